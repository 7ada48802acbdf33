//! `merge`, `diff` and `verify`, as they are called: files in, files and text out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow, ensure};

use super::{ContextProfile, Profile, diff, document, imatrix, merge, printable, read, verify};
use crate::{cli, output, trace::Capture};

/// Exit status of `verify` when the counts are not equal.
const DIFFERENT: u8 = 1;

/// Merges files, and writes what comes of it.
///
/// # Errors
/// When a file cannot be read, they do not fit each other, or the result cannot be written.
pub fn run_merge(arguments: &cli::Merge) -> anyhow::Result<u8> {
    let mut names = BTreeSet::new();
    for path in &arguments.inputs {
        // Its counts would count twice.
        let name = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        ensure!(names.insert(name), "{} is named twice", shown(path));
    }
    let mut profiles = Vec::new();
    for paths in of_one_trace_together(&arguments.inputs)? {
        let path = &paths[0];
        let profile = said(match &paths[..] {
            [only] => read::read(only)?,
            parts => read::read_parts(parts)?,
        });
        if profile.layers_context.is_none() {
            say!(
                "{}: nothing was routed: it adds nothing to the sum",
                shown(path)
            );
        }
        profiles.push(profile);
    }
    let merged = merge::merge(profiles)?;
    // Files that were merged before tell what is in them.
    let mut sources = BTreeSet::new();
    for source in merged.sources.iter().filter(|name| !sources.insert(*name)) {
        let source = printable(source);
        say!("{source} is in more than one of these files: its counts may be in the sum twice");
    }
    output::write(&arguments.output, &document::to_json(&merged)?)?;
    Ok(0)
}

/// Compares two files, and says how they differ.
///
/// # Errors
/// When a file cannot be read, or does not have the context.
pub fn run_diff(arguments: &cli::Diff) -> anyhow::Result<u8> {
    let (a, b) = (read_file(&arguments.a)?, read_file(&arguments.b)?);
    let in_a = context_of(&a, arguments.context_a, &arguments.a, "--context-a")?;
    let in_b = context_of(&b, arguments.context_b, &arguments.b, "--context-b")?;
    let side = |path: &Path, context: &ContextProfile| diff::Side {
        file: path.to_string_lossy().into_owned(),
        context: context.id,
    };
    let sides = [
        (side(&arguments.a, in_a), in_a),
        (side(&arguments.b, in_b), in_b),
    ];
    let report = diff::compare(sides, arguments.hot, arguments.top);
    output::print(&match arguments.json {
        true => to_json(&report)?,
        false => report.to_text().into_bytes(),
    })?;
    Ok(0)
}

/// Compares a file with an imatrix, and says how they differ. Gives the exit status.
///
/// # Errors
/// When one of the two cannot be read, or has no counts to compare.
pub fn run_verify(arguments: &cli::Verify) -> anyhow::Result<u8> {
    let report = verify_files(arguments)?;
    output::print(&match arguments.json {
        true => to_json(&report)?,
        false => report.to_text().into_bytes(),
    })?;
    Ok(match report.equal {
        true => 0,
        false => DIFFERENT,
    })
}

fn verify_files(arguments: &cli::Verify) -> anyhow::Result<verify::Report> {
    let cli::Verify { stats, imatrix, .. } = arguments;
    let profile = read_file(stats)?;
    let context = context_of(&profile, arguments.context, stats, "--context")?;
    let counts = imatrix::read(imatrix).map_err(|error| anyhow!("{} {error}", shown(imatrix)))?;
    let mut layers = counts.layers.values().flat_map(BTreeMap::values);
    ensure!(
        layers.any(|counts| counts.iter().any(|count| *count > 0)),
        "{} counts nothing: all its counts of experts are 0, and there is nothing to compare",
        shown(imatrix)
    );
    if counts.second_block {
        let imatrix = shown(imatrix);
        say!("{imatrix} has counts of second blocks of experts, which are not compared");
    }
    let [stats, imatrix] = [stats, imatrix].map(|path| path.to_string_lossy());
    Ok(verify::verify(&profile, context, &stats, &counts, &imatrix))
}

