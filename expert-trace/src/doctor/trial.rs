//! What tracing takes, really tried: on functions of our own process, and on a child that never runs
//! anything.

use std::{io, num::NonZeroU32, path::PathBuf};

use nix::sys::wait::waitpid;

use super::report::HitCosts;
use crate::{
    attach::{AttachError, Events, Scope, Session},
    caller::{Account, CallerError, Environment},
    decode::{Body, decode},
    launch::{LaunchError, Program, Suspended},
    own_code::{CALLS, call_ns, emulated, probe, returning, single_stepped},
    probes::Hook,
};

/// Why tracing ourselves failed.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// The kernel refused the programs, or a probe.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Our own functions could not be found.
    #[error("cannot find our own code: {0}")]
    Own(#[from] io::Error),
    /// A probe is there, and its hits are not.
    #[error("of {calls} hits of a probe in our own process, {arrived} arrived")]
    Lost {
        /// Times that the function was called.
        calls: usize,
        /// Hits that were told of.
        arrived: usize,
    },
    /// The account that we are.
    #[error(transparent)]
    Caller(#[from] CallerError),
    /// A child could not wait at the gate.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A tracepoint is there, and a fork did not hit it.
    #[error("a child was forked, and the tracepoint task_newtask was not hit")]
    ForkUnseen,
}

/// Room for the records of all hits of one function.
const RING_BYTES: u32 = 256 << 10;
/// Loads the programs, sets probes in our own process, hits them, and compares what arrives.
///
/// # Errors
/// Says at which step it failed.
pub fn trace_ourselves() -> Result<HitCosts, TrialError> {
    let pid =
        NonZeroU32::new(std::process::id()).ok_or(io::Error::from(io::ErrorKind::NotFound))?;
    let (mut session, mut events) = Session::load(RING_BYTES, Scope::Process(pid))?;
    session.load_programs(Hook::ALL)?;
    let mut costs = [0.0; 3];
    // Programs that count their hits, and have nothing to say of a function that is not ggml's.
    for (number, (cost, (hook, function))) in (1..).zip(costs.iter_mut().zip([
        (Hook::WeightsFollow, emulated as extern "C" fn()),
        (Hook::WeightsFollow, single_stepped),
        (Hook::SplitDone, returning),
    ])) {
        let probe = probe(hook, number, function)?;
        let without = call_ns(function);
        session.attach(&probe)?;
        session.set_active(true)?;
        let with = call_ns(function);
        session.set_active(false)?;
        *cost = with - without;
        expect_all(usize::try_from(session.hits(&probe)?).unwrap_or(0))?;
    }
    // One that tells of each hit, which wakes us and so takes longer.
    session.attach(&probe(Hook::Libraries, 4, emulated)?)?;
    session.set_active(true)?;
    call_ns(emulated);
    session.set_active(false)?;
    expect_all(arrived(&mut events))?;
    session.detach();
    let [entry, entry_single_stepped, on_return] = costs;
    Ok(HitCosts {
        entry,
        entry_single_stepped,
        on_return,
    })
}

fn expect_all(arrived: usize) -> Result<(), TrialError> {
    match arrived {
        CALLS => Ok(()),
        arrived => Err(TrialError::Lost {
            calls: CALLS,
            arrived,
        }),
    }
}

fn arrived(events: &mut Events) -> usize {
    let mut arrived = 0;
    let mut take = |bytes: &[u8]| {
        if decode(bytes).is_ok_and(|event| matches!(event.body, Body::Libraries)) {
            arrived += 1;
        }
    };
    while !events.drain(&mut take) {}
    arrived
}

/// Attaches the tracepoints by which `run` follows forks, and forks a child, which waits at a gate as
/// those of `run` do, and never runs anything.
///
/// # Errors
/// Says what the kernel refused.
pub fn follow_a_child() -> Result<(), TrialError> {
    let (session, _events) = Session::load(RING_BYTES, Scope::FirstChild { forks: true })?;
    let account = Account::current()?;
    let path = PathBuf::from("/proc/self/exe");
    let child = Suspended::spawn(&Program {
        path: &path,
        arguments: &[],
        environment: &Environment::default(),
        account: &account,
        own_session: false,
    })?;
    let pid = child.pid();
    let first = session.first_child()?;
    // It exits when nobody can release it any more.
    drop(child);
    waitpid(pid, None).map_err(LaunchError::from)?;
    if first == 0 {
        return Err(TrialError::ForkUnseen);
    }
    Ok(())
}
