//! Tells the program whether it can trace, and which compiled BPF object to embed then.
//!
//! The committed ones need no BPF toolchain. `EXPERT_TRACE_EBPF_DIR` names a directory of others, so
//! that freshly built ones can be tested.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(can_trace)");
    let is_linux = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux");
    if !is_linux || env::var_os("CARGO_FEATURE_CAPTURE").is_none() {
        return;
    }
    println!("cargo::rustc-cfg=can_trace");
    println!("cargo::rerun-if-env-changed=EXPERT_TRACE_EBPF_DIR");
    let architecture = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let directory = env::var_os("EXPERT_TRACE_EBPF_DIR").map_or_else(
        || PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("bpf"),
        PathBuf::from,
    );
    let object = directory.join(format!("expert-trace.{architecture}.bpf.o"));
    println!("cargo::rerun-if-changed={}", object.display());
    println!(
        "cargo::rustc-env=EXPERT_TRACE_BPF_OBJECT={}",
        object.display()
    );
    if !object.exists() {
        println!(
            "cargo::error=there is no BPF object for {architecture} ({}): `git checkout -- expert-trace/bpf` brings back those of x86_64 and aarch64, others do not exist",
            object.display()
        );
    }
}
