//! Who called us, and whose program `run` starts.
//!
//! Probes need root, and llama.cpp does not: under sudo the program runs as the user who called it,
//! with that user's environment, and files are written with that user's rights. So `sudo expert-trace
//! run -- X` finds the models, caches and libraries that `X` alone finds, and gives nobody a right
//! over files that they have not.

mod account;
mod environment;

use std::{ffi::OsString, fs, io, os::unix::ffi::OsStrExt as _, path::Path, process};

use nix::{
    errno::Errno,
    unistd::{Gid, Uid, geteuid, getuid},
};
use thiserror::Error;

use self::environment::merge;
pub use self::{account::Account, environment::Environment};

/// Why the caller, or the account of a program, is not known.
#[derive(Debug, Error)]
pub enum CallerError {
    /// No account of that name.
    #[error("there is no user {0}; `getent passwd` lists those that there are")]
    UnknownUser(String),
    /// Only root can become somebody else.
    #[error(
        "only root can start a program as {0}: call expert-trace with sudo, or leave --user out"
    )]
    NotRoot(String),
    /// Something else than sudo has set the variable.
    #[error("{name} is {value:?}, which is no id; unset it, or call expert-trace with sudo itself")]
    BadId {
        /// The variable.
        name: &'static str,
        /// What it says.
        value: OsString,
    },
    /// The program has been installed set-user-ID.
    #[error(
        "expert-trace is installed set-user-ID, which would make everybody root; \
         take that bit away (chmod u-s), and call it with sudo"
    )]
    SetUserId,
    /// The user or group database, or the kernel, refused.
    #[error("cannot look up accounts: {0}")]
    System(#[from] Errno),
}

/// Who called us.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The user who called sudo, or else who we are.
    pub account: Account,
    /// That user's environment.
    pub environment: Environment,
    /// A sentence for the user when the environment is not what it should be.
    pub notice: Option<String>,
}

impl Caller {
    /// Finds out.
    ///
    /// # Errors
    /// When sudo's variables hold no ids, or the user database cannot be read.
    pub fn detect() -> Result<Self, CallerError> {
        if getuid() != geteuid() {
            return Err(CallerError::SetUserId);
        }
        let own = Environment::current();
        // Without root's real id nobody has called us by sudo to be root, and the variables could be
        // anybody's.
        if !getuid().is_root() || own.get("SUDO_UID").is_none() {
            return Ok(Self {
                account: Account::current()?,
                environment: own,
                notice: None,
            });
        }
        let uid = Uid::from_raw(id(&own, "SUDO_UID")?);
        let gid = Gid::from_raw(id(&own, "SUDO_GID")?);
        let account = Account::by_ids(uid, gid)?;
        let (environment, notice) = match invokers_environment() {
            Ok(invoker) => (merge(invoker, &own, &account), None),
            Err(error) => {
                let mut environment = own;
                environment.adapt(&account);
                let notice = format!(
                    "cannot read the environment that sudo was called with ({error}): \
                     the program gets what sudo has left of it, and --env adds to that"
                );
                (environment, Some(notice))
            }
        };
        Ok(Self {
            account,
            environment,
            notice,
        })
    }

    /// The account and environment of the program that we start: the caller's; or those of `user`
    /// (`--user`), which gets our environment rather than the caller's, as from `sudo -u`. Then
    /// `variables` (`--env`) are set.
    ///
    /// # Errors
    /// When there is no such user, or we are not root and it is somebody else.
    pub fn program(
        &self,
        user: Option<&str>,
        variables: &[(OsString, OsString)],
    ) -> Result<(Account, Environment), CallerError> {
        let other = match user {
            Some(name) => Some(Account::by_name(name)?).filter(|user| user.uid != self.account.uid),
            None => None,
        };
        let (account, mut environment) = match other {
            None => (self.account.clone(), self.environment.clone()),
            Some(other) if geteuid().is_root() => {
                let mut environment = Environment::current();
                environment.adapt(&other);
                (other, environment)
            }
            Some(other) => return Err(CallerError::NotRoot(other.name.unwrap_or_default())),
        };
        for (name, value) in variables {
            environment.set(name, value);
        }
        Ok((account, environment))
    }
}

/// An id that sudo has left in a variable.
fn id(environment: &Environment, name: &'static str) -> Result<u32, CallerError> {
    let value = environment.get(name).unwrap_or_default();
    value
        .to_str()
        .and_then(|text| text.parse().ok())
        // The largest number means "none" to the kernel.
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| CallerError::BadId {
            name,
            value: value.to_owned(),
        })
}

/// File names of sudo: the original one also has its own where sudo-rs is the default.
const SUDO_NAMES: [&str; 3] = ["sudo", "sudo-rs", "sudo.ws"];

/// So far up is sudo looked for: it is our parent, or there is a shell or two between us.
const MAX_ANCESTORS: usize = 16;

/// The environment that sudo was called with.
///
/// sudo hands on a part of it, yet its process waits for us and still has all on its stack, where
/// `/proc/PID/environ` reads it: also what the dynamic linker has taken from a set-user-ID program,
/// such as `LD_LIBRARY_PATH`.
fn invokers_environment() -> io::Result<Environment> {
    let mut pid = process::id();
    for _ in 0..MAX_ANCESTORS {
        pid = parse_parent(&fs::read(format!("/proc/{pid}/stat"))?)
            .ok_or(io::ErrorKind::InvalidData)?;
        if pid == 0 {
            break;
        }
        if is_sudo(pid) {
            return Ok(Environment::parse(&fs::read(format!(
                "/proc/{pid}/environ"
            ))?));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "its process is not there",
    ))
}

/// Whether this is sudo, and not something of the user's that is called so: only root's has root's
/// effective id.
fn is_sudo(pid: u32) -> bool {
    let named_so = fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| names_sudo(&exe));
    named_so
        && fs::read(format!("/proc/{pid}/status"))
            .is_ok_and(|status| parse_effective_uid(&status) == Some(0))
}

fn names_sudo(exe: &Path) -> bool {
    let name = exe.file_name().unwrap_or_default().as_bytes();
    // The kernel says so of a file that an upgrade has replaced (d_path).
    let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    SUDO_NAMES.iter().any(|sudo| name == sudo.as_bytes())
}

/// Parent in `/proc/PID/stat`: `pid (name) state ppid ...`, where the name can hold anything
/// (fs/proc/array.c, `do_task_stat`).
fn parse_parent(stat: &[u8]) -> Option<u32> {
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(&stat[end_of_name + 1..]).ok()?;
    rest.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The second of real, effective, saved and file system id in `/proc/PID/status` (fs/proc/array.c,
/// `task_state`). The name in its first line cannot hold a line's end.
fn parse_effective_uid(status: &[u8]) -> Option<u32> {
    let line = status
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"Uid:"))?;
    let mut ids = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    ids.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests;
