//! Expert ids on their way from an NVIDIA GPU to the host, in a program that stands in for llama.cpp
//! with one: `tests/oracle/cuda.cpp`.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use expert_trace::probes::{Hook, Mapper, Plan};
use expert_trace_tests::tracer::{self, Attached, Stats, read_log};
use tempfile::TempDir;

use crate::{
    layouts::compile_to,
    support::{Waiting, scratch},
};

type Rows = Vec<(u32, Vec<u32>)>;

const FLAGS: [&str; 2] = ["-fno-exceptions", "-pthread"];

/// The stand-in in one of the ways in which ggml's CUDA backend is built.
struct Build {
    directory: TempDir,
}

impl Build {
    /// With NVIDIA's library in it, whose functions are then in `.symtab` alone.
    fn with_static_runtime(flags: &[&str]) -> Self {
        let build = Self {
            directory: scratch(),
        };
        let flags = [&FLAGS[..], &["-fvisibility=hidden"], flags].concat();
        compile_to(&build.program(), &["cuda.cpp", "cudart.c"], &flags);
        build
    }

    /// With NVIDIA's library beside it.
    fn with_shared_runtime(flags: &[&str]) -> Self {
        let build = Self {
            directory: scratch(),
        };
        let runtime = build.runtime();
        let soname = "-Wl,-soname,libcudart.so.13";
        compile_to(&runtime, &["cudart.c"], &["-shared", "-fPIC", "-s", soname]);
        let beside = [runtime.to_str().unwrap(), "-Wl,-rpath,$ORIGIN"];
        let flags = [&FLAGS[..], &beside, flags].concat();
        compile_to(&build.program(), &["cuda.cpp"], &flags);
        build
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("program")
    }

    fn runtime(&self) -> PathBuf {
        self.directory.path().join("libcudart.so.13")
    }

    fn command(&self, layout: &str, shape: [u32; 3], steps: &str) -> Command {
        let mut command = Command::new(self.program());
        command.arg(layout).args(shape.map(|n| n.to_string()));
        command.args(steps.split_whitespace());
        command
    }
}

fn shared() -> &'static Build {
    static BUILD: OnceLock<Build> = OnceLock::new();
    BUILD.get_or_init(|| Build::with_shared_runtime(&[]))
}

fn hidden() -> &'static Build {
    static BUILD: OnceLock<Build> = OnceLock::new();
    BUILD.get_or_init(|| Build::with_static_runtime(&[]))
}

fn api_inlined() -> &'static Build {
    static BUILD: OnceLock<Build> = OnceLock::new();
    BUILD.get_or_init(|| Build::with_static_runtime(&["-DAPI_INLINED"]))
}

/// k, rows and experts.
const SMALL: [u32; 3] = [4, 37, 32];

/// A row as the stand-in prints it.
fn parse(line: &str) -> (u32, Vec<u32>) {
    let mut numbers = line.split(' ').map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.collect())
}

/// What came of a traced stand-in.
struct Traced {
    stats: Stats,
    /// Rows that the tracer has logged.
    seen: Rows,
    /// Rows that the stand-in had.
    had: Rows,
    /// What the tracer said.
    said: String,
}

fn run(mut command: Command) -> Traced {
    let directory = scratch();
    let [path, log] = ["stats.json", "log"].map(|name| directory.path().join(name));
    let options = options(&path, &log);
    command = tracer::run(&options, &command).unwrap();
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let had = String::from_utf8(output.stdout).unwrap();
    Traced {
        stats: Stats::read(&path).unwrap(),
        seen: read_log(&log).unwrap(),
        had: had.lines().map(parse).collect(),
        said,
    }
}

/// Rows up to where the stand-in waits.
fn rows(target: &mut Waiting) -> Rows {
    let lines = target.until_it_waits();
    lines.iter().map(|line| parse(line)).collect()
}

