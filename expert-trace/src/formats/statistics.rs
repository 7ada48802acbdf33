//! `json` of a trace that has an end: the document of statistics that its capture wrote. The trace's summary is
//! that document without what follows from the rows, which are counted again.
//!
//! docs/json-schema.md explains it. Close calls are in no row: where there can have been some, they are `null`.

use std::collections::BTreeSet;

use expert_trace_common::{MAX_LAYERS, Route};
use serde::{Serialize, Serializer, ser::SerializeMap as _};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::{
    profile::counting::{ContextCounts, Counted},
    routes,
    tally::{SpecifiedLayer, Tally, expert_stats, never_activated},
};

/// Most experts that a model file can have (`gguf`).
const MAX_EXPERTS: u64 = 4096;

static NOTHING: Tally = Tally {
    k: 0,
    tokens: [0; 2],
    experts: Vec::new(),
};

/// Why a trace does not become a document of statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// It has no summary that this program knows.
    #[error("it has no summary, so that whether it is complete is not known")]
    NoSummary,
    /// Its summary is not as it should be.
    #[error("its summary is not understood")]
    NotUnderstood,
    /// Its rows are not those that the summary stands for.
    #[error(
        "its summary tells of other rows, as of a trace in several files, or where counts began anew"
    )]
    OtherRows,
}

/// A document of statistics.
#[derive(Debug, Serialize)]
pub struct Document<'a> {
    #[serde(flatten)]
    told: Told<'a>,
    layers: Vec<SpecifiedLayer>,
    contexts: Vec<Context<'a>>,
}

#[derive(Debug, Serialize)]
struct Context<'a> {
    #[serde(flatten)]
    told: Told<'a>,
    layers: Vec<Layer<'a>>,
}

#[derive(Debug, Serialize)]
struct Layer<'a> {
    #[serde(flatten)]
    told: Told<'a>,
    #[serde(flatten)]
    counts: Counts<'a>,
    /// None where it is not known whether there were any.
    close_calls: Option<[(); 0]>,
    second_block: Option<SecondBlock<'a>>,
    #[serde(skip)]
    id: u16,
    /// Whether it was seen in a pass.
    #[serde(skip)]
    is_seen: bool,
}

#[derive(Debug, Serialize)]
struct SecondBlock<'a> {
    #[serde(flatten)]
    told: Told<'a>,
    #[serde(flatten)]
    counts: Counts<'a>,
}

/// Members of an object of the summary, but for some.
#[derive(Debug)]
struct Told<'a> {
    members: &'a Map<String, Value>,
    but: &'static [&'static str],
}

/// What a layer or a second block activated. The lists are made when they are written: those of all layers
/// at once would take many times what is counted.
#[derive(Debug)]
struct Counts<'a> {
    tally: &'a Tally,
    /// Experts that there are, where that is known and some were seen.
    n_expert: Option<u32>,
}

impl<'a> Document<'a> {
    /// That of a trace.
    ///
    /// # Errors
    /// When the trace does not have all that is in it.
    pub fn new(counted: &'a Counted) -> Result<Self, Refusal> {
        let summary = counted.summary.as_ref().ok_or(Refusal::NoSummary)?;
        let told = Told::of(summary, &["contexts", "layers"])?;
        let mut ids = BTreeSet::new();
        let mut contexts = Vec::new();
        for context in told.list("contexts")? {
            let told = Told::of(context, &["layers"])?;
            let id = told.number("trace_context")?;
            let id = u32::try_from(id).map_err(|_| Refusal::NotUnderstood)?;
            if !ids.insert(id) {
                return Err(Refusal::NotUnderstood);
            }
            let layers = layers(&told, counted.contexts.get(&id))?;
            contexts.push(Context { told, layers });
        }
        let has_rows = |context: &ContextCounts| {
            !context.layers.is_empty() || !context.second_blocks.is_empty()
        };
        let mut counted = counted.contexts.iter();
        if counted.any(|(id, context)| has_rows(context) && !ids.contains(id)) {
            return Err(Refusal::OtherRows);
        }
        let main = match told.members.get("layers_context") {
            Some(Value::Null) => None,
            Some(main) => {
                let main = main.as_u64().and_then(|main| contexts.get(main as usize));
                Some(main.ok_or(Refusal::NotUnderstood)?)
            }
            None => return Err(Refusal::NotUnderstood),
        };
        let seen = main.into_iter().flat_map(|main| &main.layers);
        let seen = seen.filter(|layer| layer.is_seen);
        Ok(Self {
            layers: seen
                .map(|layer| SpecifiedLayer::of(layer.id, layer.counts.tally))
                .collect(),
            told,
            contexts,
        })
    }

