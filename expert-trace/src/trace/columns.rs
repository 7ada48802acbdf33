//! Rows on their way into a trace, column by column.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, DictionaryArray, RecordBatch, StringArray,
    builder::{
        Float32Builder, Int32Builder, ListBuilder, StringBuilder, TimestampNanosecondBuilder,
        UInt8Builder, UInt16Builder, UInt32Builder,
    },
    types::UInt8Type,
};
use arrow_schema::{ArrowError, SchemaRef};

use super::{
    Counts, Kind, PHASES, Reason, Row, phase_key,
    schema::{UTC, column, expert_field, weight_field},
};

/// Rows of a batch: more than that are written at once.
pub const BATCH_ROWS: usize = 64 << 10;

/// Experts of a batch, for rows of more than 32 of them.
const BATCH_EXPERTS: usize = 32 * BATCH_ROWS;

/// What names stand for in all batches: a file has them once.
#[derive(Debug)]
struct Dictionaries {
    kinds: ArrayRef,
    phases: ArrayRef,
    reasons: ArrayRef,
}

impl Dictionaries {
    fn new() -> Self {
        let names = |names: Vec<&str>| Arc::new(StringArray::from(names)) as ArrayRef;
        Self {
            kinds: names(Kind::ALL.map(Kind::name).into()),
            phases: names(PHASES.into()),
            reasons: names(Reason::ALL.map(Reason::name).into()),
        }
    }
}

/// Rows that are collected for the next batch.
#[derive(Debug)]
pub struct Columns {
    schema: SchemaRef,
    dictionaries: Dictionaries,
    record: UInt8Builder,
    context: UInt32Builder,
    pass: UInt32Builder,
    phase: UInt8Builder,
    layer: UInt16Builder,
    row: UInt32Builder,
    rows: UInt32Builder,
    sequence: UInt16Builder,
    position: Int32Builder,
    token: Int32Builder,
    time: TimestampNanosecondBuilder,
    experts: ListBuilder<UInt16Builder>,
    reason: UInt8Builder,
    detail: StringBuilder,
    /// In a trace that has them.
    weights: Option<ListBuilder<Float32Builder>>,
    counts: Counts,
}

impl Columns {
    /// Nothing yet.
    pub fn new(schema: SchemaRef) -> Self {
        let has_weights = schema.field_with_name(column::WEIGHTS).is_ok();
        let weights =
            has_weights.then(|| ListBuilder::new(Float32Builder::new()).with_field(weight_field()));
        Self {
            weights,
            schema,
            dictionaries: Dictionaries::new(),
            record: UInt8Builder::new(),
            context: UInt32Builder::new(),
            pass: UInt32Builder::new(),
            phase: UInt8Builder::new(),
            layer: UInt16Builder::new(),
            row: UInt32Builder::new(),
            rows: UInt32Builder::new(),
            sequence: UInt16Builder::new(),
            position: Int32Builder::new(),
            token: Int32Builder::new(),
            time: TimestampNanosecondBuilder::new().with_timezone(UTC),
            experts: ListBuilder::new(UInt16Builder::new()).with_field(expert_field()),
            reason: UInt8Builder::new(),
            detail: StringBuilder::new(),
            counts: Counts::default(),
        }
    }

    /// Adds a row. One of a kind that routes nothing has no list of experts.
    pub fn push(&mut self, row: &Row<'_>) {
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
        self.record.append_value(kind as u8);
        self.context.append_option(context);
        self.pass.append_option(pass);
        self.phase.append_option(phase.map(phase_key));
        self.layer.append_option(layer);
        self.row.append_option(row);
        self.rows.append_option(rows);
        self.sequence.append_option(sequence);
        self.position.append_option(position);
        self.token.append_option(token);
        self.time.append_value(time_ns);
        self.experts.values().append_slice(experts);
        match kind {
            Kind::Routed | Kind::SecondBlock => {
                self.experts.append(true);
                self.counts.routed += 1;
                self.counts.without_weights += u64::from(weights.is_none());
            }
            Kind::Gap => {
                self.experts.append(false);
                self.counts.gaps += 1;
            }
            Kind::Excluded | Kind::Context | Kind::Summary => self.experts.append(false),
        }
        self.reason.append_option(reason.map(|reason| reason as u8));
        self.detail.append_option(detail);
        if let Some(column) = &mut self.weights {
            column.values().append_slice(weights.unwrap_or_default());
            column.append(weights.is_some());
        }
    }

    /// Whether nothing is there.
    pub fn is_empty(&self) -> bool {
        self.record_count() == 0
    }

    /// Whether it is time for a batch.
    pub fn is_full(&self) -> bool {
        let experts = self.experts.values_ref().values_slice().len();
        self.record_count() >= BATCH_ROWS || experts >= BATCH_EXPERTS
    }

    /// Counts rows from what has been counted before.
    pub fn go_on_from(&mut self, before: &Columns) {
        self.counts = before.counts;
    }

    /// Rows since the beginning of the trace.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    fn record_count(&self) -> usize {
        self.record.values_slice().len()
    }

    /// Takes out what is there.
    ///
    /// # Errors
    /// When the columns do not fit the schema, which would be a mistake of ours.
    pub fn take(&mut self) -> Result<RecordBatch, ArrowError> {
        let named = |keys: &mut UInt8Builder, names: &ArrayRef| {
            let keys = keys.finish();
            DictionaryArray::<UInt8Type>::try_new(keys, Arc::clone(names))
                .map(|array| Arc::new(array) as ArrayRef)
        };
        let Self {
            schema,
            dictionaries,
            ..
        } = self;
        let mut columns: Vec<ArrayRef> = vec![
            named(&mut self.record, &dictionaries.kinds)?,
            Arc::new(self.context.finish()),
            Arc::new(self.pass.finish()),
            named(&mut self.phase, &dictionaries.phases)?,
            Arc::new(self.layer.finish()),
            Arc::new(self.row.finish()),
            Arc::new(self.rows.finish()),
            Arc::new(self.sequence.finish()),
            Arc::new(self.position.finish()),
            Arc::new(self.token.finish()),
            Arc::new(self.time.finish()),
            Arc::new(self.experts.finish()),
            named(&mut self.reason, &dictionaries.reasons)?,
            Arc::new(self.detail.finish()),
        ];
        if let Some(weights) = &mut self.weights {
            columns.push(Arc::new(weights.finish()));
        }
        RecordBatch::try_new(Arc::clone(schema), columns)
    }
}
