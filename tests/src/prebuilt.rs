//! Builds of llama.cpp that others publish: `cargo xtask prebuilt` downloads them, and prints the
//! environment variables that say where they are.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::environment::existing;

/// What prints the variables.
const TASK: &str = "cargo xtask prebuilt";

const VULKAN_SERVER: &str = "EXPERT_TRACE_TEST_VULKAN_SERVER";
const SHADER_CACHE: &str = "EXPERT_TRACE_TEST_SHADER_CACHE";
const CUDA_LIBRARIES: &str = "EXPERT_TRACE_TEST_CUDA_LIBRARIES";
const CUDA_RUNTIMES: &str = "EXPERT_TRACE_TEST_CUDA_RUNTIMES";

/// Builds of llama.cpp that are ready to be traced, or to be looked into.
#[derive(Debug, Clone)]
pub struct Prebuilt {
    /// Directory of a stripped `llama-server` with the Vulkan backend, and of its libraries.
    pub vulkan_server: PathBuf,
    /// Directory for Mesa's compiled shaders (`MESA_SHADER_CACHE_DIR`), which are worth keeping from
    /// one run to the next; exists.
    pub shader_cache: PathBuf,
    /// Directory of node-llama-cpp's libraries for CUDA 13, with the CUDA library for CUDA 12 in
    /// `fallback`. They have no code for GPUs.
    pub cuda_libraries: PathBuf,
    /// Directory of NVIDIA's `libcudart.so.12` and `libcudart.so.13`, which those are linked with.
    pub cuda_runtimes: PathBuf,
}

impl Prebuilt {
    /// Those that are named in the environment.
    pub fn from_env() -> Result<Self> {
        Ok(Self {
            vulkan_server: existing(VULKAN_SERVER, TASK)?,
            shader_cache: existing(SHADER_CACHE, TASK)?,
            cuda_libraries: existing(CUDA_LIBRARIES, TASK)?,
            cuda_runtimes: existing(CUDA_RUNTIMES, TASK)?,
        })
    }

    /// The variables that [`Prebuilt::from_env`] reads.
    pub fn to_env(&self) -> [(&'static str, &Path); 4] {
        let Self {
            vulkan_server,
            shader_cache,
            cuda_libraries,
            cuda_runtimes,
        } = self;
        [
            (VULKAN_SERVER, vulkan_server),
            (SHADER_CACHE, shader_cache),
            (CUDA_LIBRARIES, cuda_libraries),
            (CUDA_RUNTIMES, cuda_runtimes),
        ]
    }
}
