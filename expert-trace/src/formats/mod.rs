//! Traces and counts in the formats that others read, and from those that others write.
//!
//! | format | holds | does not hold |
//! |---|---|---|
//! | `json` | the document of statistics; of a trace without an end, counts alone: a profile | rows, gaps; of a trace: close calls; of a profile: second blocks |
//! | `jsonl` | everything, a JSON object per row | |
//! | `parquet` | everything, with the trace's columns and metadata | |
//! | `csv` | layer and expert of each activation, in order; of counts, by layer and expert | tokens, phases, passes, positions |
//! | `route-trace` | phase, position, layer and experts of each token, the model | passes, sequences, token ids, times; weights that are not known are `nan` |
//! | `mbolt` | layer and experts of each token, by passes | phases, positions, token ids, times |
//! | `turbospark` | counts by layer and expert, the experts of each layer's tokens | phases, passes, positions; without a trace, tokens too |
//! | `imatrix-counts` | counts by layer and expert, as F32 | phases; counts above 2^24 are rounded; sums of squares, without which `llama-quantize` does not take it |
//! | `npy` | counts by layer, expert and phase | which layers there are: they are ascending |
//!
//! All from `csv` on are of one context, and leave out gaps and second blocks of experts. Those of counts
//! (`json`, `csv`, `turbospark`, `imatrix-counts`, `npy`) are made of statistics and profiles, too.
//!
//! A trace is read twice for most of them, and in constant memory: the first round counts. Input is not
//! trusted.

pub(crate) mod batches;
mod counts;
pub mod csv;
pub mod imatrix;
pub mod jsonl;
pub mod mbolt;
pub mod npy;
pub mod parquet;
pub(crate) mod progress;
pub mod route_trace;
pub mod statistics;
#[cfg(test)]
pub(crate) mod tests;
mod text;
pub mod turbospark;

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufReader, Read as _, Seek as _},
    path::Path,
};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use expert_trace_common::MAX_LAYERS;

use self::{batches::Batches, progress::Progress, route_trace::Imported, statistics::Document};
use crate::{
    cli::{Export, Import},
    output::{self, Output},
    profile::{self, ContextProfile, Profile, counting::Counted, document, printable},
    trace::{Ending, Reader},
};

/// Experts of a layer at most.
const MAX_EXPERTS: u32 = expert_trace_common::MAX_EXPERTS as u32;

/// Formats that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Statistics: counts of all contexts, and how they were made
    Json,
    /// All rows, a JSON object each
    Jsonl,
    /// One line `layer,expert` per activation
    Csv,
    /// All rows, as a table for DuckDB, Polars and pandas
    Parquet,
    /// route_trace v1 of BigMoeOnEdge
    RouteTrace,
    /// Ids by pass and layer, as numbers of 32 bits
    Mbolt,
    /// JSON of counts and ids by layer
    Turbospark,
    /// GGUF of counts, as llama-imatrix has them
    ImatrixCounts,
    /// Array [layers, experts, 2 phases] for NumPy
    Npy,
}

impl Format {
    /// Whether it is fit for stdout.
    fn is_text(self) -> bool {
        match self {
            Self::Json | Self::Jsonl | Self::Csv | Self::RouteTrace | Self::Turbospark => true,
            Self::Parquet | Self::Mbolt | Self::ImatrixCounts | Self::Npy => false,
        }
    }

    /// Whether it has all contexts.
    fn holds_all(self) -> bool {
        matches!(self, Self::Json | Self::Jsonl | Self::Parquet)
    }

    /// Whether it can be made of counts alone.
    fn is_of_counts(self) -> bool {
        match self {
            Self::Json | Self::Csv | Self::Turbospark | Self::ImatrixCounts | Self::Npy => true,
            Self::Jsonl | Self::Parquet | Self::RouteTrace | Self::Mbolt => false,
        }
    }