/// Rows up to its end.
fn finish(mut target: Waiting) -> Rows {
    target.go_on();
    let (rest, status) = target.end();
    assert!(status.success());
    rest.lines().map(parse).collect()
}

fn options(path: &Path, log: &Path) -> [String; 3] {
    [
        format!("--output={}", path.display()),
        format!("--log={}", log.display()),
        "--top=0".to_owned(),
    ]
}

/// Attaches where the stand-in waits for the first time, and detaches where it does for the second.
fn attach(command: Command) -> Traced {
    let directory = scratch();
    let [path, log] = ["stats.json", "log"].map(|name| directory.path().join(name));
    let mut target = Waiting::start(command);
    rows(&mut target);
    let attached = Attached::to(target.pid(), &options(&path, &log)).unwrap();
    target.go_on();
    let had = rows(&mut target);
    let said = attached.interrupt().unwrap();
    finish(target);
    Traced {
        stats: Stats::read(&path).unwrap(),
        seen: read_log(&log).unwrap(),
        had,
        said,
    }
}

/// Numbers of `integrity.routes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Routes {
    ids_copies: u64,
    fetches: u64,
    device_copies: u64,
    repeated: u64,
    copies_lost: u64,
}

impl Routes {
    fn of(stats: &Stats) -> Self {
        let number = |name: &str| stats.number(&format!("/integrity/routes/{name}"));
        Self {
            ids_copies: number("ids_copies"),
            fetches: number("fetches"),
            device_copies: number("device_copies"),
            repeated: number("repeated"),
            copies_lost: number("copies_lost"),
        }
    }

    /// Of so many layers whose tokens the device sorts, and so many whose weights are streamed: gate,
    /// up and down each ask for the same ids.
    fn of_layers(slow: u64, streamed: u64) -> Self {
        let device_copies = 3 * (slow + streamed);
        Self {
            ids_copies: device_copies + streamed,
            fetches: streamed,
            device_copies,
            repeated: 2 * slow + 3 * streamed,
            copies_lost: 0,
        }
    }
}

impl Traced {
    fn assert_exact(&self, rows: usize, routes: Routes) {
        self.stats.assert_complete();
        assert_eq!(self.had.len(), rows);
        assert!(self.seen == self.had, "{:?}\n{:?}", self.seen, self.had);
        assert_eq!(Routes::of(&self.stats), routes);
    }

    fn assert_lost(&self, lost: u64) {
        assert!(self.seen == self.had, "{:?}\n{:?}", self.seen, self.had);
        assert_eq!(Routes::of(&self.stats).copies_lost, lost, "{}", self.said);
        assert_eq!(self.stats.0["integrity"]["complete"], false);
        assert!(self.said.contains("INCOMPLETE"), "{}", self.said);
    }

    /// Symbol tables in which a function was found.
    fn tables(&self, hook: Hook) -> Vec<&str> {
        let hook = serde_json::to_value(hook).unwrap();
        let probes = self.stats.0["target"]["hooks"].as_array().unwrap().iter();
        let of = probes.filter(|probe| probe["hook"] == hook);
        of.map(|probe| probe["table"].as_str().unwrap()).collect()
    }
}

/// Three passes, with all that is no copy of ids for the device itself in between.
const PASSES: &str = "pass slow get fast get fetch get slow other get \
                      pass slow get fast get fetch get slow other get \
                      pass slow get fast get fetch get slow other get";

/// Routes of these passes.
fn routes_of_passes() -> Routes {
    Routes::of_layers(3 * 2, 3)
}

