//! Passes as the kernel reports them, and what becomes of them.

mod recorded;
mod reset;

use expert_trace_common::{Header, Kind, PassSource, ROW_OUTPUT, RowInfo, UBATCH_UNREADABLE};

use super::*;
use crate::{decode::decode, routes::Routes};

const SCHED: u64 = 0x5000;

fn record(header: Header, payload: &[u8]) -> Vec<u8> {
    // SAFETY: the header is made of integers without padding (checked in the common crate).
    let head = unsafe {
        std::slice::from_raw_parts((&raw const header).cast::<u8>(), size_of::<Header>())
    };
    [head, payload].concat()
}

/// Layer, and experts of each row.
type LayerRows<'a> = (u16, &'a [&'a [i32]]);

/// One pass as the kernel reports it.
struct TestPass<'a> {
    context: u64,
    number: u32,
    /// (position, sequence, output) of each token; none when the ubatch was not read.
    ubatch: &'a [(i32, u16, bool)],
    tokens: &'a [i32],
    layers: &'a [LayerRows<'a>],
    /// Those of second blocks.
    second_blocks: &'a [LayerRows<'a>],
}

impl Default for TestPass<'_> {
    fn default() -> Self {
        Self {
            context: SCHED,
            number: 0,
            ubatch: &[],
            tokens: &[],
            layers: &[],
            second_blocks: &[],
        }
    }
}

impl TestPass<'_> {
    fn header(&self, kind: Kind) -> Header {
        let source = if self.context == 0 {
            PassSource::LayerOrder
        } else {
            PassSource::Scheduler
        };
        Header {
            kind: kind as u8,
            pass_source: source as u8,
            context: self.context,
            pass: self.number,
            process: 1,
            ubatch_tokens: self.ubatch.len() as u32,
            ..Header::default()
        }
    }

    fn records(&self) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        let of = |header: Header, rows: usize| Header {
            rows: rows as u32,
            total_rows: rows as u32,
            ..header
        };
        if self.context != 0 {
            let infos: Vec<u8> = self
                .ubatch
                .iter()
                .flat_map(|(position, sequence, output)| {
                    let flags = if *output { ROW_OUTPUT } else { 0 };
                    let mut bytes = position.to_ne_bytes().to_vec();
                    bytes.extend(sequence.to_ne_bytes());
                    bytes.extend(flags.to_ne_bytes());
                    assert_eq!(bytes.len(), size_of::<RowInfo>());
                    bytes
                })
                .collect();
            let header = of(self.header(Kind::Pass), self.ubatch.len());
            records.push(record(header, &infos));
        }
        let numbers = |numbers: &[i32]| -> Vec<u8> {
            numbers.iter().flat_map(|id| id.to_ne_bytes()).collect()
        };
        if !self.tokens.is_empty() {
            let header = of(self.header(Kind::Tokens), self.tokens.len());
            records.push(record(header, &numbers(self.tokens)));
        }
        for (kind, row_stride, layers) in [
            (Kind::Rows, 8, self.layers),
            (Kind::SecondBlock, 2, self.second_blocks),
        ] {
            for (layer, rows) in layers {
                let k = rows.first().map_or(1, |ids| ids.len());
                let header = Header {
                    layer: *layer,
                    k: k as u16,
                    row_stride,
                    ..of(self.header(kind), rows.len())
                };
                records.push(record(header, &numbers(&rows.concat())));
            }
        }
        records
    }
}

fn push(model: &mut Model, pass: &TestPass<'_>) -> usize {
    let mut committed = 0;
    for record in pass.records() {
        model.push(decode(&record), &mut |finished| {
            committed += usize::from(finished.shown().is_some());
        });
    }
    committed
}

fn run(options: Options, facts: ModelFacts, passes: &[TestPass<'_>], end: End) -> Model {
    let mut model = Model::new(options);
    model.set_facts(facts);
    for pass in passes {
        push(&mut model, pass);
    }
    model.end(&|_| end, &mut |_| {});
    model
}

const FROM_START: Options = Options {
    include_warmup: false,
    from_start: true,
};
const ATTACHED: Options = Options {
    include_warmup: false,
    from_start: false,
};

/// A decode of one token of sequence 0 at `position`, through layers 0 and 1.
fn decode_at(number: u32, ubatch: &[(i32, u16, bool)]) -> TestPass<'_> {
    TestPass {
        number,
        ubatch,
        layers: &[(0, &[&[1, 2]]), (1, &[&[3, 4]])],
        ..TestPass::default()
    }
}

fn tokens(model: &Model, context: usize, layer: u16) -> [u64; 2] {
    model.contexts()[context].layers[layer].tally.tokens
}

#[test]
fn prefill_and_decode_by_tokens_per_sequence() {
    let rows: &[&[i32]] = &[&[0, 1], &[2, 3], &[4, 5]];
    let passes = [
        // A prompt of three tokens; the last layer sees the one output row.
        TestPass {
            number: 0,
            ubatch: &[(0, 0, false), (1, 0, false), (2, 0, true)],
            layers: &[(0, rows), (1, &[&[6, 7]])],
            ..TestPass::default()
        },
        // Two sequences decode beside one that begins.
        TestPass {
            number: 1,
            ubatch: &[(3, 0, true), (9, 1, true), (0, 2, true)],
            layers: &[(0, rows), (1, rows)],
            ..TestPass::default()
        },
    ];
    let model = run(FROM_START, ModelFacts::default(), &passes, End::Exited);
    assert_eq!(tokens(&model, 0, 0), [4, 2]);
    assert_eq!(tokens(&model, 0, 1), [2, 2]);
    let layer = &model.contexts()[0].layers[1];
    assert_eq!(layer.tally.experts[6], [1, 0]);
    assert_eq!(layer.tally.experts[0], [0, 1]);
    assert_eq!(layer.n_expert, 8);
}

