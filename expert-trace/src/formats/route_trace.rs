//! `route-trace`: route_trace v1 of BigMoeOnEdge, one line per activation behind a preamble on the model.
//!
//! ```text
//! # route_trace v1
//! # model=<path> arch=<name> n_layer=<n> n_expert=<n> n_expert_used=<n>
//! # layer=<n> expert_bytes=<n> dense_bytes=<n>          (of each layer)
//! turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped
//! ```
//!
//! `phase` is 0 for prompts, and 1 for generated tokens; `step` is the position; `slot` 0 is the first
//! choice of the router. A weight that is not known is `nan`. A trace says nothing of what was in memory. `expert_bytes` is
//! that of the row's layer, 0 where it is not known.

use std::{
    collections::BTreeMap,
    io::{BufRead, Write},
};

use anyhow::{Context as _, bail, ensure};
use expert_trace_common::Phase;
use serde_json::json;

use super::{
    MAX_EXPERTS, MAX_LAYERS,
    batches::{Batches, routed},
    counts,
    text::{Header, Lines, push_number},
};
use crate::{
    profile::{
        ContextProfile,
        model::{LAYER_BYTES, ModelFacts},
        printable,
    },
    trace::{Capture, ContextDetail, Kind, Row, Weights, file::TraceFile, phase_key},
};

/// Stands for the path and the architecture of a model that is not known.
const UNKNOWN: &str = "?";

/// Lines are handed on when they have so many bytes.
const FLUSH: usize = 128 << 10;

/// `phase` of generated tokens.
const GENERATED: i64 = 1;

/// Most rows of a layer that wait for its end.
const MAX_HELD: usize = 64 << 10;

/// Most experts that one token can choose.
const MAX_K: usize = MAX_EXPERTS as usize;

/// Writes what a context routed that runs this model and has these counts.
///
/// # Errors
/// When the trace cannot be read, or the output not be written.
pub fn write(
    batches: &mut Batches<'_>,
    model: &ModelFacts,
    context: &ContextProfile,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut lines = preamble(model, context).into_bytes();
    let mut steps = Steps::default();
    let mut held = Held::default();
    let mut seen = context.layers.iter().rev();
    let last = seen.find(|layer| layer.total_tokens > 0);
    let last = last.map(|layer| layer.layer_id);
    let bytes_of = |layer: Option<u16>| {
        let bytes = layer.and_then(|layer| model.layer_bytes.get(&layer));
        bytes.map_or(0, |(expert, _)| *expert)
    };
    while let Some(batch) = batches.next()? {
        for row in routed(&batch, context.id as u32) {
            if row.layer != last || row.pass != held.pass {
                held.release(&mut lines, &mut steps, bytes_of(last));
            }
            if row.layer == last && row.position.is_none() && held.hold(&row) {
                continue;
            }
            push_row(&mut lines, &row, steps.of(&row), bytes_of(row.layer));
            if lines.len() >= FLUSH {
                out.write_all(&lines)?;
                lines.clear();
            }
        }
    }
    held.release(&mut lines, &mut steps, bytes_of(last));
    Ok(out.write_all(&lines)?)
}

fn preamble(model: &ModelFacts, context: &ContextProfile) -> String {
    let path = printable(model.path.as_deref().unwrap_or(UNKNOWN));
    let arch = printable(model.arch.as_deref().unwrap_or(UNKNOWN));
    let last = context.layers.last().map_or(0, |layer| layer.layer_id);
    let layers = model.layers.unwrap_or(u64::from(last) + 1);
    let experts = counts::widest(context);
    let k = counts::k(context);
    let mut text = format!(
        "# route_trace v1\n\
         # model={path} arch={arch} n_layer={layers} n_expert={experts} n_expert_used={k}\n"
    );
    let mut bytes = model.layer_bytes.clone();
    for layer in &context.layers {
        bytes.entry(layer.layer_id).or_default();
    }
    for (layer, (expert, dense)) in bytes {
        text += &format!("# layer={layer} expert_bytes={expert} dense_bytes={dense}\n");
    }
    text + "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped\n"
}

