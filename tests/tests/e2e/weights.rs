//! `--weights`: what the router gives the chosen experts, bit for bit what a program's own eval callback
//! reads of `ffn_moe_weights`.

use std::{collections::BTreeMap, path::Path, process::Command};

use expert_trace::trace::{Kind, Reader, Weights};
use expert_trace_tests::{
    models::Shape,
    oracle::{read_dump, read_weights},
    tracer::{self, Stats},
};

use crate::support::{Traced, assert_schema, random_small, scratch, shape};

/// Pass, layer, whether it is a second block, and row.
type Place = (u64, u32, bool, u32);

/// Experts and weights' bits of each row of a trace.
fn traced(path: &Path) -> BTreeMap<Place, (Vec<u32>, Option<Vec<u32>>)> {
    let mut reader = Reader::open(path).unwrap();
    assert_eq!(reader.capture().weights, Some(Weights::Router));
    let mut rows = BTreeMap::new();
    while let Some(batch) = reader.next().unwrap() {
        for row in batch.rows() {
            let second = match row.kind {
                Kind::Routed => false,
                Kind::SecondBlock => true,
                _ => continue,
            };
            let pass = u64::from(row.pass.unwrap());
            let place = (
                pass,
                u32::from(row.layer.unwrap()),
                second,
                row.row.unwrap(),
            );
            let experts = row.experts.iter().map(|id| u32::from(*id)).collect();
            let bits = |weights: &[f32]| weights.iter().map(|weight| weight.to_bits()).collect();
            let before = rows.insert(place, (experts, row.weights.map(bits)));
            assert!(before.is_none(), "{place:?} twice");
        }
    }
    rows
}

fn rows_of(stats: &Stats) -> (u64, u64) {
    let trace = &stats.0["trace"];
    let number = |key: &str| trace[key].as_u64().unwrap();
    (number("rows"), number("rows_without_weights"))
}

/// Softmax, sigmoid, logits of which only the chosen ones become probabilities, and a second block of
/// experts; rows of one record and of many.
#[test]
fn weights_are_those_that_the_target_gathers() {
    for (name, of) in [
        ("qwen3moe", &Shape::QWEN3MOE),
        ("deepseek2", &Shape::DEEPSEEK2),
        ("gpt-oss-20b", &Shape::GPT_OSS_20B),
        ("grovemoe", &Shape::GROVEMOE),
        ("qwen3next", &Shape::QWEN3NEXT),
    ] {
        let directory = scratch();
        let [trace, dump] = ["routes.arrows", "weights"].map(|name| directory.path().join(name));
        let option = format!("--trace={}", trace.display());
        let driver = ["-t", "2", "-c", "512", "-ub", "256", "--dump-weights"];
        let mut target = Traced::start_with(
            &[&option, "--weights"],
            &shape(name, of),
            &[&driver[..], &[dump.to_str().unwrap()]].concat(),
        );
        for command in ["prompt 0 200 4000", "generate 0 8 17", "batch 0:77 1:78"] {
            target.command(command);
        }
        let (stats, _) = target.finish();
        assert_schema(&stats);

        let found = traced(&trace);
        let oracle: BTreeMap<Place, Vec<u32>> = read_weights(&dump)
            .unwrap()
            .into_iter()
            .map(|row| ((row.pass, row.layer, row.second, row.row), row.bits))
            .collect();
        assert!(oracle.len() > 200, "{name}: {} rows", oracle.len());
        let has_second = oracle.keys().any(|(_, _, second, _)| *second);
        assert_eq!(has_second, name == "grovemoe");
        assert!(found.keys().eq(oracle.keys()), "{name}: other rows");
        for (place, (experts, bits)) in &found {
            assert_eq!(bits.as_ref(), Some(&oracle[place]), "{name} {place:?}");
            assert_eq!(experts.len(), oracle[place].len());
        }
        assert_eq!(rows_of(&stats), (found.len() as u64, 0));
    }
}

/// Ids that the target's own callback has asked for come first, without weights. Those of the gathering
/// node take their place; where that one is not read, there are none, which is said.
#[test]
fn ids_with_weights_take_the_place_of_those_without() {
    for (routes, has_weights) in [(None, true), (Some("--routes=callback"), false)] {
        let directory = scratch();
        let [trace, dump] = ["routes.arrows", "ids"].map(|name| directory.path().join(name));
        let option = format!("--trace={}", trace.display());
        let options = [&option, "--weights"].into_iter().chain(routes);
        let driver = ["-t", "2", "-c", "512", "-ub", "32", "--dump"];
        let mut target = Traced::start_with(
            &options.collect::<Vec<&str>>(),
            random_small(),
            &[&driver[..], &[dump.to_str().unwrap()]].concat(),
        );
        for command in ["prompt 0 100 20", "generate 0 4 7"] {
            target.command(command);
        }
        let (stats, _) = target.finish();
        let found = traced(&trace);
        let oracle: BTreeMap<Place, Vec<u32>> = read_dump(&dump)
            .unwrap()
            .into_iter()
            .map(|row| ((row.pass, row.layer, false, row.row), row.ids))
            .collect();
        assert!(found.keys().eq(oracle.keys()));
        for (place, (experts, bits)) in &found {
            assert_eq!(experts, &oracle[place]);
            assert_eq!(bits.is_some(), has_weights, "{place:?}");
        }
        let rows = found.len() as u64;
        assert_eq!(rows_of(&stats), (rows, if has_weights { 0 } else { rows }));
    }
}

/// Exports keep them, and an import brings them back.
#[test]
fn weights_go_through_a_route_trace() {
    let directory = scratch();
    let [trace, text, back] =
        ["routes.arrows", "routes.csv", "back.arrows"].map(|name| directory.path().join(name));
    let option = format!("--trace={}", trace.display());
    let mut target = Traced::start_with(&[&option, "--weights"], random_small(), &["-t", "2"]);
    target.command("prompt 0 40 20");
    target.command("generate 0 4 7");
    target.finish();
    let weights = |path: &Path| {
        let mut reader = Reader::open(path).unwrap();
        let mut rows = Vec::new();
        while let Some(batch) = reader.next().unwrap() {
            let routed = batch.rows().filter(|row| row.kind == Kind::Routed);
            rows.extend(routed.map(|row| {
                let bits = row.weights.unwrap().iter().map(|weight| weight.to_bits());
                (row.layer, row.experts.to_vec(), bits.collect::<Vec<u32>>())
            }));
        }
        rows
    };
    for (command, from, to) in [("export", &trace, &text), ("import", &text, &back)] {
        let mut program = Command::new(tracer::program().unwrap());
        program.arg(command).arg(from).arg("--format=route-trace");
        assert!(program.arg("-o").arg(to).status().unwrap().success());
    }
    assert_eq!(
        Reader::open(&back).unwrap().capture().weights,
        Some(Weights::Imported)
    );
    assert_eq!(weights(&back), weights(&trace));
}