    /// Its name on the command line.
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Formats that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImportFormat {
    /// route_trace v1 of BigMoeOnEdge; becomes a trace
    RouteTrace,
    /// One line `layer,expert` per activation; becomes a profile
    Csv,
    /// GGUF of llama-imatrix; becomes a profile
    Imatrix,
}

/// What `export` does. Gives the exit status: 1 when something could not be read or written.
pub fn export(arguments: &Export) -> u8 {
    status(export_file(arguments), &arguments.output)
}

/// What `import` does. Gives the exit status: 1 when something could not be read or written.
pub fn import(arguments: &Import) -> u8 {
    status(import_file(arguments), &arguments.output)
}

fn status(result: anyhow::Result<u8>, output: &Path) -> u8 {
    let error = match result {
        Ok(status) => return status,
        Err(error) => error,
    };
    // Whoever reads stdout has read enough.
    if output == Path::new("-") && output::reader_is_gone(&error) {
        return 0;
    }
    say!("error: {}", printable(&format!("{error:#}")));
    1
}

fn export_file(arguments: &Export) -> anyhow::Result<u8> {
    let Export {
        input,
        format,
        output,
        context,
    } = arguments;
    let name = format.name();
    ensure!(
        format.is_text() || output != Path::new("-"),
        "{name} is no text: name a file for it"
    );
    ensure!(
        !format.holds_all() || context.is_none(),
        "{name} has all contexts: leave out --context"
    );
    let shown = printable(&input.to_string_lossy());
    let mut file = File::open(input).with_context(|| format!("cannot open {shown}"))?;
    if is_json(&file).with_context(|| format!("cannot read {shown}"))? {
        ensure!(
            format.is_of_counts(),
            "{name} needs a trace (.arrows), and {shown} has counts alone"
        );
        let profile = profile::read::read(input)?.profile;
        let out = Output::create(output, Some(input))?;
        if *format == Format::Json {
            file.rewind()?;
            out.write(|out| Ok(io::copy(&mut file, out)?))?;
        } else {
            write_counts(&profile, None, *format, *context, out)?;
        }
        return Ok(0);
    }
    let ending = export_trace(arguments, &file, &shown)?;
    Ok(match ending {
        Ending::Whole => 0,
        Ending::Cut => {
            say!("{shown} has no end: it was cut, or is being written; all before is exported");
            0
        }
        Ending::Damaged(why) => {
            say!(
                "error: {shown}: {}; all before is exported",
                printable(&why)
            );
            1
        }
    })
}

/// Whether a file begins as a JSON object does.
fn is_json(file: &File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        let message = "it is no regular file: save it as one";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let mut start = Vec::new();
    file.take(64).read_to_end(&mut start)?;
    let first = start.iter().find(|byte| !byte.is_ascii_whitespace());
    Ok(first == Some(&b'{'))
}

fn export_trace(arguments: &Export, file: &File, shown: &str) -> anyhow::Result<Ending> {
    let Export {
        input,
        format,
        output,
        context,
    } = arguments;
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
    if matches!(format, Format::Jsonl | Format::Parquet) {
        let mut progress = Progress::new(bytes, 1);
        let mut batches = Batches::open(input, u64::MAX, &mut progress)?;
        Output::create(output, Some(input))?.write(|out| match format {
            Format::Parquet => parquet::write(&mut batches, out),
            _ => jsonl::write(&mut batches, out),
        })?;
        for line in batches.missing(shown) {
            say!("{line}");
        }
        return Ok(batches.ending().cloned().unwrap_or(Ending::Cut));
    }
    let rounds = match format {
        Format::Json | Format::ImatrixCounts | Format::Npy => 1,
        _ => 2,
    };
    let mut progress = Progress::new(bytes, rounds);
    let mut reader = Reader::open(input)?;
    let out = Output::create(output, Some(input))?;
    let counted = Counted::read(&mut reader, input, &mut |bytes| progress.update(bytes))?;
    progress.end_round(reader.position());
    for line in counted.missing(shown) {
        say!("{line}");
    }
    if *format == Format::Json {
        write_json(&counted, shown, out)?;
        return Ok(counted.ending);
    }
    let profile = counted.profile(shown.to_owned());
    if rounds == 1 {
        write_counts(&profile, Some(&counted), *format, *context, out)?;
        return Ok(counted.ending);
    }
    let chosen = choose(&profile, *context)?;
    say_what_is_left_out(&profile, chosen, Some(&counted), *format);
    let mut batches = Batches::open(input, counted.batches, &mut progress)?;
    let id = chosen.id as u32;
    let of_context = counted.contexts.get(&id).context("no such context")?;
    out.write(|out| match format {
        Format::Csv => csv::write(&mut batches, id, out),
        Format::RouteTrace => {
            let model = counted.model_of(of_context);
            route_trace::write(&mut batches, &model, chosen, out)
        }
        Format::Mbolt => mbolt::write(&mut batches, chosen, out),
        _ => turbospark::write(Some(&mut batches), chosen, out),
    })?;
    Ok(counted.ending)
}

/// Writes the statistics that a trace has, or else its counts alone.
fn write_json(counted: &Counted, shown: &str, out: Output) -> anyhow::Result<()> {
    let document = match Document::new(counted) {
        Ok(document) => document,
        Err(why) => {
            say!("{shown}: {why}: counts alone are written, a profile");
            let gaps = counted.gaps();
            if gaps > 0 {
                say!("{gaps} gaps are left out: counts are lower bounds");
            }
            let profile = document::to_json(&counted.profile(shown.to_owned()))?;
            return out.write(|out| Ok(out.write_all(&profile)?));
        }
    };
    if document.lacks_close_calls() {
        say!("close calls are not in a trace: null, where experts were chosen from logits");
    }
    out.write(|out| {
        serde_json::to_writer_pretty(&mut *out, &document)?;
        Ok(out.write_all(b"\n")?)
    })
}

/// Writes a format of counts; `counted` is the trace that the counts come from.
fn write_counts(
    profile: &Profile,
    counted: Option<&Counted>,
    format: Format,
    context: Option<usize>,
    out: Output,
) -> anyhow::Result<()> {
    let chosen = choose(profile, context)?;
    say_what_is_left_out(profile, chosen, counted, format);
    out.write(|out| match format {
        Format::Csv => csv::write_counts(chosen, out),
        Format::ImatrixCounts => imatrix::write(chosen, out),
        Format::Npy => npy::write(chosen, out),
        _ => turbospark::write(None, chosen, out),
    })
}

/// The context that was asked for, or else the main one.
fn choose(profile: &Profile, wanted: Option<usize>) -> anyhow::Result<&ContextProfile> {
    let Some(wanted) = wanted else {
        let main = profile.context(None).ok();
        let main = main.filter(|main| !main.layers.is_empty());
        return main.context("nothing was routed: there is nothing to export");
    };
    let mut routing = with_layers(profile);
    if let Some(chosen) = routing.find(|context| context.id == wanted) {
        return Ok(chosen);
    }
    let ids: Vec<String> = with_layers(profile)
        .take(16)
        .map(|context| context.id.to_string())
        .collect();
    bail!(
        "no context {wanted} has routed anything; there are {}",
        ids.join(", ")
    )
}

/// Contexts of which there are counts.
fn with_layers(profile: &Profile) -> impl Iterator<Item = &ContextProfile> {
    let contexts = profile.contexts.iter();
    contexts.filter(|context| !context.layers.is_empty())
}

fn say_what_is_left_out(
    profile: &Profile,
    chosen: &ContextProfile,
    counted: Option<&Counted>,
    format: Format,
) {
    for line in left_out(profile, chosen, counted, format) {
        say!("{line}");
    }
}

/// What a format of one context does not hold of what is there, a line each.
fn left_out(
    profile: &Profile,
    chosen: &ContextProfile,
    counted: Option<&Counted>,
    format: Format,
) -> Vec<String> {
    let mut lines = Vec::new();
    let others = with_layers(profile)
        .filter(|other| other.id != chosen.id)
        .count();
    if others > 0 {
        lines.push(format!(
            "context {} alone is exported: {others} more left out (--context)",
            chosen.id
        ));
    }
    match counted {
        Some(counted) => lines.extend(left_out_of_trace(counted, chosen, format)),
        None if format == Format::Csv => {
            lines.push(
                "lines are by layer and expert: counts do not tell the order of tokens".to_owned(),
            );
            lines.push("prompts and generated tokens are not told apart".to_owned());
        }
        None if format == Format::Turbospark => {
            lines.push("`trace` is empty: counts do not tell the order".to_owned());
        }
        None => {}
    }
    let needs_width = !matches!(format, Format::Csv | Format::Json);
    let unknown = counts::of_unknown_width(chosen);
    if needs_width && !unknown.is_empty() {
        lines.push(format!(
            "how many experts there are is not known of layers {}: as many as the largest id tells",
            listed(&unknown)
        ));
    }
    let ks: BTreeSet<u32> = chosen.layers.iter().filter_map(|layer| layer.k).collect();
    if format == Format::Turbospark && ks.len() > 1 {
        lines.push(
            "layers choose different numbers of experts: `top_k` is the largest, and lists of `trace` cannot \
             be divided by it"
                .to_owned(),
        );
    }
    if format == Format::Npy {
        let layers: Vec<u16> = chosen.layers.iter().map(|layer| layer.layer_id).collect();
        lines.push(format!("the array has layers {}", listed(&layers)));
    }
    let mut experts = chosen.layers.iter().flat_map(|layer| &layer.experts);
    if format == Format::ImatrixCounts && experts.any(|expert| expert.activations > imatrix::EXACT)
    {
        lines.push("counts above 16777216 are rounded, as F32 has them".to_owned());
    }
    lines
}

/// What is in the rows of a trace alone.
fn left_out_of_trace(counted: &Counted, chosen: &ContextProfile, format: Format) -> Vec<String> {
    let mut lines = Vec::new();
    let id = chosen.id as u32;
    let Some(of_context) = counted.contexts.get(&id) else {
        return lines;
    };
    let gaps = counted.gaps_of(id);
    if gaps > 0 {
        lines.push(format!(
            "{gaps} gaps are left out: tokens are missing there"
        ));
    }
    let rows = of_context.second_block_rows();
    if rows > 0 {
        lines.push(format!(
            "{rows} rows of second blocks of experts are left out"
        ));
    }
    let in_order = !matches!(format, Format::ImatrixCounts | Format::Npy);
    if of_context.several_sequences && in_order {
        lines.push("sequences are not told apart".to_owned());
    }
    let weighted = of_context.rows_with_weights;
    if format != Format::RouteTrace {
        if weighted > 0 {
            lines.push("weights are left out".to_owned());
        }
        return lines;
    }
    let unknown = of_context.rows_without_position;
    if unknown > 0 {
        lines.push(format!(
            "{unknown} rows have no position: they are counted on from the last, those of the last layer from the end \
             of the pass"
        ));
    }
    match of_context.rows - weighted {
        0 => {}
        _ if weighted == 0 => lines.push("weights are nan: the trace has none".to_owned()),
        unknown => lines.push(format!(
            "weights of {unknown} rows are nan: they are not known"
        )),
    }
    let known = counted.model_of(of_context).layer_bytes;
    let ids = chosen.layers.iter().map(|layer| layer.layer_id);
    let unknown: Vec<u16> = ids.filter(|id| !known.contains_key(id)).collect();
    if !unknown.is_empty() {
        lines.push(format!(
            "expert_bytes are 0, and not known, of layers {}",
            listed(&unknown)
        ));
    }
    lines
}

/// Numbers in ascending order, neighbours together.
pub(crate) fn listed(numbers: &[u16]) -> String {
    let mut runs: Vec<(u16, u16)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*number) => *last = *number,
            _ => runs.push((*number, *number)),
        }
    }
    let runs = runs.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    runs.collect::<Vec<_>>().join(", ")
}