fn push_row(lines: &mut Vec<u8>, row: &Row<'_>, step: i64, expert_bytes: u64) {
    let phase = row.phase.map_or(1, phase_key);
    let mut weights = row.weights.unwrap_or_default().iter();
    for (slot, expert) in (0..).zip(row.experts) {
        lines.extend(b"0,");
        lines.push(b'0' + phase);
        lines.push(b',');
        if step < 0 {
            lines.push(b'-');
        }
        push_number(lines, step.unsigned_abs());
        lines.push(b',');
        push_number(lines, row.layer.unwrap_or(0).into());
        lines.push(b',');
        push_number(lines, slot);
        lines.push(b',');
        push_number(lines, (*expert).into());
        lines.push(b',');
        push_weight(lines, weights.next().copied());
        lines.extend(b",0,");
        push_number(lines, expert_bytes);
        lines.extend(b",0\n");
    }
}

fn push_weight(lines: &mut Vec<u8>, weight: Option<f32>) {
    match weight.filter(|weight| !weight.is_nan()) {
        // The shortest text that is read as the same number.
        Some(weight) => lines.extend(format!("{weight}").bytes()),
        None => lines.extend(b"nan"),
    }
}

/// Positions of rows. Those that are not known are counted.
#[derive(Debug, Default)]
struct Steps {
    pass: Option<u32>,
    /// The first position of the pass.
    first: i64,
    /// The position after the last of the pass.
    end: i64,
}

impl Steps {
    fn enter(&mut self, pass: Option<u32>) {
        if self.pass != pass {
            self.pass = pass;
            self.first = self.end;
        }
    }

    fn of(&mut self, row: &Row<'_>) -> i64 {
        self.enter(row.pass);
        let known = row.position.map(i64::from);
        let step = known.unwrap_or(self.first + i64::from(row.row.unwrap_or(0)));
        self.end = self.end.max(step + 1);
        step
    }
}

/// Rows of the last layer whose positions are not known. Of a prompt, that layer computes the rows alone whose
/// output is wanted, and these are the last ones of the pass, as a rule. How many there are shows at their end.
#[derive(Debug, Default)]
struct Held {
    pass: Option<u32>,
    layer: Option<u16>,
    /// Phase, row, how many experts, and whether they have weights.
    rows: Vec<(Option<Phase>, u32, usize, bool)>,
    experts: Vec<u16>,
    weights: Vec<f32>,
}

impl Held {
    /// Whether it is held: the rows of one pass, up to a number that no pass has.
    fn hold(&mut self, row: &Row<'_>) -> bool {
        if self.rows.len() >= MAX_HELD {
            return false;
        }
        (self.pass, self.layer) = (row.pass, row.layer);
        let number = row.row.unwrap_or(0);
        let has_weights = row.weights.is_some();
        self.rows
            .push((row.phase, number, row.experts.len(), has_weights));
        self.experts.extend_from_slice(row.experts);
        self.weights
            .extend_from_slice(row.weights.unwrap_or_default());
        true
    }

    fn release(&mut self, lines: &mut Vec<u8>, steps: &mut Steps, expert_bytes: u64) {
        if self.rows.is_empty() {
            return;
        }
        steps.enter(self.pass);
        let rows = self.rows.iter().map(|(_, row, ..)| i64::from(*row) + 1);
        let rows = rows.max().unwrap_or(0);
        let first = steps.first.max(steps.end - rows);
        let mut experts = &self.experts[..];
        let mut weights = &self.weights[..];
        for (phase, row, k, has_weights) in self.rows.drain(..) {
            let (chosen, rest) = experts.split_at(k);
            experts = rest;
            let of_row = has_weights.then(|| weights.split_at(k));
            weights = of_row.map_or(weights, |(_, rest)| rest);
            let step = first + i64::from(row);
            let row = Row {
                phase,
                layer: self.layer,
                experts: chosen,
                weights: of_row.map(|(of_row, _)| of_row),
                ..Row::of(Kind::Routed)
            };
            push_row(lines, &row, step, expert_bytes);
            steps.end = steps.end.max(step + 1);
        }
        self.experts.clear();
        self.weights.clear();
    }
}

