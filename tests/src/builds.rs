//! Builds of llama.cpp that the compatibility suite traces. Each is data: `cargo xtask compat` makes a
//! list of them and hands it over as a file; the suite knows nothing of any single one. `cargo xtask
//! prebuilt` makes a list of some, which CI knows by name.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::environment::existing;
use crate::models::{ModelSpec, PlainArchitecture, WeightType};

/// What sets the variable.
const TASK: &str = "cargo xtask prebuilt";
/// File with a list of builds.
const LIST: &str = "EXPERT_TRACE_TEST_BUILDS";

/// A build, and how to make it decode tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Build {
    /// As the table names it.
    pub name: String,
    /// Of llama.cpp.
    pub version: String,
    /// Program and arguments, up to where the model's path belongs.
    pub command: Vec<PathBuf>,
    /// Added to the environment.
    #[serde(default)]
    pub environment: BTreeMap<String, PathBuf>,
    /// How it is told what to decode.
    pub driven: Driven,
    /// Models to trace it with, of those that it can load.
    pub models: Vec<Model>,
    /// What comes of it by `run`.
    #[serde(default)]
    pub by_run: Fate,
    /// What comes of it by `attach`, while it waits for tokens.
    #[serde(default)]
    pub by_attach: Fate,
}

/// What has to come of a build that is traced.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Every row is seen.
    #[default]
    Equal,
    /// It is traced and no row is seen, which the tracer says with these words.
    Unseen(String),
    /// The tracer refuses to attach, with these words.
    Refused(String),
}

/// How a build is told what to decode.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Driven {
    /// As `tests/oracle/driver.c` is.
    Lines,
    /// By HTTP, as llama-server is.
    Http,
    /// As `tests/oracle/oracle.cpp` is, with the RPC and the Vulkan backend. It puts routers and experts
    /// where it is told, and is traced once for each [route](crate::routes::ROUTES).
    Oracle,
}

/// A model with known routing.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Model {
    /// Architecture `qwen3moe`.
    Qwen3Moe,
    /// Architecture `llama`, as Mixtral; for builds that are older than `qwen3moe`.
    Llama,
    /// `qwen3moe`, with experts of this type.
    #[serde(rename = "F32")]
    F32,
    #[serde(rename = "F16")]
    F16,
    #[serde(rename = "Q8_0")]
    Q8_0,
    #[serde(rename = "Q4_0")]
    Q4_0,
    #[serde(rename = "Q4_K")]
    Q4K,
}

impl Model {
    /// What to write, and what the table calls it.
    pub fn spec(self) -> (ModelSpec, &'static str) {
        let experts = |experts| ModelSpec {
            experts,
            ..ModelSpec::QUANTIZED
        };
        match self {
            Self::Qwen3Moe => (ModelSpec::SMALL, "qwen3moe"),
            Self::Llama => {
                let spec = ModelSpec {
                    architecture: PlainArchitecture::Llama,
                    ..ModelSpec::SMALL
                };
                (spec, "llama")
            }
            Self::F32 => (experts(WeightType::F32), "qwen3moe, F32"),
            Self::F16 => (experts(WeightType::F16), "qwen3moe, F16"),
            Self::Q8_0 => (experts(WeightType::Q8_0), "qwen3moe, Q8_0"),
            Self::Q4_0 => (experts(WeightType::Q4_0), "qwen3moe, Q4_0"),
            Self::Q4K => (experts(WeightType::Q4K), "qwen3moe, Q4_K"),
        }
    }
}

impl Build {
    /// The list that was prepared.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn list_from_env() -> Result<Vec<Build>> {
        let path = existing(LIST, TASK)?;
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no list", path.display()))
    }

    /// Writes a list; gives the variable that [`Build::list_from_env`] reads.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn write_list<'a>(path: &'a Path, builds: &[Build]) -> Result<(&'static str, &'a Path)> {
        let text = serde_json::to_string_pretty(builds)?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        Ok((LIST, path))
    }

    /// The command line that loads the model, with its environment.
    ///
    /// # Panics
    ///
    /// If the build has no command.
    pub fn command_line(&self, model: &Path) -> Command {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).arg(model);
        command.envs(&self.environment);
        command
    }
}

/// Copies the shared libraries of a directory, without any symbol that the dynamic linker has no use
/// for, as distributions do.
///
/// # Errors
///
/// Without binutils, or if a file cannot be read or written.
pub fn strip_libraries(from: &Path, into: &Path) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("read {}", from.display()))?;
    for entry in entries {
        let library = entry?.path();
        let name = library.file_name().unwrap_or_default();
        if !name.to_string_lossy().contains(".so") {
            continue;
        }
        // A library under two names stays one: two would be loaded as two.
        if let Ok(target) = fs::read_link(&library) {
            symlink(target, into.join(name))?;
            continue;
        }
        let status = Command::new("strip")
            .arg("--strip-unneeded")
            .arg("-o")
            .arg(into.join(name))
            .arg(&library)
            .status()
            .context("run strip; is binutils installed?")?;
        ensure!(status.success(), "strip {}: {status}", library.display());
    }
    Ok(())
}