#[test]
fn the_last_token_of_a_long_prompt_is_prefill() {
    let passes = [
        TestPass {
            number: 0,
            ubatch: &[(0, 0, false), (1, 0, false)],
            layers: &[(0, &[&[0, 1], &[2, 3]])],
            ..TestPass::default()
        },
        decode_at(1, &[(2, 0, true)]),
        decode_at(2, &[(3, 0, true)]),
    ];
    let model = run(FROM_START, ModelFacts::default(), &passes, End::Exited);
    assert_eq!(tokens(&model, 0, 0), [3, 1]);
}

#[test]
fn warmup_needs_evidence_and_comes_first() {
    let facts = ModelFacts {
        warmup_tokens: vec![vec![1, 2]],
        selective: Some(BTreeSet::from([8])),
        ..ModelFacts::default()
    };
    let two: &[&[i32]] = &[&[0, 1], &[2, 3]];
    let layers: &[(u16, &[&[i32]])] = &[(0, two)];
    let short = |number, tokens| TestPass {
        number,
        tokens,
        ubatch: &[(0, 0, true), (1, 0, true)],
        layers,
        ..TestPass::default()
    };
    let all: &[&[i32]] = &[&[7, 6, 5, 4, 3, 2, 1, 0]];
    let with_all_experts = TestPass {
        number: 2,
        tokens: &[9],
        ubatch: &[(0, 0, true)],
        layers: &[(0, all)],
        ..TestPass::default()
    };
    let passes = [
        short(0, &[0, 0]),
        short(1, &[1, 2]),
        with_all_experts,
        short(3, &[5, 6]),
        // The same tokens after work has begun are a user's.
        short(4, &[1, 2]),
        short(5, &[0, 0]),
    ];
    let model = run(FROM_START, facts.clone(), &passes, End::Exited);
    assert_eq!(tokens(&model, 0, 0), [6, 0]);
    let warmup = model.excluded()[&Exclusion::Warmup];
    assert_eq!((warmup.passes, warmup.tokens), (3, 5));

    let options = Options {
        include_warmup: true,
        ..FROM_START
    };
    let model = run(options, facts, &passes, End::Exited);
    assert_eq!(tokens(&model, 0, 0), [11, 0]);
    assert!(model.excluded().is_empty());
}

#[test]
fn a_model_that_always_uses_all_experts_has_no_warmup_by_that() {
    let all: &[&[i32]] = &[&[7, 6, 5, 4, 3, 2, 1, 0]];
    let pass = TestPass {
        tokens: &[9],
        ubatch: &[(0, 0, true)],
        layers: &[(0, all)],
        ..TestPass::default()
    };
    let facts = ModelFacts {
        selective: Some(BTreeSet::new()),
        ..ModelFacts::default()
    };
    let model = run(FROM_START, facts, &[pass], End::Exited);
    assert!(model.excluded().is_empty());
    assert_eq!(tokens(&model, 0, 0), [1, 0]);
}

#[test]
fn a_cut_last_pass_is_left_out() {
    let cut = TestPass {
        layers: &[(0, &[&[1, 2]])],
        ..decode_at(2, &[(2, 0, true)])
    };
    let passes = [
        decode_at(0, &[(0, 0, true)]),
        decode_at(1, &[(1, 0, true)]),
        cut,
    ];
    let model = run(ATTACHED, ModelFacts::default(), &passes, End::Cut);
    assert_eq!(tokens(&model, 0, 0), [1, 1]);
    assert_eq!(model.excluded()[&Exclusion::Partial].passes, 1);
    // Until a pass with an output was counted, the last layer is known from the model alone.
    let no_output = |number| TestPass {
        layers: &[(0, &[&[1, 2]])],
        ..decode_at(number, &[(2, 0, false)])
    };
    let cut = TestPass {
        layers: &[(0, &[&[1, 2]])],
        ..decode_at(1, &[(3, 0, true)])
    };
    let facts = ModelFacts {
        moe_layers: Some(BTreeSet::from([0, 1])),
        ..ModelFacts::default()
    };
    let model = run(ATTACHED, facts, &[no_output(0), cut], End::Cut);
    assert_eq!(model.contexts()[0].passes, 1);
    assert_eq!(model.excluded()[&Exclusion::Partial].passes, 1);
    // A pass without outputs ends before the last layer: that is all of it.
    let no_output = TestPass {
        layers: &[(0, &[&[1, 2]])],
        ..decode_at(2, &[(2, 0, false)])
    };
    let [first, second, _] = passes;
    let passes = [first, second, no_output];
    let model = run(ATTACHED, ModelFacts::default(), &passes, End::Cut);
    assert_eq!(tokens(&model, 0, 0), [1, 2]);
    assert!(model.excluded().is_empty());
}

#[test]
fn a_single_pass_is_whole_when_the_model_says_so() {
    let facts = |layers| ModelFacts {
        moe_layers: Some(layers),
        ..ModelFacts::default()
    };
    let whole = facts(BTreeSet::from([0, 1]));
    let more = facts(BTreeSet::from([0, 1, 2]));
    let ubatch = [(1, 0, true)];
    let pass = || [decode_at(0, &ubatch)];
    let model = run(ATTACHED, whole, &pass(), End::Cut);
    assert_eq!(tokens(&model, 0, 0), [0, 1]);
    let model = run(ATTACHED, more, &pass(), End::Cut);
    assert_eq!(model.excluded()[&Exclusion::Partial].tokens, 1);
    let model = run(ATTACHED, ModelFacts::default(), &pass(), End::Cut);
    assert_eq!(model.excluded()[&Exclusion::Partial].tokens, 1);
}

