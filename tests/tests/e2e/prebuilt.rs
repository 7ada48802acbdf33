//! Where the probes are in libraries that others have built: llama.cpp's for CUDA, which cannot run
//! here, and NVIDIA's own.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use expert_trace::{
    probes::{Hook, Mapper, Plan, Probe},
    prologue::Step,
    routes::{self, Routes},
};

use crate::support::prebuilt;

const GGML_BASE: &str = "libggml-base.so";
const CUDA_13: &str = "libggml-cuda.so";
const CUDA_12: &str = "fallback/libggml-cuda.so";
const PASS_BEGIN: &str = "ggml_backend_sched_graph_compute_async";
const GET_ASYNC: &str = "ggml_backend_tensor_get_async";
const SET_ASYNC: &str = "ggml_backend_tensor_set_async";
const CUDA_GET_ASYNC: &str =
    "_ZL34ggml_backend_cuda_get_tensor_asyncP12ggml_backendPK11ggml_tensorPvmm";
const CUDA_SET_ASYNC: &str =
    "_ZL34ggml_backend_cuda_set_tensor_asyncP12ggml_backendP11ggml_tensorPKvmm";
const CUDA_MUL_MAT_ID: &str = "_ZL20ggml_cuda_mul_mat_idR25ggml_backend_cuda_contextP11ggml_tensor";
const PROCESS_UBATCH: &str = "_ZN13llama_context14process_ubatchERK12llama_ubatch14llm_graph_type\
                              P22llama_memory_context_iR11ggml_status";

fn cuda_library(name: &str) -> PathBuf {
    prebuilt().cuda_libraries.join(name)
}

fn add(plan: &mut Plan, library: &Path) -> Vec<Probe> {
    let file = File::open(library).unwrap();
    plan.add_file(&file, library, library, Mapper::UNKNOWN)
        .unwrap()
        .probes
}

/// All of them, by name: whatever device a program has.
fn all_routes() -> Routes {
    let names = [
        "router",
        "split_input",
        "fetch",
        "device_copy",
        "logits",
        "callback",
    ];
    Routes::asked_for(&names.map(|name| routes::of_name(name).unwrap()), true)
}

/// Fails unless these are the probes of a library, each at its symbol.
fn assert_probes(library: &Path, expected: &[(Hook, &str)]) {
    let mut plan = Plan::default().with_routes(all_routes());
    let probes = add(&mut plan, library);
    let found: Vec<(Hook, &str)> = probes
        .iter()
        .map(|probe| (probe.hook, probe.symbol))
        .collect();
    assert_eq!(found, expected, "{}", library.display());
    for probe in &probes {
        assert!(probe.build_id.is_some());
        assert_at_symbol(&Elf::open(library), probe);
    }
}

/// Fails unless a probe is at the one function with its symbol: behind the instruction that indirect jumps
/// end at, and behind the test whether the first argument is null, which a jump follows.
fn assert_at_symbol(elf: &Elf, probe: &Probe) {
    const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
    const TEST_RDI: [u8; 3] = [0x48, 0x85, 0xff];
    let addresses = &elf.functions()[probe.symbol];
    let [address] = addresses[..] else {
        panic!("{}: {addresses:x?}", probe.symbol);
    };
    let offset = elf.offset_of(address);
    let mut skipped = 0;
    for passed in [&ENDBR64[..], &TEST_RDI] {
        if elf.bytes(offset + skipped, passed.len()) == passed {
            skipped += passed.len() as u64;
        }
    }
    let definition = &probe.definition;
    assert_eq!(
        (
            definition.address,
            definition.file_offset,
            definition.skipped
        ),
        (address + skipped, offset + skipped, skipped),
        "{}",
        probe.symbol
    );
    assert_eq!(definition.instruction, Some(Step::Emulated));
}

#[test]
fn libraries_without_cuda() {
    assert_probes(
        &cuda_library(GGML_BASE),
        &[
            (Hook::PassBegin, PASS_BEGIN),
            (Hook::SchedulerEnd, "ggml_backend_sched_free"),
            (Hook::Fetch, GET_ASYNC),
            (Hook::WeightsFollow, SET_ASYNC),
            (Hook::TensorGet, "ggml_backend_tensor_get"),
            (Hook::TensorGetDone, "ggml_backend_tensor_get"),
            (Hook::EvalCallback, "ggml_backend_sched_set_eval_callback"),
        ],
    );
    assert_probes(
        &cuda_library("libggml-cpu-x64.so"),
        &[
            (Hook::ExpertIds, "ggml_compute_forward_get_rows"),
            (Hook::Split, "ggml_graph_compute"),
            (Hook::SplitDone, "ggml_graph_compute"),
        ],
    );
    assert_probes(
        &cuda_library("libllama.cuda.v0.5.0.so"),
        &[
            // Called from both of its callers, so that `set_inputs` tells nothing more.
            (Hook::Context, PROCESS_UBATCH),
            (Hook::ContextEnd, "llama_free"),
        ],
    );
}

