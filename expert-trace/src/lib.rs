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
//! - [`analyze`]: whether caching, pinning or splitting experts pays: balance, time, structure and caches.
//! - [`report`]: what was counted, to look at: a page, or a picture.
//! - [`doctor`]: all of this asked beforehand: would it work, and with which probes.
//! - [`top`]: what is counted, as it is counted, on a terminal.
//! - [`control`]: what is asked of a capture that goes on.
//! - [`capture`]: the one place where all of this meets the clock, signals and files.
//!
//! What traces is there on Linux, with the feature `capture`: build.rs says so as `can_trace`. The rest
//! reads and writes files on any system.

/// Says a line to the user, on stderr. A terminal that is gone, or a full disk, is no reason to stop,
/// as it would be with `eprintln`.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {{
        let line = format!("expert-trace: {}\n", format_args!($($text)*));
        let _ = ::std::io::Write::write_all(&mut ::std::io::stderr(), line.as_bytes());
    }};
}

pub mod analyze;
#[cfg(can_trace)]
pub mod attach;
#[cfg(can_trace)]
pub mod bounded;
#[cfg(can_trace)]
pub mod bpf;
#[cfg(can_trace)]
pub mod caller;
#[cfg(can_trace)]
pub mod calls;
#[cfg(can_trace)]
pub mod capture;
pub mod cli;
#[cfg(can_trace)]
pub mod control;
#[cfg(can_trace)]
pub mod decode;
#[cfg(can_trace)]
pub mod diagnosis;
#[cfg(can_trace)]
pub mod doctor;
#[cfg(can_trace)]
pub mod eval_callback;
#[cfg(can_trace)]
pub mod export;
pub mod formats;
#[cfg(can_trace)]
pub mod gate;
pub mod gguf;
#[cfg(can_trace)]
pub mod kernel_types;
#[cfg(can_trace)]
pub mod launch;
#[cfg(can_trace)]
pub mod layout;
#[cfg(can_trace)]
pub mod model;
#[cfg(can_trace)]
pub mod models;
pub mod output;
#[cfg(can_trace)]
pub mod own_code;
#[cfg(can_trace)]
pub mod placement;
#[cfg(can_trace)]
pub mod probes;
pub mod profile;
#[cfg(can_trace)]
pub mod prologue;
#[cfg(can_trace)]
pub mod redact;
#[cfg(can_trace)]
pub mod remedy;
pub mod report;
#[cfg(can_trace)]
pub mod requirements;
#[cfg(can_trace)]
pub mod router_on_cpu;
pub mod routes;
#[cfg(can_trace)]
pub mod same_file;
#[cfg(can_trace)]
pub mod selection;
#[cfg(can_trace)]
pub mod signals;
#[cfg(can_trace)]
pub mod silence;
#[cfg(can_trace)]
pub mod stats;
pub mod stats_schema;
#[cfg(can_trace)]
pub mod summary;
#[cfg(can_trace)]
pub mod symbols;
pub mod tally;
#[cfg(can_trace)]
pub mod target;
#[cfg(can_trace)]
pub mod top;
pub mod trace;
#[cfg(can_trace)]
pub mod uprobe_event;
#[cfg(can_trace)]
pub mod users;
#[cfg(can_trace)]
pub mod variables;
#[cfg(can_trace)]
pub mod visibility;