#[test]
fn without_a_scheduler_the_first_pass_counts_if_it_is_like_the_second() {
    let pass = |number, layers| TestPass {
        context: 0,
        number,
        layers,
        ..TestPass::default()
    };
    let whole: &[(u16, &[&[i32]])] = &[(0, &[&[1, 2]]), (1, &[&[3, 4]])];
    let cut: &[(u16, &[&[i32]])] = &[(1, &[&[3, 4]])];
    let run =
        |options, passes: &[TestPass<'_>]| run(options, ModelFacts::default(), passes, End::Cut);
    let model = run(ATTACHED, &[pass(0, whole), pass(1, whole), pass(2, whole)]);
    assert_eq!(tokens(&model, 0, 0), [0, 3]);
    let model = run(ATTACHED, &[pass(0, cut), pass(1, whole), pass(2, whole)]);
    assert_eq!(tokens(&model, 0, 1), [0, 2]);
    assert_eq!(model.excluded()[&Exclusion::Partial].passes, 1);
    // One pass alone tells nothing, unless all was seen from the start.
    let model = run(ATTACHED, &[pass(0, whole)]);
    assert_eq!(model.contexts()[0].passes, 0);
    assert_eq!(model.excluded()[&Exclusion::Partial].passes, 1);
    let model = run(FROM_START, &[pass(0, whole), pass(1, whole)]);
    assert_eq!(model.contexts()[0].passes, 2);
}

#[test]
fn contexts_at_one_address_are_two() {
    let mut model = Model::new(FROM_START);
    push(&mut model, &decode_at(0, &[(0, 0, true)]));
    let first = decode_at(0, &[]);
    let end = record(first.header(Kind::ContextEnd), &[]);
    let mut committed = 0;
    model.push(decode(&end), &mut |finished| {
        committed += usize::from(finished.shown().is_some());
    });
    assert_eq!(
        committed, 1,
        "the end of a context is the end of its last pass"
    );
    push(&mut model, &decode_at(0, &[(0, 0, true)]));
    model.end(&|_| End::Exited, &mut |_| {});
    let passes: Vec<u64> = model
        .contexts()
        .iter()
        .map(|context| context.passes)
        .collect();
    assert_eq!(passes, [1, 1]);
}

/// Attached in the middle of a `llama_decode`: the first passes have the scheduler's number.
#[test]
fn a_context_adopts_the_passes_of_its_scheduler() {
    let mut model = Model::new(ATTACHED);
    push(&mut model, &decode_at(0, &[(5, 0, true)]));
    let owned = TestPass {
        context: 0x9000,
        ..decode_at(0, &[(6, 0, true)])
    };
    let owner = record(owned.header(Kind::Owner), &SCHED.to_ne_bytes());
    model.push(decode(&owner), &mut |_| {});
    push(&mut model, &owned);
    push(
        &mut model,
        &TestPass {
            number: 1,
            context: 0x9000,
            ..decode_at(1, &[(7, 0, true)])
        },
    );
    model.end(&|_| End::Cut, &mut |_| {});
    assert_eq!(model.contexts().len(), 1);
    assert_eq!(model.contexts()[0].passes, 3);
    assert_eq!(tokens(&model, 0, 0), [0, 3]);
}

#[test]
fn what_is_rejected_is_counted_and_nowhere_else() {
    let mut model = Model::new(FROM_START);
    let mut bad = decode_at(0, &[(0, 0, true)]).records();
    // An id beyond the eight experts.
    let last = bad.last_mut().unwrap();
    let end = last.len();
    last[end - 4..].copy_from_slice(&99i32.to_ne_bytes());
    for record in &bad {
        model.push(decode(record), &mut |_| {});
    }
    model.push(decode(&[]), &mut |_| {});
    model.end(&|_| End::Exited, &mut |_| {});
    let received = model.received();
    assert_eq!(
        (received.events, received.rows, received.rejected),
        (4, 1, 2)
    );
    assert!(model.contexts()[0].layers.get(1).is_none());
}

#[test]
fn graphs_that_route_nothing_are_no_passes() {
    let shift = TestPass {
        number: 1,
        ..TestPass::default()
    };
    let passes = [
        decode_at(0, &[(0, 0, true)]),
        shift,
        decode_at(2, &[(1, 0, true)]),
    ];
    let model = run(FROM_START, ModelFacts::default(), &passes, End::Exited);
    assert_eq!(model.contexts()[0].passes, 2);
    assert!(model.excluded().is_empty());
}

/// Pushes rows of one layer of a pass with 4 tokens, as a route brings them.
fn push_rows(model: &mut Model, route: Route, first_row: u32, rows: &[&[i32]]) {
    let header = TestPass::default().header(Kind::Rows);
    let header = Header {
        route: route as u8,
        layer: 2,
        k: rows[0].len() as u16,
        first_row,
        rows: rows.len() as u32,
        total_rows: 4,
        row_stride: 8,
        ..header
    };
    let payload: Vec<u8> = rows
        .iter()
        .flat_map(|ids| ids.iter())
        .flat_map(|id| id.to_ne_bytes())
        .collect();
    model.push(decode(&record(header, &payload)), &mut |_| {});
}

/// Pushes logits of the same layer, for 4 experts.
fn push_logits(model: &mut Model, kind: Kind, first_row: u32, rows: &[[f32; 4]]) {
    let header = Header {
        route: Route::Logits as u8,
        layer: 2,
        k: 4,
        first_row,
        rows: rows.len() as u32,
        total_rows: 4,
        row_stride: 4,
        ..TestPass::default().header(kind)
    };
    let payload: Vec<u8> = rows
        .iter()
        .flatten()
        .flat_map(|value| value.to_ne_bytes())
        .collect();
    model.push(decode(&record(header, &payload)), &mut |_| {});
}

/// A model that chooses 2 of 4 experts in layer 2 by what it sees at this stage.
fn choosing(stage: selection::Stage) -> Model {
    let mut model = Model::new(FROM_START);
    let layer = selection::Layer {
        k: 2,
        stage: Some(stage),
        gating: None,
        groups: 0,
        groups_used: 0,
    };
    let router = Router {
        n_expert: 4,
        layers: [(2, layer)].into(),
    };
    model.set_facts(ModelFacts {
        routers: [(1, vec![router])].into(),
        ..ModelFacts::default()
    });
    model
}

fn experts(model: &Model) -> Vec<u64> {
    let layer = &model.contexts()[0].layers[2];
    layer
        .tally
        .experts
        .iter()
        .map(|counts| counts.iter().sum())
        .collect()
}

const LOGITS: [[f32; 4]; 4] = [
    [9.0, 5.0, 1.0, 0.0],
    [0.0, 9.0, 5.0, 1.0],
    [1.0, 0.0, 9.0, 5.0],
    [5.0, 1.0, 0.9995, 9.0],
];

#[test]
fn a_layer_counts_once_whichever_route_comes_first() {
    let mut model = choosing(selection::Stage::Logits);
    push_rows(&mut model, Route::SplitInput, 0, &[&[0, 1], &[1, 2]]);
    push_rows(&mut model, Route::SplitInput, 2, &[&[2, 3], &[3, 0]]);
    // The same by another route, and once more by the first one.
    push_rows(
        &mut model,
        Route::Fetch,
        0,
        &[&[0, 1], &[1, 2], &[2, 3], &[3, 1]],
    );
    push_rows(
        &mut model,
        Route::SplitInput,
        0,
        &[&[0, 1], &[1, 2], &[2, 3], &[3, 0]],
    );
    model.end(&|_| End::Exited, &mut |_| {});
    assert_eq!(experts(&model), [2, 2, 2, 2]);
    assert_eq!(model.received().repeated_rows, 8);
    assert_eq!(model.received().differing_rows, 1);
}

/// A callback that computes with another context leaves the thread in that one's pass.
#[test]
fn rows_of_another_context_are_not_added_up() {
    let mut model = choosing(selection::Stage::Logits);
    for rows in [[&[0, 1][..], &[1, 2]], [&[2, 3], &[1, 2]]] {
        push_rows(&mut model, Route::Router, 0, &rows);
    }
    model.end(&|_| End::Exited, &mut |_| {});
    assert_eq!(experts(&model), [1, 2, 1]);
    assert_eq!(model.received().differing_rows, 1);
}

/// The scheduler copies by the function that the target's own code uses.
#[test]
fn what_the_scheduler_copies_is_not_called_the_targets_own() {
    let ids: [&[i32]; 4] = [&[0, 1], &[1, 2], &[2, 3], &[3, 0]];
    for (routes, expected) in [
        ([Route::Callback, Route::SplitInput], Route::SplitInput),
        ([Route::Callback, Route::Fetch], Route::Fetch),
        ([Route::Router, Route::Callback], Route::Router),
        ([Route::Callback, Route::Callback], Route::Callback),
        ([Route::Callback, Route::Router], Route::Callback),
    ] {
        let mut model = choosing(selection::Stage::Logits);
        push_rows(&mut model, routes[0], 0, &ids);
        push_rows(&mut model, routes[1], 0, &ids[..3]);
        push_rows(&mut model, routes[1], 3, &ids[3..]);
        model.end(&|_| End::Exited, &mut |_| {});
        assert_eq!(experts(&model), [2, 2, 2, 2]);
        assert_eq!(model.received().repeated_rows, 4);
        assert_eq!(model.received().differing_rows, 0);
        let layer = &model.contexts()[0].layers[2];
        assert_eq!(layer.routes, Routes::of(&[expected]), "{routes:?}");
    }
}

#[test]
fn ids_take_the_place_of_a_choice_from_logits() {
    let mut model = choosing(selection::Stage::Logits);
    push_logits(&mut model, Kind::Logits, 0, &LOGITS[..2]);
    push_logits(&mut model, Kind::Logits, 2, &LOGITS[2..]);
    // The last row is another one than by logits; they come in two records, too.
    push_rows(
        &mut model,
        Route::DeviceCopy,
        0,
        &[&[0, 1], &[1, 2], &[2, 3]],
    );
    push_rows(&mut model, Route::DeviceCopy, 3, &[&[3, 1]]);
    model.end(&|_| End::Exited, &mut |_| {});
    assert_eq!(experts(&model), [1, 3, 2, 2]);
    assert_eq!(model.received().repeated_rows, 4);
    assert_eq!(model.received().differing_rows, 1);
    let layer = &model.contexts()[0].layers[2];
    assert_eq!(layer.routes, Routes::of(&[Route::DeviceCopy]));
    assert!(layer.close_calls.is_empty());
}

#[test]
fn close_calls_are_named_by_their_row() {
    let mut model = choosing(selection::Stage::Logits);
    let close = [5.0, 1.0, 0.9995, 0.0];
    push_logits(&mut model, Kind::Logits, 0, &LOGITS[..3]);
    push_logits(&mut model, Kind::Logits, 3, &[close]);
    model.end(&|_| End::Exited, &mut |_| {});
    let calls = &model.contexts()[0].layers[2].close_calls;
    assert_eq!(calls.iter().map(|call| call.row).collect::<Vec<_>>(), [3]);
    assert!(calls[0].margin < 0.001);
    assert_eq!(model.from_logits().rows, 4);
}

#[test]
fn what_a_later_stage_tells_is_not_refused() {
    let refused = |last: Option<Kind>| {
        let mut model = choosing(selection::Stage::BiasedLogits);
        push_logits(&mut model, Kind::Logits, 0, &LOGITS);
        if let Some(last) = last {
            push_logits(&mut model, last, 0, &LOGITS);
        }
        model.end(&|_| End::Exited, &mut |_| {});
        model.from_logits().refused.values().sum::<u64>()
    };
    assert_eq!(refused(None), 4);
    assert_eq!(refused(Some(Kind::BiasedLogits)), 0);
    assert_eq!(refused(Some(Kind::Selection)), 0);

    // Nor is what was refused before counting began anew.
    let mut model = choosing(selection::Stage::BiasedLogits);
    push_logits(&mut model, Kind::Logits, 0, &LOGITS);
    model.reset();
    model.end(&|_| End::Exited, &mut |_| {});
    assert!(model.from_logits().refused.is_empty());
}

#[test]
fn another_process_has_other_models() {
    let mut model = choosing(selection::Stage::Logits);
    let of_other = Header {
        process: 2,
        layer: 2,
        k: 4,
        rows: 1,
        total_rows: 1,
        route: Route::Logits as u8,
        ..TestPass::default().header(Kind::Logits)
    };
    let payload: Vec<u8> = LOGITS[0]
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect();
    model.push(decode(&record(of_other, &payload)), &mut |_| {});
    model.end(&|_| End::Exited, &mut |_| {});
    assert_eq!(model.from_logits().refused, [(Refusal::NoModel, 1)].into());
}

#[test]
fn passes_of_which_nothing_was_seen_are_counted() {
    let ubatch = [(0, 0, false), (1, 0, false)];
    let (output, next) = ([(2, 0, true)], [(3, 0, true)]);
    let pass = |number, ubatch, layers| TestPass {
        number,
        ubatch,
        layers,
        ..TestPass::default()
    };
    let model = run(
        FROM_START,
        ModelFacts::default(),
        &[
            pass(0, &ubatch, &[]),
            pass(1, &output, &[(3, &[&[1, 2]])]),
            pass(2, &next, &[]),
        ],
        End::Exited,
    );
    let context = &model.contexts()[0];
    // Layer 3 is the model's last one, and had nothing to do in the first pass; or it is not.
    let last = |layer| Ends {
        known: true,
        last: Some(layer),
        nextn: None,
    };
    let of = |passes, tokens| Excluded { passes, tokens };
    assert_eq!(context.not_visible(last(3)), of(1, 1));
    assert_eq!(context.not_visible(last(5)), of(2, 3));
    assert_eq!(context.coverage(3, last(3)), Coverage::PartlyObserved);
    assert_eq!(context.coverage(4, last(5)), Coverage::NotVisible);
    let missed = |layer, ends| {
        let PhasePasses { prefill, decode } = context.passes_not_seen(layer, ends);
        (prefill, decode)
    };
    assert_eq!(missed(3, last(3)), (0, 1));
    assert_eq!(missed(3, last(5)), (1, 1));
    assert_eq!(missed(4, last(5)), (2, 1));
    // A last layer that was never seen had nothing to do but where there was an output.
    assert_eq!(missed(5, last(5)), (1, 1));
}

/// A part of a prompt has no output: its last layer is not computed, on whatever it would be.
#[test]
fn a_last_layer_that_had_nothing_to_do_is_not_observed() {
    let part = [(0, 0, false), (1, 0, false)];
    let row: &[&[i32]] = &[&[1, 2]];
    let ends = Ends {
        known: true,
        last: Some(2),
        nextn: None,
    };
    let coverage = |layers: &[LayerRows<'_>]| {
        let pass = |number| TestPass {
            number,
            ubatch: &part,
            layers,
            ..TestPass::default()
        };
        let passes = [pass(0), pass(1)];
        let model = run(ATTACHED, ModelFacts::default(), &passes, End::Exited);
        let context = &model.contexts()[0];
        assert_eq!(context.passes_not_seen(2, ends), PhasePasses::default());
        [0, 2].map(|layer| context.coverage(layer, ends))
    };
    let (observed, unseen) = (Coverage::Observed, Coverage::NotVisible);
    assert_eq!(coverage(&[(0, row)]), [observed, Coverage::NotKnown]);
    assert_eq!(coverage(&[(1, row)]), [unseen, Coverage::NotKnown]);
    // Where nothing else of the context is seen, neither would it be.
    assert_eq!(coverage(&[]), [unseen, unseen]);
}

/// Two blocks that predict further tokens after four layers: each has passes of its own, and nothing to
/// do where no output is wanted.
#[test]
fn nextn_blocks_run_in_passes_of_their_own() {
    let ubatch = [(0, 0, false), (1, 0, false)];
    let output = [(2, 0, true)];
    let pass = |number, ubatch, layers| TestPass {
        number,
        ubatch,
        layers,
        ..TestPass::default()
    };
    let facts = ModelFacts {
        moe_layers: Some([0, 1, 2, 3].into()),
        nextn: Some(4),
        ..ModelFacts::default()
    };
    let ends = Ends {
        known: true,
        last: Some(3),
        nextn: Some(4),
    };
    let passes = |last| {
        [
            pass(0, &ubatch, &[]),
            pass(1, &output, &[(4, &[&[1, 2]])]),
            pass(2, &output, last),
        ]
    };
    let model = run(
        FROM_START,
        facts.clone(),
        &passes(&[(5, &[&[1, 2]])]),
        End::Cut,
    );
    let context = &model.contexts()[0];
    assert_eq!(context.passes, 2);
    assert_eq!(context.not_visible(ends), Excluded::default());
    assert_eq!(context.coverage(4, ends), Coverage::Observed);
    assert_eq!(context.coverage(5, ends), Coverage::Observed);

    let model = run(FROM_START, facts, &passes(&[]), End::Exited);
    let context = &model.contexts()[0];
    assert_eq!(context.not_visible(ends).passes, 1);
    assert_eq!(context.coverage(4, ends), Coverage::PartlyObserved);
}

/// Where ubatches cannot be read, a pass without routing may have computed tokens out of sight.
#[test]
fn passes_that_may_have_had_tokens_are_no_coverage() {
    let silent = |number| TestPass {
        number,
        ..TestPass::default()
    };
    let seen = |number, ubatch| TestPass {
        number,
        ubatch,
        layers: &[(0, &[&[1, 2]])],
        ..TestPass::default()
    };
    let context = |ubatch: &'static [(i32, u16, bool)]| {
        let passes = [seen(0, ubatch), silent(1), seen(2, ubatch)];
        let mut model = run(
            Options::default(),
            ModelFacts::default(),
            &passes,
            End::Exited,
        );
        model.contexts.remove(0)
    };
    let old = context(&[]);
    assert_eq!((old.passes, old.passes_not_known()), (2, 1));
    assert_eq!(old.coverage(0, Ends::default()), Coverage::NotKnown);
    let new = context(&[(7, 0, true)]);
    assert_eq!((new.passes, new.passes_not_known()), (2, 0));
    assert_eq!(new.coverage(0, Ends::default()), Coverage::Observed);
}