#[test]
fn cuda_libraries() {
    for library in [CUDA_13, CUDA_12] {
        assert_probes(
            &cuda_library(library),
            &[
                (Hook::Fetch, CUDA_GET_ASYNC),
                (Hook::WeightsFollow, CUDA_SET_ASYNC),
                (Hook::DeviceMulMatId, CUDA_MUL_MAT_ID),
            ],
        );
    }
}

/// Programs that have nothing to do with llama.cpp copy by the same function of NVIDIA's library.
#[test]
fn copies_are_probed_for_cuda_libraries_only() {
    for (runtime, library) in [("libcudart.so.13", CUDA_13), ("libcudart.so.12", CUDA_12)] {
        let runtime = prebuilt().cuda_runtimes.join(runtime);
        let library = cuda_library(library);
        let copies = |probes: Vec<Probe>| -> Vec<Probe> {
            let mut probes = probes;
            probes.retain(|probe| probe.hook == Hook::DeviceMemcpy);
            probes
        };

        let mut plan = Plan::default();
        assert!(add(&mut plan, &runtime).is_empty());
        assert!(copies(add(&mut plan, &cuda_library(GGML_BASE))).is_empty());
        let behind = copies(add(&mut plan, &library));

        let mut plan = Plan::default();
        assert!(copies(add(&mut plan, &library)).is_empty());
        let before = copies(add(&mut plan, &runtime));

        for probes in [behind, before] {
            let [probe] = &probes[..] else {
                panic!("{probes:?}");
            };
            assert_eq!(probe.symbol, "cudaMemcpyAsync");
            assert_eq!(probe.attach_path, runtime);
            assert_at_symbol(&Elf::open(&runtime), probe);
        }
    }
}

/// A reader of ELF files that has nothing in common with the one under test.
struct Elf(File);

/// A section or a segment, as far as it is read here.
struct Part {
    kind: u32,
    /// `p_flags` or `sh_link`.
    other: u32,
    address: u64,
    offset: u64,
    size: u64,
}

impl Elf {
    const SYMTAB: u32 = 2;
    const DYNSYM: u32 = 11;
    const LOAD: u32 = 1;
    const EXECUTABLE: u32 = 1;

    fn open(path: &Path) -> Self {
        Self(File::open(path).unwrap())
    }

    fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// An unsigned number of so many bytes.
    fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
        let digits = bytes[at..at + length].iter().rev();
        digits.fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// Entries of a table of which the header tells offset, length of an entry and number of entries.
    fn table(&self, [offset, length, entries]: [usize; 3]) -> Vec<Vec<u8>> {
        let header = self.bytes(0, 64);
        let start = Self::number(&header, offset, 8);
        let length = Self::number(&header, length, 2);
        (0..Self::number(&header, entries, 2))
            .map(|entry| self.bytes(start + entry * length, length as usize))
            .collect()
    }

    fn segments(&self) -> Vec<Part> {
        let read = |entry: &Vec<u8>| Part {
            kind: Self::number(entry, 0, 4) as u32,
            other: Self::number(entry, 4, 4) as u32,
            offset: Self::number(entry, 8, 8),
            address: Self::number(entry, 16, 8),
            size: Self::number(entry, 32, 8),
        };
        self.table([0x20, 0x36, 0x38]).iter().map(read).collect()
    }

    fn sections(&self) -> Vec<Part> {
        let read = |entry: &Vec<u8>| Part {
            kind: Self::number(entry, 4, 4) as u32,
            address: Self::number(entry, 16, 8),
            offset: Self::number(entry, 24, 8),
            size: Self::number(entry, 32, 8),
            other: Self::number(entry, 40, 4) as u32,
        };
        self.table([0x28, 0x3a, 0x3c]).iter().map(read).collect()
    }

    /// Addresses of defined functions by name, those of versioned names without the version.
    fn functions(&self) -> BTreeMap<String, Vec<u64>> {
        const FUNCTION: u64 = 2;
        let mut functions: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        let sections = self.sections();
        for table in &sections {
            if table.kind != Self::SYMTAB && table.kind != Self::DYNSYM {
                continue;
            }
            let strings = &sections[table.other as usize];
            let strings = self.bytes(strings.offset, strings.size as usize);
            let symbols = self.bytes(table.offset, table.size as usize);
            for symbol in symbols.chunks_exact(24) {
                let defined = Self::number(symbol, 6, 2) != 0;
                if !defined || Self::number(symbol, 4, 1) & 15 != FUNCTION {
                    continue;
                }
                let name = &strings[Self::number(symbol, 0, 4) as usize..];
                let name = name.split(|byte| [0, b'@'].contains(byte)).next().unwrap();
                let name = String::from_utf8_lossy(name).into_owned();
                let addresses = functions.entry(name).or_default();
                let address = Self::number(symbol, 8, 8);
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
        }
        functions
    }

    /// Where in the file the code at an address is.
    fn offset_of(&self, address: u64) -> u64 {
        let segments = self.segments();
        let segment = segments.iter().find(|segment| {
            segment.kind == Self::LOAD
                && segment.other & Self::EXECUTABLE != 0
                && (segment.address..segment.address + segment.size).contains(&address)
        });
        let segment = segment.expect("code is in an executable segment");
        segment.offset + (address - segment.address)
    }
}
