//! Routers and experts on an NVIDIA GPU and on the host: `cargo xtask cuda` runs these tests with a
//! llama.cpp built for it.

use expert_trace::router_on_cpu::OVERRIDE;
use expert_trace_tests::{models::Shape, oracle::read_dump, tracer::Stats};

use crate::support::{
    Traced, assert_same_choice, compare_with_tokens, known_medium, known_small, known_wide,
    scratch, shape,
};

const SIZES: [&str; 10] = [
    "-t", "4", "-c", "4096", "-b", "2048", "-ub", "512", "-ngl", "99",
];
const EXPERTS_ON_CPU: [&str; 2] = ["-ot", "ffn_.*_exps=CPU"];

fn routes(stats: &Stats, layer: usize) -> Vec<String> {
    let routes = &stats.0["contexts"][0]["layers"][layer]["routes"];
    let routes = routes.as_array().unwrap().iter();
    routes
        .map(|name| name.as_str().unwrap().to_owned())
        .collect()
}

/// Short passes are computed on the CPU, and weights are streamed to the GPU for long ones.
#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask cuda"]
fn experts_on_the_cpu() {
    for known in [known_small(), known_medium(), known_wide()] {
        let options = [&SIZES[..], &EXPERTS_ON_CPU].concat();
        let stats = compare_with_tokens(known, &options);
        assert_eq!(routes(&stats, 0), ["split_input", "fetch"]);
        assert_eq!(stats.number("/integrity/routes/copies_lost"), 0);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask cuda"]
fn experts_on_the_cpu_without_streaming() {
    let options = [&SIZES[..], &EXPERTS_ON_CPU, &["--op-offload", "0"]].concat();
    let stats = compare_with_tokens(known_small(), &options);
    assert_eq!(routes(&stats, 0), ["split_input"]);
}

/// Nothing is on the GPU but what is streamed to it.
#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask cuda"]
fn layers_on_the_cpu() {
    let options = [&SIZES[..], &["-ngl", "0"]].concat();
    let stats = compare_with_tokens(known_small(), &options);
    println!("{:?}", routes(&stats, 0));
    let options = [&SIZES[..], &["-ngl", "2"], &EXPERTS_ON_CPU].concat();
    let stats = compare_with_tokens(known_small(), &options);
    println!("{:?} {:?}", routes(&stats, 0), routes(&stats, 3));
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask cuda"]
fn everything_on_the_gpu_but_the_router() {
    for known in [known_small(), known_medium(), known_wide()] {
        let options = [&SIZES[..], &["-ot", OVERRIDE, "--op-offload", "0"]].concat();
        let stats = compare_with_tokens(known, &options);
        assert_eq!(routes(&stats, 0), ["logits"]);
    }
}

/// The experts that the GPU has chosen, by an eval callback of the target itself.
#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask cuda"]
fn choice_is_the_gpus() {
    for (name, expected) in [
        ("deepseek2", Shape::DEEPSEEK2),
        ("gpt-oss-20b", Shape::GPT_OSS_20B),
        ("gpt-oss-120b", Shape::GPT_OSS_120B),
        ("mixtral", Shape::MIXTRAL),
        ("olmoe", Shape::OLMOE),
        ("qwen3moe", Shape::QWEN3MOE),
        ("qwen3next", Shape::QWEN3NEXT),
    ] {
        let directory = scratch();
        let dump = directory.path().join("dump");
        let dump_path = dump.to_string_lossy();
        let device = ["-ot", OVERRIDE, "--op-offload", "0", "--dump", &dump_path];
        let options = [&SIZES[..], &device].concat();
        let mut traced = Traced::start(&shape(name, &expected), &options);
        for command in ["prompt 0 300 4000", "generate 0 30 17", "prompt 1 20 12000"] {
            traced.command(command);
        }
        let (stats, chosen) = traced.finish();
        let by_gpu: Vec<(u32, Vec<u32>)> = read_dump(&dump)
            .unwrap()
            .into_iter()
            .map(|row| (row.layer, row.ids))
            .collect();
        assert_same_choice(&stats, &chosen, &by_gpu);
        println!("{name}: {} rows", chosen.len());
    }
}

/// CUDA copies the ids to the host itself, when no kernel of it takes the experts as they are: long
/// passes with F16 experts. Short ones stay on the GPU.
#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask cuda"]
fn slow_path() {
    let known = known_small();
    let mut traced = Traced::start(&known.path, &SIZES);
    traced.command("prompt 0 1000 3000");
    traced.command("generate 0 5 42");
    let (stats, log) = traced.finish();
    for layer in 0..known.expected.layers() - 1 {
        let seen: Vec<&[u32]> = log
            .iter()
            .filter(|(of, _)| *of == layer)
            .map(|(_, ids)| ids.as_slice())
            .collect();
        let expected: Vec<&[u32]> = (3000..4000)
            .map(|token| known.expected.ids(layer, token))
            .collect();
        assert_eq!(seen, expected, "layer {layer}");
        assert_eq!(routes(&stats, layer as usize), ["device_copy"]);
    }
    assert_eq!(stats.number("/contexts/0/passes_not_visible/passes"), 5);
    assert_eq!(
        stats.0["contexts"][0]["layers"][0]["coverage"],
        "partly_observed"
    );
}
