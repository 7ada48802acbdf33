//! The compatibility suite: many builds of llama.cpp, each traced by `run` and by `attach`, and what
//! became of each as a table; in a second table, what became of each route of expert ids.

mod builds;
mod routes;

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use expert_trace_tests::builds::{Build, Driven};
use expert_trace_tests::routes::ROUTES;
use serde_json::Value;

use crate::document::{Place, head};
use crate::planned::{self, Planned};
use crate::{command, llama, prebuilt, results, suite, system, workspace};

/// Document that shows the table.
const DOCUMENT: &str = "docs/compatibility.md";
const BUILDS: Place = Place {
    begin: "<!-- Made by `cargo xtask compat`: begin -->\n",
    end: "<!-- end -->\n",
};

const ROUTES_IN_BUILDS: Place = Place {
    begin: "<!-- Made by `cargo xtask compat`, routes: begin -->\n",
    end: "<!-- end of routes -->\n",
};

const COLUMNS: [&str; 9] = [
    "build",
    "llama.cpp",
    "model",
    "expert ids from",
    "found, never hit",
    "layout of `ggml_tensor`, found by",
    "hits per token",
    "ids by `run`",
    "by `attach`",
];

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
    let mut builds = builds::all(root);
    builds.extend(prebuilt::all(root));
    builds.extend(builds::for_routes(root));
    if let Some(filter) = &arguments.filter {
        builds = planned::named(builds, filter)?;
    }
    let builds: Vec<Build> = builds
        .into_iter()
        .map(Planned::make)
        .collect::<Result<_>>()?;
    let found = suite::run(&mut test_command(root, &builds)?)?;
    let of_route = |row: &Value| !row["route"].is_null();
    let (of_routes, of_builds): (Vec<Value>, Vec<Value>) =
        found.results.iter().cloned().partition(of_route);
    let tables = [
        (BUILDS, table(&of_builds)),
        (ROUTES_IN_BUILDS, routes::table(&of_routes)),
    ];
    for (_, table) in &tables {
        print!("\n{table}");
    }
    found.ensure_passed()?;
    let expected: usize = builds.iter().map(rows).sum();
    ensure!(
        found.results.len() == expected,
        "the tests gave {} rows, where {expected} were expected",
        found.results.len()
    );
    if arguments.filter.is_none() {
        let mut document = results::header(root, &results::COMPAT, None)?;
        document["processor"] = system::processor()?.into();
        document["tests"] = found.sum.into();
        document[results::COMPAT.rows] = of_builds.into();
        document["routes"] = of_routes.into();
        results::write(&root.join(results::COMPAT.path), &document)?;
        for (place, table) in &tables {
            place.show(root, DOCUMENT, table)?;
        }
    }
    Ok(())
}

/// How many rows a build has in the tables.
fn rows(build: &Build) -> usize {
    match build.driven {
        Driven::Oracle => ROUTES.len(),
        Driven::Lines | Driven::Http => build.models.len(),
    }
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

/// The results as a table in Markdown.
fn table(rows: &[Value]) -> String {
    let mut table = head(&COLUMNS);
    for row in rows {
        let [build, version, model] = ["build", "version", "model"].map(|key| text(&row[key]));
        let repacked = if row["repacked"] == true {
            ", repacked"
        } else {
            ""
        };
        let hits = row["hits_per_token"].as_f64();
        let hits = hits.map_or_else(|| "–".to_owned(), |hits| format!("{hits:.0}"));
        let layout = match (text(&row["layout"]), text(&row["layout_found_by"])) {
            ("", _) => "–".to_owned(),
            (layout, "") => layout.to_owned(),
            (layout, found) => format!("{layout}, {found}"),
        };
        let cells: [String; COLUMNS.len()] = [
            build.to_owned(),
            version.to_owned(),
            format!("{model}{repacked}"),
            ids(row),
            never_hit(row),
            layout,
            hits,
            outcome(&row["run"], None),
            outcome(&row["attach"], Some(&row["run"])),
        ];
        table += &format!("| {} |\n", cells.join(" | "));
    }
    table
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Where expert ids were read: the file, and the symbol table that the function was found in. Of
/// libraries that were only looked at, how many.
fn ids(row: &Value) -> String {
    let (hit, idle): (Vec<&Value>, Vec<&Value>) = hooks(row)
        .filter(|hook| hook["hook"] == "expert_ids")
        .partition(|hook| was_hit(hook));
    let mut places: Vec<String> = hit
        .iter()
        .map(|hook| {
            let [file, table] = ["file", "table"].map(|key| text(&hook[key]));
            format!("`{file}`, `{table}`")
        })
        .collect();
    if !idle.is_empty() {
        places.push(format!("not entered: {} more", idle.len()));
    }
    joined(places, "; ")
}

/// Hooks that were found, and hit in no file.
fn never_hit(row: &Value) -> String {
    let is_idle = |name: &Value| !hooks(row).any(|hook| hook["hook"] == *name && was_hit(hook));
    let mut names: Vec<String> = hooks(row)
        .map(|hook| &hook["hook"])
        .filter(|name| is_idle(name))
        .map(|name| format!("`{}`", text(name)))
        .collect();
    names.sort();
    names.dedup();
    joined(names, ", ")
}

fn was_hit(hook: &Value) -> bool {
    hook["hits"] != 0
}

fn hooks(row: &Value) -> impl Iterator<Item = &Value> {
    row["hooks"].as_array().into_iter().flatten()
}

fn joined(parts: Vec<String>, separator: &str) -> String {
    if parts.is_empty() {
        "–".to_owned()
    } else {
        parts.join(separator)
    }
}

/// Whether the ids were equal, or else what the tracer said; not again where it said the same before.
fn outcome(outcome: &Value, before: Option<&Value>) -> String {
    let [rows, expected] = ["rows", "expected"].map(|key| outcome[key].as_u64().unwrap_or(0));
    if outcome["equal"] == true {
        return format!("equal, {rows} rows");
    }
    let says = if before.is_some_and(|before| before["says"] == outcome["says"]) {
        "the same".to_owned()
    } else {
        let says = outcome["says"].as_array().into_iter().flatten().map(text);
        let says = says.collect::<Vec<_>>().join(" ");
        format!(
            "\u{201c}{}\u{201d}",
            says.replace('|', "\\|").replace('\n', " ")
        )
    };
    format!("not equal, {rows} of {expected} rows: {says}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_row_shows_what_was_hit_and_what_the_tracer_said() {
        let hook = |name, file, hits: u64| json!({"hook": name, "file": file, "table": ".dynsym", "hits": hits});
        let row = json!({
            "build": "shared", "version": "b1", "model": "llama", "repacked": true,
            "hooks": [
                hook("expert_ids", "libggml-cpu.so", 9), hook("fetch", "libggml-base.so", 0),
                hook("expert_ids", "libggml-cpu-x64.so", 0),
            ],
            "layout": "b4106 or newer", "layout_found_by": "names", "hits_per_token": 51.96,
            "run": {"equal": true, "rows": 12, "expected": 12, "says": []},
            "attach": {"equal": false, "rows": 0, "expected": 12, "says": ["INCOMPLETE: a|b."]},
        });
        let table = table(&[row]);
        let last = table.lines().last().unwrap();
        assert_eq!(
            last,
            "| shared | b1 | llama, repacked | `libggml-cpu.so`, `.dynsym`; not entered: 1 more \
             | `fetch` | b4106 or newer, names | 52 | equal, 12 rows | not equal, 0 of 12 rows: \
             \u{201c}INCOMPLETE: a\\|b.\u{201d} |"
        );
    }
}
