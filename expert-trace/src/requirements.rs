//! Whether this machine and this process can trace: capabilities before, kernel features when the
//! kernel has refused.
//!
//! Capabilities are looked at, not user ids: root can lack them, and others can have them. Features
//! of the kernel are found out by trying, not by its version: distributions carry newer features back
//! to older kernels. The version only explains a refusal that nothing else explains.

use std::{fmt, fs, io, path::Path};

use nix::{errno::Errno, sys::utsname::uname};
use thiserror::Error;

use crate::{
    attach,
    bpf::{self, Command, ProgLoad},
    uprobe_event::{self, Processes, UPROBE},
};

/// A capability (include/uapi/linux/capability.h), by its bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// Become another group.
    SetGid = 6,
    /// Become another user.
    SetUid = 7,
    /// Look at processes of other users.
    SysPtrace = 19,
    /// Set uprobes by perf events, filter system calls; holds what the two below do, too.
    SysAdmin = 21,
    /// Load tracing programs.
    Perfmon = 38,
    /// Make maps and load programs.
    Bpf = 39,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Capability::SetGid => "CAP_SETGID",
            Capability::SetUid => "CAP_SETUID",
            Capability::SysPtrace => "CAP_SYS_PTRACE",
            Capability::SysAdmin => "CAP_SYS_ADMIN",
            Capability::Perfmon => "CAP_PERFMON",
            Capability::Bpf => "CAP_BPF",
        })
    }
}

/// What is going to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Attach to a process. Whether we may look at it is a matter of the process.
    Attach,
    /// Start a program as the user we are.
    Run,
    /// Start a program as another user than we are.
    RunAsOther,
}

/// What this machine or this process lacks.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Unmet {
    /// Capabilities.
    #[error(
        "expert-trace needs {} to load BPF programs and set uprobes{}; run it with sudo",
        list(.missing),
        match .purpose {
            Purpose::Attach => "",
            Purpose::Run => " in whatever a program loads",
            Purpose::RunAsOther => {
                " in whatever a program loads, and to start it as another user"
            }
        }
    )]
    Capabilities {
        /// Those that are missing.
        missing: Vec<Capability>,
        /// For what.
        purpose: Purpose,
    },
    /// Uprobes.
    #[error(
        "{UPROBE} does not exist: the kernel has no uprobes (CONFIG_UPROBE_EVENTS), or /sys is not \
         mounted here; use a kernel that has them, and run expert-trace where /sys is mounted"
    )]
    Uprobes,
    /// `/proc` tells of other processes than those that have our numbers: `unshare --pid` without
    /// `--mount-proc`, `nsenter --pid` without `--mount`.
    #[error(
        "/proc is that of another PID namespace than expert-trace runs in, so that its numbers mean \
         other processes; mount the right one (mount -t proc proc /proc), or run expert-trace outside"
    )]
    Proc,
    /// The system call.
    #[error(
        "the kernel has no bpf() system call (CONFIG_BPF_SYSCALL), or a container's seccomp filter \
         hides it: use a kernel that has it, and run expert-trace outside of the container"
    )]
    Bpf,
    /// The map that events arrive by.
    #[error(
        "the kernel refused a BPF ring buffer ({0}), which it has since Linux 5.8: \
         expert-trace needs Linux 5.17 or newer"
    )]
    RingBuffer(Errno),
    /// Its version.
    #[error("this is Linux {0}, and expert-trace needs Linux 5.17 or newer")]
    Kernel(String),
    /// Lockdown.
    #[error(
        "the kernel forbids BPF programs although the capabilities are there: it is locked down for \
         confidentiality ({LOCKDOWN}); start the machine without lockdown=confidentiality"
    )]
    Lockdown,
    /// The capabilities are those of a user namespace.
    #[error(
        "the kernel forbids BPF programs: the capabilities count only inside this user namespace (a \
         rootless container); run expert-trace on the host, with sudo"
    )]
    UserNamespace,
    /// Something else forbids it.
    #[error(
        "the kernel forbids BPF programs although the capabilities are there: a seccomp filter (of a \
         container) or a security module does; run expert-trace on the host"
    )]
    Forbidden,
}