/// Files of a trace in several stand together, in their order, where the first of them was named.
fn of_one_trace_together(inputs: &[PathBuf]) -> anyhow::Result<Vec<Vec<PathBuf>>> {
    let mut traces: Vec<Vec<(Option<Capture>, &PathBuf)>> = Vec::new();
    for path in inputs {
        let capture = read::capture(path)?;
        let is_of = |trace: &&mut Vec<(Option<Capture>, &PathBuf)>| {
            let first = trace[0].0.as_ref();
            first
                .zip(capture.as_ref())
                .is_some_and(|(first, capture)| first.is_of_one_trace(capture))
        };
        match traces.iter_mut().find(is_of) {
            Some(trace) => trace.push((capture, path)),
            None => traces.push(vec![(capture, path)]),
        }
    }
    let number = |capture: &Option<Capture>| capture.as_ref().map_or(0, |capture| capture.part);
    let in_order = traces.into_iter().map(|mut trace| {
        trace.sort_by_key(|(capture, _)| number(capture));
        for pair in trace.windows(2) {
            let [(capture, a), (other, b)] = pair else {
                continue;
            };
            ensure!(
                number(capture) != number(other),
                "{} and {} are the same part of one trace, whose counts would count twice: name one of them",
                shown(a),
                shown(b)
            );
        }
        Ok(trace.into_iter().map(|(_, path)| path.clone()).collect())
    });
    in_order.collect()
}

fn read_file(path: &Path) -> anyhow::Result<Profile> {
    Ok(said(read::read(path)?))
}

/// What was found, when all was said of it.
fn said(found: read::Found) -> Profile {
    for note in found.notes {
        say!("{note}");
    }
    found.profile
}

fn context_of<'a>(
    profile: &'a Profile,
    id: Option<usize>,
    path: &Path,
    option: &str,
) -> anyhow::Result<&'a ContextProfile> {
    profile
        .context(id)
        .with_context(|| format!("{} ({option})", shown(path)))
}

