//! `parquet`: a trace with its columns as they are, for DuckDB, Polars, pandas and Spark.

use std::{io::Write, sync::Arc};

use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, Encoding, ZstdLevel},
    file::{metadata::KeyValue, properties::WriterProperties},
    schema::types::ColumnPath,
};

use super::batches::Batches;
use crate::trace::schema::{column, schema};

/// Rows of a row group: what a reader takes at once, and what is in memory until it is written.
const GROUP_ROWS: usize = 1 << 20;
/// Bytes of a row group, encoded.
const GROUP_BYTES: usize = 64 << 20;

/// Writes all rows, and the trace's metadata as the file's.
///
/// # Errors
/// When the trace cannot be read, or the output not be written.
pub fn write(batches: &mut Batches<'_>, out: &mut (dyn Write + Send)) -> anyhow::Result<()> {
    let mut batch = batches.next()?;
    let schema = match &batch {
        Some(batch) => batch.columns.schema(),
        None => schema(batches.capture()),
    };
    let mut file = ArrowWriter::try_new(out, Arc::clone(&schema), Some(properties()?))?;
    while let Some(next) = batch {
        file.write(&next.columns)?;
        batch = batches.next()?;
    }
    for (key, value) in schema.metadata() {
        file.append_key_value_metadata(KeyValue::new(key.clone(), value.clone()));
    }
    file.close()?;
    Ok(())
}

fn properties() -> anyhow::Result<WriterProperties> {
    // Times rise by little, and hardly two are the same.
    let time = ColumnPath::from(column::TIME);
    Ok(WriterProperties::builder()
        .set_compression(match cfg!(feature = "zstd") {
            true => Compression::ZSTD(ZstdLevel::try_new(1)?),
            false => Compression::UNCOMPRESSED,
        })
        .set_max_row_group_row_count(Some(GROUP_ROWS))
        .set_max_row_group_bytes(Some(GROUP_BYTES))
        .set_column_dictionary_enabled(time.clone(), false)
        .set_column_encoding(time, Encoding::DELTA_BINARY_PACKED)
        .build())
}

#[cfg(test)]
mod tests {
    use arrow_array::{Array as _, cast::AsArray as _, types::UInt16Type};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use super::*;
    use crate::{
        formats::tests::{TraceOnDisk, routed},
        trace::{
            Kind, Row,
            schema::{CAPTURE_KEY, FORMAT, FORMAT_KEY},
        },
    };

    fn written(rows: &[Row<'_>]) -> ParquetRecordBatchReaderBuilder<std::fs::File> {
        let trace = TraceOnDisk::new(rows);
        let mut file = tempfile::tempfile().unwrap();
        trace.batches(|batches| write(batches, &mut file)).unwrap();
        ParquetRecordBatchReaderBuilder::try_new(file).unwrap()
    }

    #[test]
    fn columns_and_metadata_survive() {
        let rows = [routed(0, 3, &[5, 1]), Row::of(Kind::Gap), routed(1, 4, &[])];
        let builder = written(&rows);
        let metadata = builder.metadata().file_metadata().key_value_metadata();
        let value = |key: &str| {
            let mut pairs = metadata.unwrap().iter();
            let pair = pairs.find(|pair| pair.key == key).unwrap();
            pair.value.clone().unwrap()
        };
        assert_eq!(value(FORMAT_KEY), FORMAT);
        assert!(value(CAPTURE_KEY).contains("import"));
        let batch = builder.build().unwrap().next().unwrap().unwrap();
        assert_eq!(batch.num_rows(), 3);
        let experts = batch.column_by_name(column::EXPERTS).unwrap();
        let lists = experts.as_list::<i32>();
        let list = |index: usize| {
            let list = lists.value(index);
            list.as_primitive::<UInt16Type>().values().to_vec()
        };
        assert_eq!((list(0), list(2)), (vec![5, 1], vec![]));
        assert!(lists.is_null(1));
    }

    #[test]
    fn row_groups_are_bounded() {
        let rows = vec![routed(0, 3, &[1]); 1_048_577];
        let builder = written(&rows);
        let groups = builder.metadata().row_groups();
        let sizes: Vec<i64> = groups.iter().map(|group| group.num_rows()).collect();
        assert_eq!(sizes, [1_048_576, 1], "as docs/formats.md has it");
    }

    #[test]
    fn a_trace_without_rows_is_a_file() {
        let batches = written(&[]).build().unwrap();
        assert_eq!(batches.count(), 0);
    }
}
