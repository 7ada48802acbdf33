//! Variables of a process, and which of them sudo's caller has meant.

use std::{
    env,
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
};

use super::Account;

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
    pub(super) fn adapt(&mut self, account: &Account) {
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
pub(super) fn merge(invoker: Environment, own: &Environment, account: &Account) -> Environment {
    let mut merged = invoker;
    for (name, value) in own.iter().filter(|(name, _)| set_on_purpose(name)) {
        merged.set(name, value);
    }
    if merged.get("HOME").is_none() {
        merged.set("HOME", &account.home);
    }
    merged
}