/// What a preamble says.
#[derive(Debug, Default)]
struct Preamble {
    path: Option<String>,
    arch: Option<String>,
    numbers: BTreeMap<&'static str, u64>,
    bytes: BTreeMap<u16, (u64, u64)>,
}

/// Makes a trace of such a file. Its passes begin where the number of the layer falls, and of a model with one
/// layer of experts where the phase changes, or a generated token has a higher step. It has no times.
///
/// # Errors
/// When it is no such file, or has numbers that no model has, or the output cannot be written.
pub fn read(input: impl BufRead, out: &mut (dyn Write + Send)) -> anyhow::Result<Imported> {
    let mut lines = Lines::new(input);
    match lines.next()?.map(str::trim) {
        Some("# route_trace v1") => {}
        Some(line) if line.starts_with("# route_trace ") => {
            let version = printable(line.trim_start_matches("# route_trace "));
            bail!("it has version '{version}' of route_trace, and this program reads v1");
        }
        _ => bail!("it does not begin with '# route_trace v1'"),
    }
    let mut preamble = Preamble::default();
    let columns = loop {
        let line = lines.next()?.context("it ends before its columns")?;
        let Some(text) = line.strip_prefix('#') else {
            break Columns::find(line)?;
        };
        let read = preamble.add(text.trim());
        read.with_context(|| format!("line {}", lines.number()))?;
    };
    let capture = Capture {
        tool: format!("expert-trace {}", env!("CARGO_PKG_VERSION")),
        mode: Capture::IMPORT.to_owned(),
        weights: columns.weight.map(|_| Weights::Imported),
        ..Capture::default()
    };
    let mut trace = TraceFile::begin(out, &capture)?;
    let detail = serde_json::to_string(&preamble.context())?;
    trace.push(&Row {
        kind: Kind::Context,
        context: Some(0),
        detail: Some(&detail),
        ..Row::of(Kind::Context)
    })?;
    let mut token = Token {
        several_layers: preamble.bytes.len() > 1,
        ..Token::default()
    };
    let limit = preamble.n_expert();
    while let Some(choice) = columns.next(&mut lines)? {
        let added = token.add(choice, limit, &mut trace);
        added.with_context(|| format!("line {}", lines.number()))?;
    }
    token.end(&mut trace)?;
    trace.finish()?;
    Ok(token.imported)
}

impl Preamble {
    fn add(&mut self, text: &str) -> anyhow::Result<()> {
        // A path can have spaces, and words that look like what follows it.
        let path = text.strip_prefix("model=");
        let (path, told) = match path.and_then(|path| path.rsplit_once(" arch=")) {
            Some((before, _)) => (Some(before), &text["model=".len() + before.len()..]),
            None => (path, text),
        };
        let value_of = |key: &str| {
            let mut words = told.split(' ').filter_map(|word| word.split_once('='));
            words.find_map(|(of, value)| (of == key).then_some(value))
        };
        let number = |key: &str| -> anyhow::Result<Option<u64>> {
            value_of(key)
                .map(|value| {
                    let number = value.parse::<u64>();
                    number.with_context(|| format!("{key} is '{}'", printable(value)))
                })
                .transpose()
        };
        if let Some(path) = path {
            let is_known = |text: &&str| *text != UNKNOWN;
            self.path = Some(path).filter(is_known).map(str::to_owned);
            self.arch = value_of("arch").filter(is_known).map(str::to_owned);
            for key in ["n_layer", "n_expert", "n_expert_used"] {
                if let Some(number) = number(key)? {
                    self.numbers.insert(key, number);
                }
            }
            ensure!(
                self.numbers.get("n_expert").copied().unwrap_or(0) <= MAX_EXPERTS.into(),
                "more than {MAX_EXPERTS} experts, as no model has"
            );
        } else if let Some(layer) = number("layer")? {
            let layer = u16::try_from(layer).ok().filter(|id| *id < MAX_LAYERS);
            let layer =
                layer.with_context(|| format!("models have at most {MAX_LAYERS} layers"))?;
            let expert = number("expert_bytes")?.unwrap_or(0);
            self.bytes
                .insert(layer, (expert, number("dense_bytes")?.unwrap_or(0)));
        }
        Ok(())
    }