fn import_file(arguments: &Import) -> anyhow::Result<u8> {
    let Import {
        input,
        format,
        output,
        k,
    } = arguments;
    ensure!(
        *format != ImportFormat::RouteTrace || k.is_none(),
        "a route_trace tells how many experts each token has: leave out --k"
    );
    let becomes_text = *format != ImportFormat::RouteTrace;
    ensure!(
        becomes_text || output != Path::new("-"),
        "a trace is no text: name a file for it"
    );
    let shown = printable(&input.to_string_lossy());
    let file = File::open(input).with_context(|| format!("cannot open {shown}"))?;
    let mut file = BufReader::with_capacity(1 << 20, file);
    let out = Output::create(output, Some(input))?;
    let profile = match format {
        ImportFormat::RouteTrace => {
            let imported = out.write(|out| route_trace::read(file, out));
            say_of_import(imported.with_context(|| shown.clone())?);
            return Ok(0);
        }
        ImportFormat::Csv => csv::read(file, shown.clone(), *k),
        ImportFormat::Imatrix => imatrix::read(&mut file, shown.clone(), *k),
    };
    let profile = profile.with_context(|| shown.clone())?;
    let mut layers = profile.contexts.iter().flat_map(|context| &context.layers);
    if layers.any(|layer| layer.k.is_none()) {
        say!("how many experts a token has is not in the file: without --k, tokens are 0");
    }
    if *format == ImportFormat::Csv {
        say!("phases are not in the file: all counts as decode");
    }
    out.write(|out| Ok(out.write_all(&document::to_json(&profile)?)?))?;
    Ok(0)
}