fn list(capabilities: &[Capability]) -> String {
    let names: Vec<String> = capabilities.iter().map(ToString::to_string).collect();
    match names.as_slice() {
        [others @ .., last] if !others.is_empty() => {
            format!(
                "the capabilities {} and {last}, which are missing,",
                others.join(", ")
            )
        }
        names => format!("the capability {}, which is missing,", names.concat()),
    }
}

const LOCKDOWN: &str = "/sys/kernel/security/lockdown";
/// bpf_loop.
const OLDEST: (u32, u32) = (5, 17);

/// Looks whether we have what tracing takes, before anything is begun.
///
/// # Errors
/// Says what is missing.
pub fn check(purpose: Purpose) -> Result<(), Unmet> {
    let unmet = missing_capabilities(purpose)
        .or_else(no_uprobes)
        .or_else(foreign_proc);
    match unmet {
        Some(unmet) => Err(unmet),
        None => Ok(()),
    }
}

/// Capabilities that we lack.
pub fn missing_capabilities(purpose: Purpose) -> Option<Unmet> {
    let missing = missing(purpose, effective(), || {
        attach::has_uprobe_multi() || perf_event_is_permitted()
    });
    (!missing.is_empty()).then_some(Unmet::Capabilities { missing, purpose })
}

/// A kernel, or a place in it, without uprobes.
pub fn no_uprobes() -> Option<Unmet> {
    (!Path::new(UPROBE).exists()).then_some(Unmet::Uprobes)
}

/// A `/proc` that tells of other processes than those that have our numbers.
pub fn foreign_proc() -> Option<Unmet> {
    // Where there is none at all, other messages say what it was needed for.
    let own = fs::read_link("/proc/self").unwrap_or_default();
    let is_ours = own.as_os_str() == std::process::id().to_string().as_str();
    (!is_ours && Path::new("/proc/version").exists()).then_some(Unmet::Proc)
}

/// The lockdown that is in force, which the kernel shows in brackets; none where it shows nothing.
pub fn lockdown() -> Option<String> {
    let modes = fs::read_to_string(LOCKDOWN).ok()?;
    let (_, mode) = modes.split_once('[')?;
    Some(mode.split_once(']')?.0.to_owned())
}

/// Whether we have a capability.
pub fn has(capability: Capability) -> bool {
    holds(effective(), capability)
}

/// The least that is missing. CAP_SYS_ADMIN alone is enough for tracing, since the kernel takes it
/// for the two finer ones (`bpf_capable` and `perfmon_capable` in include/linux/capability.h). Those
/// two are enough to attach where the kernel lets them set uprobes; the filter of the
/// [gate](crate::gate) takes CAP_SYS_ADMIN itself (`seccomp_prepare_filter` in kernel/seccomp.c).
fn missing(
    purpose: Purpose,
    effective: u64,
    uprobe_is_permitted: impl FnOnce() -> bool,
) -> Vec<Capability> {
    let has = |capability: &Capability| holds(effective, *capability);
    let fine = || [Capability::Bpf, Capability::Perfmon].iter().all(has);
    let mut missing = Vec::new();
    let attaches = purpose == Purpose::Attach;
    let can_trace = has(&Capability::SysAdmin) || (attaches && fine() && uprobe_is_permitted());
    if !can_trace {
        missing.push(Capability::SysAdmin);
    }
    if purpose == Purpose::RunAsOther {
        let other_user = [
            Capability::SetUid,
            Capability::SetGid,
            Capability::SysPtrace,
        ];
        missing.extend(other_user.iter().filter(|capability| !has(capability)));
    }
    missing
}

fn holds(set: u64, capability: Capability) -> bool {
    set & (1 << capability as u32) != 0
}

fn effective() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .unwrap_or_default();
    u64::from_str_radix(line.trim(), 16).unwrap_or(0)
}

/// Asks for a uprobe by a perf event that names no file. Linux 6.18 has nobody but CAP_SYS_ADMIN make
/// one. Who may not have one is told so before the file is looked for (`perf_uprobe_event_init` in
/// kernel/events/core.c). Without uprobes no capability is to blame.
fn perf_event_is_permitted() -> bool {
    let event = uprobe_event::open(c"", 0, false, Processes::One(0));
    let refused = event.err().and_then(|error| error.raw_os_error());
    !matches!(refused, Some(libc::EACCES | libc::EPERM))
}