    /// Experts that rows can have; all that are believed when it is not said.
    fn n_expert(&self) -> i64 {
        let number = self.numbers.get("n_expert").filter(|number| **number > 0);
        number.map_or(MAX_EXPERTS.into(), |number| *number as i64)
    }

    fn context(&self) -> ContextDetail {
        let number = |key: &str| self.numbers.get(key);
        let bytes: Vec<_> = self
            .bytes
            .iter()
            .map(|(layer, (expert, dense))| {
                json!({"layer_id": layer, "expert_bytes": expert, "dense_bytes": dense})
            })
            .collect();
        ContextDetail {
            pid: 0,
            models: vec![json!({
                "path": self.path,
                "arch": self.arch,
                "layers": number("n_layer"),
                "n_expert": number("n_expert"),
                "n_expert_used": number("n_expert_used"),
                LAYER_BYTES: bytes,
            })],
        }
    }
}

/// A line of the table: a choice.
#[derive(Clone, Copy, Debug)]
struct Choice {
    /// Turn, phase, step, layer, slot and expert.
    numbers: [i64; 6],
    weight: Option<f32>,
}

/// Where the columns are.
#[derive(Debug)]
struct Columns {
    numbers: Header<6>,
    weight: Option<usize>,
}

impl Columns {
    fn find(line: &str) -> anyhow::Result<Self> {
        let names = ["turn", "phase", "step", "layer", "slot", "expert"];
        Ok(Self {
            numbers: Header::find(line, names)?,
            weight: Header::<6>::optional(line, "weight"),
        })
    }

    /// The next choice, if there is one.
    fn next(&self, lines: &mut Lines<impl BufRead>) -> anyhow::Result<Option<Choice>> {
        while let Some(line) = lines.next()? {
            if line.trim().is_empty() {
                continue;
            }
            let read = self.read(line);
            return read
                .map(Some)
                .with_context(|| format!("line {}", lines.number()));
        }
        Ok(None)
    }

    fn read(&self, line: &str) -> anyhow::Result<Choice> {
        let numbers = self.numbers.numbers(line)?;
        let weight = self.weight.map(|place| {
            let text = line.split(',').nth(place).unwrap_or_default().trim();
            let weight = text.parse::<f32>();
            weight.with_context(|| format!("weight '{}' is no number", printable(text)))
        });
        Ok(Choice {
            numbers,
            weight: weight.transpose()?.filter(|weight| !weight.is_nan()),
        })
    }
}

/// What was found in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Rows of the trace.
    pub rows: u64,
    /// Whether there is more than one turn, which a trace does not tell apart.
    pub several_turns: bool,
    /// Rows without weights: not all of their choices have one.
    pub unweighted_rows: u64,
}

/// The token whose choices are being read.
#[derive(Debug, Default)]
struct Token {
    /// Turn, phase, step and layer.
    key: Option<[i64; 4]>,
    experts: Vec<u16>,
    /// Those that are known.
    weights: Vec<f32>,
    pass: u32,
    row: u32,
    /// Whether there is more than one layer.
    several_layers: bool,
    imported: Imported,
}

