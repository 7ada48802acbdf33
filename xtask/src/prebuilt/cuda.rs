//! Libraries of llama.cpp for CUDA, which are looked into and do not compute, and NVIDIA's own.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use object::{Object, ObjectSection, ReadCache};

use super::{entry_name, keep, start, unpack};
use crate::cache::{self, remove_directory};
use crate::{command, npm, pip};

/// The build of llama.cpp in node-llama-cpp for CUDA 13, and its CUDA library for CUDA 12.
const LLAMA_CPP: npm::Package = npm::Package {
    name: "@node-llama-cpp/linux-x64-cuda",
    version: "3.22.1",
    sha512: "f2b4028f234d2d9254162b7e6298f0942e21c242a038c224076c2ec9c2817fc354d8edf248a6e259943c6b0f64bb69d44d78d29d422b13a281f3c8ad76e4c1b8",
};
const EXTENSION: npm::Package = npm::Package {
    name: "@node-llama-cpp/linux-x64-cuda-ext",
    version: "3.22.1",
    sha512: "e1ee5a8e488cd9a476580741fcdfc00a4e30784847bce008af3c593ec217d310c55b9fba8614a1bb2d7fbecf3c48af4d19d800728f48c84dbc7984b41f579fa4",
};

/// Directory of the libraries in both archives.
const DIRECTORY: &str = "package/bins/linux-x64-cuda";

/// Libraries that the tests look into; of the processor's variants, one.
const LIBRARIES: [&str; 5] = [
    "libggml-base.so",
    "libggml-cpu-x64.so",
    "libggml-cuda.so",
    "libggml.cuda.v0.5.0.so",
    "libllama.cuda.v0.5.0.so",
];
const EXTENSION_LIBRARIES: [&str; 1] = ["fallback/libggml-cuda.so"];

/// CUDA's runtime library, which node-llama-cpp's libraries ask for and do not have beside them.
const RUNTIMES: [(pip::Distribution, &str); 2] = [
    (
        pip::Distribution {
            package: "nvidia-cuda-runtime-cu12",
            version: "12.9.79",
            file: "nvidia_cuda_runtime_cu12-12.9.79-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
            sha256: "25bba2dfb01d48a9b59ca474a1ac43c6ebf7011f1b0b8cc44f54eb6ac48a96c3",
        },
        "nvidia/cuda_runtime/lib/libcudart.so.12",
    ),
    (
        pip::Distribution {
            package: "nvidia-cuda-runtime",
            version: "13.5.37",
            file: "nvidia_cuda_runtime-13.5.37-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
            sha256: "df2b79a8852f10d1fef8c848489c49eebb5754051bf870202a862831412b179d",
        },
        "nvidia/cu13/lib/libcudart.so.13",
    ),
];

/// Section with the code for GPUs, nine tenths of a library.
const GPU_CODE: &str = ".nv_fatbin";

/// The directory of node-llama-cpp's libraries for CUDA 13, with the CUDA library for CUDA 12 in its
/// subdirectory `fallback`.
///
/// The CUDA libraries are those of the packages in all but the code for GPUs, which is zeros that
/// take no space on disk: they can be looked into, and loaded, but not compute.
pub fn libraries() -> Result<PathBuf> {
    let name = entry_name(
        "node-llama-cpp-cuda",
        LLAMA_CPP.version,
        &[
            LLAMA_CPP.sha512,
            EXTENSION.sha512,
            &LIBRARIES.join(" "),
            &EXTENSION_LIBRARIES.join(" "),
            GPU_CODE,
        ],
    );
    cache::entry(&name, |partial| {
        let download = start(partial)?;
        eprintln!("Downloading llama.cpp's libraries for CUDA (320 MB).");
        unpack(&LLAMA_CPP, DIRECTORY, &LIBRARIES, &download, partial)?;
        unpack(
            &EXTENSION,
            DIRECTORY,
            &EXTENSION_LIBRARIES,
            &download,
            partial,
        )?;
        for library in LIBRARIES.iter().chain(&EXTENSION_LIBRARIES) {
            drop_gpu_code(&partial.join(library))?;
        }
        remove_directory(&download)
    })
}

/// The directory of NVIDIA's `libcudart.so.12` and `libcudart.so.13`.
pub fn runtimes() -> Result<PathBuf> {
    let versions = RUNTIMES.map(|(wheel, _)| wheel.version).join("-");
    let parts = RUNTIMES.map(|(wheel, library)| format!("{} {library}", wheel.sha256));
    let name = entry_name(
        "cuda-runtime",
        &versions,
        &parts.each_ref().map(String::as_str),
    );
    cache::entry(&name, |partial| {
        let download = start(partial)?;
        eprintln!("Downloading CUDA's runtime libraries (6 MB).");
        for (wheel, library) in &RUNTIMES {
            let unpacked = download.join(wheel.package);
            pip::unpack_wheel(&wheel.download(&download)?, &unpacked)?;
            let from = unpacked.join(library);
            let name = from.file_name().context("a library has a name")?;
            keep(&from, &partial.join(name))?;
        }
        remove_directory(&download)
    })
}

/// Makes a hole of the code for GPUs. All else stays, at the same place.
fn drop_gpu_code(library: &Path) -> Result<()> {
    let Some((offset, length)) = gpu_code(library)? else {
        return Ok(());
    };
    command::run(
        Command::new("fallocate")
            .arg("--punch-hole")
            .arg(format!("--offset={offset}"))
            .arg(format!("--length={length}"))
            .arg(library),
    )
}

/// Where in the file the code for GPUs is.
fn gpu_code(library: &Path) -> Result<Option<(u64, u64)>> {
    let file = File::open(library).with_context(|| format!("cannot open {}", library.display()))?;
    let contents = ReadCache::new(file);
    let elf = object::File::parse(&contents)
        .with_context(|| format!("{} is not an ELF file", library.display()))?;
    Ok(elf
        .section_by_name(GPU_CODE)
        .and_then(|section| section.file_range()))
}
