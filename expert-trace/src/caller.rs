//! Who called us, and whose program `run` starts.
//!
//! Probes need root, and llama.cpp does not: under sudo the program runs as the user who called it,
//! with that user's environment, and files are written with that user's rights. So `sudo expert-trace
//! run -- X` finds the models, caches and libraries that `X` alone finds, and gives nobody a right
//! over files that they have not.

use std::{
    env,
    ffi::{CString, OsStr, OsString},
    fmt, fs, io,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
    process,
};

use nix::{
    errno::Errno,
    unistd::{Gid, ROOT, Uid, User, getegid, geteuid, getgrouplist, getgroups, getuid},
};
use thiserror::Error;

use crate::requirements::{self, Capability};

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

/// Variables of a process, each once, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment(Vec<(OsString, OsString)>);

impl Environment {
    /// Our own.
    pub fn current() -> Self {
        env::vars_os().collect()
    }

    /// Reads `/proc/PID/environ`. Entries without a name or a `=` are not variables.
    pub fn parse(bytes: &[u8]) -> Self {
        bytes
            .split(|byte| *byte == 0)
            .filter_map(|entry| {
                let end = entry.iter().position(|byte| *byte == b'=')?;
                let part = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
                (end > 0).then(|| (part(&entry[..end]), part(&entry[end + 1..])))
            })
            .collect()
    }

    /// Value of a variable.
    pub fn get(&self, name: impl AsRef<OsStr>) -> Option<&OsStr> {
        self.iter()
            .find(|(known, _)| *known == name.as_ref())
            .map(|(_, value)| value)
    }

    /// Sets a variable, in its place if it is there.
    pub fn set(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) {
        let (name, value) = (name.into(), value.into());
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }

    /// Removes a variable.
    pub fn remove(&mut self, name: impl AsRef<OsStr>) {
        self.0.retain(|(known, _)| known != name.as_ref());
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&OsStr, &OsStr)> {
        self.0
            .iter()
            .map(|(name, value)| (name.as_os_str(), value.as_os_str()))
    }

    /// `NAME=VALUE`, as exec wants them.
    pub fn entries(&self) -> impl Iterator<Item = Vec<u8>> {
        self.iter()
            .map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat())
    }

    /// Makes what is another user's environment fit for this account, as `sudo -u` does.
    fn adapt(&mut self, account: &Account) {
        self.0.retain(|(name, _)| {
            !name.as_bytes().starts_with(SUDOS_OWN) && !OF_ANOTHER_USER.iter().any(|of| name == of)
        });
        self.set("HOME", &account.home);
        self.set("SHELL", &account.shell);
        if let Some(name) = &account.name {
            self.set("USER", name);
            self.set("LOGNAME", name);
        }
    }
}

/// The first of several variables of one name wins, as it does with getenv(3).
impl FromIterator<(OsString, OsString)> for Environment {
    fn from_iter<I: IntoIterator<Item = (OsString, OsString)>>(variables: I) -> Self {
        let mut environment = Self::default();
        for (name, value) in variables {
            if environment.get(&name).is_none() {
                environment.0.push((name, value));
            }
        }
        environment
    }
}

/// Start of the names of variables with which sudo says who called it.
const SUDOS_OWN: &[u8] = b"SUDO_";

/// Variables that tell of a user, and are wrong for another one.
const OF_ANOTHER_USER: [&str; 5] = ["USER", "LOGNAME", "USERNAME", "MAIL", "XDG_RUNTIME_DIR"];

/// Variables that are not the user's doing when they differ from what sudo was called with.
const NOT_ON_PURPOSE: [&str; 17] = [
    // Set for the target user: sudoers(5), "Command environment", env_reset.
    "HOME",
    "LOGNAME",
    "MAIL",
    "SHELL",
    "USER",
    "USERNAME",
    // Replaced by secure_path.
    "PATH",
    // Set to `unknown` when there is none.
    "TERM",
    // Set by pam_systemd(8), which sudo calls as any PAM application does.
    "XDG_RUNTIME_DIR",
    "XDG_SEAT",
    "XDG_SESSION_CLASS",
    "XDG_SESSION_ID",
    "XDG_SESSION_TYPE",
    "XDG_VTNR",
    // Set by root's shell when that lies between sudo and us (`sudo -i`, `sudo sh -c`).
    "LS_COLORS",
    "SHLVL",
    "_",
];