impl Token {
    fn add(
        &mut self,
        choice: Choice,
        n_expert: i64,
        trace: &mut TraceFile<impl Write>,
    ) -> anyhow::Result<()> {
        let [turn, phase, step, layer, slot, expert] = choice.numbers;
        ensure!((0..=1).contains(&phase), "there is no phase {phase}");
        ensure!(i32::try_from(step).is_ok(), "there is no step {step}");
        ensure!(
            (0..i64::from(MAX_LAYERS)).contains(&layer),
            "layer {layer}: models have at most {MAX_LAYERS}"
        );
        ensure!(
            (0..n_expert).contains(&expert),
            "expert {expert}: the model has {n_expert} at most"
        );
        let key = [turn, phase, step, layer];
        if slot == 0 {
            self.end(trace)?;
            self.begin(key)?;
        }
        ensure!(
            self.key == Some(key)
                && slot == self.experts.len() as i64
                && self.experts.len() < MAX_K,
            "slot {slot} does not follow: {} choices of this token stand before it",
            if self.key == Some(key) {
                self.experts.len()
            } else {
                0
            }
        );
        self.experts.push(expert as u16);
        self.weights.extend(choice.weight);
        Ok(())
    }

    /// Begins another token; `key` is still that of the one before.
    fn begin(&mut self, key: [i64; 4]) -> anyhow::Result<()> {
        if let Some([turn, phase, step, layer]) = self.key {
            self.imported.several_turns |= turn != key[0];
            self.several_layers |= layer != key[3];
            // The number of a layer that is alone never falls.
            let alone =
                !self.several_layers && (phase != key[1] || (key[1] == GENERATED && step < key[2]));
            let begins = turn != key[0] || key[3] < layer || alone;
            if begins {
                self.pass = self.pass.checked_add(1).context("too many passes")?;
            }
            self.row = match !begins && key[3] == layer {
                true => self.row.checked_add(1).context("too many rows in a pass")?,
                false => 0,
            };
        }
        self.key = Some(key);
        Ok(())
    }

    fn end(&mut self, trace: &mut TraceFile<impl Write>) -> anyhow::Result<()> {
        let Some([_, phase, step, layer]) = self.key.filter(|_| !self.experts.is_empty()) else {
            return Ok(());
        };
        let is_weighted = self.weights.len() == self.experts.len();
        let weights = is_weighted.then_some(&self.weights[..]);
        trace.push(&Row {
            context: Some(0),
            pass: Some(self.pass),
            phase: Some(if phase == 0 {
                Phase::Prefill
            } else {
                Phase::Decode
            }),
            layer: Some(layer as u16),
            row: Some(self.row),
            position: Some(step as i32),
            experts: &self.experts,
            weights,
            ..Row::of(Kind::Routed)
        })?;
        self.imported.rows += 1;
        self.imported.unweighted_rows += u64::from(weights.is_none());
        self.experts.clear();
        self.weights.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, path::Path};

    use super::*;
    use crate::formats::tests::{TraceOnDisk, routed};

    const FILE: &str = "\
# route_trace v1
# model=/a model.gguf arch=qwen3moe n_layer=5 n_expert=8 n_expert_used=2
# layer=3 expert_bytes=100 dense_bytes=7
# layer=4 expert_bytes=200 dense_bytes=8
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped
0,0,0,3,0,5,nan,0,100,0
0,0,0,3,1,1,nan,0,100,0
0,0,1,3,0,5,nan,0,100,0
0,0,1,3,1,2,nan,0,100,0
0,0,0,4,0,7,nan,0,200,0
0,0,1,4,0,7,nan,0,200,0
0,1,2,3,0,0,nan,0,100,0
0,1,2,3,1,6,nan,0,100,0
";

    fn trace_of(text: &str) -> anyhow::Result<(Vec<u8>, Imported)> {
        let mut trace = Vec::new();
        let imported = read(text.as_bytes(), &mut trace)?;
        Ok((trace, imported))
    }

