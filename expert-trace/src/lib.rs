//! expert-trace shows which experts a Mixture-of-Experts model really uses, by tracing an unmodified
//! llama.cpp process from outside with eBPF uprobes.
//!
//! Data flows one way, and each module has one subject:
//!
//! ```text
//! target process ──uprobe──▶ expert-trace-ebpf ──ring buffer──▶ decode ─▶ model ─▶ export, summary, trace
//!      ▲                                                                    ▲
//! target, launch ─▶ symbols ─▶ probes (Plan) ─▶ attach (Session)          gguf
//! ```
//!
//! - [`caller`] and [`variables`]: who called us with which environment, and what that asks for.
//! - [`target`] and [`launch`]: a process, what it maps, and starting one that waits.
//! - [`same_file`] and [`users`]: whether two names lead to one file, and who maps it.
//! - [`symbols`]: ELF bytes to file offsets. [`prologue`]: where in a function to probe. [`layout`]: DWARF to the layout of structs. [`probes`]: which functions are to be probed: the `Plan`.
//! - [`attach`]: the only module that names aya. Plan to Session. [`bpf`], [`uprobe_event`]: bpf(2) and perf_event_open(2).
//!   [`kernel_types`]: where the kernel's structs have their members.
//! - [`decode`]: bytes to events. [`model`]: events to counts; pure.
//! - [`gguf`], [`models`] and [`redact`]: what model files and a command line tell.
//! - [`placement`] and [`remedy`]: where llama.cpp keeps routers and experts, and what options bring their
//!   ids to the host.
//! - [`requirements`], [`diagnosis`], [`visibility`] and [`silence`]: why the machine or a process cannot
//!   be traced, why routing was not seen, and why nothing was counted.
//! - [`trace`]: every routed row, as Arrow; recorded from what the model gives when a pass is over.
//! - [`tally`]: what is counted of a layer. [`stats`], [`export`], [`summary`]: the document, and its two forms.
//!   [`stats_schema`]: its version.
//! - [`formats`]: traces and counts as others read and write them.
//! - [`profile`]: what was counted, read again: merged, compared, verified. [`output`]: where it goes.
//! - [`doctor`]: all of this asked beforehand: would it work, and with which probes.
//! - [`capture`]: the one place where all of this meets the clock, signals and files.

/// Says a line to the user, on stderr. A terminal that is gone, or a full disk, is no reason to stop,
/// as it would be with `eprintln`.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {{
        let line = format!("expert-trace: {}\n", format_args!($($text)*));
        let _ = ::std::io::Write::write_all(&mut ::std::io::stderr(), line.as_bytes());
    }};
}

pub mod attach;
pub mod bounded;
pub mod bpf;
pub mod caller;
pub mod calls;
pub mod capture;
pub mod cli;
pub mod decode;
pub mod diagnosis;
pub mod doctor;
pub mod eval_callback;
pub mod export;
pub mod formats;
pub mod gate;
pub mod gguf;
pub mod kernel_types;
pub mod launch;
pub mod layout;
pub mod model;
pub mod models;
pub mod output;
pub mod own_code;
pub mod placement;
pub mod probes;
pub mod profile;
pub mod prologue;
pub mod redact;
pub mod remedy;
pub mod requirements;
pub mod router_on_cpu;
pub mod routes;
pub mod same_file;
pub mod selection;
pub mod signals;
pub mod silence;
pub mod stats;
pub mod stats_schema;
pub mod summary;
pub mod symbols;
pub mod tally;
pub mod target;
pub mod trace;
pub mod uprobe_event;
pub mod users;
pub mod variables;
pub mod visibility;
