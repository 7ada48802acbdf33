//! An unprivileged user who may use `sudo`, for as long as a test runs.
//!
//! What `sudo` does depends on the system's rules and on their version. The user's own rules say
//! everything that matters, as Debian 12 says it for all: `env_reset`, `use_pty` and `secure_path`.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, User, getgrouplist, setgid, setgroups, setuid};

const NAME: &str = "expert-trace-test";
/// By this an account that an interrupted run left behind is known to be ours.
const COMMENT: &str = "expert-trace end-to-end tests";
/// A group that Debian and Ubuntu have from the start.
const SECOND_GROUP: &str = "users";
/// Only one test at a time can have the account.
const LOCK: &str = "/run/expert-trace-test.lock";
const RULES: &str = "/etc/sudoers.d/expert-trace-test";
/// The path that `sudo` searches for the user's commands, and gives them.
pub const SECURE_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The user `expert-trace-test`, with a home of its own, in a second group, and allowed to run
/// everything with `sudo` without a password. Dropping it removes the user, its home and its rules.
pub struct Account {
    user: User,
    groups: Vec<Gid>,
    /// Given back last.
    _lock: File,
}

impl Account {
    /// Makes the account, after any other test with it has ended.
    ///
    /// # Errors
    ///
    /// Without root, without `sudo` or `useradd`, or if there is such a user that is not ours.
    pub fn create() -> Result<Account> {
        let lock = File::create(LOCK).with_context(|| format!("create {LOCK}"))?;
        lock.lock().with_context(|| format!("lock {LOCK}"))?;
        if let Some(user) = User::from_name(NAME)? {
            ensure!(
                user.gecos.to_bytes() == COMMENT.as_bytes(),
                "there is a user {NAME} that these tests did not make"
            );
            remove(user.uid)?;
        }
        run(Command::new("useradd")
            .args(["--system", "--user-group", "--create-home"])
            .args(["--shell", "/bin/bash", "--comment", COMMENT])
            .args(["--groups", SECOND_GROUP, NAME]))?;
        let user = User::from_name(NAME)?.with_context(|| format!("useradd made no {NAME}"))?;
        let groups = getgrouplist(c"expert-trace-test", user.gid)?;
        // From here on, an error removes what there is.
        let account = Account {
            user,
            groups,
            _lock: lock,
        };
        install_rules()?;
        Ok(account)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.user.name
    }

    /// Its user id.
    pub fn uid(&self) -> Uid {
        self.user.uid
    }

    /// Its first group.
    pub fn gid(&self) -> Gid {
        self.user.gid
    }

    /// Its home directory, which it owns.
    pub fn home(&self) -> &Path {
        &self.user.dir
    }

    /// A command of this user, in its home, with the environment of a login and no other. The
    /// program is looked up in the user's path, where `bin` of its home comes first.
    pub fn command(&self, program: &str) -> Command {
        let home = self.home().display();
        let path = format!("{home}/bin:/usr/local/bin:/usr/bin:/bin");
        let mut command = Command::new(program);
        command.env_clear().current_dir(self.home()).envs([
            ("HOME", home.to_string().as_str()),
            ("USER", self.name()),
            ("LOGNAME", self.name()),
            ("MAIL", &format!("/var/mail/{}", self.name())),
            ("SHELL", "/bin/bash"),
            ("PATH", &path),
            ("LANG", "C.UTF-8"),
            // One that promises nothing, so that no program sends it control sequences.
            ("TERM", "dumb"),
        ]);
        let Account { user, groups, .. } = self;
        let (uid, gid, groups) = (user.uid, user.gid, groups.clone());
        let become_user = move || {
            setgroups(&groups)?;
            setgid(gid)?;
            setuid(uid)?;
            Ok(())
        };
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(become_user) };
        command
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if let Err(error) = remove(self.user.uid) {
            eprintln!("the account {NAME} is left behind: {error:#}");
        }
    }
}

/// Removes the account, whole or half made, and ends what still runs in its name.
fn remove(uid: Uid) -> Result<()> {
    // First, so that nothing gets to be root any more.
    match fs::remove_file(RULES) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {RULES}"));
        }
        _ => {}
    }
    end_processes(uid)?;
    // By force: what cannot be ended must not keep the account.
    run(Command::new("userdel").args(["--force", "--remove", NAME]))
}

/// Ends all processes of a user: a failed or interrupted test leaves some, and the next account can
/// get the same id.
fn end_processes(uid: Uid) -> Result<()> {
    ensure!(!uid.is_root(), "{NAME} is root");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let processes = processes(uid)?;
        if processes.is_empty() {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "processes {processes:?} of {NAME} do not end"
        );
        for process in processes {
            // It can have ended since.
            let _ = kill(process, Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The processes whose real user this is, without those that have ended.
fn processes(uid: Uid) -> Result<Vec<Pid>> {
    let of_user = |pid: &Pid| {
        let Ok(status) = fs::read(format!("/proc/{pid}/status")) else {
            return false;
        };
        let status = String::from_utf8_lossy(&status);
        let field = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()
        };
        field("Uid:") == Some(&uid.to_string()) && !matches!(field("State:"), Some("Z" | "X"))
    };
    let entries = fs::read_dir("/proc")?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(pids.map(Pid::from_raw).filter(of_user).collect())
}

fn install_rules() -> Result<()> {
    let rules = format!(
        "Defaults:{NAME} env_reset\n\
         Defaults:{NAME} use_pty\n\
         Defaults:{NAME} secure_path=\"{SECURE_PATH}\"\n\
         {NAME} ALL=(ALL) NOPASSWD: ALL\n"
    );
    let directory = Path::new(RULES).parent().context("a directory")?;
    // `sudo` reads no file with a dot in its name. A file that it reads and does not understand would
    // be the end of `sudo` on this machine, so it is checked first.
    let mut file = tempfile::Builder::new()
        .prefix(".expert-trace-test.")
        .permissions(fs::Permissions::from_mode(0o440))
        .tempfile_in(directory)
        .with_context(|| format!("make a file in {}; is sudo installed?", directory.display()))?;
    file.write_all(rules.as_bytes())?;
    run(Command::new("visudo")
        .args(["--check", "--quiet", "--file"])
        .arg(file.path()))?;
    file.persist(RULES)
        .with_context(|| format!("create {RULES}"))?;
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