    fn exported(trace: &TraceOnDisk) -> String {
        let counted = trace.counted();
        let profile = counted.profile("a".into());
        let context = &profile.contexts[0];
        let model = counted.model_of(&counted.contexts[&(context.id as u32)]);
        let mut out = Vec::new();
        trace
            .batches(|batches| write(batches, &model, context, &mut out))
            .unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn weights_come_back() {
        let mut weights = (1..).map(|n| format!(",{},", 1.0 / n as f32));
        let mut lines: Vec<String> = FILE
            .lines()
            .map(|line| match line.contains(",nan,") {
                true => line.replacen(",nan,", &weights.next().unwrap(), 1),
                false => line.to_owned(),
            })
            .collect();
        let weighted = lines.join("\n") + "\n";
        let (trace, imported) = trace_of(&weighted).unwrap();
        assert_eq!(imported.unweighted_rows, 0);
        let trace = TraceOnDisk::of(&trace);
        assert_eq!(exported(&trace), weighted);
        let first = trace.rows(|row| row.weights.map(<[f32]>::to_vec));
        assert_eq!(first[..2], [None, Some(vec![1.0, 0.5])]);

        // One that is not known leaves its row without.
        let last = lines.last_mut().unwrap();
        *last = "0,1,2,3,1,6,nan,0,100,0".to_owned();
        let (trace, imported) = trace_of(&(lines.join("\n") + "\n")).unwrap();
        assert_eq!(imported.unweighted_rows, 1);
        let text = exported(&TraceOnDisk::of(&trace));
        assert!(text.ends_with("0,1,2,3,0,0,nan,0,100,0\n0,1,2,3,1,6,nan,0,100,0\n"));

        let odd = weighted.replacen(",0.5,", ",half,", 1);
        let error = format!("{:#}", trace_of(&odd).unwrap_err());
        assert!(error.starts_with("line 7: weight 'half' is no number"));
    }

    /// Rows of the last layer without positions are held back until their pass is over.
    #[test]
    fn rows_that_are_held_keep_their_weights() {
        let of = |row, weights| Row {
            pass: Some(0),
            row: Some(row),
            position: None,
            weights,
            ..routed(0, 3, &[5, 1])
        };
        let capture = Capture {
            weights: Some(Weights::Router),
            ..Capture::default()
        };
        let mut bytes = Vec::new();
        let mut trace = TraceFile::begin(&mut bytes, &capture).unwrap();
        for row in [
            of(0, Some(&[0.25, 0.125][..])),
            of(1, None),
            of(2, Some(&[2.0, -1.0])),
        ] {
            trace.push(&row).unwrap();
        }
        trace.finish().unwrap();
        let text = exported(&TraceOnDisk::of(&bytes));
        let weights: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("0,"))
            .map(|line| line.split(',').nth(6).unwrap())
            .collect();
        assert_eq!(weights, ["0.25", "0.125", "nan", "nan", "2", "-1"]);
    }

    #[test]
    fn a_file_comes_back_as_it_was() {
        let (trace, imported) = trace_of(FILE).unwrap();
        let expected = Imported {
            rows: 5,
            several_turns: false,
            unweighted_rows: 5,
        };
        assert_eq!(imported, expected);
        let trace = TraceOnDisk::of(&trace);
        assert_eq!(exported(&trace), FILE);
        let places: Vec<_> = trace
            .rows(|row| (row.pass, row.layer, row.row))
            .into_iter()
            .skip(1)
            .collect();
        let place = |pass, layer, row| (Some(pass), Some(layer), Some(row));
        assert_eq!(
            places,
            [
                place(0, 3, 0),
                place(0, 3, 1),
                place(0, 4, 0),
                place(0, 4, 1),
                place(1, 3, 0)
            ]
        );
    }

