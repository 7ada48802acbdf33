//! Counting that begins anew.

use super::*;
use crate::stats::specified_layers;

#[test]
fn counting_begins_anew_with_the_next_pass() {
    let mut model = Model::new(Options {
        from_start: true,
        ..Options::default()
    });
    model.set_facts(ModelFacts {
        warmup_tokens: vec![vec![1, 2]],
        ..ModelFacts::default()
    });
    let warmup = TestPass {
        tokens: &[1, 2],
        ubatch: &[(0, 0, false), (1, 0, true)],
        layers: &[(3, &[&[0, 1], &[2, 3]])],
        ..TestPass::default()
    };
    // A prompt in two passes, then what is generated.
    let first = TestPass {
        number: 1,
        ubatch: &[(0, 0, false), (1, 0, false)],
        layers: &[(3, &[&[0, 1], &[2, 3]])],
        ..TestPass::default()
    };
    let second = TestPass {
        number: 2,
        ubatch: &[(2, 0, true)],
        layers: &[(3, &[&[4, 5]])],
        ..TestPass::default()
    };
    let third = TestPass {
        number: 3,
        ubatch: &[(3, 0, true)],
        layers: &[(3, &[&[6, 7]])],
        ..TestPass::default()
    };
    push(&mut model, &warmup);
    push(&mut model, &first);
    model.reset();
    assert_eq!(model.received(), Received::default());
    push(&mut model, &second);
    push(&mut model, &third);
    model.end(&|_| End::Exited, &mut |_| {});
    let context = &model.contexts()[0];
    assert_eq!(context.passes, 2);
    // The pass that was under way decides that the next one goes on with its prompt.
    assert_eq!(context.layers[3].tally.tokens, [1, 1]);
    assert_eq!(context.layers[3].tally.experts[0], [0, 0]);
    assert_eq!(context.layers[3].tally.experts[4], [1, 0]);
    assert_eq!(model.excluded()[&Exclusion::Partial].passes, 1);
    assert!(!model.excluded().contains_key(&Exclusion::Warmup));
    assert!(context.has_warmed_up());
}

/// What is recorded of these passes, and the counts, when counting begins anew once so many have begun.
fn split(options: Options, passes: &[TestPass<'_>], begun: usize) -> (Model, Vec<String>) {
    let mut model = Model::new(options);
    model.set_facts(ModelFacts {
        warmup_tokens: vec![vec![1, 2]],
        ..ModelFacts::default()
    });
    let mut shown = Vec::new();
    for (index, pass) in passes.iter().enumerate() {
        let records = pass.records();
        // In the middle of it.
        let (half, rest) = records.split_at(records.len() - 1);
        let mut push = |model: &mut Model, records: &[Vec<u8>]| {
            for bytes in records {
                model.push(decode(bytes), &mut |finished| {
                    shown.extend(finished.shown().map(|pass| format!("{:?}", pass.blocks)));
                });
            }
        };
        push(&mut model, half);
        if index + 1 == begun {
            model.reset();
        }
        push(&mut model, rest);
    }
    model.end(&|_| End::Exited, &mut |finished| {
        shown.extend(finished.shown().map(|pass| format!("{:?}", pass.blocks)));
    });
    (model, shown)
}

#[test]
fn logs_and_traces_do_not_begin_anew() {
    let passes: Vec<TestPass<'_>> = (0..3)
        .map(|number| decode_at(number, &[(0, 0, true)]))
        .collect();
    let (whole, shown) = split(FROM_START, &passes, 0);
    assert_eq!((whole.contexts()[0].passes, shown.len()), (3, 3));
    for (begun, counted) in [(1, 2), (2, 1), (3, 0)] {
        let (model, shown_all) = split(FROM_START, &passes, begun);
        assert_eq!(shown_all, shown);
        assert_eq!(model.contexts()[0].passes, counted);
        let partial = Excluded {
            passes: 1,
            tokens: 1,
        };
        assert_eq!(model.excluded()[&Exclusion::Partial], partial);
    }
}

#[test]
fn no_half_of_a_warmup_is_counted() {
    let warmup = TestPass {
        tokens: &[1, 2],
        ubatch: &[(0, 0, false), (1, 0, true)],
        layers: &[(0, &[&[1, 2], &[3, 4]]), (1, &[&[1, 2]])],
        ..TestPass::default()
    };
    let passes = [warmup, decode_at(1, &[(0, 0, true)])];
    let options = Options {
        include_warmup: true,
        ..FROM_START
    };
    let (model, shown) = split(options, &passes, 1);
    assert_eq!((model.contexts()[0].passes, shown.len()), (1, 2));
    assert_eq!(model.excluded()[&Exclusion::Partial].passes, 1);
    let (model, shown) = split(FROM_START, &passes, 1);
    assert_eq!((model.contexts()[0].passes, shown.len()), (1, 1));
    assert_eq!(model.excluded()[&Exclusion::Warmup].passes, 1);
}

#[test]
fn contexts_that_have_ended_stay_without_counts() {
    let mut model = Model::new(FROM_START);
    let pass = decode_at(0, &[(0, 0, true)]);
    push(&mut model, &pass);
    let end = record(pass.header(Kind::ContextEnd), &[]);
    model.push(decode(&end), &mut |_| {});
    assert_eq!(model.contexts()[0].passes, 1);
    model.reset();
    model.end(&|_| End::Exited, &mut |_| {});
    let context = &model.contexts()[0];
    assert_eq!((context.passes, context.tokens()), (0, 0));
    assert_eq!(context.not_visible(Ends::default()), Excluded::default());
    assert_eq!(context.passes_not_known(), 0);
    assert!(model.excluded().is_empty());
}

#[test]
fn layers_without_counts_are_not_listed() {
    let mut model = Model::new(FROM_START);
    let one: &[LayerRows<'_>] = &[(0, &[&[1, 2]])];
    push(&mut model, &decode_at(0, &[(0, 0, true)]));
    push(&mut model, &decode_at(1, &[(1, 0, true)]));
    let listed = |model: &Model| {
        let layers = specified_layers(&model.contexts()[0]).into_iter();
        layers.map(|layer| layer.layer_id).collect::<Vec<_>>()
    };
    assert_eq!(listed(&model), [0, 1]);
    model.reset();
    for number in 2..4 {
        let pass = TestPass {
            layers: one,
            ..decode_at(number, &[(0, 0, true)])
        };
        push(&mut model, &pass);
    }
    assert_eq!(listed(&model), [0]);
}