fn set_on_purpose(name: &OsStr) -> bool {
    !name.as_bytes().starts_with(SUDOS_OWN) && !NOT_ON_PURPOSE.iter().any(|other| name == *other)
}

/// The environment that the user meant who called sudo: the one sudo was called with, and on top of it
/// what `sudo NAME=VALUE` or `sudo env NAME=VALUE` has set for us.
fn merge(invoker: Environment, own: &Environment, account: &Account) -> Environment {
    let mut merged = invoker;
    for (name, value) in own.iter().filter(|(name, _)| set_on_purpose(name)) {
        merged.set(name, value);
    }
    if merged.get("HOME").is_none() {
        merged.set("HOME", &account.home);
    }
    merged
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
mod tests {
    use super::*;
    use std::{
        os::unix::fs::{MetadataExt as _, chown},
        panic::{AssertUnwindSafe, catch_unwind},
        process::Command,
    };

    /// An id that no user database knows.
    const STRANGER: u32 = 54321;

    fn stranger() -> Account {
        Account::by_ids(Uid::from_raw(STRANGER), Gid::from_raw(STRANGER + 1)).unwrap()
    }

    fn environment(text: &str) -> Environment {
        Environment::parse(text.replace(' ', "\0").as_bytes())
    }

    fn text(environment: &Environment) -> String {
        let entries: Vec<_> = environment
            .entries()
            .map(|entry| String::from_utf8(entry).unwrap())
            .collect();
        entries.join(" ")
    }

    fn needs_root() -> bool {
        let root = geteuid().is_root();
        if !root {
            eprintln!("not tested: needs root");
        }
        root
    }

    #[test]
    fn accounts() {
        let root = Account::by_name("root").unwrap();
        assert_eq!((root.uid, root.gid), (ROOT, Gid::from_raw(0)));
        assert_eq!(root.name.as_deref(), Some("root"));
        assert!(root.groups.contains(&root.gid));
        assert_eq!(root.home, Path::new("/root"));
        assert_eq!(Account::by_ids(root.uid, root.gid).unwrap(), root);

        let stranger = stranger();
        assert_eq!(stranger.name, None);
        assert_eq!(stranger.home, Path::new("/"));
        assert_eq!(stranger.groups, [stranger.gid]);

        let current = Account::current().unwrap();
        assert_eq!((current.uid, current.gid), (geteuid(), getegid()));

        let error = Account::by_name("no-such-user").unwrap_err();
        assert!(error.to_string().contains("no-such-user"), "{error}");
    }

    #[test]
    fn rights_are_lent_and_given_back() {
        if !needs_root() {
            return;
        }
        let account = stranger();
        let before = (geteuid(), getegid(), getgroups().unwrap());
        let directory = tempfile::tempdir().unwrap();
        chown(directory.path(), Some(STRANGER), None).unwrap();
        let secret = tempfile::NamedTempFile::new().unwrap();

        let during = account
            .with_rights(|| {
                let refused = fs::read(secret.path()).unwrap_err();
                assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
                fs::write(directory.path().join("file"), "")?;
                Ok((geteuid(), getegid(), getgroups()?))
            })
            .unwrap();
        assert_eq!(during, (account.uid, account.gid, account.groups.clone()));
        let file = fs::metadata(directory.path().join("file")).unwrap();
        assert_eq!((file.uid(), file.gid()), (STRANGER, STRANGER + 1));
        let now = || (geteuid(), getegid(), getgroups().unwrap());
        assert_eq!(now(), before);
        fs::read(secret.path()).unwrap();

        let panics =
            AssertUnwindSafe(|| account.with_rights(|| -> io::Result<()> { panic!("meant") }));
        catch_unwind(panics).unwrap_err();
        assert_eq!(now(), before);
        account
            .with_rights(|| -> io::Result<()> { Err(io::ErrorKind::Other.into()) })
            .unwrap_err();
        assert_eq!(now(), before);
    }

    #[test]
    fn rights_of_other_threads_stay() {
        if !needs_root() {
            return;
        }
        let (ask, asked) = std::sync::mpsc::channel();
        let (answer, answered) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            asked.recv().unwrap();
            answer.send(geteuid()).unwrap();
        });
        let other = stranger().with_rights(|| {
            ask.send(()).unwrap();
            Ok(answered.recv().unwrap())
        });
        assert_eq!(other.unwrap(), ROOT);
    }

    #[test]
    fn the_id_that_means_unchanged_is_refused() {
        if !needs_root() {
            return;
        }
        for (uid, gid) in [(u32::MAX, 1), (1, u32::MAX)] {
            let account = Account {
                uid: Uid::from_raw(uid),
                gid: Gid::from_raw(gid),
                ..stranger()
            };
            let result = account.with_rights(|| Ok(()));
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn environments() {
        let mut environment = Environment::parse(b"A=1\0=x\0odd\0\0B=a=b\0A=2\0C=\0D=\xff");
        assert_eq!(environment.get("A"), Some(OsStr::new("1")));
        assert_eq!(environment.get("B"), Some(OsStr::new("a=b")));
        assert_eq!(environment.get("C"), Some(OsStr::new("")));
        assert_eq!(environment.get("D"), Some(OsStr::from_bytes(b"\xff")));
        assert_eq!(environment.get("odd"), None);
        environment.remove("D");
        environment.set("A", "3");
        environment.set("E", "4");
        assert_eq!(text(&environment), "A=3 B=a=b C= E=4");
        assert_eq!(Environment::parse(b""), Environment::default());
    }

    #[test]
    fn what_was_set_on_purpose_goes_on_top() {
        let table = [
            // invoker's, ours, the program's
            ("HOME=/h A=1", "", "HOME=/h A=1"),
            ("HOME=/h A=1", "A=2 B=3", "HOME=/h A=2 B=3"),
            (
                "HOME=/h PATH=/p USER=u TERM=t SUDO_UID=7",
                "HOME=/root PATH=/s USER=root TERM=unknown MAIL=m LOGNAME=root SUDO_UID=1 SUDO_X=2",
                "HOME=/h PATH=/p USER=u TERM=t SUDO_UID=7",
            ),
            ("A=1", "HOME=/root", "A=1 HOME=/"),
            (
                "HOME=/h PWD=/a SHLVL=2 _=sudo",
                "PWD=/b SHLVL=1 _=expert-trace",
                "HOME=/h PWD=/b SHLVL=2 _=sudo",
            ),
            (
                "HOME=/h LD_LIBRARY_PATH=/l XDG_RUNTIME_DIR=/run/user/1",
                "XDG_RUNTIME_DIR=/run/user/0",
                "HOME=/h LD_LIBRARY_PATH=/l XDG_RUNTIME_DIR=/run/user/1",
            ),
        ];
        for (invoker, own, expected) in table {
            let merged = merge(environment(invoker), &environment(own), &stranger());
            assert_eq!(text(&merged), expected);
        }
    }

    #[test]
    fn another_users_environment_is_adapted() {
        let own = "USER=root A=1 HOME=/root MAIL=m SUDO_UID=1 XDG_RUNTIME_DIR=/run/user/0 PATH=/p";
        let mut nameless = environment(own);
        nameless.adapt(&stranger());
        assert_eq!(text(&nameless), "A=1 HOME=/ PATH=/p SHELL=/bin/sh");
        let mut named = environment(own);
        named.adapt(&Account {
            name: Some("alice".to_owned()),
            home: "/home/alice".into(),
            shell: "/bin/zsh".into(),
            ..stranger()
        });
        assert_eq!(
            text(&named),
            "A=1 HOME=/home/alice PATH=/p SHELL=/bin/zsh USER=alice LOGNAME=alice"
        );
    }

    #[test]
    fn ids() {
        let read = |text| id(&environment(text), "SUDO_UID").map_err(|error| error.to_string());
        assert_eq!(read("SUDO_UID=0"), Ok(0));
        assert_eq!(read("SUDO_UID=1000"), Ok(1000));
        for text in [
            "",
            "SUDO_UID=",
            "SUDO_UID=-1",
            "SUDO_UID=4294967295",
            "SUDO_UID=me",
        ] {
            assert!(read(text).unwrap_err().contains("SUDO_UID"), "{text}");
        }
    }

    #[test]
    fn lines_of_proc() {
        assert_eq!(parse_parent(b"7 (sudo) S 3 7 7 0"), Some(3));
        assert_eq!(parse_parent(b"7 (a) R 9 (b)) S 3 7 7 0"), Some(3));
        assert_eq!(parse_parent(b"7 (sudo"), None);
        assert_eq!(parse_parent(b""), None);
        let status = b"Name:\tUid:\nUmask:\t0022\nUid:\t1000\t0\t0\t0\nGid:\t1\t2\t3\t4\n";
        assert_eq!(parse_effective_uid(status), Some(0));
        assert_eq!(parse_effective_uid(b"Uid:\t1000\n"), None);
        for (exe, expected) in [
            ("/usr/bin/sudo", true),
            ("/usr/bin/sudo (deleted)", true),
            ("/usr/bin/sudo-rs", true),
            ("/usr/bin/sudoedit-like", false),
            ("/sudo/bash", false),
            ("/", false),
        ] {
            assert_eq!(names_sudo(Path::new(exe)), expected, "{exe}");
        }
    }

    #[test]
    fn the_programs_account() {
        let caller = Caller {
            account: stranger(),
            environment: environment("A=1"),
            notice: None,
        };
        let variables = [("A".into(), "2".into()), ("B".into(), "3".into())];
        let (account, its) = caller.program(None, &variables).unwrap();
        assert_eq!((account, text(&its)), (stranger(), "A=2 B=3".to_owned()));

        let error = caller.program(Some("no-such-user"), &[]).unwrap_err();
        assert!(error.to_string().contains("no-such-user"), "{error}");

        let result = caller.program(Some("root"), &variables);
        if geteuid().is_root() {
            let (account, its) = result.unwrap();
            assert_eq!(account.uid, ROOT);
            assert_eq!(its.get("HOME"), Some(OsStr::new("/root")));
            assert_eq!(its.get("PATH"), env::var_os("PATH").as_deref());
            assert_eq!(its.get("A"), Some(OsStr::new("2")));
        } else {
            let error = result.unwrap_err().to_string();
            assert!(
                error.contains("only root") && error.contains("--user"),
                "{error}"
            );
        }
    }

    /// Runs itself as a child of a shell that is called `sudo`.
    #[test]
    fn the_environment_of_sudo_is_found() {
        const CHILD: &str = "EXPERT_TRACE_TEST_CHILD";
        if env::var_os(CHILD).is_some() {
            let caller = Caller::detect().unwrap();
            println!("caller: {} {:?}", text(&caller.environment), caller.account);
            println!("notice: {:?}", caller.notice);
            return;
        }
        if !needs_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let call = |shell: &str| {
            let program = directory.path().join(shell);
            fs::copy("/bin/sh", &program).unwrap();
            let output = Command::new(program)
                .env_clear()
                .envs([("HOME", "/h"), ("A", "1"), ("USER", "alice")])
                .arg("-c")
                .arg(format!(
                    "/usr/bin/env -i {CHILD}=1 SUDO_UID={STRANGER} SUDO_GID=1 HOME=/root B=2 \"$0\" \
                     --exact caller::tests::the_environment_of_sudo_is_found --nocapture; exit $?"
                ))
                .arg(env::current_exe().unwrap())
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let found = call("sudo");
        assert!(found.contains("A=1 "), "{found}");
        assert!(
            found.contains("HOME=/h ") && found.contains("USER=alice "),
            "{found}"
        );
        assert!(found.contains(" B=2 "), "{found}");
        assert!(found.contains(&format!("uid: Uid({STRANGER})")), "{found}");
        assert!(found.contains("notice: None"), "{found}");

        if invokers_environment().is_ok() {
            return eprintln!("the rest is not tested: we run under sudo");
        }
        let not_found = call("no-sudo");
        assert!(!not_found.contains("A=1 "), "{not_found}");
        assert!(
            not_found.contains("HOME=/ ") && not_found.contains("B=2 "),
            "{not_found}"
        );
        assert!(not_found.contains("notice: Some"), "{not_found}");
    }
}
