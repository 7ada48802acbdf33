//! What else goes on in a pass: a second block of experts in each layer.

use expert_trace_tests::{
    models::Shape,
    oracle::{DumpRow, Oracle, read_dump},
    tracer::{self, count, read_second_log},
};
use serde_json::Value;

use crate::support::{Files, driver, shape};

fn rows(dump: Vec<DumpRow>) -> Vec<(u32, Vec<u32>)> {
    dump.into_iter().map(|row| (row.layer, row.ids)).collect()
}

/// GroveMoE: the ids of the second block are those that its weights are multiplied by.
#[test]
fn a_second_block_is_counted_apart() {
    let expected = &Shape::GROVEMOE;
    let model = shape("grovemoe", expected);
    let files = Files::new();
    let [dump, second] = ["dump", "second"].map(|name| files.path(name));
    let driver = driver(
        &model,
        &[
            "-t",
            "2",
            "-c",
            "512",
            "-ub",
            "32",
            "--dump",
            dump.to_str().unwrap(),
            "--dump-second",
            second.to_str().unwrap(),
        ],
    );
    let mut command = tracer::run(&files.options(), &driver).unwrap();
    let mut target = Oracle::spawn(&mut command).unwrap();
    for command in ["prompt 0 48 4000", "generate 0 8 17", "batch 0:77 1:78"] {
        target.command(command).unwrap();
    }
    assert!(target.quit().unwrap().success());

    let stats = files.stats();
    stats.assert_complete();
    let dumped = rows(read_dump(&dump).unwrap());
    assert_eq!(files.log(), dumped);
    assert_eq!(
        stats.counts(),
        count(dumped.iter().map(|(layer, ids)| (*layer, &ids[..])))
    );

    let dumped = rows(read_dump(&second).unwrap());
    assert_eq!(read_second_log(&files.path("log")).unwrap(), dumped);
    let mut counts = count(dumped.iter().map(|(layer, ids)| (*layer, &ids[..])));
    let layers = stats.0["contexts"][0]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), expected.layers as usize);
    for layer in layers {
        assert_eq!(layer["n_expert"], expected.n_expert);
        assert_eq!(layer["coverage"], "observed");
        let block = &layer["second_block"];
        assert_eq!(block["n_expert"], expected.second_experts().unwrap());
        assert_eq!(block["k"], expected.k);
        assert_eq!(block["coverage"], "observed");
        for key in ["passes", "total_tokens", "prefill_tokens", "decode_tokens"] {
            assert_eq!(block[key], layer[key], "{key}");
        }
        let number = layer["layer_id"].as_u64().unwrap() as u32;
        let dumped = counts.remove(&number).unwrap();
        let seen: Vec<&Value> = block["experts"].as_array().unwrap().iter().collect();
        assert_eq!(seen.len(), dumped.len());
        for expert in seen {
            let id = expert["expert_id"].as_u64().unwrap() as u32;
            assert_eq!(
                expert["activations"], dumped[&id],
                "layer {number}, expert {id}"
            );
        }
        // Two experts of a row can have the same one in the second block.
        let tokens = block["total_tokens"].as_u64().unwrap();
        assert_eq!(block["activations"], tokens * u64::from(expected.k));
    }
    assert!(dumped.iter().any(|(_, ids)| {
        let mut ids = ids.clone();
        ids.sort_unstable();
        ids.windows(2).any(|pair| pair[0] == pair[1])
    }));
    let model = &stats.0["models"][0];
    assert_eq!(
        model["second_block_experts"],
        expected.second_experts().unwrap()
    );
}
