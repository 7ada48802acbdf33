//! What is analyzed: a file of any kind that has routing or counts.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::Path,
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use tempfile::NamedTempFile;

use super::routing::{Layer, Routing};
use crate::{
    formats::{batches::Batches, progress::Progress, route_trace},
    gguf::{Gguf, ModelShape, shard_paths},
    profile::{
        ContextProfile, Profile,
        counting::Counted,
        model::ModelFacts,
        printable,
        read::{self, Found},
    },
    trace::{Capture, Kind, Reader},
};

/// How a message of an Arrow stream begins.
const ARROW: [u8; 4] = [0xff; 4];

/// Kinds of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A trace of ours.
    Trace,
    /// route_trace v1 of BigMoeOnEdge, or a trace that was made of it.
    RouteTrace,
    /// Statistics or a profile: counts alone.
    Counts,
}

/// A context of a file.
#[derive(Debug)]
pub struct Input {
    /// What the file is.
    pub kind: FileKind,
    /// Counts of the context.
    pub context: ContextProfile,
    /// Layers with experts, ascending.
    pub layers: Vec<Layer>,
    /// What it routed, where the file has rows.
    pub routing: Option<Routing>,
    /// What is known of its model.
    pub model: ModelFacts,
    /// What is to be said of the file, a sentence each.
    pub notes: Vec<String>,
    /// The summary of a trace: what its capture's document says beside the counts.
    pub summary: Option<serde_json::Value>,
}

/// Reads a file. `context` is the one that is wanted, by default that with most tokens; `model` is a GGUF whose
/// sizes count.
///
/// # Errors
/// When it cannot be read, is of another kind, or has no such context; when the model cannot be read, or has
/// other experts.
pub fn read(path: &Path, context: Option<usize>, model: Option<&Path>) -> anyhow::Result<Input> {
    let shown = printable(&path.to_string_lossy());
    let file = File::open(path).with_context(|| format!("cannot open {shown}"))?;
    let metadata = file
        .metadata()
        .with_context(|| format!("cannot read {shown}"))?;
    ensure!(
        metadata.is_file(),
        "{shown} is no regular file: save it as one"
    );
    let mut file = BufReader::with_capacity(1 << 20, file);
    let start = file
        .fill_buf()
        .with_context(|| format!("cannot read {shown}"))?;
    let model = model.map(sizes_of).transpose()?;
    let mut input = if start.starts_with(&ARROW) {
        from_trace(path, &shown, context, model)?
    } else if start.starts_with(b"# route_trace") {
        let mut trace = NamedTempFile::new().context("there is no room for a temporary file")?;
        route_trace::read(file, trace.as_file_mut()).with_context(|| shown.clone())?;
        from_trace(trace.path(), &shown, context, model)?
    } else {
        from_counts(path, context, model)?
    };
    for layer in &mut input.layers {
        let bytes = input.model.layer_bytes.get(&layer.id);
        layer.expert_bytes = bytes.map(|(expert, _)| *expert).filter(|bytes| *bytes > 0);
    }
    if let Some(routing) = &mut input.routing {
        routing.set_sizes(&input.layers);
    }
    Ok(input)
}

fn from_counts(
    path: &Path,
    context: Option<usize>,
    model: Option<ModelFacts>,
) -> anyhow::Result<Input> {
    let Found { profile, notes } = read::read(path)?;
    let chosen = chosen(&profile, context)?;
    let described = chosen.model.and_then(|index| profile.models.get(index));
    let known = described.map(ModelFacts::of).unwrap_or_default();
    Ok(Input {
        kind: FileKind::Counts,
        layers: layers(&chosen),
        context: chosen,
        routing: None,
        model: model.unwrap_or(known),
        notes,
        summary: None,
    })
}