#[test]
fn every_kind_of_build() {
    for (build, shape, runtime, interface) in [
        (shared(), SMALL, ".dynsym", 2),
        (hidden(), [2, 2, 8], ".symtab", 2),
        (api_inlined(), [8, 512, 128], ".symtab", 1),
    ] {
        let traced = run(build.command("new", shape, PASSES));
        traced.assert_exact(3 * 3 * shape[1] as usize, routes_of_passes());
        assert_eq!(traced.tables(Hook::DeviceMemcpy), [runtime]);
        assert_eq!(traced.tables(Hook::Fetch).len(), interface);
        assert_eq!(traced.tables(Hook::WeightsFollow).len(), interface);
        let context = &traced.stats.0["contexts"][0];
        assert_eq!(context["pass_source"], "scheduler");
        let layers = context["layers"].as_array().unwrap().iter();
        let seen = layers.map(|layer| {
            let routes = layer["routes"].as_array().unwrap();
            assert_eq!(routes.len(), 1);
            (layer["layer_id"].as_u64(), routes[0].as_str().unwrap())
        });
        let expected = [
            (Some(0), "device_copy"),
            (Some(2), "fetch"),
            (Some(3), "device_copy"),
        ];
        assert_eq!(seen.collect::<Vec<_>>(), expected);
    }
}

#[test]
fn the_narrowest_and_a_wide_model() {
    for shape in [[1, 1, 8], [10, 2100, 512]] {
        let rows = 2 * shape[1] as usize;
        let traced = run(shared().command("new", shape, "pass slow fetch"));
        traced.assert_exact(rows, Routes::of_layers(1, 1));
    }
}

/// With a cache of experts on the device, what multiplies them has slots of the cache for its ids. The
/// rows are those of experts, of one token and of several.
#[test]
fn slots_of_a_cache_are_no_experts() {
    for shape in [SMALL, [4, 1, 32]] {
        let steps = "pass slow cache cache pass cache fetch cache";
        let traced = run(shared().command("new", shape, steps));
        let of_others = Routes::of_layers(1, 1);
        let routes = Routes {
            ids_copies: of_others.ids_copies + 4,
            fetches: of_others.fetches + 4,
            ..of_others
        };
        traced.assert_exact(6 * shape[1] as usize, routes);
    }
}

/// Such old builds stream no weights.
#[test]
fn tensors_of_old_builds() {
    let steps = "pass slow get fast get slow other get pass slow get fast get slow";
    let traced = run(shared().command("old", SMALL, steps));
    traced.assert_exact(2 * 2 * 37, Routes::of_layers(4, 0));
    let layout = &traced.stats.0["target"]["tensor_layouts"][0]["builds"];
    assert_eq!(layout, "b3209 to b4105");
}

#[test]
fn attached_between_passes() {
    for build in [shared(), hidden(), api_inlined()] {
        let steps = format!("pass slow fetch wait {PASSES} wait pass slow fetch");
        let traced = attach(build.command("new", SMALL, &steps));
        traced.assert_exact(3 * 3 * 37, routes_of_passes());
    }
}

/// Where no pass was seen to begin, gate, up and down are still the same ids: of layer 1, two of the
/// three are seen.
#[test]
fn attached_in_the_middle_of_a_pass() {
    let steps = "pass slow gate wait rest slow pass slow slow slow pass slow slow slow wait";
    let traced = attach(shared().command("new", SMALL, steps));
    traced.stats.assert_complete();
    let routes = Routes {
        ids_copies: 7 * 3 + 2,
        device_copies: 7 * 3 + 2,
        repeated: 7 * 2 + 1,
        ..Routes::default()
    };
    assert_eq!(Routes::of(&traced.stats), routes);
    assert_eq!(traced.stats.number("/integrity/rows/seen"), 8 * 37);
    // The pass that was cut is left out, and the stand-in shows layer 1 of it when we do not look.
    assert_eq!(traced.stats.excluded("partial"), (1, 37));
    assert_eq!(traced.had.len(), 7 * 37);
    assert!(traced.seen == traced.had[37..], "{:?}", traced.seen);
}

/// Where ids were, other data lies as soon as nobody needs them.
#[test]
fn other_data_where_ids_were() {
    let steps = "pass slow reuse slow pass slow reuse slow";
    let traced = run(api_inlined().command("new", SMALL, steps));
    traced.assert_exact(2 * 2 * 37, Routes::of_layers(4, 0));
}

