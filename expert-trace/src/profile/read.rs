//! Reading profiles from files of several kinds, which are told apart by what they contain.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::value::RawValue;
use thiserror::Error;

use super::{Profile, SCHEMA_NAME, SCHEMA_VERSION, Schema, counting::Counted, printable};
use crate::{
    stats_schema,
    trace::{
        Capture,
        reader::{ReadError as TraceError, Reader},
    },
};

/// Longest JSON that is read, in bytes: 300 contexts of the largest models that llama.cpp runs.
const MAX_JSON: u64 = 256 << 20;

/// Longest `sources` and `models`, in bytes of JSON: short values take many times their text in memory.
const MAX_LIST: usize = 8 << 20;

/// How a message of an Arrow stream begins.
const ARROW: [u8; 4] = [0xff; 4];

/// A profile that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What was read.
    pub profile: Profile,
    /// What is to be said of it: one sentence each.
    pub notes: Vec<String>,
}

/// Why no profile can be read from a file.
#[derive(Debug, Error)]
pub enum ReadError {
    /// It cannot be opened or read.
    #[error("cannot read {}: {error}", shown(path))]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It is something else.
    #[error(
        "{} has no counts that can be read: {why}. Name statistics (-o), a profile (merge) or a trace \
         (--trace)",
        shown(path)
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is, or lacks.
        why: String,
    },
    /// It was written by a newer program.
    #[error(
        "{} has version {version} of {name}, which this program does not know: use a newer expert-trace",
        shown(path)
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        name: &'static str,
        /// Its version.
        version: u32,
    },
    /// It is what it should be, with content that cannot be.
    #[error("{} is damaged: {why}", shown(path))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// It cannot be read as a trace.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// Reads statistics, a profile or a trace.
///
/// # Errors
/// When the file cannot be read, or is none of them.
pub fn read(path: &Path) -> Result<Found, ReadError> {
    let of_io = |error| ReadError::Io {
        path: path.to_owned(),
        error,
    };
    let file = File::open(path).map_err(of_io)?;
    let mut input = BufReader::with_capacity(1 << 20, file);
    let is_arrow = input.fill_buf().map_err(of_io)?.starts_with(&ARROW);
    if is_arrow {
        return from_traces([Ok((path, Reader::new(input, path)?))]);
    }
    let mut text = Vec::new();
    input
        .take(MAX_JSON + 1)
        .read_to_end(&mut text)
        .map_err(of_io)?;
    let profile = from_json(&text, path)?;
    checked(profile, Vec::new(), path)
}

/// Reads the files of one trace as one, in this order.
///
/// # Errors
/// When one cannot be read, or is no trace.
pub fn read_parts(paths: &[PathBuf]) -> Result<Found, ReadError> {
    from_traces(paths.iter().map(|path| Ok((&**path, Reader::open(path)?))))
}

/// What a trace says of its capture; none of other files, and of what can be read once alone, as a pipe.
///
/// # Errors
/// When the file cannot be read, or is a trace that cannot be.
pub fn capture(path: &Path) -> Result<Option<Capture>, ReadError> {
    let of_io = |error| ReadError::Io {
        path: path.to_owned(),
        error,
    };
    if !fs::metadata(path).map_err(of_io)?.is_file() {
        return Ok(None);
    }
    let mut input = BufReader::new(File::open(path).map_err(of_io)?);
    if !input.fill_buf().map_err(of_io)?.starts_with(&ARROW) {
        return Ok(None);
    }
    Ok(Some(Reader::new(input, path)?.capture().clone()))
}

