//! `csv`: a header `layer,expert`, and one line per activation: in the order of the trace, or of counts by layer
//! and expert.

use std::{
    collections::BTreeMap,
    io::{BufRead, Write},
};

use anyhow::{Context as _, ensure};

use super::{
    MAX_EXPERTS, MAX_LAYERS,
    batches::{Batches, routed},
    progress::Progress,
    text::{Header, Lines, push_number},
};
use crate::profile::{ContextProfile, ExpertProfile, LayerProfile, Profile};

const COLUMNS: [&str; 2] = ["layer", "expert"];

/// Writes the activations of a context.
///
/// # Errors
/// When the trace cannot be read, or the output not be written.
pub fn write(batches: &mut Batches<'_>, context: u32, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut lines = HEADER.to_vec();
    while let Some(batch) = batches.next()? {
        for row in routed(&batch, context) {
            for expert in row.experts {
                push_line(&mut lines, row.layer.unwrap_or(0), (*expert).into());
            }
            if lines.len() >= FLUSH {
                out.write_all(&lines)?;
                lines.clear();
            }
        }
    }
    Ok(out.write_all(&lines)?)
}

/// Writes as many lines for each expert as it has activations, by layer and expert. How many there are does
/// not matter to the memory it takes.
///
/// # Errors
/// When the output cannot be written.
pub fn write_counts(context: &ContextProfile, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut progress = Progress::new(bytes_of(context), 1);
    let mut written = 0_u64;
    out.write_all(HEADER)?;
    for layer in &context.layers {
        let mut experts: Vec<&ExpertProfile> = layer.experts.iter().collect();
        experts.sort_by_key(|expert| expert.expert_id);
        for expert in experts {
            let line = line(layer, expert);
            let in_block = (FLUSH / line.len()) as u64;
            let block = line.repeat(expert.activations.min(in_block) as usize);
            let mut left = expert.activations;
            while left > 0 {
                let lines = left.min(in_block);
                let bytes = &block[..lines as usize * line.len()];
                out.write_all(bytes)?;
                left -= lines;
                written = written.saturating_add(bytes.len() as u64);
                progress.update(written);
            }
        }
    }
    Ok(())
}

/// Bytes of all lines.
fn bytes_of(context: &ContextProfile) -> u64 {
    let experts = context
        .layers
        .iter()
        .flat_map(|layer| layer.experts.iter().map(move |expert| (layer, expert)));
    experts.fold(0_u64, |sum, (layer, expert)| {
        let line = line(layer, expert).len() as u64;
        sum.saturating_add(expert.activations.saturating_mul(line))
    })
}

fn line(layer: &LayerProfile, expert: &ExpertProfile) -> Vec<u8> {
    let mut line = Vec::new();
    push_line(&mut line, layer.layer_id, expert.expert_id);
    line
}

fn push_line(lines: &mut Vec<u8>, layer: u16, expert: u32) {
    push_number(lines, layer.into());
    lines.push(b',');
    push_number(lines, expert.into());
    lines.push(b'\n');
}

const HEADER: &[u8] = b"layer,expert\n";

/// Lines are handed on when they have so many bytes.
const FLUSH: usize = 128 << 10;

/// Counts the activations of such a file. How many experts a token has is not in it: without `k`, the
/// number of tokens stays 0. Phases are not in it either, and all counts as decode.
///
/// # Errors
/// When it is no such file, or has numbers that no model has.
pub fn read(input: impl BufRead, source: String, k: Option<u32>) -> anyhow::Result<Profile> {
    let mut lines = Lines::new(input);
    let mut layers: BTreeMap<u16, Vec<[u64; 2]>> = BTreeMap::new();
    let first = lines.next()?.context("it is empty")?;
    let header = Header::find(first, COLUMNS)
        .context("its first line names no columns 'layer' and 'expert'")?;
    while let Some(line) = lines.next()? {
        let numbers = match line.trim().is_empty() {
            true => continue,
            false => header.numbers(line),
        };
        let add = |[layer, expert]: [i64; 2]| {
            ensure!(
                (0..i64::from(MAX_LAYERS)).contains(&layer),
                "layer {layer}: models have at most {MAX_LAYERS}"
            );
            ensure!(
                (0..i64::from(MAX_EXPERTS)).contains(&expert),
                "expert {expert}: models have at most {MAX_EXPERTS}"
            );
            let (layer, expert) = (layer as u16, expert as usize);
            let counts = layers.entry(layer).or_default();
            if expert >= counts.len() {
                counts.resize(expert + 1, [0; 2]);
            }
            counts[expert][1] += 1;
            Ok(())
        };
        let added = numbers.and_then(add);
        added.with_context(|| format!("line {}", lines.number()))?;
    }
    let layers = layers.iter().map(|(layer_id, counts)| {
        let experts = ExpertProfile::list(counts);
        let activations: u64 = experts.iter().map(|expert| expert.activations).sum();
        let tokens = tokens(activations, k).with_context(|| format!("layer {layer_id}"))?;
        Ok(LayerProfile {
            layer_id: *layer_id,
            n_expert: None,
            k,
            coverage: None,
            total_tokens: tokens,
            prefill_tokens: 0,
            decode_tokens: tokens,
            experts,
        })
    });
    let layers = layers.collect::<anyhow::Result<_>>()?;
    let context = ContextProfile {
        layers,
        ..ContextProfile::default()
    };
    Ok(Profile::new(vec![source], Vec::new(), vec![context]))
}

