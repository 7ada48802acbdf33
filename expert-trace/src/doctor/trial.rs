//! What tracing takes, really tried: on functions of our own process, and on a child that never runs
//! anything.

use std::{
    fs, io,
    num::NonZeroU32,
    path::PathBuf,
    time::{Duration, Instant},
};

use expert_trace_common::Site;
use nix::sys::wait::waitpid;

use super::report::HitCosts;
use crate::{
    attach::{AttachError, Events, Scope, Session},
    caller::{Account, CallerError, Environment},
    decode::{Body, decode},
    launch::{LaunchError, Program, Suspended},
    probes::{FileId, Hook, Probe},
    symbols::{Definition, Table},
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
/// Calls that are timed together.
const BATCH: usize = 32;
/// Batches; the median of them is told.
const BATCHES: usize = 15;

// The first instruction decides what a probe costs, so that it is written out.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
extern "C" fn emulated() {
    std::arch::naked_asm!("push rbp", "pop rbp", "ret")
}

#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
extern "C" fn single_stepped() {
    std::arch::naked_asm!("sub rsp, 8", "add rsp, 8", "ret")
}

#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
extern "C" fn emulated() {
    std::arch::naked_asm!(
        "stp x29, x30, [sp, #-16]!",
        "ldp x29, x30, [sp], #16",
        "ret"
    )
}

/// As the first, and another function.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
extern "C" fn returning() {
    std::arch::naked_asm!("push rbx", "pop rbx", "ret")
}

#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
extern "C" fn returning() {
    std::arch::naked_asm!(
        "stp x19, x30, [sp, #-16]!",
        "ldp x19, x30, [sp], #16",
        "ret"
    )
}

#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
extern "C" fn single_stepped() {
    std::arch::naked_asm!("sub sp, sp, #16", "add sp, sp, #16", "ret")
}

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
    let mut number = 0;
    for (cost, (hook, function)) in costs.iter_mut().zip([
        (Hook::Libraries, emulated as extern "C" fn()),
        (Hook::Libraries, single_stepped),
        (Hook::SplitDone, returning),
    ]) {
        number += 1;
        let probe = probe(hook, number, function)?;
        let without = call_ns(function);
        session.attach(&probe)?;
        session.set_active(true)?;
        let with = call_ns(function);
        session.set_active(false)?;
        *cost = with - without;
        let calls = BATCH * BATCHES;
        let mut arrived = arrived(&mut events);
        // The program of the return probe counts its hits, and has nothing to say of a function that
        // is not ggml's.
        if hook == Hook::SplitDone {
            arrived = usize::try_from(session.hits(&probe)?).unwrap_or(0);
        }
        if arrived != calls {
            return Err(TrialError::Lost { calls, arrived });
        }
    }
    session.detach();
    let [entry, entry_single_stepped, on_return] = costs;
    Ok(HitCosts {
        entry,
        entry_single_stepped,
        on_return,
    })
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

/// Median time of a call, in nanoseconds.
fn call_ns(function: extern "C" fn()) -> f64 {
    let function = std::hint::black_box(function);
    let mut batches = [Duration::ZERO; BATCHES];
    for batch in &mut batches {
        let begin = Instant::now();
        for _ in 0..BATCH {
            function();
        }
        *batch = begin.elapsed();
    }
    batches.sort_unstable();
    batches[BATCHES / 2].as_nanos() as f64 / BATCH as f64
}

/// A probe on a function of ours. It is found by where it is mapped, since our own symbols can have
/// been stripped.
fn probe(hook: Hook, number: u32, function: extern "C" fn()) -> io::Result<Probe> {
    const OWN: &str = "/proc/self/exe";
    let address = function as usize as u64;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let file_offset = maps
        .lines()
        .find_map(|line| file_offset(line, address))
        .ok_or(io::ErrorKind::NotFound)?;
    Ok(Probe {
        hook,
        symbol: "a function of expert-trace",
        file: OWN.to_owned(),
        build_id: None,
        definition: Definition {
            table: Table::Symtab,
            address,
            file_offset,
            skipped: 0,
            instruction: None,
        },
        site: Site {
            source: 0,
            probe: number,
        },
        declared: None,
        file_id: FileId::default(),
        attach_path: PathBuf::from(OWN),
    })
}

/// Offset of an address in the file that a line of `/proc/PID/maps` shows there.
fn file_offset(line: &str, address: u64) -> Option<u64> {
    let mut fields = line.split(' ');
    let (from, to) = fields.next()?.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let (from, to) = (number(from)?, number(to)?);
    let offset = number(fields.nth(1)?)?;
    (from..to)
        .contains(&address)
        .then(|| offset + (address - from))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_is_that_of_the_mapping() {
        let line = "55d0c0a21000-55d0c0b00000 r-xp 00021000 fe:00 1311 /opt/llama cpp/llama-cli";
        assert_eq!(file_offset(line, 0x55d0c0a21010), Some(0x21010));
        assert_eq!(file_offset(line, 0x55d0c0b00000), None);
        assert_eq!(file_offset("nothing", 1), None);
    }

    #[test]
    fn our_functions_are_where_their_probes_sit() {
        let code = fs::read("/proc/self/exe").unwrap();
        for function in [emulated as extern "C" fn(), single_stepped, returning] {
            let place = probe(Hook::Libraries, 0, function).unwrap().definition;
            // SAFETY: the functions are at least this long.
            let loaded = unsafe { std::slice::from_raw_parts(function as *const u8, 4) };
            let start = place.file_offset as usize;
            assert_eq!(&code[start..start + 4], loaded);
        }
    }
}
