//! `mbolt`: a stream of little-endian i32, `0x544C424D, 1, n_expert` and then, for every layer of every
//! pass in the order of execution, `layer, k, n_tokens, ids[n_tokens × k]`, token by token.

use std::io::Write;

use super::{
    batches::{Batches, routed},
    counts,
};
use crate::profile::ContextProfile;

/// First number: `MBLT`.
const MAGIC: i32 = 0x544C_424D;
const VERSION: i32 = 1;

/// Ids of a record at most; a longer one is divided.
const MAX_IDS: usize = 1 << 20;

/// Writes what a context routed.
///
/// # Errors
/// When the trace cannot be read, or the output not be written.
pub fn write(
    batches: &mut Batches<'_>,
    context: &ContextProfile,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let n_expert = counts::widest(context) as i32;
    for number in [MAGIC, VERSION, n_expert] {
        out.write_all(&number.to_le_bytes())?;
    }
    let mut record = Record::default();
    while let Some(batch) = batches.next()? {
        for row in routed(&batch, context.id as u32) {
            let key = (row.pass, row.layer.unwrap_or(0), row.experts.len());
            let is_full = record.ids.len() + row.experts.len() > MAX_IDS;
            if record.key != Some(key) || is_full {
                record.write(out)?;
                record.key = Some(key);
            }
            record.tokens += 1;
            record.ids.extend_from_slice(row.experts);
        }
    }
    record.write(out)
}

/// Tokens of one layer and pass.
#[derive(Debug, Default)]
struct Record {
    /// Pass, layer and k.
    key: Option<(Option<u32>, u16, usize)>,
    tokens: i32,
    ids: Vec<u16>,
}

impl Record {
    /// Writes it, and leaves it empty. Tokens that chose nothing are in no record.
    fn write(&mut self, out: &mut dyn Write) -> anyhow::Result<()> {
        if let Some((_, layer, k)) = self.key.take()
            && k > 0
        {
            let head = [i32::from(layer), k as i32, self.tokens];
            let ids = self.ids.iter().map(|id| i32::from(*id));
            let bytes: Vec<u8> = head
                .into_iter()
                .chain(ids)
                .flat_map(i32::to_le_bytes)
                .collect();
            out.write_all(&bytes)?;
        }
        self.tokens = 0;
        self.ids.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        formats::tests::{TraceOnDisk, routed},
        trace::Row,
    };

    fn numbers(rows: &[Row<'_>]) -> Vec<i32> {
        let trace = TraceOnDisk::new(rows);
        let profile = trace.counted().profile("a".into());
        let mut out = Vec::new();
        let context = &profile.contexts[0];
        trace
            .batches(|batches| write(batches, context, &mut out))
            .unwrap();
        let (numbers, rest) = out.as_chunks::<4>();
        assert!(rest.is_empty());
        numbers
            .iter()
            .map(|bytes| i32::from_le_bytes(*bytes))
            .collect()
    }

    #[test]
    fn a_record_per_pass_layer_and_k() {
        let pass = |pass, row| Row {
            pass: Some(pass),
            ..row
        };
        let numbers = numbers(&[
            pass(0, routed(0, 3, &[5, 1])),
            pass(0, routed(0, 3, &[4, 2])),
            pass(0, routed(1, 3, &[7, 7])),
            pass(0, routed(0, 4, &[6])),
            pass(0, routed(0, 4, &[])),
            pass(1, routed(0, 4, &[0])),
        ]);
        assert_eq!(
            numbers,
            [
                0x544C_424D,
                1,
                7, // the largest id is 6
                3,
                2,
                2,
                5,
                1,
                4,
                2, //
                4,
                1,
                1,
                6, //
                4,
                1,
                1,
                0,
            ]
        );
        assert_eq!(&MAGIC.to_le_bytes(), b"MBLT");
    }

    #[test]
    fn long_records_are_divided() {
        let ids: Vec<u16> = (0..1024).collect();
        let rows = vec![routed(0, 3, &ids); MAX_IDS / 1024 + 1];
        let numbers = numbers(&rows);
        assert_eq!(numbers[3..6], [3, 1024, 1024]);
        assert_eq!(numbers[6 + MAX_IDS..][..3], [3, 1024, 1]);
    }
}