fn say_of_import(imported: Imported) {
    if imported.several_turns {
        say!("turns are not told apart");
    }
    match imported.unweighted_rows {
        0 => {}
        all if all == imported.rows => {
            say!("there are no weights")
        }
        some => say!("{some} rows have no weights, or not all of them"),
    }
    say!(
        "{} rows; times are left out, what was in memory too",
        imported.rows
    );
}

#[cfg(test)]
mod unit_tests {
    use super::{
        tests::{TraceOnDisk, routed, small_profile},
        *,
    };
    use crate::trace::{Kind, Row};

    #[test]
    fn runs_of_numbers() {
        assert_eq!(listed(&[]), "");
        assert_eq!(listed(&[3]), "3");
        assert_eq!(listed(&[0, 1, 2, 5, 65_534, 65_535]), "0-2, 5, 65534-65535");
    }

    #[test]
    fn what_is_left_out_is_said() {
        let of_sequence = |sequence| Row {
            sequence: Some(sequence),
            position: Some(0),
            ..routed(0, 1, &[2])
        };
        let second = Row {
            kind: Kind::SecondBlock,
            ..routed(0, 1, &[1])
        };
        let trace = TraceOnDisk::new(&[
            of_sequence(0),
            of_sequence(1),
            second,
            routed(1, 1, &[2]),
            Row::of(Kind::Gap),
        ]);
        let counted = trace.counted();
        let profile = counted.profile("a".into());
        let said = |format| {
            let lines = left_out(&profile, &profile.contexts[0], Some(&counted), format);
            lines.join("\n")
        };
        let csv = said(Format::Csv);
        for part in ["1 more left out", "1 gaps", "1 rows of second", "sequences"] {
            assert!(csv.contains(part), "{part}: {csv}");
        }
        let route_trace = said(Format::RouteTrace);
        for part in [
            "weights are nan",
            "expert_bytes are 0, and not known, of layers 1",
            "known of layers 1:",
        ] {
            assert!(route_trace.contains(part), "{part}: {route_trace}");
        }
        assert!(!route_trace.contains("no position"), "{route_trace}");
        assert!(!said(Format::Npy).contains("sequences"));
        assert!(said(Format::Npy).contains("the array has layers 1"));
        let of_counts = left_out(&profile, &profile.contexts[0], None, Format::Csv).join("\n");
        for part in ["1 more left out", "by layer and expert", "not told apart"] {
            assert!(of_counts.contains(part), "{part}: {of_counts}");
        }
    }

