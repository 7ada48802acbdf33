//! What the committed objects are built with. All of it goes into their fingerprints.

/// Little-endian BPF.
pub const TARGET: &str = "bpfel-unknown-none";
/// Registers of the traced process differ by architecture, and with them the object.
pub const ARCHITECTURES: [&str; 2] = ["x86_64", "aarch64"];
/// Release of Debian's rustc-web.
pub const RUSTC: &str = "1.96.0";
/// LLVM that the linker is built with; rustc must not have a newer one.
pub const LLVM_MAJOR: u32 = 22;
/// Version of bpf-linker.
pub const BPF_LINKER: &str = "0.13.0";

/// Flags for rustc, apart from those that hide the machine's directories.
pub fn flags(architecture: &str) -> Vec<String> {
    vec![
        format!("--cfg=bpf_target_arch=\"{architecture}\""),
        // BTF is made from debug information.
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ]
}

/// The recipe in one line.
pub fn line(architecture: &str) -> String {
    let flags = flags(architecture).join(" ");
    format!("{TARGET} rustc {RUSTC} LLVM {LLVM_MAJOR} bpf-linker {BPF_LINKER} {flags}")
}