    /// Whether there can have been close calls, which are not in it.
    pub fn lacks_close_calls(&self) -> bool {
        let mut layers = self.contexts.iter().flat_map(|context| &context.layers);
        layers.any(|layer| layer.close_calls.is_none())
    }
}

/// The layers of a context, of which these were counted.
fn layers<'a>(
    context: &Told<'a>,
    counted: Option<&'a ContextCounts>,
) -> Result<Vec<Layer<'a>>, Refusal> {
    let mut layers: Vec<Layer<'a>> = Vec::new();
    for layer in context.list("layers")? {
        let told = Told::of(
            layer,
            &[
                "experts",
                "experts_never_activated",
                "close_calls",
                "second_block",
            ],
        )?;
        let id = u16::try_from(told.number("layer_id")?).ok();
        let id = id
            .filter(|id| *id < MAX_LAYERS)
            .ok_or(Refusal::NotUnderstood)?;
        if layers.last().is_some_and(|before| before.id >= id) {
            return Err(Refusal::NotUnderstood);
        }
        let tally = counted.and_then(|counted| counted.layers.get(&id));
        let second = counted.and_then(|counted| counted.second_blocks.get(&id));
        let is_seen = told.number("passes")? > 0;
        let logits = routes::name(Route::Logits);
        let from_logits = told.list("routes")?.iter().any(|route| route == logits);
        layers.push(Layer {
            counts: told.counts(tally, is_seen)?,
            close_calls: (!from_logits).then_some([]),
            second_block: second_block(&told, second)?,
            id,
            is_seen,
            told,
        });
    }
    let is_told = |id: &u16| layers.binary_search_by_key(id, |layer| layer.id).is_ok();
    let mut ids = counted.into_iter().flat_map(|counted| {
        let second = counted.second_blocks.keys();
        counted.layers.keys().chain(second)
    });
    match ids.all(is_told) {
        true => Ok(layers),
        false => Err(Refusal::OtherRows),
    }
}

fn second_block<'a>(
    layer: &Told<'a>,
    counted: Option<&'a Tally>,
) -> Result<Option<SecondBlock<'a>>, Refusal> {
    let told = layer.members.get("second_block").unwrap_or(&Value::Null);
    if told.is_null() {
        return match counted {
            Some(_) => Err(Refusal::OtherRows),
            None => Ok(None),
        };
    }
    let told = Told::of(told, &["experts", "experts_never_activated"])?;
    let counts = told.counts(counted, true)?;
    Ok(Some(SecondBlock { told, counts }))
}

impl<'a> Told<'a> {
    fn of(value: &'a Value, but: &'static [&'static str]) -> Result<Self, Refusal> {
        let members = value.as_object().ok_or(Refusal::NotUnderstood)?;
        Ok(Self { members, but })
    }

    fn list(&self, key: &str) -> Result<&'a [Value], Refusal> {
        let list = self.members.get(key).and_then(Value::as_array);
        list.map(Vec::as_slice).ok_or(Refusal::NotUnderstood)
    }

    fn number(&self, key: &str) -> Result<u64, Refusal> {
        let number = self.members.get(key).and_then(Value::as_u64);
        number.ok_or(Refusal::NotUnderstood)
    }