/// A pass without output in which the last layer was seen is no reason to excuse another.
#[test]
fn a_layer_that_ran_is_not_excused() {
    let prompt = [(0, 0, false), (1, 0, false)];
    let output = [(2, 0, true)];
    let layers = |last| -> Vec<(u16, &'static [&'static [i32]])> {
        let mut layers: Vec<(u16, &[&[i32]])> = vec![(0, &[&[1, 2]])];
        if last {
            layers.push((1, &[&[1, 2]]));
        }
        layers
    };
    let (with, without) = (layers(true), layers(false));
    let passes = [
        TestPass {
            ubatch: &prompt,
            layers: &with,
            ..TestPass::default()
        },
        TestPass {
            number: 1,
            ubatch: &output,
            layers: &without,
            ..TestPass::default()
        },
    ];
    let model = run(FROM_START, ModelFacts::default(), &passes, End::Exited);
    let context = &model.contexts()[0];
    assert_eq!(
        context.coverage(1, Ends::default()),
        Coverage::PartlyObserved
    );
    // The model's last layer is dense: the one before it always runs.
    let dense_end = Ends {
        known: true,
        ..Ends::default()
    };
    assert_eq!(context.coverage(1, dense_end), Coverage::PartlyObserved);
}

/// A ubatch that could not be read may have had tokens, also where others were read.
#[test]
fn ubatches_that_could_not_be_read_are_no_coverage() {
    let mut model = Model::new(FROM_START);
    let seen = |number| TestPass {
        number,
        ubatch: &[(7, 0, true)],
        layers: &[(0, &[&[1, 2]])],
        ..TestPass::default()
    };
    push(&mut model, &seen(0));
    let unreadable = TestPass {
        number: 1,
        ..TestPass::default()
    };
    let header = Header {
        k: UBATCH_UNREADABLE,
        ..unreadable.header(Kind::Pass)
    };
    model.push(decode(&record(header, &[])), &mut |_| {});
    push(&mut model, &seen(2));
    model.end(&|_| End::Exited, &mut |_| {});
    let context = &model.contexts()[0];
    assert_eq!((context.passes, context.passes_not_known()), (2, 1));
    assert_eq!(context.coverage(0, Ends::default()), Coverage::NotKnown);
}

