//! Results of suites that CI does not run: files in docs/results that say what they are of.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::command;

/// Results of `cargo xtask cuda`.
pub const CUDA: &str = "docs/results/cuda.json";

/// Results of `cargo xtask compat`.
pub const COMPAT: &str = "docs/results/compat.json";

/// All result files.
const ALL: [&str; 2] = [COMPAT, CUDA];

/// What all results depend on.
const COVERED: [&str; 4] = [
    "expert-trace",
    "expert-trace-common",
    "expert-trace-ebpf",
    "tests",
];

/// What those of `cargo xtask compat` depend on, too: which builds there are, and how they are made.
const BUILDS: [&str; 4] = [
    "xtask/src/compat/builds.rs",
    "xtask/src/driver.rs",
    "xtask/src/llama.rs",
    "xtask/src/prebuilt/cpu.rs",
];

fn covered(name: &str) -> Vec<&'static str> {
    let mut covered = COVERED.to_vec();
    if name == COMPAT {
        covered.extend(BUILDS);
    }
    covered
}

#[derive(Default, clap::Args)]
pub struct Arguments {
    /// Fail if one is older than the code it covers, as before a release
    #[arg(long)]
    fresh: bool,
}

/// `cargo xtask results`.
pub fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    let ages = ages(root)?;
    for (name, age) in &ages {
        println!("{name}: {age}");
    }
    let stale = ages.iter().filter(|(_, age)| !age.is_fresh());
    let stale: Vec<&str> = stale.map(|(name, _)| *name).collect();
    ensure!(
        !arguments.fresh || stale.is_empty(),
        "not of the code that is here: {}",
        stale.join(", ")
    );
    Ok(())
}

/// How a result file stands to the code it covers.
struct Age {
    /// As the file has it.
    commit: String,
    /// Makes it anew.
    command: String,
    /// Commits since then; `None` where the history does not tell.
    commits: Option<u64>,
}

impl Age {
    fn is_fresh(&self) -> bool {
        self.commits == Some(0)
    }
}

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            commit,
            command,
            commits,
        } = self;
        match commits {
            Some(0) => write!(f, "of commit {commit}, up to date"),
            Some(commits) => write!(
                f,
                "of commit {commit}, OLDER than the code it covers by {commits} commits; {command} \
                 makes it anew"
            ),
            None => write!(
                f,
                "of commit {commit}, whose age cannot be told without the history"
            ),
        }
    }
}

fn ages(root: &Path) -> Result<Vec<(&'static str, Age)>> {
    let age = |name| Ok((name, age(root, name)?));
    ALL.into_iter().map(age).collect()
}

/// Start of the result file `name`: of which commit it is, from when, on which kernel, by which command.
pub fn header(root: &Path, name: &str, commit: Option<&str>, command: &str) -> Result<Value> {
    let commit = match commit {
        Some(commit) => commit.to_owned(),
        None => head(root, name)?,
    };
    let kernel = command::output(Command::new("uname").args(["-s", "-r", "-m"]))?;
    Ok(json!({
        "commit": commit,
        "date": humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        "kernel": kernel.trim(),
        "command": command,
    }))
}

/// The commit that is checked out. What is not committed is in no history, and its results can never be
/// up to date.
fn head(root: &Path, name: &str) -> Result<String> {
    let commit = git(root, &["rev-parse", "HEAD"])?;
    let mut status = vec!["status", "--porcelain", "--"];
    status.extend(covered(name));
    let changes = git(root, &status)?;
    Ok(if changes.is_empty() {
        commit
    } else {
        format!("{commit}, changed")
    })
}

/// Writes a result file.
pub fn write(path: &Path, document: &Value) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    let text = serde_json::to_string_pretty(document)? + "\n";
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn age(root: &Path, name: &str) -> Result<Age> {
    let path = root.join(name);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}: a result file is missing", path.display()))?;
    let document: Value =
        serde_json::from_str(&text).with_context(|| format!("{name} is no JSON"))?;
    let text = |key: &str| document[key].as_str().unwrap_or_default().to_owned();
    let commit = text("commit");
    let range = format!("{commit}..HEAD");
    let mut arguments = vec!["rev-list", "--count", &range, "--"];
    arguments.extend(covered(name));
    // A copy of the sources need not have the history.
    let commits = git(root, &arguments).ok().and_then(|n| n.parse().ok());
    Ok(Age {
        commit,
        command: text("command"),
        commits,
    })
}

fn git(root: &Path, arguments: &[&str]) -> Result<String> {
    let mut git = Command::new("git");
    git.arg("-C").arg(root).args(arguments);
    Ok(command::output(&mut git)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::{env, path::PathBuf, process};

    use super::*;

    /// A repository with one commit, removed at the end.
    struct Repository(PathBuf);

    impl Repository {
        fn new() -> Self {
            let root = env::temp_dir().join(format!("xtask-results-{}", process::id()));
            fs::create_dir_all(root.join("tests")).unwrap();
            let repository = Self(root);
            repository.git(&["init", "--quiet"]);
            repository.commit("tests/code", "1");
            repository
        }

        fn git(&self, arguments: &[&str]) {
            let identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"];
            git(&self.0, &[&identity, arguments].concat()).unwrap();
        }

        fn commit(&self, file: &str, text: &str) {
            fs::write(self.0.join(file), text).unwrap();
            self.git(&["add", "--all"]);
            self.git(&["commit", "--quiet", "--message", file]);
        }

        /// Leaves results of what is there, and says how old they are.
        fn results(&self) -> Age {
            let header = header(&self.0, COMPAT, None, "cargo xtask compat").unwrap();
            write(&self.0.join(COMPAT), &header).unwrap();
            age(&self.0, COMPAT).unwrap()
        }
    }

    impl Drop for Repository {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn results_are_fresh_until_what_they_cover_changes() {
        let repository = Repository::new();
        assert!(repository.results().is_fresh());
        repository.commit("README.md", "not covered");
        assert!(age(&repository.0, COMPAT).unwrap().is_fresh());
        repository.commit("tests/code", "2");
        assert_eq!(age(&repository.0, COMPAT).unwrap().commits, Some(1));

        fs::write(repository.0.join("tests/code"), "not committed").unwrap();
        let of_changes = repository.results();
        assert!(of_changes.commit.ends_with(", changed"));
        assert_eq!(of_changes.commits, None);
    }
}
