//! Routers and experts on an NVIDIA GPU and on the host: `cargo xtask cuda` runs these tests with a
//! llama.cpp built for it.

use std::time::Instant;

use expert_trace::router_on_cpu::OVERRIDE;
use expert_trace_tests::{
    comparison,
    models::Shape,
    oracle::{Oracle, read_dump},
    tracer::{Attached, Stats},
};

use crate::support::{
    Traced, assert_same_choice, compare_with_tokens, driver, known_medium, known_small, known_wide,
    reference, scratch, shape,
};

const SIZES: [&str; 10] = [
    "-t", "4", "-c", "4096", "-b", "2048", "-ub", "512", "-ngl", "99",
];
const EXPERTS_ON_CPU: [&str; 2] = ["-ot", "ffn_.*_exps=CPU"];
const ROUTER_ON_CPU: [&str; 4] = ["-ot", OVERRIDE, "--op-offload", "0"];

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
    let options = [&SIZES[..], &ROUTER_ON_CPU].concat();
    let stats = compare_with_tokens(known_small(), &options);
    assert_eq!(routes(&stats, 0), ["logits"]);
}

/// No CUDA kernel takes experts that are 32 wide: the ids are copied in every pass, and win over the
/// choice that is made from the logits, too.
#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask cuda"]
fn ids_that_cuda_copies() {
    for known in [known_medium(), known_wide()] {
        let stats = compare_with_tokens(known, &SIZES);
        assert_eq!(routes(&stats, 0), ["device_copy"]);
        let options = [&SIZES[..], &ROUTER_ON_CPU].concat();
        let stats = compare_with_tokens(known, &options);
        assert_eq!(routes(&stats, 0), ["device_copy"]);
        assert!(stats.number("/integrity/received/repeated_rows") > 0);
        assert_eq!(stats.number("/integrity/received/differing_rows"), 0);
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
        let device = ["--dump", &dump_path];
        let options = [&SIZES[..], &ROUTER_ON_CPU, &device].concat();
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

/// CUDA copies the ids to the host itself, when no kernel of it takes so many rows with F16 experts.
/// Short passes stay on the GPU.
#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask cuda"]
fn slow_path() {
    let known = known_small();
    let options = [&SIZES[..], &["-ub", "1024"]].concat();
    let mut traced = Traced::start(&known.path, &options);
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

/// A way to run the driver.
struct Arm {
    name: &'static str,
    options: &'static [&'static str],
    traced: bool,
    /// Index of the arm that it is compared with.
    baseline: usize,
}

const ARMS: [Arm; 8] = [
    Arm {
        name: "GPU",
        options: &[],
        traced: false,
        baseline: 0,
    },
    Arm {
        name: "GPU, attached",
        options: &[],
        traced: true,
        baseline: 0,
    },
    Arm {
        name: "GPU, eval callback on ffn_moe_topk",
        options: &["--count", "1"],
        traced: false,
        baseline: 0,
    },
    Arm {
        name: "GPU, routers on the CPU",
        options: &ROUTER_ON_CPU,
        traced: false,
        baseline: 0,
    },
    Arm {
        name: "GPU, routers on the CPU, attached",
        options: &ROUTER_ON_CPU,
        traced: true,
        baseline: 3,
    },
    Arm {
        name: "experts on the CPU",
        options: &EXPERTS_ON_CPU,
        traced: false,
        baseline: 5,
    },
    Arm {
        name: "experts on the CPU, attached",
        options: &EXPERTS_ON_CPU,
        traced: true,
        baseline: 5,
    },
    Arm {
        name: "experts on the CPU, eval callback on ffn_moe_topk",
        options: &["-ot", "ffn_.*_exps=CPU", "--count", "1"],
        traced: false,
        baseline: 5,
    },
];
const ROUNDS: u64 = 40;
const PROMPT: usize = 512;
const GENERATED: usize = 64;

/// What tracing costs, next to doing the same in the program: prints a line of JSON for each arm.
#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask cuda"]
fn cost() {
    for (model, path) in [
        ("qwen3moe 128/8, n_embd 2048, 8 layers, Q4_0", reference()),
        (
            "qwen3moe 512/10, n_embd 128, 3 layers, F16",
            &known_wide().path,
        ),
    ] {
        let mut targets: Vec<Oracle> = ARMS
            .iter()
            .map(|arm| {
                let options = [&SIZES[..], &["-t", "8"], arm.options].concat();
                Oracle::spawn(&mut driver(path, &options)).unwrap()
            })
            .collect();
        let tracers: Vec<Option<Attached>> = ARMS
            .iter()
            .zip(&targets)
            .map(|(arm, target)| {
                let none: [&str; 0] = [];
                let attached = || Attached::to(target.pid(), &none).unwrap();
                arm.traced.then(attached)
            })
            .collect();
        let mut times = vec![[Vec::new(), Vec::new()]; ARMS.len()];
        for round in 0..=ROUNDS {
            for arm in comparison::order(ARMS.len(), round) {
                let (prompt, generate) = time(&mut targets[arm]);
                // The first round warms everything up.
                if round > 0 {
                    times[arm][0].push(prompt);
                    times[arm][1].push(generate);
                }
            }
        }
        for (arm, times_of_arm) in ARMS.iter().zip(&times) {
            let phases = [("prompt", PROMPT), ("decode", GENERATED)];
            for ((phase, tokens), column) in phases.into_iter().zip(0..) {
                let time = &times_of_arm[column];
                let ratio = comparison::ratio(time, &times[arm.baseline][column]);
                let line = serde_json::json!({
                    "model": model,
                    "arm": arm.name,
                    "phase": phase,
                    "tokens_per_second": tokens as f64 / comparison::median(time),
                    "compared_with": ARMS[arm.baseline].name,
                    "time_ratio": [ratio.low, ratio.median, ratio.high],
                    "rounds": ROUNDS,
                });
                println!("RESULT {line}");
            }
        }
        for (arm, tracer) in ARMS.iter().zip(tracers) {
            let Some(tracer) = tracer else { continue };
            let said = tracer.interrupt().unwrap();
            let complete = said.contains("Complete: ") && !said.contains("INCOMPLETE");
            assert!(complete, "{}: {said}", arm.name);
        }
    }
}

/// Seconds of a prompt, and of decoding after it.
fn time(target: &mut Oracle) -> (f64, f64) {
    let mut timed = |command: &str| {
        let start = Instant::now();
        target.command(command).unwrap();
        start.elapsed().as_secs_f64()
    };
    let prompt = timed(&format!("prompt 0 {PROMPT} 1000"));
    let generate = timed(&format!("generate 0 {GENERATED} 42"));
    timed("clear 0");
    (prompt, generate)
}