/// A pass that was cut before its first layer with experts is no evidence of routing out of sight, where
/// others were seen.
#[test]
fn a_pass_that_was_cut_early_is_not_out_of_sight() {
    let decode = [(7, 0, true)];
    let pass = |number, layers| TestPass {
        number,
        ubatch: &decode,
        layers,
        ..TestPass::default()
    };
    let seen: &[(u16, &[&[i32]])] = &[(0, &[&[1, 2]])];
    for (end, unseen) in [(End::Cut, 0), (End::Exited, 1)] {
        let passes = [pass(0, seen), pass(1, seen), pass(2, &[])];
        let model = run(FROM_START, ModelFacts::default(), &passes, end);
        let context = &model.contexts()[0];
        assert_eq!(context.passes, 2);
        assert_eq!(context.not_visible(Ends::default()).passes, unseen);
    }
}

/// Two experts share one of the second block.
const WITH_SECOND_BLOCKS: TestPass<'static> = TestPass {
    context: SCHED,
    number: 0,
    ubatch: &[(0, 0, false), (1, 0, true)],
    tokens: &[],
    layers: &[(0, &[&[6, 7], &[0, 3]]), (1, &[&[2, 5]])],
    second_blocks: &[(0, &[&[3, 3], &[0, 1]]), (1, &[&[1, 2]])],
};

