//! What the program itself needs for what the kernel hands it, without a target: ids in a second,
//! symbols of a file, and the document. `cargo xtask bench throughput` judges and records it.

mod records;

use std::{env, fs::File, hint::black_box};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use expert_trace::{
    bounded::{self, Bounded},
    caller::Account,
    decode::decode,
    export::Output,
    model::{Model, Options},
    probes::Hook,
    stats, symbols,
};

use self::records::{Passes, Records};

/// Passes that are decoded, by name. Tokens × layers × chosen ids, as models in the field have them.
const PASSES: [(&str, Passes); 6] = [
    ("decode 48 × 8 of 128", passes(1, 8, 128, 256)),
    ("decode 48 × 10 of 512", passes(1, 10, 512, 256)),
    ("prompt 512 × 48 × 8 of 128", passes(512, 8, 128, 4)),
    ("prompt 512 × 48 × 10 of 512", passes(512, 10, 512, 4)),
    ("prompt 2048 × 48 × 8 of 128", passes(2048, 8, 128, 2)),
    ("prompt 2048 × 48 × 10 of 512", passes(2048, 10, 512, 2)),
];

const fn passes(rows: u32, k: u16, n_expert: u32, passes: u32) -> Passes {
    Passes {
        rows,
        layers: 48,
        n_expert,
        k,
        passes,
    }
}

const FROM_START: Options = Options {
    include_warmup: false,
    from_start: true,
};

fn count(model: &mut Model, records: &Records) {
    for record in records.iter() {
        model.push(decode(record), &mut |pass| {
            black_box(pass);
        });
    }
}

/// From the bytes of the ring buffer to counts.
fn decode_and_aggregate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ids");
    for (name, passes) in PASSES {
        let records = passes.records();
        let mut model = Model::new(FROM_START);
        count(&mut model, &records);
        // The last pass is still open.
        let counted = u64::from(passes.passes - 1) * u64::from(passes.rows);
        assert_eq!(model.contexts()[0].tokens(), counted);
        let rows = counted + u64::from(passes.rows);
        let received = model.received();
        assert_eq!(received.events, records.count() as u64);
        assert_eq!(received.rows, rows * u64::from(passes.layers));
        assert_eq!((received.rejected, received.repeated_rows), (0, 0));

        group.throughput(Throughput::Elements(passes.ids()));
        group.bench_function(name, |bencher| {
            bencher.iter(|| count(&mut model, black_box(&records)));
        });
    }
    group.finish();
}

/// From the file of this program to the addresses of the functions that are probed, of which it has none,
/// and of one that it has: each name of its symbol table is looked at.
fn resolve(criterion: &mut Criterion) {
    let program = env::current_exe().expect("a process has a program");
    let file = File::open(program).expect("its file can be read");
    let probed = Hook::ALL.into_iter().flat_map(Hook::symbols).copied();
    let names: Vec<&str> = probed.chain(["main"]).collect();
    let resolve = || symbols::resolve(Bounded(&bounded::cache(&file)), &names);
    let found = resolve().expect("it is an ELF file");
    assert!(found.definitions.contains_key("main"));

    let mut group = criterion.benchmark_group("symbols");
    let size = file.metadata().expect("it has a size").len();
    group.throughput(Throughput::Bytes(size));
    group.bench_function("this program", |bencher| bencher.iter(resolve));
    group.finish();
}

/// From counts to a file: all that grows with layers and experts.
fn export(criterion: &mut Criterion) {
    let passes = Passes {
        rows: 512,
        layers: 128,
        n_expert: 512,
        k: 10,
        passes: 2,
    };
    let mut model = Model::new(FROM_START);
    count(&mut model, &passes.records());
    let context = &model.contexts()[0];
    let activated = context
        .layers
        .iter()
        .map(|(_, layer)| layer.tally.experts.len());
    assert_eq!(activated.sum::<usize>(), 128 * 512);

    let account = Account::current().expect("a process has a user");
    let directory = tempfile::tempdir().expect("there is room for temporary files");
    let path = directory.path().join("stats.json");
    let mut group = criterion.benchmark_group("export");
    group.bench_function("128 × 512", |bencher| {
        bencher.iter_batched(
            || Output::create(&path, &account).expect("the directory can be written"),
            |output| {
                let layers = stats::specified_layers(context);
                let context = stats::context_stats(0, context, &[], &[], 1);
                output
                    .write_json(&(layers, context))
                    .expect("it is written");
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group!(benches, decode_and_aggregate, resolve, export);
criterion_main!(benches);