fn from_traces<'a, R: Read>(
    files: impl IntoIterator<Item = Result<(&'a Path, Reader<R>), TraceError>>,
) -> Result<Found, ReadError> {
    let mut counted = Counted::nothing();
    let mut sources: Vec<String> = Vec::new();
    let mut notes = Vec::new();
    let mut last = Path::new("");
    for file in files {
        let (path, mut reader) = file?;
        counted.read_on(&mut reader, path, &mut |_| {})?;
        notes.extend(counted.note_of_end(path));
        sources.push(path.to_string_lossy().into_owned());
        last = path;
    }
    let shown = match &sources[..] {
        [first, .., last] => format!("{} to {}", printable(first), printable(last)),
        sources => printable(&sources.concat()),
    };
    notes.extend(counted.notes(&shown));
    let profile = Profile {
        sources,
        ..counted.profile(String::new())
    };
    checked(profile, notes, last)
}

/// A profile whose content can be, in its order.
fn checked(mut profile: Profile, notes: Vec<String>, path: &Path) -> Result<Found, ReadError> {
    profile.put_in_order();
    profile.check().map_err(|why| ReadError::Damaged {
        path: path.to_owned(),
        why,
    })?;
    Ok(Found { profile, notes })
}

fn from_json(text: &[u8], path: &Path) -> Result<Profile, ReadError> {
    #[derive(Deserialize)]
    struct Head<'a> {
        schema: Schema,
        #[serde(borrow, default)]
        sources: Option<&'a RawValue>,
        #[serde(borrow, default)]
        models: Option<&'a RawValue>,
    }

    let foreign = |why: String| ReadError::Foreign {
        path: path.to_owned(),
        why,
    };
    if text.len() as u64 > MAX_JSON {
        return Err(foreign(format!("it is longer than {} MiB", MAX_JSON >> 20)));
    }
    match text.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') => {}
        None => return Err(foreign("it is empty".into())),
        Some(_) => return Err(foreign("it is neither JSON nor an Arrow stream".into())),
    }
    let head: Head<'_> = serde_json::from_slice(text).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => foreign(format!("it has no schema ({error})")),
        _ => ReadError::Damaged {
            path: path.to_owned(),
            why: error.to_string(),
        },
    })?;
    let Schema { name, version } = head.schema;
    let (known, newest) = match name.as_str() {
        SCHEMA_NAME => (SCHEMA_NAME, SCHEMA_VERSION),
        stats_schema::NAME => (stats_schema::NAME, stats_schema::VERSION),
        _ => {
            let name = printable(&name.chars().take(100).collect::<String>());
            return Err(foreign(format!("its schema is '{name}'")));
        }
    };
    if version > newest {
        return Err(ReadError::Newer {
            path: path.to_owned(),
            name: known,
            version,
        });
    }
    for (key, list) in [("sources", head.sources), ("models", head.models)] {
        let length = list.map_or(0, |list| list.get().len());
        if length > MAX_LIST {
            return Err(ReadError::Damaged {
                path: path.to_owned(),
                why: format!("{key} has {length} bytes, and not more than {MAX_LIST} are read"),
            });
        }
    }
    let profile: Profile = serde_json::from_slice(text).map_err(|error| ReadError::Damaged {
        path: path.to_owned(),
        why: error.to_string(),
    })?;
    Ok(if known == SCHEMA_NAME {
        profile
    } else {
        from_statistics(profile, path)
    })
}