/// What a refusal was seen with.
#[derive(Debug)]
struct Refusal {
    /// Why the kernel makes no simple map.
    map: Option<Errno>,
    /// Why it makes no ring buffer.
    ring: Option<Errno>,
    /// Why it loads no program that does nothing. aya's own error does not tell: it takes a refusal
    /// for a missing feature, and then fails for lack of that.
    program: Option<Errno>,
    /// An error for want of permission is behind it.
    forbidden: bool,
    lockdown: String,
    user_namespace: bool,
    release: String,
}

/// What is behind a refusal of our BPF programs by the kernel, where that can be found out.
pub fn behind(refusal: &(dyn std::error::Error + 'static)) -> Option<Unmet> {
    cause(&Refusal {
        map: map_error(BPF_MAP_TYPE_ARRAY),
        ring: map_error(BPF_MAP_TYPE_RINGBUF),
        program: program_error(),
        forbidden: is_forbidden(refusal),
        lockdown: fs::read_to_string(LOCKDOWN).unwrap_or_default(),
        user_namespace: in_user_namespace(),
        release: release(),
    })
}

/// Our kernel's version, when it is too old for what it has refused.
pub fn old_kernel() -> Option<Unmet> {
    let release = release();
    (version(&release)? < OLDEST).then_some(Unmet::Kernel(release))
}

/// Whether our kernel's version is this one or a newer one; `false` when it does not tell.
pub fn kernel_is_at_least(oldest: (u32, u32)) -> bool {
    version(&release()).is_some_and(|version| version >= oldest)
}

/// Release of the running kernel.
pub fn release() -> String {
    let name = uname();
    name.map_or_else(
        |_| String::new(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

fn cause(refusal: &Refusal) -> Option<Unmet> {
    let Refusal {
        map,
        ring,
        program,
        forbidden,
        lockdown,
        user_namespace,
        release,
    } = refusal;
    let is_forbidden = *forbidden
        || [map, program]
            .iter()
            .any(|error| matches!(error, Some(Errno::EPERM | Errno::EACCES)));
    match (map, ring) {
        (Some(Errno::ENOSYS), _) => Some(Unmet::Bpf),
        _ if is_forbidden && *user_namespace => Some(Unmet::UserNamespace),
        _ if is_forbidden && lockdown.contains("[confidentiality]") => Some(Unmet::Lockdown),
        _ if is_forbidden => Some(Unmet::Forbidden),
        (None, Some(error)) => Some(Unmet::RingBuffer(*error)),
        _ if version(release)? < OLDEST => Some(Unmet::Kernel(release.clone())),
        _ => None,
    }
}

fn is_forbidden(error: &(dyn std::error::Error + 'static)) -> bool {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)))
}

/// The initial user namespace maps all ids to themselves (kernel/user.c).
fn in_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let numbers: Vec<&str> = map.split_whitespace().collect();
    !map.is_empty() && numbers != ["0", "0", "4294967295"]
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

/// include/uapi/linux/bpf.h
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_RINGBUF: u32 = 27;

/// Tries to make a map, and gives the error.
fn map_error(kind: u32) -> Option<Errno> {
    /// Start of `bpf_attr` for BPF_MAP_CREATE.
    #[repr(C)]
    struct Attributes {
        kind: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    // A ring buffer has no keys; its size is a power of two, and whole pages of any size that there is.
    let (key_size, value_size, max_entries) = match kind {
        BPF_MAP_TYPE_RINGBUF => (0, 0, 64 << 10),
        _ => (4, 4, 1),
    };
    let attributes = Attributes {
        kind,
        key_size,
        value_size,
        max_entries,
    };
    // SAFETY: the attributes are complete.
    unsafe { bpf::descriptor(Command::MapCreate, &attributes) }.err()
}

/// Tries to load a program that does nothing, and gives the error.
fn program_error() -> Option<Errno> {
    // SAFETY: the attributes are complete.
    unsafe { bpf::descriptor(Command::ProgLoad, &ProgLoad::nothing()) }.err()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(capabilities: &[Capability]) -> u64 {
        capabilities.iter().map(|c| 1 << *c as u32).sum()
    }

    #[test]
    fn no_more_than_needed_is_missing() {
        use Capability::{Bpf, Perfmon, SetGid, SetUid, SysAdmin, SysPtrace};
        for (purpose, have, permitted, expected) in [
            (Purpose::Attach, &[SysAdmin][..], false, &[][..]),
            (Purpose::Run, &[SysAdmin], false, &[]),
            (Purpose::Attach, &[Bpf, Perfmon], true, &[]),
            (Purpose::Run, &[Bpf, Perfmon], true, &[SysAdmin]),
            (Purpose::Attach, &[Bpf, Perfmon], false, &[SysAdmin]),
            (Purpose::Attach, &[Bpf], true, &[SysAdmin]),
            (Purpose::Attach, &[], true, &[SysAdmin]),
            (
                Purpose::RunAsOther,
                &[SysAdmin],
                false,
                &[SetUid, SetGid, SysPtrace],
            ),
            (
                Purpose::RunAsOther,
                &[SetUid, SetGid],
                false,
                &[SysAdmin, SysPtrace],
            ),
        ] {
            let missing = missing(purpose, set(have), || permitted);
            assert_eq!(missing, expected, "{purpose:?} with {have:?}");
        }
    }

    #[test]
    fn every_missing_capability_is_named() {
        let unmet = |missing: &[Capability], purpose| {
            let missing = missing.to_vec();
            Unmet::Capabilities { missing, purpose }.to_string()
        };
        assert_eq!(
            unmet(&[Capability::SysAdmin], Purpose::Attach),
            "expert-trace needs the capability CAP_SYS_ADMIN, which is missing, to load BPF programs \
             and set uprobes; run it with sudo"
        );
        assert_eq!(
            unmet(
                &[Capability::SysAdmin, Capability::SetUid, Capability::SetGid],
                Purpose::RunAsOther
            ),
            "expert-trace needs the capabilities CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID, which are \
             missing, to load BPF programs and set uprobes in whatever a program loads, and to start \
             it as another user; run it with sudo"
        );
    }

    #[test]
    fn what_is_behind_a_refusal() {
        let plain = || Refusal {
            map: None,
            ring: None,
            program: None,
            forbidden: false,
            lockdown: "none [integrity] confidentiality".to_owned(),
            user_namespace: false,
            release: "6.18.4-generic".to_owned(),
        };
        assert_eq!(cause(&plain()), None);
        let mut refusal = plain();
        refusal.release = "5.16.20-200.fc35".to_owned();
        assert_eq!(
            cause(&refusal),
            Some(Unmet::Kernel("5.16.20-200.fc35".to_owned()))
        );
        refusal.ring = Some(Errno::EINVAL);
        assert_eq!(cause(&refusal), Some(Unmet::RingBuffer(Errno::EINVAL)));
        refusal.forbidden = true;
        assert_eq!(cause(&refusal), Some(Unmet::Forbidden));
        (refusal.forbidden, refusal.program) = (false, Some(Errno::EPERM));
        assert_eq!(cause(&refusal), Some(Unmet::Forbidden));
        refusal.lockdown = "none integrity [confidentiality]".to_owned();
        assert_eq!(cause(&refusal), Some(Unmet::Lockdown));
        refusal.user_namespace = true;
        assert_eq!(cause(&refusal), Some(Unmet::UserNamespace));
        refusal.map = Some(Errno::ENOSYS);
        assert_eq!(cause(&refusal), Some(Unmet::Bpf));
        // A map that is refused for another reason says nothing of ring buffers.
        let mut refusal = plain();
        (refusal.map, refusal.ring) = (Some(Errno::ENOMEM), Some(Errno::ENOMEM));
        assert_eq!(cause(&refusal), None);
    }

    #[test]
    fn versions() {
        assert_eq!(version("5.17.0-1-amd64"), Some((5, 17)));
        assert_eq!(version("6.18-rc1"), Some((6, 18)));
        assert!(version("5.9.1").unwrap() < OLDEST);
        assert_eq!(version("Linux"), None);
    }

    #[test]
    fn permission_is_found_in_a_chain_of_errors() {
        #[derive(Debug, Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        let error = |number| Outer(io::Error::from_raw_os_error(number));
        assert!(is_forbidden(&error(libc::EPERM)));
        assert!(!is_forbidden(&error(libc::EINVAL)));
    }
}