#[test]
fn second_blocks_are_in_no_other_count() {
    let passes = [WITH_SECOND_BLOCKS];
    let model = run(FROM_START, ModelFacts::default(), &passes, End::Exited);
    let layers = &model.contexts()[0].layers;
    assert_eq!(layers[0].tally.tokens, [2, 0]);
    assert_eq!(layers[0].tally.activations(), 4);
    assert_eq!(layers[0].n_expert, 8);
    let second = layers[0].second_block.as_ref().unwrap();
    assert_eq!((second.passes, second.tally.k), (1, 2));
    assert_eq!(second.tally.tokens, [2, 0]);
    assert_eq!(second.tally.experts, [[1, 0], [1, 0], [0, 0], [2, 0]]);
    assert_eq!(model.received().rows, 6);

    // Without its layer it has no place.
    let alone = TestPass {
        layers: &WITH_SECOND_BLOCKS.layers[..1],
        ..WITH_SECOND_BLOCKS
    };
    let model = run(FROM_START, ModelFacts::default(), &[alone], End::Exited);
    assert_eq!(model.contexts()[0].layers.numbers().count(), 1);
}

#[test]
fn a_last_pass_that_lacks_a_second_block_is_cut() {
    let last = |second_blocks| TestPass {
        number: 1,
        second_blocks,
        ..WITH_SECOND_BLOCKS
    };
    for (second_blocks, passes) in [
        (WITH_SECOND_BLOCKS.second_blocks, 2),
        (&WITH_SECOND_BLOCKS.second_blocks[..1], 1),
    ] {
        let model = run(
            FROM_START,
            ModelFacts::default(),
            &[WITH_SECOND_BLOCKS, last(second_blocks)],
            End::Cut,
        );
        assert_eq!(model.contexts()[0].passes, passes);
    }
}