    #[test]
    fn layers_that_choose_different_numbers_are_named() {
        let mut profile = small_profile();
        let says = |profile: &Profile| {
            let lines = left_out(profile, &profile.contexts[0], None, Format::Turbospark);
            lines.join("\n").contains("`top_k` is the largest")
        };
        assert!(!says(&profile));
        profile.contexts[0].layers[1].k = Some(2);
        assert!(says(&profile));
    }

    /// The main context of a file that somebody else has written can be any.
    #[test]
    fn a_context_without_layers_is_nothing_to_export() {
        let mut profile = small_profile();
        profile.contexts[0].layers.clear();
        let error = choose(&profile, None).unwrap_err().to_string();
        assert!(error.contains("nothing was routed"), "{error}");
        let lines = left_out(&profile, &profile.contexts[0], None, Format::Npy);
        assert!(!lines.join("\n").contains("left out"), "{lines:?}");
    }

    #[test]
    fn counts_that_an_f32_cannot_hold_are_named() {
        let mut profile = small_profile();
        let said = |profile: &Profile| {
            let lines = left_out(profile, &profile.contexts[0], None, Format::ImatrixCounts);
            lines.join("\n")
        };
        assert!(!said(&profile).contains("rounded"));
        profile.contexts[0].layers[0].experts[0].activations = imatrix::EXACT + 1;
        assert!(said(&profile).contains("rounded"));
    }
}
