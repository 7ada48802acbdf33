//! The compatibility suite: many builds of llama.cpp, each traced by `run` and by `attach`, and what
//! became of each as a table.

mod builds;

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use expert_trace_tests::builds::Build;
use serde_json::Value;

use crate::{command, llama, results, suite, system, workspace};

/// Document that shows the table.
const DOCUMENT: &str = "docs/compatibility.md";
/// Lines of it between which the table is.
const BEGIN: &str = "<!-- Made by `cargo xtask compat`: begin -->\n";
const END: &str = "<!-- end -->\n";

#[derive(clap::Args)]
pub struct Arguments {
    /// Trace only the builds whose names contain this, and write nothing
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
}

pub fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    ensure!(
        system::is_root(),
        "tracing another process needs root: run `sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask compat`"
    );
    let mut builds = builds::all(root)?;
    if let Some(filter) = &arguments.filter {
        builds.retain(|build| build.name.contains(filter));
    }
    let found = suite::run(&mut test_command(root, &builds)?)?;
    let table = table(&found.results);
    print!("\n{table}");
    if arguments.filter.is_none() {
        let mut document = results::header(root, None, "cargo xtask compat")?;
        document["processor"] = processor()?.into();
        document["tests"] = found.sum.clone().into();
        document["builds"] = found.results.into();
        results::write(&root.join(results::COMPAT), &document)?;
        show(&root.join(DOCUMENT), &table)?;
    }
    ensure!(found.passed, "tests have failed: {}", found.sum);
    Ok(())
}

fn test_command(root: &Path, builds: &[Build]) -> Result<Command> {
    let llama = llama::provision(root)?;
    command::run(&mut workspace::release_build(root))?;
    let list = workspace::target()?.join("compat-builds.json");
    let mut cargo = workspace::cargo(root);
    cargo
        .args(["test", "--package", "expert-trace-tests", "--test", "e2e"])
        .args(["--", "--test-threads=1", "--nocapture", "--ignored"])
        .arg("compat::")
        .env("EXPERT_TRACE_TEST_BIN", workspace::release_program()?)
        .envs(llama.to_env())
        .envs([Build::write_list(&list, builds)?]);
    Ok(cargo)
}

/// What the system calls the processor.
fn processor() -> Result<String> {
    let lscpu = command::output(Command::new("lscpu").env("LC_ALL", "C"))?;
    let name = lscpu.lines().find_map(|line| line.strip_prefix("Model name:"));
    Ok(name.unwrap_or("unknown").trim().to_owned())
}

/// The results as a table in Markdown.
fn table(rows: &[Value]) -> String {
    let mut table = "| build | llama.cpp | model | hooks hit, and files they are in | not hit | layout of tensors; found by | hits per token | ids by `run` | by `attach` |\n\
                     |---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for row in rows {
        let [build, version, model] = ["build", "version", "model"].map(|key| text(&row[key]));
        let (hit, not_hit) = hooks(row);
        let hits = row["hits_per_token"].as_f64();
        let hits = hits.map_or_else(|| "–".to_owned(), |hits| format!("{hits:.0}"));
        let layout = match (text(&row["layout"]), text(&row["layout_found"])) {
            ("", _) => "–".to_owned(),
            (layout, "") => layout.to_owned(),
            (layout, found) => format!("{layout}; {found}"),
        };
        let [run, attach] = ["run", "attach"].map(|how| outcome(&row[how]));
        // Writing to a String does not fail.
        let _ = writeln!(
            table,
            "| {build} | {version} | {model} | {hit} | {not_hit} | {layout} | {hits} | {run} | {attach} |"
        );
    }
    table
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