fn from_trace(
    path: &Path,
    shown: &str,
    context: Option<usize>,
    model: Option<ModelFacts>,
) -> anyhow::Result<Input> {
    let mut reader = Reader::open(path)?;
    let bytes = path.metadata().map_or(0, |metadata| metadata.len());
    let mut progress = Progress::new(bytes, 2);
    let counted = Counted::read(&mut reader, path, &mut |bytes| progress.update(bytes))?;
    progress.end_round(reader.position());
    let mut notes: Vec<String> = counted.note_of_end(Path::new(shown)).into_iter().collect();
    notes.extend(counted.notes(shown));
    let mut profile = counted.profile(shown.to_owned());
    profile.put_in_order();
    // A trace that was cut can have lost what was asked for.
    let chosen = chosen(&profile, context);
    let chosen = chosen.map_err(|error| match notes.is_empty() {
        true => error,
        false => error.context(notes.join("; ")),
    })?;
    let id = chosen.id as u32;
    let of_context = counted.contexts.get(&id).context("no such context")?;
    if of_context.second_block_rows() > 0 {
        notes.push("second blocks of experts (GroveMoE) are left out".to_owned());
    }
    let known = counted.model_of(of_context);
    let layers = layers(&chosen);
    let activations: u64 = chosen.layers.iter().map(|layer| layer.activations()).sum();
    let rows: u64 = chosen.layers.iter().map(|layer| layer.total_tokens).sum();
    let kind = match reader.capture().mode == Capture::IMPORT {
        true => FileKind::RouteTrace,
        false => FileKind::Trace,
    };
    let mut routing = Routing::new(layers.clone(), rows as usize, activations as usize);
    let mut batches = Batches::open(path, counted.batches, &mut progress)?;
    while let Some(batch) = batches.next()? {
        for row in batch.rows() {
            match row.kind {
                Kind::Routed if row.context == Some(id) => {
                    let pushed = routing.push(&row);
                    pushed.map_err(|why| anyhow::anyhow!("{shown}: {why}"))?;
                }
                Kind::Gap if row.context.is_none_or(|context| context == id) => {
                    routing.push_gap(row.layer);
                }
                _ => {}
            }
        }
    }
    Ok(Input {
        kind,
        context: chosen,
        layers,
        routing: Some(routing),
        model: model.unwrap_or(known),
        notes,
        summary: counted.summary,
    })
}

/// The context that is wanted, which has routed something, with those layers alone that have.
fn chosen(profile: &Profile, wanted: Option<usize>) -> anyhow::Result<ContextProfile> {
    let mut chosen = profile.context(wanted)?.clone();
    chosen.layers.retain(|layer| !layer.experts.is_empty());
    ensure!(
        !chosen.layers.is_empty(),
        "context {} has routed nothing: there is nothing to analyze",
        chosen.id
    );
    Ok(chosen)
}

fn layers(context: &ContextProfile) -> Vec<Layer> {
    let mut first_key = 0;
    let layers = context.layers.iter().map(|layer| {
        let n_expert = layer.width() as u32;
        let layer = Layer {
            id: layer.layer_id,
            n_expert,
            k: layer.k.unwrap_or(0),
            expert_bytes: None,
            first_key,
        };
        first_key += n_expert;
        layer
    });
    layers.collect()
}

/// What a GGUF tells of its experts.
fn sizes_of(path: &Path) -> anyhow::Result<ModelFacts> {
    let open = |path: &Path| -> anyhow::Result<Gguf> {
        let shown = printable(&path.to_string_lossy());
        let file = File::open(path).with_context(|| format!("cannot open {shown} (--model)"))?;
        Gguf::read(&mut BufReader::new(file)).with_context(|| format!("{shown} (--model)"))
    };
    let shards = shard_paths(path);
    let shards: Vec<Gguf> = shards
        .iter()
        .map(|path| open(path))
        .collect::<Result<_, _>>()?;
    let shown = printable(&path.to_string_lossy());
    let shape = ModelShape::from_ggufs(&shards).with_context(|| format!("{shown} (--model)"))?;
    let mut described = serde_json::to_value(&shape)?;
    described["path"] = shown.into();
    Ok(ModelFacts::of(&described))
}
