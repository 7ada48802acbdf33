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
//! choice of the router. A trace has no weights (`nan`), and says nothing of what was in memory.

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
    facts::{ContextFacts, LAYER_BYTES},
    text::{Header, Lines, printable, push_number},
    trace_file::TraceFile,
};
use crate::{
    profile::ContextProfile,
    trace::{Capture, ContextDetail, Kind, Row, phase_key},
};

/// Lines are handed on when they have so many bytes.
const FLUSH: usize = 128 << 10;

/// Most experts that one token can choose.
const MAX_K: usize = MAX_EXPERTS as usize;

/// Writes what a context routed, of which these are the facts and the counts.
///
/// # Errors
/// When the trace cannot be read, or the output not be written.
pub fn write(
    batches: &mut Batches<'_>,
    facts: &ContextFacts,
    context: &ContextProfile,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut lines = preamble(facts, context).into_bytes();
    let mut steps = Steps::default();
    while let Some(batch) = batches.next()? {
        for row in routed(&batch, context.id as u32) {
            push_row(&mut lines, &row, steps.of(&row));
            if lines.len() >= FLUSH {
                out.write_all(&lines)?;
                lines.clear();
            }
        }
    }
    Ok(out.write_all(&lines)?)
}

fn preamble(facts: &ContextFacts, context: &ContextProfile) -> String {
    let model = facts.model();
    let path = model.path.as_deref().map_or("?".into(), printable);
    let arch = model.arch.as_deref().map_or("?".into(), printable);
    let last = context.layers.last().map_or(0, |layer| layer.layer_id);
    let layers = model.layers.unwrap_or(u64::from(last) + 1);
    let experts = counts::widest(context);
    let k = counts::k(context);
    let mut text = format!(
        "# route_trace v1\n\
         # model={path} arch={arch} n_layer={layers} n_expert={experts} n_expert_used={k}\n"
    );
    let mut bytes = model.layer_bytes;
    for layer in &context.layers {
        bytes.entry(layer.layer_id).or_default();
    }
    for (layer, (expert, dense)) in bytes {
        text += &format!("# layer={layer} expert_bytes={expert} dense_bytes={dense}\n");
    }
    text + "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped\n"
}

