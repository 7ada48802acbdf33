//! `examples/`, a small real output of each format, and pictures of the live view and of a report: all of one
//! run of llama.cpp that is traced here.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use expert_trace_tests::tmux::Tmux;
use tempfile::TempDir;

use crate::{command, demo, llama, packages, screen, system, workspace};

/// Where llama.cpp is while it is traced: a document has the names of files, and these are nobody's own.
const PLACE: &str = "/opt/llama.cpp";

/// Formats that are made of the trace, and their files.
const EXPORTS: [(&str, &str); 8] = [
    ("jsonl", "routes.jsonl"),
    ("csv", "routes.csv"),
    ("parquet", "routes.parquet"),
    ("route-trace", "routes.route.csv"),
    ("mbolt", "routes.mbolt"),
    ("turbospark", "routes.turbospark.json"),
    ("imatrix-counts", "counts.gguf"),
    ("npy", "counts.npy"),
];

/// Columns and lines of the live view.
const TERMINAL: (u16, u16) = (100, 22);

pub fn run(root: &Path) -> Result<()> {
    ensure!(system::is_root(), "tracing another process needs root");
    packages::ensure(&["chromium", "tmux"], "taking pictures")?;
    command::run(&mut workspace::release_build(root))?;
    let place = Place::new(&llama::llama_cli()?, &demo::model()?)?;
    let program = workspace::release_program()?;
    let examples = root.join("examples");
    let images = root.join("docs/images");
    for directory in [&examples, &images] {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }

    let tracer = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.current_dir(&examples).args(arguments);
        command.stdin(Stdio::null());
        command
    };
    let traced = [
        "run",
        "--user",
        "root",
        "-o",
        "stats.json",
        "--trace",
        "routes.arrows",
        "--weights",
        "--",
    ];
    command::run(tracer(&traced).args(place.command(24)))?;
    for (format, file) in EXPORTS {
        command::run(&mut tracer(&[
            "export",
            "routes.arrows",
            "--format",
            format,
            "-o",
            file,
        ]))?;
    }
    command::run(&mut tracer(&["merge", "stats.json", "-o", "profile.json"]))?;
    command::run(&mut tracer(&[
        "report",
        "routes.arrows",
        "-o",
        "report.html",
    ]))?;
    command::run(&mut tracer(&[
        "report",
        "stats.json",
        "--format",
        "svg",
        "-o",
        "heat-map.svg",
    ]))?;

    let pictures = tempfile::tempdir()?;
    let report = examples.join("report.html");
    picture(&report, (1200, 1250), &images.join("report.png"))?;
    let page = pictures.path().join("top.html");
    fs::write(&page, live_view(&program, &place)?)?;
    picture(&page, screen::size(TERMINAL), &images.join("top.png"))
}

/// A copy of llama.cpp and of a model, for as long as it is traced.
struct Place {
    _directory: Removed,
    command: Vec<String>,
}

/// A directory that goes with this.
struct Removed(&'static str);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0);
    }
}

impl Place {
    fn new(llama_cli: &Path, model: &Path) -> Result<Self> {
        fs::create_dir(PLACE)
            .with_context(|| format!("cannot make {PLACE}, to trace llama.cpp there"))?;
        let directory = Removed(PLACE);
        let from = llama_cli.parent().context("llama-cli is in no directory")?;
        for entry in fs::read_dir(from)? {
            let path = entry?.path();
            let copy = Path::new(PLACE).join(path.file_name().unwrap_or_default());
            match fs::read_link(&path) {
                Ok(goal) => symlink(goal, copy)?,
                Err(_) => drop(fs::copy(&path, copy)?),
            }
        }
        let model_copy = format!("{PLACE}/model.gguf");
        fs::copy(model, &model_copy)?;
        let words = [
            &format!("{PLACE}/llama-cli"),
            "-m",
            &model_copy,
            "--single-turn",
        ];
        Ok(Self {
            _directory: directory,
            command: words.map(str::to_owned).into(),
        })
    }

    /// The command that generates so many tokens.
    fn command(&self, tokens: usize) -> Vec<String> {
        let prompt = "Which experts of a mixture are used most, and why?";
        let tokens = tokens.to_string();
        let more = ["-p", prompt, "-n", &tokens, "--ignore-eos", "-c", "65536"].map(str::to_owned);
        self.command.iter().cloned().chain(more).collect()
    }
}

/// The live view of a run, as a page.
fn live_view(program: &Path, place: &Place) -> Result<String> {
    let scratch: TempDir = tempfile::tempdir()?;
    let script = scratch.path().join("start.sh");
    let words: Vec<String> = place
        .command(20_000)
        .iter()
        .map(|word| format!("'{word}'"))
        .collect();
    fs::write(
        &script,
        format!(
            "cd '{}' && exec '{}' run --live --user root -- {}\n",
            scratch.path().display(),
            program.display(),
            words.join(" ")
        ),
    )?;
    let variables = [("TERM", "xterm-256color"), ("LC_ALL", "C.UTF-8")];
    let (columns, lines) = TERMINAL;
    let line = format!("sh {}", script.display());
    let tmux = Tmux::spawn(columns, lines, &variables, &line)?;
    tmux.wait(|shown| {
        let decoded = shown.get(1).and_then(|line| line.split("decode ").nth(1));
        let digits = decoded.and_then(|text| text.split(' ').next());
        digits.is_some_and(|digits| digits.len() >= 3)
    })?;
    tmux.press(&["Down", "Right", "Right"])?;
    tmux.wait_for("layer 1, expert 2")?;
    let page = screen::page(&tmux.shown_with_colours()?);
    tmux.press(&["C-c"])?;
    tmux.wait_for("[over: ")?;
    Ok(page)
}

/// A picture of a page.
fn picture(page: &Path, (width, height): (u32, u32), file: &Path) -> Result<()> {
    let profile = tempfile::tempdir()?;
    let mut browser = Command::new("chromium");
    browser.args([
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
    ]);
    browser.args([
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]);
    browser.arg("--hide-scrollbars");
    browser.arg(format!("--user-data-dir={}", profile.path().display()));
    browser.arg(format!("--window-size={width},{height}"));
    browser.arg(format!("--screenshot={}", file.display()));
    let page: PathBuf = fs::canonicalize(page)?;
    command::run(browser.arg(format!("file://{}", page.display())))
}
