//! What building llama.cpp's Vulkan backend takes: a compiler for shaders, and headers.
//!
//! The backend names types of `VK_EXT_layer_settings`, which the headers of Debian 12 and of Ubuntu
//! 22.04 are too old for. Headers are no code of the system's: where its own are too old, those of
//! Debian 13 are unpacked beside them, and nothing is installed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{cache, command, packages};

/// The loader that programs are linked with, its headers, and what compiles shaders.
const PACKAGES: [&str; 3] = ["glslc", "libvulkan-dev", "spirv-headers"];

/// What the backend needs of the headers.
const NEEDED: &str = "VK_EXT_layer_settings";

/// Debian 13's headers. They are the same for all architectures.
const HEADERS: packages::Pinned = packages::Pinned {
    version: "1.4.309.0",
    path: "pool/main/v/vulkan-loader/libvulkan-dev_1.4.309.0-1_amd64.deb",
    sha256: "8d329d465e16168afff58b1bd0dd6db46aac2cc3f56054a481b25a04e90b345a",
};

/// What the backend is built with.
pub struct Tools {
    /// Directory that has `vulkan/vulkan.hpp`.
    pub headers: PathBuf,
    /// What the shaders' compiler says of its version.
    compiler: String,
}

impl Tools {
    /// Installs or downloads what is missing.
    pub fn provide() -> Result<Self> {
        packages::ensure(&PACKAGES, "building llama.cpp's Vulkan backend")?;
        Ok(Self {
            headers: headers()?,
            compiler: command::output(Command::new("glslc").arg("--version"))?,
        })
    }

    /// Identifies them, as a part of the key of what they make.
    pub fn key(&self) -> String {
        format!("{} {}", self.headers.display(), self.compiler)
    }
}

fn headers() -> Result<PathBuf> {
    let system = Path::new("/usr/include");
    if are_new_enough(system)? {
        return Ok(system.to_owned());
    }
    let name = format!(
        "vulkan-headers-{}-{}",
        HEADERS.version,
        &HEADERS.sha256[..12]
    );
    let unpacked = cache::entry(&name, |partial| {
        cache::remove_directory(partial)?;
        fs::create_dir_all(partial)
            .with_context(|| format!("cannot create {}", partial.display()))?;
        eprintln!("Downloading headers for Vulkan (2 MB).");
        let package = partial.join("package.deb");
        HEADERS.download(&package)?;
        command::run(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(&package)
                .arg(partial)
                .stdin(Stdio::null())
                .stdout(io::stderr()),
        )?;
        fs::remove_file(&package).with_context(|| format!("cannot remove {}", package.display()))
    })?;
    let headers = unpacked.join("usr/include");
    ensure!(
        are_new_enough(&headers)?,
        "Vulkan's headers {} lack {NEEDED}",
        HEADERS.version
    );
    Ok(headers)
}

fn are_new_enough(headers: &Path) -> Result<bool> {
    let core = headers.join("vulkan/vulkan_core.h");
    let text =
        fs::read_to_string(&core).with_context(|| format!("cannot read {}", core.display()))?;
    Ok(text.contains(NEEDED))
}
