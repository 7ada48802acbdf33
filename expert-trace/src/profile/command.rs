//! `merge`, `diff` and `verify`, as they are called: files in, files and text out.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, anyhow, ensure};

use super::{
    ContextProfile, Profile, diff, document, imatrix, merge, output, printable, read, verify,
};
use crate::cli;

/// Exit status of `verify` when the counts are not equal.
const DIFFERENT: u8 = 1;

/// Merges files, and writes what comes of it.
///
/// # Errors
/// When a file cannot be read, they do not fit each other, or the result cannot be written.
pub fn run_merge(arguments: &cli::Merge) -> anyhow::Result<u8> {
    let mut names = BTreeSet::new();
    let mut profiles = Vec::new();
    for path in &arguments.inputs {
        // Its counts would count twice.
        let name = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        ensure!(names.insert(name), "{} is named twice", shown(path));
        let profile = read_file(path)?;
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
    if counts.second_block {
        let imatrix = shown(imatrix);
        say!("{imatrix} has counts of second blocks of experts, which are not compared");
    }
    let [stats, imatrix] = [stats, imatrix].map(|path| path.to_string_lossy());
    Ok(verify::verify(&profile, context, &stats, &counts, &imatrix))
}

fn read_file(path: &Path) -> anyhow::Result<Profile> {
    let found = read::read(path)?;
    for note in found.notes {
        say!("{note}");
    }
    Ok(found.profile)
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
    use std::path::PathBuf;

    use super::*;
    use crate::profile::{
        imatrix::tests::file,
        tests::{context, layer, profile},
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
        let error = verify(&[3.0, 3.0, 0.0, 0.0], Some(1)).unwrap_err();
        assert!(
            format!("{error:#}").contains("(--context): it has no context 1"),
            "{error:#}"
        );
    }
}
