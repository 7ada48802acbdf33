//! Traces for the tests of formats, and what several of them have to keep.

use std::{
    io::{Cursor, Write as _},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::{Format, batches::Batches, export, import, progress::Progress};
pub use crate::profile::counting::tests::routed;
use crate::{
    cli,
    profile::{
        self, ContextProfile, ExpertProfile, LayerProfile, Profile, counting::Counted, document,
    },
    stats_schema,
    trace::{Capture, Kind, Reader, Row, file::TraceFile},
};

/// A trace of these rows.
pub fn trace(rows: &[Row<'_>]) -> Vec<u8> {
    let capture = Capture {
        mode: "import".to_owned(),
        ..Capture::default()
    };
    let mut bytes = Vec::new();
    let mut file = TraceFile::begin(&mut bytes, &capture).unwrap();
    for row in rows {
        file.push(row).unwrap();
    }
    file.finish().unwrap();
    bytes
}

pub fn read(bytes: &[u8]) -> Reader<Cursor<&[u8]>> {
    Reader::new(Cursor::new(bytes), Path::new("test")).unwrap()
}

/// A trace in a file.
pub struct TraceOnDisk(NamedTempFile);

impl TraceOnDisk {
    pub fn new(rows: &[Row<'_>]) -> Self {
        Self::of(&trace(rows))
    }

    pub fn of(bytes: &[u8]) -> Self {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Self(file)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Has all its batches read.
    pub fn batches<T>(&self, read: impl FnOnce(&mut Batches<'_>) -> T) -> T {
        let mut progress = Progress::new(0, 1);
        read(&mut Batches::open(self.0.path(), u64::MAX, &mut progress).unwrap())
    }

    /// Something of each row.
    pub fn rows<T>(&self, of: impl Fn(&Row<'_>) -> T) -> Vec<T> {
        self.batches(|batches| {
            let mut all = Vec::new();
            while let Some(batch) = batches.next().unwrap() {
                all.extend(batch.rows().map(|row| of(&row)));
            }
            all
        })
    }

    /// What it has.
    pub fn counted(&self) -> Counted {
        let mut reader = Reader::open(self.0.path()).unwrap();
        Counted::read(&mut reader, self.0.path(), &mut |_| {}).unwrap()
    }
}

/// Counts of layer 1 with 4 experts, and of layer 4, of which it is not known how many it has.
pub fn small_profile() -> Profile {
    let expert = |expert_id, prefill, decode| ExpertProfile {
        expert_id,
        activations: prefill + decode,
        prefill,
        decode,
    };
    let layer = |layer_id, n_expert, prefill_tokens, decode_tokens, experts| LayerProfile {
        layer_id,
        n_expert,
        k: Some(1),
        coverage: None,
        total_tokens: prefill_tokens + decode_tokens,
        prefill_tokens,
        decode_tokens,
        experts,
    };
    let context = ContextProfile {
        id: 0,
        source: 0,
        model: None,
        layers: vec![
            layer(1, Some(4), 3, 1, vec![expert(2, 2, 1), expert(0, 1, 0)]),
            layer(4, None, 0, 5, vec![expert(1, 0, 5)]),
        ],
        summed: Vec::new(),
    };
    Profile::new(vec!["a".to_owned()], Vec::new(), vec![context])
}

/// What `export` was told to do in a directory of its own.
struct Exported {
    status: u8,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Exported {
    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

fn exported(input: &[u8], format: Format, context: Option<usize>) -> Exported {
    let directory = tempfile::tempdir().unwrap();
    let (from, path) = (directory.path().join("in"), directory.path().join("out"));
    std::fs::write(&from, input).unwrap();
    let status = export(&cli::Export {
        input: from,
        format,
        output: path.clone(),
        context,
    });
    Exported {
        status,
        path,
        _directory: directory,
    }
}

const ALL: [Format; 9] = [
    Format::Json,
    Format::Jsonl,
    Format::Csv,
    Format::Parquet,
    Format::RouteTrace,
    Format::Mbolt,
    Format::Turbospark,
    Format::ImatrixCounts,
    Format::Npy,
];

#[test]
fn a_trace_becomes_every_format() {
    let bytes = trace(&[routed(0, 1, &[2]), routed(1, 1, &[3]), routed(1, 1, &[3])]);
    for format in ALL {
        let exported = exported(&bytes, format, None);
        assert_eq!(exported.status, 0, "{format:?}");
        assert!(!exported.bytes().is_empty(), "{format:?}");
    }
}

#[test]
fn the_context_with_most_tokens_is_meant_unless_another_is_named() {
    let bytes = trace(&[routed(0, 1, &[2]), routed(1, 1, &[3]), routed(1, 1, &[3])]);
    let lines = |context| {
        let exported = exported(&bytes, Format::Csv, context);
        String::from_utf8(exported.bytes()).unwrap()
    };
    assert_eq!(lines(None), "layer,expert\n1,3\n1,3\n");
    assert_eq!(lines(Some(0)), "layer,expert\n1,2\n");
    assert_eq!(exported(&bytes, Format::Csv, Some(2)).status, 1);
    assert_eq!(
        exported(&bytes, Format::Jsonl, Some(1)).status,
        1,
        "it has all of them"
    );
}

#[test]
fn what_stands_before_a_cut_or_damage_is_exported() {
    let rows = vec![routed(0, 1, &[2]); 70_000];
    let bytes = trace(&rows);
    let mut damaged = bytes.clone();
    let second = second_batch(&bytes);
    damaged[second..second + 4].fill(0x55);
    for (bytes, status) in [(&bytes[..], 0), (&bytes[..second + 100], 0), (&damaged, 1)] {
        for format in ALL {
            let exported = exported(bytes, format, None);
            assert_eq!(exported.status, status, "{format:?}");
            assert!(!exported.bytes().is_empty());
        }
    }
    let lines = exported(&damaged, Format::Csv, None).bytes();
    assert_eq!(
        lines.iter().filter(|byte| **byte == b'\n').count(),
        1 + 65_536
    );
}

/// Where the second batch of rows begins.
fn second_batch(bytes: &[u8]) -> usize {
    let mut reader = read(bytes);
    reader.next().unwrap();
    let mut at = reader.position() as usize;
    // What stands between are dictionaries, if any.
    while bytes[at..at + 4] != [0xff; 4] {
        at += 1;
    }
    at
}

#[test]
fn foreign_files_are_refused() {
    let good = trace(&[routed(0, 1, &[2])]);
    for bytes in [&b""[..], b"{}", b"ARROW1", b"layer,expert\n", &good[..20]] {
        for format in ALL {
            let exported = exported(bytes, format, None);
            assert_eq!(exported.status, 1, "{format:?}");
            assert!(!exported.path.exists(), "{format:?}");
        }
    }
}

#[test]
fn counts_are_made_of_counts() {
    let profile = document::to_json(&small_profile()).unwrap();
    for format in ALL {
        let holds = matches!(
            format,
            Format::Json | Format::Csv | Format::Turbospark | Format::ImatrixCounts | Format::Npy
        );
        let exported = exported(&profile, format, None);
        assert_eq!(exported.status == 0, holds, "{format:?}");
        assert_eq!(exported.path.exists(), holds, "{format:?}");
    }
}

#[test]
fn documents_stay_as_they_are() {
    let profile = document::to_json(&small_profile()).unwrap();
    let statistics = json!({
        "schema": {"name": stats_schema::NAME, "version": 2},
        "contexts": [], "layers_context": null, "layers": [], "tool": {"version": "0.0.1"},
    });
    let statistics = format!(" {statistics:#}").into_bytes();
    for document in [profile, statistics] {
        assert_eq!(exported(&document, Format::Json, None).bytes(), document);
    }
}

#[test]
fn a_trace_with_an_end_becomes_the_document_of_its_capture() {
    let layer = json!({
        "layer_id": 1, "n_expert": 4, "passes": 2, "routes": ["router"], "total_tokens": 2,
        "prefill_tokens": 0, "decode_tokens": 2, "activations": 2, "second_block": null,
        "k": 1, "coverage": "observed",
    });
    let summary = json!({
        "schema": {"name": stats_schema::NAME, "version": stats_schema::VERSION},
        "models": [], "layers_context": 0,
        "contexts": [{"id": 0, "trace_context": 3, "layers": [layer]}],
    });
    let detail = summary.to_string();
    let end = Row {
        detail: Some(&detail),
        ..Row::of(Kind::Summary)
    };
    let rows = [routed(3, 1, &[2]), routed(3, 1, &[2]), end];
    let whole = exported(&trace(&rows), Format::Json, None);
    let document: Value = serde_json::from_slice(&whole.bytes()).unwrap();
    assert_eq!(document["schema"]["name"], stats_schema::NAME);
    assert_eq!(document["layers"][0]["experts"][0]["activations"], 2);
    let profile = profile::read::read(&whole.path).unwrap().profile;
    assert_eq!(profile.contexts[0].layers[0].dense(), [0, 0, 2, 0]);
    // A part of it is no more than its counts.
    for rows in [&rows[1..], &rows[..2]] {
        let part = exported(&trace(rows), Format::Json, None);
        let document: Value = serde_json::from_slice(&part.bytes()).unwrap();
        assert_eq!(document["schema"]["name"], profile::SCHEMA_NAME);
    }
}

#[test]
fn files_of_others_become_ours() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("in"), directory.path().join("out"));
    let imported = |bytes: &[u8], format, k| {
        std::fs::write(&from, bytes).unwrap();
        import(&cli::Import {
            input: from.clone(),
            format,
            output: to.clone(),
            k,
        })
    };
    let rows = [
        routed(0, 1, &[2, 0]),
        routed(0, 1, &[2, 1]),
        routed(0, 4, &[7, 3]),
    ];
    let trace = trace(&rows);
    let counts = |bytes: &[u8]| {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let profile = profile::read::read(file.path()).unwrap().profile;
        let layers = profile.contexts[0].layers.iter();
        layers
            .map(|layer| {
                let experts = layer.experts.iter();
                let counts: Vec<_> = experts
                    .map(|expert| (expert.expert_id, expert.activations))
                    .collect();
                (layer.layer_id, layer.total_tokens, counts)
            })
            .collect::<Vec<_>>()
    };
    let expected = counts(&exported(&trace, Format::Json, None).bytes());
    for (format, back) in [
        (Format::Csv, super::ImportFormat::Csv),
        (Format::ImatrixCounts, super::ImportFormat::Imatrix),
    ] {
        let bytes = exported(&trace, format, None).bytes();
        assert_eq!(imported(&bytes, back, Some(2)), 0);
        assert_eq!(counts(&std::fs::read(&to).unwrap()), expected, "{format:?}");
    }
    let bytes = exported(&trace, Format::RouteTrace, None).bytes();
    assert_eq!(imported(&bytes, super::ImportFormat::RouteTrace, None), 0);
    let bytes = std::fs::read(&to).unwrap();
    assert_eq!(
        counts(&exported(&bytes, Format::Json, None).bytes()),
        expected
    );
    assert_eq!(imported(b"", super::ImportFormat::Csv, None), 1);
    assert_eq!(imported(&bytes, super::ImportFormat::RouteTrace, None), 1);
}

/// A draft model without experts can be the first context.
#[test]
fn contexts_keep_their_numbers_in_a_profile() {
    let trace = trace(&[routed(1, 3, &[2]), routed(4, 3, &[5])]);
    let exported = exported(&trace, Format::Json, None);
    let profile = profile::read::read(&exported.path).unwrap().profile;
    let layers: Vec<usize> = profile.contexts.iter().map(|of| of.layers.len()).collect();
    assert_eq!(layers, [0, 1, 0, 0, 1]);
    assert_eq!(profile.layers_context, Some(1));
}