/// Statistics have the keys of a profile, as far as a profile has them, and one source.
fn from_statistics(statistics: Profile, path: &Path) -> Profile {
    let mut profile = Profile {
        schema: Schema::default(),
        sources: vec![path.to_string_lossy().into_owned()],
        ..statistics
    };
    for context in &mut profile.contexts {
        context.source = 0;
        context.summed.clear();
    }
    profile
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::Arc};

    use arrow_ipc::writer::StreamWriter;
    use expert_trace_common::Phase;
    use serde_json::json;

    use super::*;
    use crate::profile::{
        ContextProfile, ExpertProfile, LayerProfile, document,
        tests::{context, layer, profile},
    };
    use crate::trace::{Capture, Kind, Row, columns::Columns, schema};

    fn of_text(text: impl AsRef<[u8]>) -> Result<Found, ReadError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, text).unwrap();
        read(&path)
    }

    fn statistics(version: u32) -> serde_json::Value {
        json!({
            "schema": {"name": "expert-trace-stats", "version": version},
            "models": [{"arch": "qwen3moe", "n_expert": 8}],
            "layers_context": 0,
            "layers": [],
            "contexts": [{
                "id": 0, "pid": 7, "model": 0, "passes": 3,
                "layers": [{
                    "layer_id": 2, "coverage": "observed", "n_expert": 8, "k": 2,
                    "total_tokens": 3, "prefill_tokens": 2, "decode_tokens": 1, "activations": 6,
                    "second_block": null,
                    "experts": [
                        {"expert_id": 5, "activations": 3, "prefill": 2, "decode": 1,
                         "percentage": 100.0, "share": 0.5},
                        {"expert_id": 1, "activations": 3, "prefill": 2, "decode": 1,
                         "percentage": 100.0, "share": 0.5},
                    ],
                }],
            }],
        })
    }

    #[test]
    fn statistics_of_both_versions_are_read() {
        let expert = |expert_id| ExpertProfile {
            expert_id,
            activations: 3,
            prefill: 2,
            decode: 1,
        };
        for version in [1, 2] {
            let found = of_text(statistics(version).to_string()).unwrap();
            assert_eq!(found.profile.schema, Schema::default());
            assert_eq!(found.profile.sources.len(), 1);
            assert_eq!(found.profile.layers_context, Some(0));
            let layers = vec![LayerProfile {
                layer_id: 2,
                n_expert: Some(8),
                k: Some(2),
                coverage: Some("observed".into()),
                total_tokens: 3,
                prefill_tokens: 2,
                decode_tokens: 1,
                experts: vec![expert(1), expert(5)],
            }];
            let expected = ContextProfile {
                model: Some(0),
                layers,
                ..ContextProfile::default()
            };
            assert_eq!(found.profile.contexts, [expected]);
        }
    }

    #[test]
    fn a_profile_is_read_as_it_was_written() {
        let of = |counts| context(vec![layer(0, 4, counts), layer(7, 4, &[[0, 0], [1, 2]])]);
        let written = profile("a.json", vec![of(&[[3, 0], [2, 5]]), of(&[[9, 9]])]);
        let text = document::to_json(&written).unwrap();
        assert_eq!(of_text(&text).unwrap().profile, written);

        let document: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let first = &document["layers"][0];
        assert_eq!(document["layers_context"], 1);
        assert_eq!(first["experts"][0]["activations"], 18);
        let keys = |value: &serde_json::Value| -> Vec<String> {
            value.as_object().unwrap().keys().cloned().collect()
        };
        let mut layer = keys(first);
        layer.sort();
        assert_eq!(layer, ["experts", "layer_id", "total_tokens"]);
        let mut expert = keys(&first["experts"][0]);
        expert.sort();
        assert_eq!(expert, ["activations", "expert_id", "percentage"]);
    }

    /// A trace with a row in each of two batches, and where the first batch ends.
    fn trace() -> (Vec<u8>, usize) {
        let schema = schema::schema(&Capture::default());
        let mut columns = Columns::new(Arc::clone(&schema));
        let mut writer = StreamWriter::try_new(Vec::new(), &schema).unwrap();
        let mut batch = |experts: &[u16]| {
            columns.push(&Row {
                context: Some(0),
                layer: Some(2),
                phase: Some(Phase::Prefill),
                experts,
                ..Row::of(Kind::Routed)
            });
            writer.write(&columns.take().unwrap()).unwrap();
            writer.get_ref().len()
        };
        let first = batch(&[5, 1]);
        batch(&[5, 3]);
        (writer.into_inner().unwrap(), first)
    }

    #[test]
    fn a_trace_is_counted_also_when_it_was_cut() {
        let (text, first) = trace();
        let whole = of_text(&text).unwrap();
        let [note] = &whole.notes[..] else {
            panic!("{:?}", whole.notes);
        };
        assert!(
            note.contains("no summary stands at the end of part 0"),
            "{note}"
        );
        let layer = &whole.profile.context(None).unwrap().layers[0];
        assert_eq!(layer.dense(), [0, 1, 0, 1, 0, 2]);
        assert_eq!((layer.prefill_tokens, layer.decode_tokens), (2, 0));
        for length in [first, first + 10] {
            let cut = of_text(&text[..length]).unwrap();
            let layer = &cut.profile.context(None).unwrap().layers[0];
            assert_eq!(layer.dense(), [0, 1, 0, 0, 0, 1], "{length}");
            assert!(cut.notes[0].contains("has no end"), "{:?}", cut.notes);
        }
    }

    #[test]
    fn what_is_not_counts_is_refused_with_the_reason() {
        let newer = statistics(3).to_string();
        let other = json!({"schema": {"name": "x\u{1b}[31m", "version": 1}}).to_string();
        let cut = &statistics(2).to_string()[..200];
        for (text, reason) in [
            ("", "it is empty"),
            ("GGUF....", "neither JSON nor an Arrow stream"),
            ("[1, 2]", "neither JSON nor an Arrow stream"),
            ("{\"layers\": []}", "it has no schema"),
            (newer.as_str(), "version 3 of expert-trace-stats"),
            (other.as_str(), "its schema is 'x\u{fffd}[31m'"),
            (cut, "is damaged: EOF"),
        ] {
            let error = of_text(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
            assert!(!error.contains('\u{1b}'), "{error}");
        }
        let arrow = of_text([0xff, 0xff, 0xff, 0xff, 8, 0, 0, 0]).unwrap_err();
        assert!(matches!(arrow, ReadError::Trace(_)), "{arrow}");
    }

    #[test]
    fn long_lists_are_refused_before_they_take_memory() {
        for key in ["sources", "models"] {
            let of_bytes = |bytes: usize| {
                let mut document = statistics(2);
                document[key] = json!(["x".repeat(bytes)]);
                of_text(document.to_string())
            };
            assert!(of_bytes(MAX_LIST - 4).is_ok(), "{key}");
            let error = of_bytes(MAX_LIST).unwrap_err().to_string();
            assert!(
                error.contains(&format!("{key} has 8388612 bytes")),
                "{error}"
            );
        }
    }

    #[test]
    fn hostile_numbers_are_refused() {
        let layer = "/contexts/0/layers/0";
        let expert = "/contexts/0/layers/0/experts/0";
        for (at, key, value, reason) in [
            ("", "layers_context", json!(1), "layers_context"),
            ("/contexts/0", "id", json!(1), "context 0 has another id"),
            ("/contexts/0", "model", json!(1), "context 0 has another id"),
            (layer, "layer_id", json!(1024), "layer 1024 is beyond"),
            (layer, "layer_id", json!(70_000), "is damaged"),
            (
                layer,
                "n_expert",
                json!(4_000_000_000_u32),
                "beyond the limit",
            ),
            (layer, "n_expert", json!(5), "expert 5 is none of its 5"),
            (
                layer,
                "total_tokens",
                json!(4),
                "total_tokens is not the sum",
            ),
            (expert, "expert_id", json!(1), "expert 1 is there twice"),
            (expert, "activations", json!(4), "expert 5 are not the sum"),
            (
                expert,
                "prefill",
                json!(u64::MAX),
                "expert 5 are not the sum",
            ),
            (expert, "activations", json!(-1), "is damaged"),
        ] {
            let mut document = statistics(2);
            document.pointer_mut(at).unwrap()[key] = value;
            let error = of_text(document.to_string()).unwrap_err().to_string();
            assert!(error.contains(reason), "{at} {key}: {error}");
        }
        let mut twice = statistics(2);
        let layers = twice.pointer_mut("/contexts/0/layers").unwrap();
        let copy = layers[0].clone();
        layers.as_array_mut().unwrap().push(copy);
        let error = of_text(twice.to_string()).unwrap_err().to_string();
        assert!(error.contains("layer 2 is there twice"), "{error}");
    }
}