fn push_row(lines: &mut Vec<u8>, row: &Row<'_>, step: i64) {
    let phase = row.phase.map_or(1, phase_key);
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
        lines.extend(b",nan,0,0,0\n");
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
    fn of(&mut self, row: &Row<'_>) -> i64 {
        if self.pass != row.pass {
            self.pass = row.pass;
            self.first = self.end;
        }
        let known = row.position.map(i64::from);
        let step = known.unwrap_or(self.first + i64::from(row.row.unwrap_or(0)));
        self.end = self.end.max(step + 1);
        step
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

/// Makes a trace of such a file. Its passes begin where the number of the layer falls; it has no times.
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
    let header = loop {
        let line = lines.next()?.context("it ends before its columns")?;
        let Some(text) = line.strip_prefix('#') else {
            break Header::find(line, ["turn", "phase", "step", "layer", "slot", "expert"])?;
        };
        let read = preamble.add(text.trim());
        read.with_context(|| format!("line {}", lines.number()))?;
    };
    let capture = Capture {
        tool: format!("expert-trace {}", env!("CARGO_PKG_VERSION")),
        mode: "import".to_owned(),
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
    let mut token = Token::default();
    let limit = preamble.n_expert();
    while let Some(line) = lines.next()? {
        if line.trim().is_empty() {
            continue;
        }
        let numbers = header.numbers(line);
        let added = numbers.and_then(|numbers| token.add(numbers, limit, &mut trace));
        added.with_context(|| format!("line {}", lines.number()))?;
    }
    token.end(&mut trace)?;
    trace.finish()?;
    Ok(token.imported)
}

impl Preamble {
    fn add(&mut self, text: &str) -> anyhow::Result<()> {
        let value_of = |key: &str| {
            let word = text.split(' ').find_map(|word| word.strip_prefix(key));
            word.and_then(|value| value.strip_prefix('='))
        };
        let number = |key: &str| -> anyhow::Result<Option<u64>> {
            value_of(key)
                .map(|value| {
                    let number = value.parse::<u64>();
                    number.with_context(|| format!("{key} is '{}'", printable(value)))
                })
                .transpose()
        };
        if let Some(rest) = text.strip_prefix("model=") {
            // A path can have spaces.
            let end = rest.rfind(" arch=").unwrap_or(rest.len());
            self.path = Some(rest[..end].to_owned());
            self.arch = value_of("arch").map(str::to_owned);
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

/// What was found in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Rows of the trace.
    pub rows: u64,
    /// Whether there is more than one turn, which a trace does not tell apart.
    pub several_turns: bool,
}

/// The token whose choices are being read.
#[derive(Debug, Default)]
struct Token {
    /// Turn, phase, step and layer.
    key: Option<[i64; 4]>,
    experts: Vec<u16>,
    pass: u32,
    row: u32,
    imported: Imported,
}

impl Token {
    fn add(
        &mut self,
        [turn, phase, step, layer, slot, expert]: [i64; 6],
        n_expert: i64,
        trace: &mut TraceFile<impl Write>,
    ) -> anyhow::Result<()> {
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
        Ok(())
    }

    /// Begins another token; `key` is still that of the one before.
    fn begin(&mut self, key: [i64; 4]) -> anyhow::Result<()> {
        if let Some([turn, _, _, layer]) = self.key {
            self.imported.several_turns |= turn != key[0];
            if turn != key[0] || key[3] < layer {
                self.pass = self.pass.checked_add(1).context("too many passes")?;
            }
            self.row = match turn == key[0] && key[3] == layer {
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
            ..Row::of(Kind::Routed)
        })?;
        self.imported.rows += 1;
        self.experts.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, path::Path};

    use super::*;
    use crate::formats::tests::{TraceOnDisk, facts_of, routed};

    const FILE: &str = "\
# route_trace v1
# model=/a model.gguf arch=qwen3moe n_layer=5 n_expert=8 n_expert_used=2
# layer=3 expert_bytes=100 dense_bytes=7
# layer=4 expert_bytes=200 dense_bytes=8
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped
0,0,0,3,0,5,nan,0,0,0
0,0,0,3,1,1,nan,0,0,0
0,0,1,3,0,5,nan,0,0,0
0,0,1,3,1,2,nan,0,0,0
0,0,0,4,0,7,nan,0,0,0
0,0,1,4,0,7,nan,0,0,0
0,1,2,3,0,0,nan,0,0,0
0,1,2,3,1,6,nan,0,0,0
";

    fn trace_of(text: &str) -> anyhow::Result<(Vec<u8>, Imported)> {
        let mut trace = Vec::new();
        let imported = read(text.as_bytes(), &mut trace)?;
        Ok((trace, imported))
    }

    fn exported(trace: &TraceOnDisk) -> String {
        let facts = facts_of(trace);
        let profile = facts.profile("a".into());
        let context = &profile.contexts[0];
        let mut out = Vec::new();
        trace
            .batches(|batches| {
                write(
                    batches,
                    &facts.contexts[&(context.id as u32)],
                    context,
                    &mut out,
                )
            })
            .unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_file_comes_back_as_it_was() {
        let (trace, imported) = trace_of(FILE).unwrap();
        let expected = Imported {
            rows: 5,
            several_turns: false,
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
        let preamble = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| line.starts_with('#'));
            lines.map(str::to_owned).collect()
        };
        let (trace, imported) = trace_of(&text).unwrap();
        let exported = exported(&TraceOnDisk::of(&trace));
        assert_eq!(choices(&exported), choices(&text));
        assert_eq!(preamble(&exported), preamble(&text));
        assert_eq!(imported.rows * 6, choices(&text).len() as u64);
    }
}
