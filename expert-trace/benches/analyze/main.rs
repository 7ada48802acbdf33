//! What `analyze` takes for the caches of a trace of 128 generated tokens: nine budgets, six policies.
//! `cargo xtask bench analyze` judges and records it.

use std::{env, hint::black_box, path::Path};

use criterion::{Criterion, criterion_group, criterion_main};
use expert_trace::analyze::{
    cache::{Cache, Options},
    input::{self, Input},
};
use expert_trace_tests::synthetic::Synthetic;

/// MiB, as the script that published the figures of the real trace has them.
const BUDGETS: [u64; 9] = [500, 1000, 1500, 2000, 3000, 4000, 5000, 6000, 8000];

fn read(path: &Path) -> Input {
    input::read(path, None, None).expect("it is a trace")
}

/// The real trace where it is there, and one of its shape.
fn traces() -> Vec<(&'static str, Input)> {
    let mut traces = Vec::new();
    let real = env::var_os("EXPERT_TRACE_ROUTE_TRACE").map_or_else(
        || {
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            root.join("../../shared/data/routes/qwen3-30b-a3b.route.csv")
        },
        Into::into,
    );
    match real.exists() {
        true => traces.push(("qwen3-30b-a3b", read(&real))),
        false => eprintln!("{} is not there: not measured", real.display()),
    }
    let mut file = tempfile::NamedTempFile::new().expect("there is room for temporary files");
    Synthetic::SMALL
        .write(file.as_file_mut())
        .expect("it is written");
    traces.push(("synthetic", read(file.path())));
    traces
}

fn caches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("caches");
    let options = Options {
        budgets: BUDGETS.map(|mib| mib << 20).to_vec(),
        sample: usize::MAX,
        seed: 1,
    };
    for (name, input) in traces() {
        let routing = input.routing.expect("it has rows");
        let sizes: Vec<u64> = routing
            .layers()
            .iter()
            .flat_map(|layer| vec![layer.expert_bytes.unwrap_or(1); layer.n_expert as usize])
            .collect();
        group.bench_function(name, |bencher| {
            bencher.iter(|| Cache::of(black_box(&routing), &sizes, &options, &mut |_, _, _| {}));
        });
    }
    group.finish();
}

criterion_group!(benches, caches);
criterion_main!(benches);
