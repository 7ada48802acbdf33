//! What a trace has of passes: gaps where something is missing, and none where nothing is.

use super::*;
use crate::trace::{
    ContextDetail, Kind as RowKind, Reason,
    recorder::{Recorder, Settings},
};

/// Kind, pass, layer and reason of a row, and how many rows it tells of.
type Told = (
    RowKind,
    Option<u32>,
    Option<u16>,
    Option<Reason>,
    Option<u32>,
);

/// Rows that are recorded of these records; `describe` tells of contexts.
fn recorded(
    facts: ModelFacts,
    records: &[Vec<u8>],
    describe: &dyn Fn(&Context) -> ContextDetail,
) -> Vec<Told> {
    let mut model = Model::new(Options::default());
    model.set_facts(facts);
    let mut recorder = Recorder::new(Settings::default());
    let mut told = Vec::new();
    let mut on_pass = |finished: Finished<'_>| {
        recorder.pass(&finished, describe, &mut |row| {
            told.push((row.kind, row.pass, row.layer, row.reason, row.rows));
        });
    };
    for record in records {
        model.push(decode(record), &mut on_pass);
    }
    model.end(&|_| End::Exited, &mut on_pass);
    told
}

fn gaps(facts: ModelFacts, records: &[Vec<u8>]) -> Vec<Told> {
    let mut told = recorded(facts, records, &|_| ContextDetail::default());
    told.retain(|(kind, ..)| *kind == RowKind::Gap);
    told
}

#[test]
fn a_second_block_that_is_missing_is_a_gap() {
    let numbered = |number| TestPass {
        number,
        ..WITH_SECOND_BLOCKS
    };
    let mut lacking = numbered(1);
    lacking.second_blocks = &WITH_SECOND_BLOCKS.second_blocks[..1];
    let mut lost = numbered(3);
    lost.layers = &WITH_SECOND_BLOCKS.layers[..1];
    lost.second_blocks = &WITH_SECOND_BLOCKS.second_blocks[..1];
    let passes = [numbered(0), lacking, numbered(2), lost, numbered(4)];
    let mut records = passes.map(|pass| pass.records());
    // Of the third one's first second block, which has two rows, the second one.
    let second_block = records[2].iter_mut().rev().nth(1).unwrap();
    let whole = decode(second_block).unwrap().header;
    assert_eq!((whole.kind, whole.rows), (Kind::SecondBlock as u8, 2));
    let half = Header {
        rows: 1,
        first_row: 1,
        ..whole
    };
    let ids: Vec<u8> = [0_i32, 1].iter().flat_map(|id| id.to_ne_bytes()).collect();
    *second_block = record(half, &ids);
    let not_seen = Some(Reason::SecondBlockNotSeen);
    let rows_lost = Some(Reason::SecondRowsLost);
    let layer_not_seen = Some(Reason::LayerNotSeen);
    assert_eq!(
        gaps(ModelFacts::default(), &records.concat()),
        [
            (RowKind::Gap, Some(1), Some(1), not_seen, Some(1)),
            (RowKind::Gap, Some(2), Some(0), rows_lost, Some(1)),
            (RowKind::Gap, Some(3), Some(1), not_seen, None),
            (RowKind::Gap, Some(3), Some(1), layer_not_seen, None),
        ]
    );
}

/// A NextN block works on output rows: a pass without any is not missing there.
#[test]
fn a_pass_without_output_is_no_gap_of_a_nextn_context() {
    let passes = [
        TestPass {
            ubatch: &[(0, 0, true)],
            layers: &[(2, &[&[1, 2]])],
            ..TestPass::default()
        },
        TestPass {
            number: 1,
            ubatch: &[(1, 0, false)],
            ..TestPass::default()
        },
        TestPass {
            number: 2,
            ubatch: &[(2, 0, true)],
            layers: &[(2, &[&[1, 2]])],
            ..TestPass::default()
        },
    ];
    let records = passes.each_ref().map(TestPass::records).concat();
    let with = |nextn| ModelFacts {
        nextn,
        ..ModelFacts::default()
    };
    assert_eq!(gaps(with(Some(2)), &records), []);
    let not_seen = Some(Reason::PassNotSeen);
    assert_eq!(
        gaps(with(None), &records),
        [(RowKind::Gap, Some(1), None, not_seen, Some(1))]
    );
}

/// Layers tell which model a context has: what is known without them is told once more with them.
#[test]
fn a_context_is_described_again_when_more_is_known() {
    let layers: &[LayerRows<'_>] = &[(0, &[&[1, 2], &[1, 2]])];
    let passes = [
        TestPass {
            ubatch: &[(0, 0, true), (1, 0, true)],
            tokens: &[0, 0],
            layers,
            ..TestPass::default()
        },
        TestPass {
            number: 1,
            ubatch: &[(0, 0, false), (1, 0, true)],
            layers,
            ..TestPass::default()
        },
    ];
    let records = passes.each_ref().map(TestPass::records).concat();
    let kinds = |describe: &dyn Fn(&Context) -> ContextDetail| -> Vec<RowKind> {
        let told = recorded(ModelFacts::default(), &records, describe);
        told.into_iter().map(|(kind, ..)| kind).collect()
    };
    let [context, excluded, routed] = [RowKind::Context, RowKind::Excluded, RowKind::Routed];
    assert_eq!(
        kinds(&|context| ContextDetail {
            pid: context.layers.numbers().count() as u32,
            ..ContextDetail::default()
        }),
        [context, excluded, context, routed, routed]
    );
    assert_eq!(
        kinds(&|_| ContextDetail::default()),
        [context, excluded, routed, routed]
    );
}
