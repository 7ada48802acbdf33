//! Results of suites that CI does not run: files in docs/results that say what they are of.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{bench, command, suite};

/// A file with the results of a suite.
pub struct ResultFile {
    /// In the workspace.
    pub path: &'static str,
    /// Member of the document with what was found out, in rows.
    pub rows: &'static str,
    /// Makes it.
    pub command: &'static str,
}

pub const CUDA: ResultFile = ResultFile {
    path: "docs/results/cuda.json",
    rows: "costs",
    command: "cargo xtask cuda",
};

pub const COMPAT: ResultFile = ResultFile {
    path: "docs/results/compat.json",
    rows: "builds",
    command: "cargo xtask compat",
};

/// All result files.
fn all() -> impl Iterator<Item = &'static ResultFile> {
    [&COMPAT, &CUDA].into_iter().chain(bench::files())
}

/// What results depend on: what is tested, the tests, and what decides how either is built and which
/// builds of llama.cpp are traced.
const COVERED: [&str; 8] = [
    ".cargo",
    "Cargo.lock",
    "Cargo.toml",
    "expert-trace",
    "expert-trace-common",
    "expert-trace-ebpf",
    "tests",
    "xtask",
];

#[derive(Default, clap::Args)]
pub struct Arguments {
    /// Fail if one is not of the code that is here, as before a release
    #[arg(long)]
    fresh: bool,
}

/// `cargo xtask results`.
pub fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    let ages = ages(root)?;
    for (path, age) in &ages {
        println!("{path}: {age}");
    }
    let stale = ages.iter().filter(|(_, age)| !age.is_fresh());
    let stale: Vec<&str> = stale.map(|(path, _)| *path).collect();
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
    command: &'static str,
    /// Why it is not of the code that is here.
    faults: Vec<String>,
}

impl Age {
    fn is_fresh(&self) -> bool {
        self.faults.is_empty()
    }
}

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            commit,
            command,
            faults,
        } = self;
        if self.is_fresh() {
            return write!(f, "of commit {commit}, up to date");
        }
        write!(f, "of commit {commit:?}, NOT of the code that is here:")?;
        for fault in faults {
            write!(f, "\n  {fault}")?;
        }
        write!(f, "\n  {command} makes it anew")
    }
}

fn ages(root: &Path) -> Result<Vec<(&'static str, Age)>> {
    let age = |file: &'static ResultFile| Ok((file.path, age(root, file)?));
    all().map(age).collect()
}

/// Start of a result file: of which commit it is, from when, on which kernel, by which command.
pub fn header(root: &Path, file: &ResultFile, commit: Option<&str>) -> Result<Value> {
    let commit = match commit {
        Some(commit) => commit.to_owned(),
        None => head(root)?,
    };
    let kernel = command::output(Command::new("uname").args(["-s", "-r", "-m"]))?;
    Ok(json!({
        "commit": commit,
        "date": humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        "kernel": kernel.trim(),
        "command": file.command,
    }))
}