fn to_json(report: &impl serde::Serialize) -> anyhow::Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(report)?;
    json.push(b'\n');
    Ok(json)
}

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        profile::{
            counting::tests::routed,
            imatrix::tests::file,
            tests::{context, layer, profile},
        },
        trace::{Kind, Row, file::TraceFile},
    };

    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn with_counts(&self, name: &str, counts: &[[u64; 2]]) -> PathBuf {
            let path = self.path(name);
            let written = profile(name, vec![context(vec![layer(3, 4, counts)])]);
            fs::write(&path, document::to_json(&written).unwrap()).unwrap();
            path
        }
    }

    #[test]
    fn files_are_merged_and_read_again() {
        let files = Files::new();
        let inputs = vec![
            files.with_counts("a", &[[1, 2], [3, 0]]),
            files.with_counts("b", &[[0, 0], [2, 2]]),
        ];
        let output = files.path("merged.json");
        let merge = |inputs: Vec<PathBuf>| {
            run_merge(&cli::Merge {
                inputs,
                output: output.clone(),
            })
        };
        assert_eq!(merge(inputs.clone()).unwrap(), 0);
        let merged = read::read(&output).unwrap().profile;
        assert_eq!(merged.sources, ["a", "b"]);
        let layer = &merged.context(None).unwrap().layers[0];
        assert_eq!(layer.dense(), [3, 7, 0, 0]);

        let again = files.path(".").join("a");
        let error = merge(vec![inputs[0].clone(), again]).unwrap_err();
        assert!(error.to_string().ends_with("is named twice"), "{error}");
        let error = merge(vec![files.path("missing")]).unwrap_err();
        assert!(error.to_string().starts_with("cannot read "), "{error}");
    }

    #[test]
    fn parts_of_a_trace_are_one() {
        let files = Files::new();
        let part = |name: &str, part, started: &str, rows: &[Row<'_>]| {
            let capture = Capture {
                mode: "run".into(),
                started: started.into(),
                part,
                ..Capture::default()
            };
            let mut written = Vec::new();
            let mut trace = TraceFile::begin(&mut written, &capture).unwrap();
            rows.iter().for_each(|row| trace.push(row).unwrap());
            trace.finish().unwrap();
            let path = files.path(name);
            fs::write(&path, written).unwrap();
            path
        };
        let (day, other_day) = ("2026-11-01T00:00:00.000Z", "2026-11-02T00:00:00.000Z");
        // The draft model's context has more than the main one in the second part.
        let small = routed(0, 3, &[1, 2]);
        let draft = routed(1, 0, &[0]);
        let inputs = [
            part(
                "t.0001.arrows",
                1,
                day,
                &[draft, draft, small, Row::of(Kind::Summary)],
            ),
            part("other", 0, other_day, &[small, Row::of(Kind::Summary)]),
            part("t.0000.arrows", 0, day, &[small, small, small]),
        ];
        let together = of_one_trace_together(&inputs).unwrap();
        let [first, second, third] = inputs.clone();
        assert_eq!(together, [vec![third.clone(), first.clone()], vec![second]]);

        let output = files.path("merged.json");
        let merge = |inputs: &[PathBuf]| {
            run_merge(&cli::Merge {
                inputs: inputs.to_vec(),
                output: output.clone(),
            })
        };
        merge(&inputs).unwrap();
        let merged = read::read(&output).unwrap().profile;
        assert_eq!(merged.sources.len(), 3);
        let main = merged.context(None).unwrap();
        assert_eq!(main.summed, [0, 2]);
        assert_eq!(main.layers.len(), 1, "nothing of the draft model");
        assert_eq!(main.layers[0].dense(), [0, 5, 5]);
        assert_eq!(merged.contexts[0].layers[0].total_tokens, 4);
        assert_eq!(merged.contexts[1].layers[0].total_tokens, 2);

        let notes = read::read_parts(&[third.clone(), first]).unwrap().notes;
        assert_eq!(notes, [""; 0]);
        let copy = files.path("copy");
        fs::copy(&third, &copy).unwrap();
        let error = merge(&[third, copy]).unwrap_err().to_string();
        assert!(error.contains("the same part of one trace"), "{error}");
    }

    #[test]
    fn verify_reads_both_files() {
        let files = Files::new();
        let verify = |counts: &[f32], context| {
            let imatrix = files.path("imatrix.gguf");
            let name = "blk.3.ffn_down_exps.weight.counts";
            let shape = &[1, counts.len() as u64];
            fs::write(&imatrix, file("imatrix", &[(name, shape, 0, counts)])).unwrap();
            verify_files(&cli::Verify {
                stats: files.with_counts("stats.json", &[[1, 2], [3, 0]]),
                imatrix,
                context,
                json: true,
            })
        };
        assert!(verify(&[3.0, 3.0, 0.0, 0.0], None).unwrap().equal);
        assert!(!verify(&[3.0, 4.0, 0.0, 0.0], None).unwrap().equal);
        let error = verify(&[3.0, 3.0, 0.0, 0.5], None).unwrap_err();
        assert!(
            format!("{error:#}").contains("imatrix.gguf is damaged"),
            "{error:#}"
        );
        let error = verify(&[0.0; 4], None).unwrap_err();
        assert!(error.to_string().contains("counts nothing"), "{error}");
        let error = verify(&[3.0, 3.0, 0.0, 0.0], Some(1)).unwrap_err();
        assert!(
            format!("{error:#}").contains("(--context): it has no context 1"),
            "{error:#}"
        );
    }
}