/// Tokens that make so many activations; 0 when `k` is not known.
///
/// # Errors
/// When they are not `k` each.
pub fn tokens(activations: u64, k: Option<u32>) -> anyhow::Result<u64> {
    let Some(k) = k.map(u64::from) else {
        return Ok(0);
    };
    ensure!(
        k > 0 && activations.is_multiple_of(k),
        "{activations} activations are not {k} per token: give another --k, or none"
    );
    Ok(activations / k)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::tests::{TraceOnDisk, routed, small_profile};

    #[test]
    fn one_line_per_activation() {
        let trace = TraceOnDisk::new(&[
            routed(0, 3, &[5, 1]),
            routed(1, 3, &[7]),
            routed(0, 10, &[]),
            routed(0, 10, &[1023]),
        ]);
        let mut out = Vec::new();
        trace
            .batches(|batches| write(batches, 0, &mut out))
            .unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "layer,expert\n3,5\n3,1\n10,1023\n"
        );
    }

    #[test]
    fn counts_become_as_many_lines() {
        let mut profile = small_profile();
        let written = |profile: &Profile| {
            let mut out = Vec::new();
            write_counts(&profile.contexts[0], &mut out).unwrap();
            out
        };
        let lines = "layer,expert\n1,0\n1,2\n1,2\n1,2\n4,1\n4,1\n4,1\n4,1\n4,1\n";
        assert_eq!(String::from_utf8(written(&profile)).unwrap(), lines);

        // More than one block.
        let many = 3 * FLUSH as u64 / 4 + 1;
        let expert = &mut profile.contexts[0].layers[1].experts[0];
        (expert.activations, expert.decode) = (many, many);
        let text = written(&profile);
        let back = read(&text[..], "a".into(), None).unwrap();
        let counts = |profile: &Profile| -> Vec<Vec<(u32, u64)>> {
            let layers = profile.contexts[0].layers.iter();
            let of_layer = |layer: &LayerProfile| {
                let experts = layer.experts.iter();
                experts
                    .map(|expert| (expert.expert_id, expert.activations))
                    .collect()
            };
            layers.map(of_layer).collect()
        };
        assert_eq!(counts(&back), counts(&profile));
    }

    #[test]
    fn counts_come_back() {
        let text = b"expert,layer,more\n5,3,x\n1,3,\n\n5,3,y\n2,3,\n";
        let profile = read(&text[..], "a".into(), Some(2)).unwrap();
        let layer = &profile.contexts[0].layers[0];
        assert_eq!((layer.layer_id, layer.total_tokens), (3, 2));
        let counts: Vec<_> = layer
            .experts
            .iter()
            .map(|expert| (expert.expert_id, expert.activations))
            .collect();
        assert_eq!(counts, [(5, 2), (1, 1), (2, 1)]);
        let unknown = read(&text[..], "a".into(), None).unwrap();
        assert_eq!(unknown.contexts[0].layers[0].total_tokens, 0);
        assert!(read(&text[..], "a".into(), Some(3)).is_err());
        assert!(read(&text[..], "a".into(), Some(0)).is_err());
    }

    #[test]
    fn bad_lines_are_named() {
        for (text, expected) in [
            ("", "empty"),
            ("a,b\n", "no columns"),
            ("layer,expert\n1,2\n1\n", "line 3"),
            ("layer,expert\n1,1024\n", "line 2: expert 1024"),
            ("layer,expert\n1024,1\n", "line 2: layer 1024"),
            ("layer,expert\n-1,1\n", "line 2: layer -1"),
            ("layer,expert\n1,\x1b[2J\n", "'\u{fffd}[2J' is no number"),
        ] {
            let error = format!("{:#}", read(text.as_bytes(), "a".into(), None).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