    /// The counts of this layer or second block, which have to be those of its sums.
    fn counts(&self, tally: Option<&'a Tally>, is_seen: bool) -> Result<Counts<'a>, Refusal> {
        let tally = tally.unwrap_or(&NOTHING);
        let [prefill, decode] = tally.tokens;
        for (key, sum) in [
            ("total_tokens", prefill + decode),
            ("prefill_tokens", prefill),
            ("decode_tokens", decode),
            ("activations", tally.activations()),
        ] {
            if self.number(key)? != sum {
                return Err(Refusal::OtherRows);
            }
        }
        let n_expert = match self.members.get("n_expert") {
            Some(Value::Null) => None,
            Some(n) => {
                let n = n.as_u64().filter(|n| *n <= MAX_EXPERTS);
                Some(n.ok_or(Refusal::NotUnderstood)? as u32)
            }
            None => return Err(Refusal::NotUnderstood),
        };
        Ok(Counts {
            tally,
            n_expert: n_expert.filter(|_| is_seen),
        })
    }
}

impl Serialize for Told<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let members = self.members.iter();
        serializer.collect_map(members.filter(|(key, _)| !self.but.contains(&key.as_str())))
    }
}

impl Serialize for Counts<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let experts = expert_stats(self.tally);
        let never = self.n_expert.map(|n| never_activated(n, &experts));
        let mut members = serializer.serialize_map(Some(2))?;
        members.serialize_entry("experts", &experts)?;
        members.serialize_entry("experts_never_activated", &never)?;
        members.end()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        formats::tests::{TraceOnDisk, routed},
        stats_schema,
        trace::{Kind, Row},
    };

    /// A layer of the summary whose experts are `n_expert`.
    fn layer(id: u16, [prefill, decode]: [u64; 2], activations: u64) -> Value {
        json!({
            "layer_id": id, "n_expert": 4, "passes": 1, "routes": ["router"],
            "total_tokens": prefill + decode, "prefill_tokens": prefill, "decode_tokens": decode,
            "activations": activations, "second_block": null, "coverage": "observed",
        })
    }

    fn summary(layers: Value) -> Value {
        json!({
            "schema": {"name": stats_schema::NAME, "version": stats_schema::VERSION},
            "capture": {"duration_s": 0.1},
            "layers_context": 0,
            "contexts": [{"id": 0, "trace_context": 2, "pid": 7, "layers": layers}],
        })
    }

    /// What becomes of a trace of these rows with such a summary.
    fn document(rows: &[Row<'_>], summary: &Value) -> Result<Value, Refusal> {
        let detail = summary.to_string();
        let end = Row {
            detail: Some(&detail),
            ..Row::of(Kind::Summary)
        };
        let counted = TraceOnDisk::new(&[rows, &[end]].concat()).counted();
        let document = Document::new(&counted)?;
        Ok(serde_json::to_value(&document).unwrap())
    }

    const ROWS: [Row<'static>; 3] = [
        Row {
            context: Some(2),
            layer: Some(3),
            phase: Some(expert_trace_common::Phase::Prefill),
            experts: &[1, 2],
            ..Row::of(Kind::Routed)
        },
        Row {
            context: Some(2),
            layer: Some(3),
            phase: Some(expert_trace_common::Phase::Decode),
            experts: &[2, 0],
            ..Row::of(Kind::Routed)
        },
        Row {
            context: Some(2),
            layer: Some(3),
            experts: &[1, 1],
            ..Row::of(Kind::SecondBlock)
        },
    ];

    fn told() -> Value {
        let mut first = layer(3, [1, 1], 4);
        first["second_block"] = json!({
            "n_expert": 2, "k": 2, "coverage": "observed", "passes": 1,
            "total_tokens": 1, "prefill_tokens": 0, "decode_tokens": 1, "activations": 2,
        });
        let mut unseen = layer(5, [0, 0], 0);
        unseen["passes"] = json!(0);
        unseen["routes"] = json!([]);
        summary(json!([first, unseen]))
    }

    #[test]
    fn counts_are_filled_in() {
        let document = document(&ROWS, &told()).unwrap();
        assert_eq!(document["capture"], json!({"duration_s": 0.1}));
        let experts = json!([
            {"expert_id": 2, "activations": 2, "percentage": 100.0},
            {"expert_id": 0, "activations": 1, "percentage": 50.0},
            {"expert_id": 1, "activations": 1, "percentage": 50.0},
        ]);
        let layers = json!([{"layer_id": 3, "total_tokens": 2, "experts": experts}]);
        assert_eq!(document["layers"], layers);
        let context = &document["contexts"][0];
        assert_eq!(context["pid"], 7);
        let [first, unseen] = &context["layers"].as_array().unwrap()[..] else {
            panic!("{context:#}");
        };
        let of_first = json!({"expert_id": 2, "activations": 2, "prefill": 1, "decode": 1,
                              "percentage": 100.0, "share": 0.5});
        assert_eq!(first["experts"][0], of_first);
        assert_eq!(first["experts_never_activated"], json!([3]));
        assert_eq!(first["close_calls"], json!([]));
        assert_eq!(first["coverage"], "observed");
        let second = &first["second_block"];
        assert_eq!(second["experts"][0]["percentage"], 200.0);
        assert_eq!(second["experts_never_activated"], json!([0]));
        assert_eq!(second["k"], 2);
        assert_eq!(unseen["experts"], json!([]));
        assert_eq!(unseen["experts_never_activated"], Value::Null);
        assert_eq!(unseen["second_block"], Value::Null);
    }

    #[test]
    fn close_calls_are_not_known_of_choices_from_logits() {
        let mut told = told();
        told["contexts"][0]["layers"][0]["routes"] = json!(["router", "logits"]);
        let layers = &document(&ROWS, &told).unwrap()["contexts"][0]["layers"];
        assert_eq!(layers[0]["close_calls"], Value::Null);
        assert_eq!(layers[1]["close_calls"], json!([]));
    }

    #[test]
    fn a_trace_without_its_end_has_no_document() {
        let counted = TraceOnDisk::new(&ROWS).counted();
        assert_eq!(Document::new(&counted).err(), Some(Refusal::NoSummary));
        let mut idle = told();
        idle["layers_context"] = Value::Null;
        idle["contexts"] = json!([]);
        assert_eq!(document(&[], &idle).unwrap()["layers"], json!([]));
    }

    /// One of several files, or one that was changed.
    #[test]
    fn rows_have_to_be_those_that_the_summary_tells_of() {
        let of_rows = |rows: &[Row<'_>]| document(rows, &told()).err();
        assert_eq!(of_rows(&ROWS), None);
        assert_eq!(of_rows(&ROWS[1..]), Some(Refusal::OtherRows));
        assert_eq!(of_rows(&ROWS[..2]), Some(Refusal::OtherRows));
        for more in [
            routed(2, 3, &[1, 2]),
            routed(2, 4, &[1]),
            routed(0, 3, &[1]),
            Row {
                kind: Kind::SecondBlock,
                ..routed(2, 5, &[1])
            },
        ] {
            let rows = [&ROWS[..], &[more]].concat();
            assert_eq!(of_rows(&rows), Some(Refusal::OtherRows), "{more:?}");
        }
    }

    #[test]
    fn a_summary_that_is_not_understood_is_refused() {
        let layer = "/contexts/0/layers/0";
        for (at, key, value) in [
            ("", "contexts", json!({})),
            ("", "layers_context", json!(1)),
            ("", "layers_context", json!("0")),
            ("/contexts/0", "trace_context", json!(-1)),
            ("/contexts/0", "layers", json!(null)),
            ("/contexts/0", "layers", json!([7])),
            (layer, "layer_id", json!(1024)),
            ("/contexts/0/layers/1", "layer_id", json!(3)),
            (layer, "n_expert", json!(4097)),
            (layer, "passes", json!(null)),
            (layer, "routes", json!("logits")),
            (layer, "second_block", json!(7)),
        ] {
            let mut told = told();
            told.pointer_mut(at).unwrap()[key] = value;
            let refused = document(&ROWS, &told).err();
            assert_eq!(refused, Some(Refusal::NotUnderstood), "{at} {key}");
        }
        let mut twice = told();
        let context = twice["contexts"][0].clone();
        twice["contexts"].as_array_mut().unwrap().push(context);
        assert_eq!(document(&ROWS, &twice).err(), Some(Refusal::NotUnderstood));
    }
}
