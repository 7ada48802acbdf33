//! The BPF objects that the program embeds.
//!
//! They are committed, so that building the program needs no BPF toolchain, and each carries a
//! [fingerprint](sources) of what it was built from, so that forgetting to rebuild them is found out
//! without one. The [recipe] is pinned and leaves no trace of the machine in them: whoever has the
//! toolchain gets the same bytes.

mod object;
mod recipe;
mod sources;
mod toolchain;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{command, workspace};
use toolchain::Toolchain;

/// Where the committed objects are, in the workspace.
const COMMITTED: &str = "expert-trace/bpf";

/// Builds the objects, and writes them to `out`, by default the place of the committed ones.
pub fn build(root: &Path, out: Option<&Path>) -> Result<()> {
    let toolchain = Toolchain::provision()?;
    match (&toolchain.other_rustc, out) {
        (Some(other), None) => bail!(
            "the committed objects are built with rustc {}, and this is rustc {other}: adapt \
             RUSTC in xtask/src/ebpf/recipe.rs, or build elsewhere with --out",
            recipe::RUSTC
        ),
        (Some(other), Some(_)) => eprintln!(
            "note: this is rustc {other}; with another than {} the bytes may differ",
            recipe::RUSTC
        ),
        (None, _) => {}
    }
    let out = out.map_or_else(|| root.join(COMMITTED), Path::to_owned);
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;

    let build = Build::new(root, &toolchain)?;
    for architecture in recipe::ARCHITECTURES {
        let linked = build.link(architecture)?;
        let path = out.join(object_name(architecture));
        let finished = object::finish(
            &toolchain.objcopy,
            &linked,
            &sources::fingerprint(root, architecture)?,
            &build.private_paths(),
        )?;
        write_if_changed(&path, &finished)?;
    }
    Ok(())
}

/// Compares the committed objects' fingerprints with the sources'. Needs no BPF toolchain.
pub fn check(root: &Path) -> Result<()> {
    let mut stale = Vec::new();
    for architecture in recipe::ARCHITECTURES {
        let path = committed(root, architecture);
        let expected = sources::fingerprint(root, architecture)?;
        match object::fingerprint(&path) {
            Ok(found) if found == expected => println!("{} is up to date", path.display()),
            Ok(_) => stale.push(format!("{} is older than its sources", path.display())),
            Err(error) => stale.push(format!("{error:#}")),
        }
    }
    ensure!(
        stale.is_empty(),
        "{}: run `cargo xtask build-ebpf` and commit",
        stale.join("; ")
    );
    Ok(())
}

/// The committed objects that are not byte for byte those in `fresh`.
pub fn differing(root: &Path, fresh: &Path) -> Result<Vec<PathBuf>> {
    let mut differing = Vec::new();
    for architecture in recipe::ARCHITECTURES {
        let committed = committed(root, architecture);
        if read(&committed)? != read(&fresh.join(object_name(architecture)))? {
            differing.push(committed);
        }
    }
    Ok(differing)
}

fn committed(root: &Path, architecture: &str) -> PathBuf {
    root.join(COMMITTED).join(object_name(architecture))
}

fn object_name(architecture: &str) -> String {
    format!("expert-trace.{architecture}.bpf.o")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Cargo rebuilds what embeds a file that was written, even with the same bytes.
fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        println!("{} is unchanged ({} bytes)", path.display(), bytes.len());
        return Ok(());
    }
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{} is written ({} bytes)", path.display(), bytes.len());
    Ok(())
}

/// One run of Cargo per architecture, and the directories that must leave no trace.
struct Build<'a> {
    root: &'a Path,
    toolchain: &'a Toolchain,
    target: PathBuf,
    cargo_home: PathBuf,
}

impl<'a> Build<'a> {
    fn new(root: &'a Path, toolchain: &'a Toolchain) -> Result<Self> {
        let cargo_home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
            .context("cannot tell Cargo's home directory: set CARGO_HOME")?;
        let build = Self {
            root,
            toolchain,
            target: workspace::target()?.join("ebpf"),
            cargo_home,
        };
        // Crates have to be unpacked before their directories can be told.
        command::run(build.cargo().args(["fetch", "--locked"]))?;
        Ok(build)
    }

    /// Compiles and links; the result still has its debug information.
    fn link(&self, architecture: &str) -> Result<PathBuf> {
        let flags: Vec<String> = recipe::flags(architecture)
            .into_iter()
            .chain(self.remapped_paths()?)
            .collect();
        eprintln!("Building the BPF programs for {architecture}.");
        command::run(
            self.cargo()
                .args(["build", "--locked", "--release", "-Zbuild-std=core"])
                .args(["--target", recipe::TARGET])
                .env("RUSTC", toolchain::RUSTC)
                // Stable Cargo and rustc then accept what is unstable: -Zbuild-std, the target, and
                // the features that aya-ebpf uses.
                .env("RUSTC_BOOTSTRAP", "1")
                .env("CARGO_INCREMENTAL", "0")
                .env("CARGO_TARGET_DIR", &self.target)
                .env(
                    "CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER",
                    &self.toolchain.linker,
                )
                .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")),
        )?;
        Ok(self
            .target
            .join(recipe::TARGET)
            .join("release/expert-trace-ebpf"))
    }

    fn cargo(&self) -> Command {
        let mut cargo = toolchain::cargo();
        cargo.current_dir(self.root.join("expert-trace-ebpf"));
        cargo
    }

    /// Flags that replace directories of this machine in debug information, BTF and messages. Of
    /// several that match, rustc takes the last.
    fn remapped_paths(&self) -> Result<Vec<String>> {
        let mut remapped = vec![
            (self.root.to_owned(), "/expert-trace"),
            (self.cargo_home.clone(), "/cargo"),
        ];
        // One directory per registry, named after its host.
        let registries = self.cargo_home.join("registry/src");
        let entries = fs::read_dir(&registries)
            .with_context(|| format!("cannot read {}", registries.display()))?;
        for entry in entries {
            remapped.push((entry?.path(), "/crates"));
        }
        remapped.push((self.target.clone(), "/target"));
        for sources in &self.toolchain.rust_sources {
            remapped.push((sources.clone(), "/rust"));
        }
        Ok(remapped
            .into_iter()
            .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()))
            .collect())
    }

    /// What must not be found in an object.
    fn private_paths(&self) -> Vec<PathBuf> {
        let Self {
            root,
            toolchain,
            target,
            cargo_home,
        } = self;
        let mut paths = vec![root.to_path_buf(), target.clone(), cargo_home.clone()];
        paths.extend(toolchain.rust_sources.iter().cloned());
        paths.extend(env::home_dir());
        paths
    }
}