/// Tokens of prompts, and generated ones, of passes with these ubatches.
fn phases_of(ubatches: &[&[(i32, u16, bool)]]) -> [u64; 2] {
    let row: &[i32] = &[1, 2];
    let rows = vec![row; 100];
    let layers: Vec<[LayerRows<'_>; 1]> = ubatches
        .iter()
        .map(|ubatch| [(0, &rows[..ubatch.len()])])
        .collect();
    let passes: Vec<TestPass<'_>> = (0..)
        .zip(ubatches.iter().zip(&layers))
        .map(|(number, (ubatch, layers))| TestPass {
            number,
            ubatch,
            layers,
            ..TestPass::default()
        })
        .collect();
    let model = run(FROM_START, ModelFacts::default(), &passes, End::Exited);
    tokens(&model, 0, 0)
}

/// Embeddings of texts of 2, 3 and 4 tokens in one batch, as a cache for each sequence has them cut.
#[test]
fn what_equal_parts_leave_is_prefill() {
    let all = [0, 1, 2].map(|sequence| [(0, sequence, true), (1, sequence, true)]);
    let run_with = |rest: &[&[(i32, u16, bool)]]| {
        let ubatches: Vec<&[(i32, u16, bool)]> = [&[all.as_flattened()], rest].concat();
        phases_of(&ubatches)
    };
    assert_eq!(
        run_with(&[&[(2, 1, true), (2, 2, true)], &[(3, 2, true)]]),
        [9, 0]
    );
    // Prompts of which all outputs were wanted, and what was generated then.
    let generated: [(i32, u16, bool); 3] = [(2, 0, true), (2, 1, true), (2, 2, true)];
    assert_eq!(run_with(&[&generated, &[(3, 2, true)]]), [6, 4]);
    // The next text begins.
    assert_eq!(run_with(&[&[(0, 1, true)], &[(1, 1, true)]]), [7, 1]);
}

/// A prompt, and tokens that were guessed: each check follows what was certain.
#[test]
fn what_is_guessed_and_checked_is_decode() {
    let text = |from: i32, count: i32, output: fn(i32) -> bool| -> Vec<(i32, u16, bool)> {
        let positions = from..from + count;
        positions.map(|at| (at, 0, output(at))).collect()
    };
    let prompt = text(0, 8, |at| at == 7);
    let check = |from| text(from, 4, |_| true);
    assert_eq!(phases_of(&[&prompt, &check(8), &check(10)]), [8, 8]);
    // Attached in the middle.
    assert_eq!(phases_of(&[&check(20), &check(22)]), [0, 8]);
    // A text of which every token's likelihood is wanted, and one in whose second half it is.
    let whole = text(0, 8, |_| true);
    assert_eq!(phases_of(&[&whole, &check(8)]), [12, 0]);
    assert_eq!(phases_of(&[&text(0, 8, |_| false), &check(8)]), [12, 0]);
    // More than anybody guesses; a prompt that follows an answer; one token of it that was left.
    assert_eq!(phases_of(&[&prompt, &text(8, 66, |_| true)]), [74, 0]);
    assert_eq!(phases_of(&[&prompt, &text(8, 4, |at| at == 11)]), [12, 0]);
    assert_eq!(
        phases_of(&[&text(0, 8, |_| false), &text(8, 1, |_| true)]),
        [9, 0]
    );
}

/// Of a prompt that is asked again, the last token alone is evaluated, where generated ones were.
#[test]
fn the_last_token_of_a_prompt_asked_again_is_prefill() {
    let text = |from: i32, count: i32, output: fn(i32) -> bool| -> Vec<(i32, u16, bool)> {
        let positions = from..from + count;
        positions.map(|at| (at, 0, output(at))).collect()
    };
    let one = |at| text(at, 1, |_| true);
    let prompt = text(0, 8, |at| at == 7);
    let check = |from| text(from, 4, |_| true);
    // After generated ones, a check, and nothing; and a third time.
    assert_eq!(phases_of(&[&prompt, &one(8), &one(7), &one(8)]), [9, 2]);
    assert_eq!(phases_of(&[&prompt, &check(8), &one(7)]), [9, 4]);
    assert_eq!(phases_of(&[&prompt, &one(7), &one(7), &one(8)]), [10, 1]);
    // One in two parts, and one that goes on with an answer.
    let rest = text(8, 4, |at| at == 11);
    let first = text(0, 8, |_| false);
    assert_eq!(
        phases_of(&[&first, &rest, &one(12), &one(11), &one(12)]),
        [13, 2]
    );
    assert_eq!(
        phases_of(&[&prompt, &one(8), &rest, &one(12), &one(11), &one(12)]),
        [13, 3]
    );
    // After a check of which one, or nothing, was right, one token is left.
    assert_eq!(phases_of(&[&prompt, &check(8), &one(9), &one(10)]), [8, 6]);
    // A draft model goes back behind its guesses; so it does where it has evaluated the check.
    assert_eq!(
        phases_of(&[&prompt, &one(8), &one(9), &one(9), &one(10)]),
        [8, 4]
    );
    let checked = text(8, 4, |at| at == 11);
    for from in 9..=12 {
        assert_eq!(
            phases_of(&[
                &prompt,
                &one(8),
                &one(9),
                &checked,
                &one(from),
                &one(from + 1)
            ]),
            [12, 4],
            "{from}"
        );
    }
}

#[test]
fn records_that_contradict_each_other_are_counted_without_a_panic() {
    // Of two records that go on with each other, the second says that there are more rows than tokens.
    let pass = TestPass {
        ubatch: &[(5, 0, false), (6, 0, true)],
        ..TestPass::default()
    };
    let mut model = Model::new(FROM_START);
    push(&mut model, &pass);
    for (first_row, total_rows) in [(0, 2), (2, 9)] {
        let header = Header {
            layer: 1,
            k: 1,
            row_stride: 8,
            first_row,
            rows: 2,
            total_rows,
            ..pass.header(Kind::Rows)
        };
        let ids: Vec<u8> = [3_i32, 4].into_iter().flat_map(i32::to_ne_bytes).collect();
        model.push(decode(&record(header, &ids)), &mut |_| {});
    }
    model.end(&|_| End::Exited, &mut |_| {});
    assert_eq!(model.contexts()[0].layers[1].tally.tokens, [4, 0]);
}

/// What a recorder makes of passes, in short.
fn recorded(options: Options, passes: &[TestPass<'_>]) -> Vec<String> {
    use crate::trace::{
        ContextDetail,
        recorder::{Recorder, Settings},
    };

    let mut recorder = Recorder::new(Settings {
        tokens: true,
        clock_offset_ns: 0,
    });
    let mut rows = Vec::new();
    let mut model = Model::new(options);
    let mut record = |finished: Finished<'_>| {
        recorder.pass(&finished, &|_| ContextDetail::default(), &mut |row| {
            let number = |number: Option<u32>| number.map_or("-".to_owned(), |n| n.to_string());
            let mut text = format!("{} {}", row.kind.name(), number(row.pass));
            text += &format!(
                " layer {} row {}",
                number(row.layer.map(u32::from)),
                number(row.row)
            );
            match row.reason {
                Some(reason) => text += &format!(": {} {}", reason.name(), number(row.rows)),
                None => {
                    let place = (row.sequence, row.position, row.token);
                    text += &format!(": {place:?} {:?}", row.experts);
                }
            }
            rows.push(text);
        });
    };
    for pass in passes {
        for bytes in pass.records() {
            model.push(decode(&bytes), &mut record);
        }
    }
    model.end(&|_| End::Exited, &mut record);
    rows
}

#[test]
fn rows_of_a_trace_know_their_tokens() {
    let passes = [
        TestPass {
            ubatch: &[(0, 4, false), (1, 4, false), (2, 4, true)],
            tokens: &[10, 11, 12],
            layers: &[(0, &[&[1, 2], &[3, 4], &[5, 6]]), (1, &[&[7, 0]])],
            ..TestPass::default()
        },
        TestPass {
            number: 1,
            layers: &[(0, &[&[5, 1]]), (1, &[&[2, 3]])],
            ..TestPass::default()
        },
    ];
    let rows = recorded(Options::default(), &passes);
    assert_eq!(
        rows[1..],
        [
            "routed 0 layer 0 row 0: (Some(4), Some(0), Some(10)) [1, 2]",
            "routed 0 layer 0 row 1: (Some(4), Some(1), Some(11)) [3, 4]",
            "routed 0 layer 0 row 2: (Some(4), Some(2), Some(12)) [5, 6]",
            // The last layer works on the output alone.
            "routed 0 layer 1 row 0: (Some(4), Some(2), Some(12)) [7, 0]",
            "routed 1 layer 0 row 0: (None, None, None) [5, 1]",
            "routed 1 layer 1 row 0: (None, None, None) [2, 3]",
        ]
    );
    assert!(rows[0].starts_with("context"));
}

#[test]
fn what_is_missing_is_a_gap_in_its_place() {
    let one: LayerRows<'_> = (0, &[&[1, 2]]);
    let whole = [one, (1, &[&[3, 4]]), (2, &[&[5, 6]])];
    let decode = |number, layers| TestPass {
        number,
        ubatch: &[(1, 0, true)],
        layers,
        ..TestPass::default()
    };
    let passes = [
        decode(0, &whole),
        // A layer is missing, then the whole pass, then two passes with all that is of them.
        decode(1, &whole[1..]),
        decode(2, &[]),
        decode(5, &whole),
        decode(6, &whole[..2]),
        decode(7, &whole),
    ];
    let rows = recorded(Options::default(), &passes);
    let gaps: Vec<&String> = rows.iter().filter(|row| row.starts_with("gap")).collect();
    assert_eq!(
        gaps,
        [
            "gap 1 layer 0 row -: layer_not_seen 1",
            "gap 2 layer - row -: pass_not_seen 1",
            "gap 3 layer - row -: passes_lost -",
            // How many rows the last layer would have had is not known.
            "gap 6 layer 2 row -: layer_not_seen -",
        ]
    );
    let place = |text: &str| rows.iter().position(|row| row.starts_with(text)).unwrap();
    assert!(place("routed 1 layer 2") < place("gap 1"));
    assert!(place("gap 3") < place("routed 5"));
}
