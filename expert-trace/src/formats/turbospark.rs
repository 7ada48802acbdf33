//! `turbospark`: one JSON object, `num_layers`, `num_experts`, `top_k`, `counts[layer][expert]` and
//! `trace[layer]`, the ids that were chosen in a layer, token by token.
//!
//! Lists begin with layer 0, and those of layers without routing have zeros and nothing.

use std::{
    fs::File,
    io::{BufWriter, Read as _, Seek as _, SeekFrom, Write},
};

use anyhow::Context as _;

use super::{
    batches::{Batches, routed},
    counts,
    text::push_number,
};
use crate::profile::{ContextProfile, LayerProfile};

/// Text of a layer that is kept in memory.
const LANE: usize = 32 << 10;

/// Writes counts of a context; with a trace, what it routed too.
///
/// # Errors
/// When the trace cannot be read, or the output or a temporary file not be written.
pub fn write(
    batches: Option<&mut Batches<'_>>,
    context: &ContextProfile,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let layers = context
        .layers
        .last()
        .map_or(0, |layer| usize::from(layer.layer_id) + 1);
    let experts = counts::widest(context);
    let top_k = counts::k(context);
    let mut by_layer: Vec<Option<&LayerProfile>> = vec![None; layers];
    for layer in &context.layers {
        by_layer[usize::from(layer.layer_id)] = Some(layer);
    }
    write!(
        out,
        "{{\"num_layers\":{layers},\"num_experts\":{experts},\"top_k\":{top_k},\n\"counts\":["
    )?;
    for (index, layer) in by_layer.iter().enumerate() {
        let mut counts = layer.map_or_else(Vec::new, |layer| layer.dense());
        counts.resize(experts, 0);
        let mut text = separator(index).to_vec();
        text.push(b'[');
        push_list(&mut text, &counts);
        text.push(b']');
        out.write_all(&text)?;
    }
    out.write_all(b"\n],\n\"trace\":[")?;
    let mut lanes = Lanes::new(layers)?;
    if let Some(batches) = batches {
        while let Some(batch) = batches.next()? {
            for row in routed(&batch, context.id as u32) {
                lanes.add(row.layer.unwrap_or(0).into(), row.experts)?;
            }
        }
    }
    lanes.write(out)?;
    out.write_all(b"\n]}\n")?;
    Ok(())
}

fn separator(index: usize) -> &'static [u8] {
    if index == 0 { b"\n" } else { b",\n" }
}

fn push_list(text: &mut Vec<u8>, numbers: &[u64]) {
    for (index, number) in numbers.iter().enumerate() {
        if index > 0 {
            text.push(b',');
        }
        push_number(text, *number);
    }
}

/// Ids by layer, of which a trace has those of all layers in turn: what is too much for memory waits in a
/// temporary file.
struct Lanes {
    lanes: Vec<Lane>,
    spilled: BufWriter<File>,
    bytes: u64,
}

#[derive(Clone, Default)]
struct Lane {
    text: Vec<u8>,
    is_begun: bool,
    /// Places in the temporary file.
    chunks: Vec<(u64, usize)>,
}

impl Lanes {
    fn new(layers: usize) -> anyhow::Result<Self> {
        let file = tempfile::tempfile().context("cannot make a temporary file: set TMPDIR")?;
        Ok(Self {
            lanes: vec![Lane::default(); layers],
            spilled: BufWriter::new(file),
            bytes: 0,
        })
    }

    /// Adds the choices of a token, in one of the layers that there are.
    fn add(&mut self, layer: usize, experts: &[u16]) -> anyhow::Result<()> {
        let lane = self
            .lanes
            .get_mut(layer)
            .with_context(|| format!("layer {layer} came while the trace was read"))?;
        for expert in experts {
            if lane.is_begun {
                lane.text.push(b',');
            }
            lane.is_begun = true;
            push_number(&mut lane.text, (*expert).into());
        }
        if lane.text.len() >= LANE {
            self.spilled
                .write_all(&lane.text)
                .context("cannot write a temporary file: set TMPDIR to a directory with room")?;
            lane.chunks.push((self.bytes, lane.text.len()));
            self.bytes += lane.text.len() as u64;
            lane.text.clear();
        }
        Ok(())
    }

    fn write(self, out: &mut dyn Write) -> anyhow::Result<()> {
        let Self { lanes, spilled, .. } = self;
        let mut spilled = spilled
            .into_inner()
            .map_err(|error| error.into_error())
            .context("cannot write a temporary file: set TMPDIR to a directory with room")?;
        let mut chunk = Vec::new();
        for (index, lane) in lanes.iter().enumerate() {
            out.write_all(separator(index))?;
            out.write_all(b"[")?;
            for (at, length) in &lane.chunks {
                chunk.resize(*length, 0);
                spilled.seek(SeekFrom::Start(*at))?;
                spilled.read_exact(&mut chunk)?;
                out.write_all(&chunk)?;
            }
            out.write_all(&lane.text)?;
            out.write_all(b"]")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        formats::tests::{TraceOnDisk, routed, small_profile},
        trace::Row,
    };

    fn exported(rows: &[Row<'_>]) -> Value {
        let trace = TraceOnDisk::new(rows);
        let profile = trace.counted().profile("a".into());
        let mut out = Vec::new();
        trace
            .batches(|batches| write(Some(batches), &profile.contexts[0], &mut out))
            .unwrap();
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn lists_by_layer() {
        let value = exported(&[
            routed(0, 0, &[2, 1]),
            routed(0, 2, &[0, 1]),
            routed(1, 2, &[3, 3]),
            routed(0, 0, &[1, 0]),
        ]);
        assert_eq!(
            value,
            json!({
                "num_layers": 3, "num_experts": 3, "top_k": 2,
                "counts": [[1, 2, 1], [0, 0, 0], [1, 1, 0]],
                "trace": [[2, 1, 1, 0], [], [0, 1]],
            })
        );
    }

    #[test]
    fn long_lists_keep_their_order() {
        let ids: Vec<[u16; 2]> = (0..20_000).map(|i| [i % 1024, i / 7 % 1024]).collect();
        let rows: Vec<Row<'_>> = (0..)
            .zip(&ids)
            .map(|(i, ids)| routed(0, i % 2, ids))
            .collect();
        let value = exported(&rows);
        for layer in 0..2 {
            let expected: Vec<u16> = ids
                .iter()
                .skip(layer)
                .step_by(2)
                .flatten()
                .copied()
                .collect();
            assert_eq!(value["trace"][layer], json!(expected));
        }
    }

    #[test]
    fn counts_alone_have_no_trace() {
        let mut out = Vec::new();
        write(None, &small_profile().contexts[0], &mut out).unwrap();
        let value: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value["counts"][1], json!([1, 0, 3, 0]));
        assert_eq!(value["trace"], json!([[], [], [], [], []]));
    }
}
