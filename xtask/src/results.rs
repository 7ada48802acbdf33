//! Results of suites that CI does not run: files in docs/results that say what they are of.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::command;

/// Results of `cargo xtask cuda`.
pub const CUDA: &str = "docs/results/cuda.json";

/// All result files.
const ALL: [&str; 1] = [CUDA];

/// What the results depend on.
const COVERED: [&str; 4] = [
    "expert-trace",
    "expert-trace-common",
    "expert-trace-ebpf",
    "tests",
];

/// Start of a result file: of which commit it is, from when, on which kernel, by which command.
pub fn header(root: &Path, commit: Option<&str>, command: &str) -> Result<Value> {
    let commit = match commit {
        Some(commit) => commit.to_owned(),
        None => git(root, &["rev-parse", "HEAD"])?,
    };
    let kernel = command::output(Command::new("uname").args(["-s", "-r", "-m"]))?;
    Ok(json!({
        "commit": commit,
        "date": humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        "kernel": kernel.trim(),
        "command": command,
    }))
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

/// Says of each result file whether it is older than the code it covers.
pub fn report_age(root: &Path) -> Result<()> {
    for name in ALL {
        println!("{name}: {}", age(root, name)?);
    }
    Ok(())
}

fn age(root: &Path, name: &str) -> Result<String> {
    let path = root.join(name);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}: a result file is missing", path.display()))?;
    let document: Value =
        serde_json::from_str(&text).with_context(|| format!("{name} is no JSON"))?;
    let commit = document["commit"].as_str().unwrap_or_default();
    let range = format!("{commit}..HEAD");
    let mut arguments = vec!["rev-list", "--count", &range, "--"];
    arguments.extend(COVERED);
    // A copy of the sources need not have the history.
    Ok(match git(root, &arguments).as_deref() {
        Ok("0") => format!("of commit {commit}, up to date"),
        Ok(commits) => format!(
            "of commit {commit}, OLDER than the code it covers by {commits} commits; {} makes it anew",
            document["command"].as_str().unwrap_or("its command")
        ),
        Err(_) => format!("of commit {commit}, whose age cannot be told without the history"),
    })
}

fn git(root: &Path, arguments: &[&str]) -> Result<String> {
    let mut git = Command::new("git");
    git.arg("-C").arg(root).args(arguments);
    Ok(command::output(&mut git)?.trim().to_owned())
}