/// Copies that nothing follows are lost, and say nothing.
#[test]
fn ids_that_never_arrive() {
    for (steps, lost) in [
        // The next MUL_MAT_ID tells, the next pass, the end of the target,
        ("pass slow broken slow", 3),
        ("pass slow broken pass slow slow", 3),
        ("pass slow thread pass slow", 3),
        // … and the next fetch.
        ("pass slow again again slow", 2),
    ] {
        let traced = run(hidden().command("new", SMALL, steps));
        traced.assert_lost(lost);
    }
}

/// The same, when the target ends while we are attached.
#[test]
fn ids_that_never_arrive_before_an_attached_target_ends() {
    let directory = scratch();
    let [path, log] = ["stats.json", "log"].map(|name| directory.path().join(name));
    let command = hidden().command("new", SMALL, "wait pass slow pass slow thread");
    let mut target = Waiting::start(command);
    rows(&mut target);
    let attached = Attached::to(target.pid(), &options(&path, &log)).unwrap();
    let had = finish(target);
    let (status, said) = attached.wait().unwrap();
    assert!(status.success(), "{said}");
    Traced {
        stats: Stats::read(&path).unwrap(),
        seen: read_log(&log).unwrap(),
        had,
        said,
    }
    .assert_lost(3);
}

/// What is not visible is not counted.
#[test]
fn stripped_builds() {
    let steps = "pass slow fast get slow";
    let build = Build::with_static_runtime(&["-s"]);
    let traced = run(build.command("new", SMALL, steps));
    assert_eq!(traced.seen, []);
    let reason = "contains llama.cpp without symbols";
    assert!(traced.said.contains(reason), "{}", traced.said);

    // The API is visible, and NVIDIA's library; the device's own functions are not.
    let build = Build::with_shared_runtime(&["-rdynamic", "-s", "-DREGISTERED"]);
    let traced = run(build.command("new", SMALL, steps));
    assert_eq!(traced.seen, []);
    assert_eq!(Routes::of(&traced.stats), Routes::default());
    assert_eq!(traced.tables(Hook::DeviceMemcpy), [] as [&str; 0]);
    let reason = "No expert routing was seen: tokens were decoded, but no MoE layer ran on the CPU";
    assert!(traced.said.contains(reason), "{}", traced.said);

    let traced = run(build.command("new", SMALL, "pass fetch slow pass fetch slow"));
    traced.stats.assert_complete();
    let of_first_layer = traced.had.iter().filter(|(layer, _)| *layer == 0);
    assert!(traced.seen.iter().eq(of_first_layer), "{:?}", traced.seen);
    let routes = Routes {
        ids_copies: 2,
        fetches: 2,
        ..Routes::default()
    };
    assert_eq!(Routes::of(&traced.stats), routes);
}

/// Programs that have nothing to do with llama.cpp use NVIDIA's library, too.
#[test]
fn copies_are_probed_for_llama_cpp_alone() {
    let build = shared();
    let mut plan = Plan::gated();
    assert_eq!(added(&mut plan, &build.runtime()), []);
    let of_program = added(&mut plan, &build.program());
    assert_eq!(of_program.last(), Some(&Hook::DeviceMemcpy));
    assert!(of_program.contains(&Hook::DeviceMulMatId));

    let mut plan = Plan::gated();
    assert_eq!(
        of_program[..of_program.len() - 1],
        added(&mut plan, &build.program())
    );
    assert_eq!(added(&mut plan, &build.runtime()), [Hook::DeviceMemcpy]);

    // Both are in one file.
    let mut plan = Plan::gated();
    assert_eq!(added(&mut plan, &hidden().program()), of_program);
}

/// What a file adds to a plan.
fn added(plan: &mut Plan, file: &Path) -> Vec<Hook> {
    let change = plan
        .add_file(&File::open(file).unwrap(), file, file, Mapper::UNKNOWN)
        .unwrap();
    change.probes.iter().map(|probe| probe.hook).collect()
}
