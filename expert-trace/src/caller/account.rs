//! A user, and doing things with that user's rights.

use std::{ffi::CString, fmt, io, path::PathBuf, process};

use nix::{
    errno::Errno,
    unistd::{Gid, ROOT, Uid, User, getegid, geteuid, getgrouplist, getgroups},
};

use super::CallerError;
use crate::requirements::{self, Capability};

/// A user, with all that decides about rights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The user.
    pub uid: Uid,
    /// The primary group.
    pub gid: Gid,
    /// All groups; the primary one can be among them.
    pub groups: Vec<Gid>,
    /// Login name; none when the user database does not know the user, as in many containers.
    pub name: Option<String>,
    /// Home directory.
    pub home: PathBuf,
    /// Login shell.
    pub shell: PathBuf,
}

impl Account {
    /// The account of this name, as a login would have it.
    ///
    /// # Errors
    /// When there is none, or the databases cannot be read.
    pub fn by_name(name: &str) -> Result<Self, CallerError> {
        let user =
            User::from_name(name)?.ok_or_else(|| CallerError::UnknownUser(name.to_owned()))?;
        let gid = user.gid;
        Self::of_user(user, gid)
    }

    /// The account of a user, in this primary group. A user that is not known has no name, and the
    /// home `/`.
    ///
    /// # Errors
    /// When the databases cannot be read.
    pub fn by_ids(uid: Uid, gid: Gid) -> Result<Self, CallerError> {
        match User::from_uid(uid)? {
            Some(user) => Self::of_user(user, gid),
            None => Ok(Self {
                uid,
                gid,
                groups: vec![gid],
                name: None,
                home: "/".into(),
                shell: DEFAULT_SHELL.into(),
            }),
        }
    }

    /// Our own account, with the groups that we really have.
    ///
    /// # Errors
    /// When the databases cannot be read.
    pub fn current() -> Result<Self, CallerError> {
        Ok(Self {
            groups: getgroups()?,
            ..Self::by_ids(geteuid(), getegid())?
        })
    }

    fn of_user(user: User, gid: Gid) -> Result<Self, CallerError> {
        let name = CString::new(user.name.as_bytes()).map_err(|_| Errno::EINVAL)?;
        let shell = match user.shell.as_os_str().is_empty() {
            // passwd(5)
            true => DEFAULT_SHELL.into(),
            false => user.shell,
        };
        Ok(Self {
            uid: user.uid,
            gid,
            groups: getgrouplist(&name, gid)?,
            name: Some(user.name),
            home: user.dir,
            shell,
        })
    }

    /// Does something to files with the rights of this account, and no others.
    ///
    /// Without it a user who may call us by sudo could have us write to, or replace, anybody's files
    /// through symbolic and hard links. Nothing changes for root's account, nor when we are not root.
    ///
    /// The rights are those of the calling thread alone. `/proc/self` is not accessible meanwhile: the
    /// kernel gives it to root when a process has changed its user (proc(5), `PR_SET_DUMPABLE`).
    ///
    /// # Errors
    /// Those of `f`, or that of the system when it does not let us change our rights.
    pub fn with_rights<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if !geteuid().is_root() || self.uid.is_root() {
            return f();
        }
        for needed in [Capability::SetUid, Capability::SetGid] {
            if !requirements::has(needed) {
                let missing = format!("the capability {needed} is missing, to act as {self}");
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, missing));
            }
        }
        let _restored = RootsRights {
            gid: getegid(),
            groups: getgroups()?,
        };
        assume(self.uid, self.gid, &self.groups)?;
        f()
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "user {name}"),
            None => write!(f, "user {}", self.uid),
        }
    }
}

const DEFAULT_SHELL: &str = "/bin/sh";

/// Gives root's rights back at the end of its life, also when that is a panic.
struct RootsRights {
    gid: Gid,
    groups: Vec<Gid>,
}

impl Drop for RootsRights {
    fn drop(&mut self) {
        if let Err(error) = assume(ROOT, self.gid, &self.groups) {
            // What would follow expects to be root, and could do the wrong thing as somebody else.
            say!("error: cannot become root again: {error}");
            process::abort();
        }
    }
}

/// Changes the effective ids and the groups of this thread. Its saved user stays root, so that there
/// is a way back.
///
/// glibc's functions change all threads (nptl(7)), among them those that do something else. The
/// kernel knows of threads alone.
fn assume(uid: Uid, gid: Gid, groups: &[Gid]) -> io::Result<()> {
    const UNCHANGED: u32 = u32::MAX;
    if uid.as_raw() == UNCHANGED || gid.as_raw() == UNCHANGED {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let checked = |result: libc::c_long| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let set_user = |uid: Uid| {
        // SAFETY: the call takes plain numbers.
        checked(unsafe { libc::syscall(libc::SYS_setresuid, UNCHANGED, uid.as_raw(), UNCHANGED) })
    };
    // Groups are root's to change.
    set_user(ROOT)?;
    // SAFETY: a `Gid` is transparent, and the slice has this length.
    checked(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: the call takes plain numbers.
    checked(unsafe { libc::syscall(libc::SYS_setresgid, UNCHANGED, gid.as_raw(), UNCHANGED) })?;
    set_user(uid)
}
