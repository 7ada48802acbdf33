//! `jsonl`: every row of a trace as a JSON object on a line of its own, with the columns' names as keys.
//!
//! What a row does not have is left out. The first line is of the record `trace`: what the trace's
//! metadata says. `time` is called `time_ns`, nanoseconds since 1970, UTC; `detail` is an object.

use std::io::Write;

use serde_json::{Value, json};

use super::{batches::Batches, text::push_number};
use crate::trace::{
    Kind, PHASES, Row, phase_key,
    schema::{FORMAT, VERSION, column},
};

/// Details of more bytes stay text.
const MAX_PARSED: usize = 4 << 20;

/// Lines are handed on when they have so many bytes.
const FLUSH: usize = 128 << 10;

/// Writes all rows.
///
/// # Errors
/// When the trace cannot be read, or the output not be written.
pub fn write(batches: &mut Batches<'_>, out: &mut dyn Write) -> anyhow::Result<()> {
    let first = json!({
        column::RECORD: "trace",
        "format": FORMAT,
        "version": VERSION,
        "capture": batches.capture(),
    });
    let mut lines = first.to_string().into_bytes();
    lines.push(b'\n');
    while let Some(batch) = batches.next()? {
        for row in batch.rows() {
            push_row(&mut lines, &row)?;
            if lines.len() >= FLUSH {
                out.write_all(&lines)?;
                lines.clear();
            }
        }
    }
    Ok(out.write_all(&lines)?)
}

fn push_row(line: &mut Vec<u8>, row: &Row<'_>) -> anyhow::Result<()> {
    let Row {
        kind,
        context,
        pass,
        phase,
        layer,
        row,
        rows,
        sequence,
        position,
        token,
        time_ns,
        experts,
        weights,
        reason,
        detail,
    } = *row;
    line.extend(b"{\"record\":\"");
    line.extend(kind.name().as_bytes());
    line.push(b'"');
    let wide = |number: Option<u32>| number.map(i64::from);
    let narrow = |number: Option<u16>| number.map(i64::from);
    let signed = |number: Option<i32>| number.map(i64::from);
    push_key_number(line, column::CONTEXT, wide(context));
    push_key_number(line, column::PASS, wide(pass));
    if let Some(phase) = phase {
        push_name(line, column::PHASE, PHASES[usize::from(phase_key(phase))]);
    }
    push_key_number(line, column::LAYER, narrow(layer));
    push_key_number(line, column::ROW, wide(row));
    push_key_number(line, column::ROWS, wide(rows));
    push_key_number(line, column::SEQUENCE, narrow(sequence));
    push_key_number(line, column::POSITION, signed(position));
    push_key_number(line, column::TOKEN, signed(token));
    push_key_number(line, "time_ns", Some(time_ns));
    if matches!(kind, Kind::Routed | Kind::SecondBlock) {
        push_key(line, column::EXPERTS);
        line.push(b'[');
        for (index, expert) in experts.iter().enumerate() {
            if index > 0 {
                line.push(b',');
            }
            push_number(line, (*expert).into());
        }
        line.push(b']');
    }
    if let Some(weights) = weights {
        push_key(line, column::WEIGHTS);
        serde_json::to_writer(&mut *line, weights)?;
    }
    if let Some(reason) = reason {
        push_name(line, column::REASON, reason.name());
    }
    if let Some(detail) = detail {
        push_key(line, column::DETAIL);
        let parsed = (detail.len() <= MAX_PARSED)
            .then(|| serde_json::from_str::<Value>(detail).ok())
            .flatten();
        match parsed {
            Some(value) => serde_json::to_writer(&mut *line, &value)?,
            None => serde_json::to_writer(&mut *line, detail)?,
        }
    }
    line.extend(b"}\n");
    Ok(())
}

fn push_key(line: &mut Vec<u8>, key: &str) {
    line.extend(b",\"");
    line.extend(key.as_bytes());
    line.extend(b"\":");
}

/// Names are ours, and have nothing that JSON writes in another way.
fn push_name(line: &mut Vec<u8>, key: &str, name: &str) {
    push_key(line, key);
    line.push(b'"');
    line.extend(name.as_bytes());
    line.push(b'"');
}

fn push_key_number(line: &mut Vec<u8>, key: &str, number: Option<i64>) {
    let Some(number) = number else { return };
    push_key(line, key);
    if number < 0 {
        line.push(b'-');
    }
    push_number(line, number.unsigned_abs());
}

#[cfg(test)]
mod tests {
    use expert_trace_common::Phase;

    use super::*;
    use crate::{
        formats::tests::{TraceOnDisk, routed},
        trace::Reason,
    };

    #[test]
    fn weights_are_listed_and_null_where_they_are_no_numbers() {
        let row = Row {
            weights: Some(&[0.1, f32::NAN]),
            ..routed(0, 3, &[5, 1])
        };
        let mut line = Vec::new();
        push_row(&mut line, &row).unwrap();
        let line: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(line["weights"].to_string(), "[0.1,null]");
    }

    #[test]
    fn every_row_is_an_object() {
        let trace = TraceOnDisk::new(&[
            Row {
                kind: Kind::Context,
                detail: Some("{\"pid\": 1,\n \"models\": []}"),
                ..routed(0, 0, &[])
            },
            Row {
                phase: Some(Phase::Prefill),
                pass: Some(4),
                row: Some(2),
                sequence: Some(1),
                position: Some(-1),
                token: Some(99),
                time_ns: i64::MAX,
                ..routed(0, 3, &[5, 1])
            },
            routed(0, 3, &[]),
            Row {
                rows: Some(7),
                reason: Some(Reason::RowsLost),
                detail: Some("not JSON\n"),
                ..Row::of(Kind::Gap)
            },
        ]);
        let mut out = Vec::new();
        trace.batches(|batches| write(batches, &mut out)).unwrap();
        let lines: Vec<Value> = String::from_utf8(out)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines[0]["record"], "trace");
        assert_eq!(lines[0]["capture"]["mode"], "import");
        assert_eq!(lines[1]["detail"], json!({"pid": 1, "models": []}));
        assert_eq!(
            lines[2],
            json!({
                "record": "routed", "context": 0, "pass": 4, "phase": "prefill", "layer": 3, "row": 2,
                "sequence": 1, "position": -1, "token": 99, "time_ns": i64::MAX, "experts": [5, 1],
            })
        );
        assert_eq!(lines[3]["experts"], json!([]));
        assert_eq!(
            lines[4],
            json!({"record": "gap", "rows": 7, "time_ns": 0, "reason": "rows_lost",
                   "detail": "not JSON\n"})
        );
        assert_eq!(lines.len(), 5);
    }
}
