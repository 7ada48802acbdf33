//! llama-imatrix counts the rows routed to each expert itself: its counts and ours must be equal.

use std::{collections::BTreeMap, fs, path::Path};

use expert_trace_tests::{
    imatrix::read_counts,
    tracer::{self, Stats},
};

use crate::support::{llama_program, random_small, random_wide, scratch};

fn compare(model: &Path) {
    let directory = scratch();
    let [stats, text, counts] =
        ["stats.json", "text", "imatrix.gguf"].map(|name| directory.path().join(name));
    let sentences: Vec<String> = (0..400)
        .map(|i| {
            format!(
                "Line {i}: the {}th of {} owls counts {} mice.",
                i * 7,
                i % 13,
                i * i
            )
        })
        .collect();
    fs::write(&text, sentences.join("\n")).unwrap();
    let (text, counts) = (text.to_string_lossy(), counts.to_string_lossy());
    let command = llama_program(
        "llama-imatrix",
        model,
        &[
            "-f", &text, "-o", &counts, "-c", "128", "--chunks", "12", "--no-ppl", "-t", "2",
        ],
    );
    let options = [
        format!("--output={}", stats.display()),
        "--top=0".to_owned(),
    ];
    let output = tracer::run(&options, &command).unwrap().output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");

    let stats = Stats::read(&stats).unwrap();
    stats.assert_complete();
    let theirs = read_counts(Path::new(&*counts)).unwrap();
    let ours: BTreeMap<u32, Vec<u64>> = theirs
        .iter()
        .map(|(layer, counts)| {
            let layer_counts = &stats.counts()[layer];
            let of = |expert: usize| layer_counts.get(&(expert as u32)).copied().unwrap_or(0);
            (*layer, (0..counts.len()).map(of).collect())
        })
        .collect();
    assert_eq!(ours, theirs);
    assert_eq!(stats.counts().len(), theirs.len());
    let rows: u64 = theirs.values().flatten().sum();
    assert!(
        rows > 12 * 128,
        "several chunks were counted, not {rows} activations"
    );
}

#[test]
fn small() {
    compare(random_small());
}

#[test]
fn wide() {
    compare(random_wide());
}