/// The commit that is checked out. What is not committed is in no history, and its results can never be
/// up to date.
fn head(root: &Path) -> Result<String> {
    let commit = git(root, &["rev-parse", "HEAD"])?;
    Ok(if uncommitted(root)?.is_empty() {
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

fn age(root: &Path, file: &ResultFile) -> Result<Age> {
    let path = root.join(file.path);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}: a result file is missing", path.display()))?;
    let document: Value =
        serde_json::from_str(&text).with_context(|| format!("{} is no JSON", file.path))?;
    let commit = document["commit"].as_str().unwrap_or_default().to_owned();
    let mut faults = faults_of_results(file, &document);
    faults.extend(faults_of_commit(root, &commit));
    Ok(Age {
        commit,
        command: file.command,
        faults,
    })
}

/// What is wrong with the results themselves.
fn faults_of_results(file: &ResultFile, document: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    // Not all results are of tests.
    if let Some(sum) = document.get("tests") {
        let sum = sum.as_str().unwrap_or_default();
        if !suite::all_passed(sum) {
            faults.push(format!("not all of its tests passed: {sum:?}"));
        }
    }
    if document[file.rows].as_array().is_none_or(Vec::is_empty) {
        faults.push(format!("it has no rows in {:?}", file.rows));
    }
    faults
}

/// Why what is here is not what that commit has.
fn faults_of_commit(root: &Path, commit: &str) -> Vec<String> {
    let is_hash = commit.len() == 40 && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_hash {
        return vec!["that is no hash of a commit, which has 40 hexadecimal digits".to_owned()];
    }
    // A copy of the sources need not have the history.
    let is_known = git(root, &["cat-file", "-e", &format!("{commit}^{{commit}}")]).is_ok();
    if !is_known {
        return vec![
            "its age cannot be told: the history here does not have that commit".to_owned(),
        ];
    }
    if git(root, &["merge-base", "--is-ancestor", commit, "HEAD"]).is_err() {
        return vec!["that commit is no ancestor of HEAD".to_owned()];
    }
    let since = changed(root, commit).map(|files| fault("changed since then", &files));
    let here = uncommitted(root).map(|files| fault("changed and not committed", &files));
    [since, here]
        .into_iter()
        .filter_map(|fault| fault.unwrap_or_else(|error| Some(format!("{error:#}"))))
        .collect()
}

/// Names what has happened to files, which are too many to list.
fn fault(what: &str, files: &[String]) -> Option<String> {
    let mut of_parts = BTreeMap::<&str, usize>::new();
    for file in files {
        let part = file.split('/').next().unwrap_or(file);
        *of_parts.entry(part).or_default() += 1;
    }
    let parts: Vec<String> = of_parts
        .iter()
        .map(|(part, count)| format!("{part} ({count})"))
        .collect();
    let noun = if files.len() == 1 { "file" } else { "files" };
    (!files.is_empty()).then(|| format!("{} {noun} {what}: {}", files.len(), parts.join(", ")))
}

/// Covered files that differ between the commit and HEAD.
fn changed(root: &Path, commit: &str) -> Result<Vec<String>> {
    paths(
        root,
        &["diff", "--name-only", "--no-renames", "-z", commit, "HEAD"],
    )
}

/// Covered files that differ from HEAD, or are not in it.
fn uncommitted(root: &Path) -> Result<Vec<String>> {
    let mut files = paths(root, &["diff", "--name-only", "--no-renames", "-z", "HEAD"])?;
    let others = ["ls-files", "--others", "--exclude-standard", "-z"];
    files.extend(paths(root, &others)?);
    Ok(files)
}

/// Paths that a git command lists, of those that are covered.
fn paths(root: &Path, command: &[&str]) -> Result<Vec<String>> {
    let list = git(root, &[command, &["--"], &COVERED].concat())?;
    let paths = list.split_terminator('\0').map(str::to_owned);
    Ok(paths.collect())
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
        fn new(name: &str) -> Self {
            let name = format!("xtask-results-{name}-{}", process::id());
            let repository = Self(env::temp_dir().join(name));
            fs::create_dir_all(repository.0.join("tests")).unwrap();
            fs::create_dir_all(repository.0.join("xtask/src")).unwrap();
            repository.git(&["init", "--quiet"]);
            repository.commit("tests/code", "1");
            repository
        }

        fn git(&self, arguments: &[&str]) -> String {
            let identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"];
            git(&self.0, &[&identity, arguments].concat()).unwrap()
        }

        fn edit(&self, file: &str, text: &str) {
            fs::write(self.0.join(file), text).unwrap();
        }

        fn commit(&self, file: &str, text: &str) {
            self.edit(file, text);
            self.git(&["add", "--all"]);
            self.git(&["commit", "--quiet", "--message", file]);
        }

        /// Leaves good results of what is there, changed as told.
        fn write(&self, change: impl FnOnce(&mut Value)) {
            let mut document = header(&self.0, &COMPAT, None).unwrap();
            document["tests"] = "ok. 1 passed; 0 failed; 0 ignored".into();
            document[COMPAT.rows] = json!([{"build": "shared"}]);
            change(&mut document);
            write(&self.0.join(COMPAT.path), &document).unwrap();
        }

        fn faults(&self) -> Vec<String> {
            age(&self.0, &COMPAT).unwrap().faults
        }
    }

    impl Drop for Repository {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn results_are_fresh_until_what_they_cover_changes() {
        let repository = Repository::new("age");
        repository.write(|_| ());
        assert!(age(&repository.0, &COMPAT).unwrap().is_fresh());
        repository.commit("README.md", "not covered");
        assert_eq!(repository.faults(), [""; 0]);

        repository.commit("tests/code", "2");
        repository.commit("tests/more", "1");
        repository.commit("Cargo.lock", "1");
        repository.commit("xtask/src/code", "1");
        let since = "4 files changed since then: Cargo.lock (1), tests (2), xtask (1)";
        assert_eq!(repository.faults(), [since]);
        repository.edit("tests/code", "3");
        repository.edit("xtask/src/new", "1");
        let here = "2 files changed and not committed: tests (1), xtask (1)";
        assert_eq!(repository.faults(), [since, here]);

        // Of a work tree that no commit has.
        repository.write(|_| ());
        assert!(repository.faults()[0].starts_with("that is no hash"));
    }

    #[test]
    fn results_without_a_commit_of_this_history_are_not_fresh() {
        let repository = Repository::new("commit");
        let fault_of = |commit: &str| {
            repository.write(|document| document["commit"] = commit.into());
            repository.faults().join("\n")
        };
        for name in ["", "HEAD", "3358816"] {
            assert!(fault_of(name).contains("no hash"), "{name}");
        }
        assert!(fault_of(&"1".repeat(40)).contains("does not have that commit"));

        let first = repository.git(&["rev-parse", "HEAD"]);
        repository.git(&["checkout", "--quiet", "--orphan", "other"]);
        repository.commit("tests/code", "1");
        assert_eq!(fault_of(&first), "that commit is no ancestor of HEAD");
    }

    #[test]
    fn results_of_tests_that_failed_or_gave_nothing_are_not_fresh() {
        let repository = Repository::new("tests");
        for sum in [
            "FAILED. 1 passed; 1 failed; 0 ignored",
            "ok. 0 passed; 0 failed; 0 ignored",
        ] {
            repository.write(|document| document["tests"] = sum.into());
            assert_eq!(
                repository.faults(),
                [format!("not all of its tests passed: {sum:?}")]
            );
        }
        for rows in [json!([]), Value::Null] {
            repository.write(|document| document[COMPAT.rows] = rows);
            assert_eq!(repository.faults(), [r#"it has no rows in "builds""#]);
        }
    }
}
