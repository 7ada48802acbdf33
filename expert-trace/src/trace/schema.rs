//! The schema of a trace: its columns, and what its metadata says of the capture.

use std::{collections::HashMap, sync::Arc};

use arrow_schema::{DataType, Field, Schema, SchemaRef, TimeUnit};
use serde::{Deserialize, Deserializer, Serialize};

/// Name of the format, in the schema's metadata under [`FORMAT_KEY`].
pub const FORMAT: &str = "expert-trace-routes";
/// Its version: raised when a column changes its meaning or goes. New columns can come without.
pub const VERSION: u32 = 1;

/// Metadata key of the format's name.
pub const FORMAT_KEY: &str = "expert-trace.format";
/// Metadata key of its version.
pub const VERSION_KEY: &str = "expert-trace.version";
/// Metadata key of what is known when a capture begins: a [`Capture`] as JSON.
pub const CAPTURE_KEY: &str = "expert-trace.capture";

/// What is known when a capture begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capture {
    /// Version of the program that wrote the trace.
    pub tool: String,
    /// `run` or `attach`; [`IMPORT`](Self::IMPORT) when it was made of a file.
    pub mode: String,
    /// First process of the capture.
    pub pid: u32,
    /// When the probes were switched on: RFC 3339, UTC.
    pub started: String,
    /// Whether warm-up passes are rows like all others.
    pub include_warmup: bool,
    /// Whether there are token ids.
    pub tokens: bool,
    /// Which weights there are, if there is a column of them.
    #[serde(deserialize_with = "known")]
    pub weights: Option<Weights>,
    /// Number of the file in a trace that is divided into several, from 0.
    pub part: u32,
}

impl Capture {
    /// `mode` of what others have recorded.
    pub const IMPORT: &str = "import";

    /// Whether this and another file are of one trace. Nothing tells it of files that do not say when their
    /// capture began.
    pub fn is_of_one_trace(&self, other: &Self) -> bool {
        let without_part = |of: &Self| Self {
            part: 0,
            ..of.clone()
        };
        !self.started.is_empty() && without_part(self) == without_part(other)
    }
}

/// Which weights there are, if that is known here: a newer program can have others.
fn known<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Weights>, D::Error> {
    let name = Option::<String>::deserialize(from)?;
    Ok(name.and_then(|name| serde_json::from_value(name.into()).ok()))
}

/// What the column `weights` has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    /// What the router gives the chosen experts (`ffn_moe_weights-N`): before they are normalised or scaled,
    /// and of models in which only the chosen experts' logits become probabilities, those logits.
    Router,
    /// What another program has recorded.
    Imported,
}

/// Names of the columns, in their order.
pub mod column {
    /// A [`Kind`](crate::trace::Kind).
    pub const RECORD: &str = "record";
    /// Context.
    pub const CONTEXT: &str = "context";
    /// Pass.
    pub const PASS: &str = "pass";
    /// Phase.
    pub const PHASE: &str = "phase";
    /// Layer.
    pub const LAYER: &str = "layer";
    /// Row within the pass and layer.
    pub const ROW: &str = "row";
    /// Rows that are missing.
    pub const ROWS: &str = "rows";
    /// Sequence.
    pub const SEQUENCE: &str = "sequence";
    /// Position.
    pub const POSITION: &str = "position";
    /// Token id.
    pub const TOKEN: &str = "token";
    /// Time.
    pub const TIME: &str = "time";
    /// Experts in router order.
    pub const EXPERTS: &str = "experts";
    /// Weights of the experts, in a trace that has them.
    pub const WEIGHTS: &str = "weights";
    /// A [`Reason`](crate::trace::Reason).
    pub const REASON: &str = "reason";
    /// JSON.
    pub const DETAIL: &str = "detail";
}

/// Time zone of the column `time`.
pub const UTC: &str = "UTC";

/// Names by small numbers: each is in the file once.
pub fn named() -> DataType {
    DataType::Dictionary(Box::new(DataType::UInt8), Box::new(DataType::Utf8))
}

/// The items of the column `experts`.
pub fn expert_field() -> Arc<Field> {
    Arc::new(Field::new_list_field(DataType::UInt16, false))
}

/// The items of the column `weights`.
pub fn weight_field() -> Arc<Field> {
    Arc::new(Field::new_list_field(DataType::Float32, false))
}

/// The column that traces with weights have behind all others.
pub fn weights() -> Field {
    Field::new(column::WEIGHTS, DataType::List(weight_field()), true)
}

/// The columns that every trace has, without metadata.
pub fn fields() -> Vec<Field> {
    let optional = |name, of| Field::new(name, of, true);
    vec![
        Field::new(column::RECORD, named(), false),
        optional(column::CONTEXT, DataType::UInt32),
        optional(column::PASS, DataType::UInt32),
        optional(column::PHASE, named()),
        optional(column::LAYER, DataType::UInt16),
        optional(column::ROW, DataType::UInt32),
        optional(column::ROWS, DataType::UInt32),
        optional(column::SEQUENCE, DataType::UInt16),
        optional(column::POSITION, DataType::Int32),
        optional(column::TOKEN, DataType::Int32),
        Field::new(
            column::TIME,
            DataType::Timestamp(TimeUnit::Nanosecond, Some(UTC.into())),
            false,
        ),
        optional(column::EXPERTS, DataType::List(expert_field())),
        optional(column::REASON, named()),
        optional(column::DETAIL, DataType::Utf8),
    ]
}

/// The schema of a capture's trace.
pub fn schema(capture: &Capture) -> SchemaRef {
    let mut fields = fields();
    fields.extend(capture.weights.map(|_| weights()));
    // A structure of plain fields becomes JSON.
    let capture = serde_json::to_string(capture).unwrap_or_default();
    let metadata = [
        (FORMAT_KEY, FORMAT.to_owned()),
        (VERSION_KEY, VERSION.to_string()),
        (CAPTURE_KEY, capture),
    ];
    let metadata: HashMap<String, String> = metadata
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    Arc::new(Schema::new_with_metadata(fields, metadata))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_newer_program_says_of_weights_costs_nothing_else() {
        let capture = |weights: &str| -> Capture {
            let text = format!("{{\"mode\": \"run\", \"weights\": {weights}, \"part\": 3}}");
            serde_json::from_str(&text).unwrap()
        };
        for (weights, expected) in [
            ("\"router\"", Some(Weights::Router)),
            ("\"of_tomorrow\"", None),
            ("null", None),
        ] {
            let found = capture(weights);
            assert_eq!((found.mode.as_str(), found.part), ("run", 3));
            assert_eq!(found.weights, expected);
        }
        assert_eq!(
            serde_json::from_str::<Capture>("{}").unwrap(),
            Capture::default()
        );
    }
}