    #[test]
    fn unknown_positions_are_counted() {
        let row = |pass, row| Row {
            pass: Some(pass),
            row: Some(row),
            ..routed(0, 3, &[1])
        };
        let known = Row {
            position: Some(9),
            ..row(1, 0)
        };
        let trace = TraceOnDisk::new(&[row(0, 0), row(0, 1), known, row(2, 0)]);
        let text = exported(&trace);
        let steps: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("0,1,"))
            .map(|line| line.split(',').nth(2).unwrap())
            .collect();
        assert_eq!(steps, ["0", "1", "9", "10"]);
        assert!(text.contains("# model=? arch=? n_layer=4 n_expert=2 n_expert_used=1\n"));
        assert!(text.contains("# layer=3 expert_bytes=0 dense_bytes=0\n"));
    }

    /// A last layer computes those rows alone whose output is wanted.
    #[test]
    fn unknown_positions_of_the_last_layer_are_counted_from_the_end() {
        let row = |pass, layer, row| Row {
            phase: Some(Phase::Prefill),
            pass: Some(pass),
            row: Some(row),
            ..routed(0, layer, &[1])
        };
        let steps = |rows: &[Row<'_>]| -> Vec<String> {
            let lines = exported(&TraceOnDisk::new(rows));
            let lines = lines.lines().filter(|line| line.starts_with("0,0,"));
            lines
                .map(|line| {
                    line.split(',')
                        .skip(2)
                        .take(2)
                        .collect::<Vec<_>>()
                        .join("/")
                })
                .collect()
        };
        let all: Vec<Row<'_>> = vec![
            row(0, 3, 0),
            row(0, 3, 1),
            row(0, 3, 2),
            row(0, 4, 0),
            row(1, 3, 0),
            row(1, 3, 1),
            row(1, 4, 0),
            row(1, 4, 1),
        ];
        let expected = ["0/3", "1/3", "2/3", "2/4", "3/3", "4/3", "3/4", "4/4"];
        assert_eq!(steps(&all), expected);
        let alone = [row(0, 4, 0), row(0, 4, 1), row(1, 4, 0)];
        assert_eq!(steps(&alone), ["0/4", "1/4", "2/4"]);
        let long: Vec<Row<'_>> = (0..=MAX_HELD as u32).map(|at| row(0, 4, at)).collect();
        let steps = steps(&long);
        assert_eq!(steps.len(), long.len());
        assert_eq!(steps.last().unwrap(), "65536/4");
    }

    #[test]
    fn passes_of_a_layer_that_is_alone_are_told_by_phase_and_step() {
        let file = |preamble: &str, lines: &[&str]| {
            let lines: Vec<String> = lines.iter().map(|line| format!("0,{line},0,1\n")).collect();
            let columns = "turn,phase,step,layer,slot,expert";
            let text = format!("# route_trace v1\n{preamble}{columns}\n{}", lines.concat());
            let (trace, _) = trace_of(&text).unwrap();
            let places = TraceOnDisk::of(&trace).rows(|row| row.pass.zip(row.row));
            places.into_iter().flatten().collect::<Vec<_>>()
        };
        let lines = ["0,0,7", "0,1,7", "1,2,7", "1,3,7", "0,4,7", "0,5,7"];
        let expected = [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (3, 1)];
        assert_eq!(file("", &lines), expected);
        let one = "# layer=7 expert_bytes=1\n";
        assert_eq!(file(one, &lines), expected);
        // Drafted tokens are checked together.
        let two = "# layer=7 expert_bytes=1\n# layer=8 expert_bytes=1\n";
        let lines = ["1,2,7", "1,3,7", "1,2,8", "1,3,8", "1,4,7"];
        let expected = [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0)];
        assert_eq!(file(two, &lines), expected);
    }

    #[test]
    fn preambles_are_read_behind_the_path() {
        for (line, path, arch, layers) in [
            (
                "model=/my arch/n_layer=9 m.gguf arch=x n_layer=5",
                Some("/my arch/n_layer=9 m.gguf"),
                Some("x"),
                Some(5),
            ),
            ("model=? arch=? n_layer=5", None, None, Some(5)),
            (
                "model=/m arch=a b arch=c",
                Some("/m arch=a b"),
                Some("c"),
                None,
            ),
            (
                "model=/m.gguf n_layer=5",
                Some("/m.gguf n_layer=5"),
                None,
                Some(5),
            ),
        ] {
            let mut preamble = Preamble::default();
            preamble.add(line).unwrap();
            let found = (preamble.path.as_deref(), preamble.arch.as_deref());
            assert_eq!(found, (path, arch), "{line}");
            assert_eq!(preamble.numbers.get("n_layer").copied(), layers, "{line}");
        }
    }

    #[test]
    fn columns_can_stand_in_another_order() {
        let text =
            "# route_trace v1\nexpert,slot,layer,step,phase,turn\n3,0,1,0,1,0\n4,0,1,0,1,1\n";
        let (trace, imported) = trace_of(text).unwrap();
        assert!(imported.several_turns);
        let rows = TraceOnDisk::of(&trace).rows(|row| (row.pass, row.experts.to_vec()));
        assert_eq!(rows[1..], [(Some(0), vec![3]), (Some(1), vec![4])]);
    }

    #[test]
    fn bad_files_are_refused() {
        let line = |line: &str| FILE.replacen("0,0,0,3,1,1,", line, 1);
        for (text, expected) in [
            (String::new(), "does not begin"),
            ("layer,expert\n".into(), "does not begin"),
            (FILE.replace("v1", "v2"), "version 'v2'"),
            ("# route_trace v1\n".into(), "ends before"),
            (
                "# route_trace v1\nlayer,expert\n".into(),
                "no column 'turn'",
            ),
            (FILE.replace("n_expert=8", "n_expert=x"), "line 2"),
            (FILE.replace("n_expert=8", "n_expert=5000"), "line 2"),
            (FILE.replace("# layer=4", "# layer=1024"), "line 4"),
            (line("0,0,0,3,2,1,"), "line 7: slot 2"),
            (line("0,0,0,4,1,1,"), "line 7: slot 1"),
            (line("0,0,0,3,1,8,"), "line 7: expert 8"),
            (line("0,0,0,1024,1,8,"), "line 7: layer 1024"),
            (line("0,2,0,3,1,1,"), "line 7: there is no phase 2"),
            (line("0,0,9999999999,3,1,1,"), "line 7: there is no step"),
            (line("x,0,0,3,1,1,"), "line 7: 'x'"),
        ] {
            let error = format!("{:#}", trace_of(&text).unwrap_err());
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    /// A file of BigMoeOnEdge, where there is one: its activations come back in their order.
    #[test]
    fn a_real_file() {
        let path = env::var_os("EXPERT_TRACE_ROUTE_TRACE").map_or_else(
            || {
                let root = Path::new(env!("CARGO_MANIFEST_DIR"));
                root.join("../../shared/data/routes/qwen3-30b-a3b.route.csv")
            },
            Into::into,
        );
        let Ok(text) = fs::read_to_string(&path) else {
            return;
        };
        let choices = |text: &str| -> Vec<String> {
            let rows = text.lines().filter(|line| line.starts_with("0,"));
            rows.map(|line| line.split(',').take(6).collect::<Vec<_>>().join(","))
                .collect()
        };
        // Weights, and what was in memory, are not kept: the file has 0 bytes for those.
        let bytes = |text: &str| -> Vec<String> {
            let rows = text.lines().filter(|line| line.starts_with("0,"));
            rows.filter_map(|line| line.split(',').nth(8).map(str::to_owned))
                .collect()
        };
        let preamble = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| line.starts_with('#'));
            lines.map(str::to_owned).collect()
        };
        let (trace, imported) = trace_of(&text).unwrap();
        let exported = exported(&TraceOnDisk::of(&trace));
        assert_eq!(choices(&exported), choices(&text));
        assert_eq!(preamble(&exported), preamble(&text));
        for (ours, theirs) in bytes(&exported).iter().zip(bytes(&text)) {
            assert!(theirs == "0" || *ours == theirs, "{ours} is not {theirs}");
        }
        assert_eq!(imported.rows * 6, choices(&text).len() as u64);
    }
}
