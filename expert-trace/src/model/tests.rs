use expert_trace_common::{Header, Kind, ROW_OUTPUT, RowInfo};

use super::*;
use crate::decode::decode;

const SCHED: u64 = 0x5000;

fn record(header: Header, payload: &[u8]) -> Vec<u8> {
    // SAFETY: the header is made of integers without padding (checked in the common crate).
    let head = unsafe {
        std::slice::from_raw_parts((&raw const header).cast::<u8>(), size_of::<Header>())
    };
    [head, payload].concat()
}

/// One pass as the kernel reports it.
struct TestPass<'a> {
    context: u64,
    number: u32,
    /// (position, sequence, output) of each token; none when the ubatch was not read.
    ubatch: &'a [(i32, u16, bool)],
    tokens: &'a [i32],
    /// Experts of each row, by layer.
    layers: &'a [(u16, &'a [&'a [i32]])],
}

impl Default for TestPass<'_> {
    fn default() -> Self {
        Self {
            context: SCHED,
            number: 0,
            ubatch: &[],
            tokens: &[],
            layers: &[],
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
        for (layer, rows) in self.layers {
            let k = rows.first().map_or(1, |ids| ids.len());
            let header = Header {
                layer: *layer,
                k: k as u16,
                row_stride: 8,
                ..of(self.header(Kind::Rows), rows.len())
            };
            records.push(record(header, &numbers(&rows.concat())));
        }
        records
    }
}

fn push(model: &mut Model, pass: &TestPass<'_>) -> usize {
    let mut committed = 0;
    for record in pass.records() {
        model.push(decode(&record), &mut |_| committed += 1);
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
    model.contexts()[context].layers[&layer].tokens
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
    let layer = &model.contexts()[0].layers[&1];
    assert_eq!(layer.experts[6], [1, 0]);
    assert_eq!(layer.experts[0], [0, 1]);
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
    model.push(decode(&end), &mut |_| committed += 1);
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
    assert!(!model.contexts()[0].layers.contains_key(&1));
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
