//! Why a process cannot be traced, in words that tell the user what to do next.
//!
//! Looked at before anything is attached ([`check_process`]), when its files show no expert ids
//! ([`no_expert_ids`]), and when something fails in between, because it can end at any time
//! ([`unless_ended`]).

mod elf;
mod namesakes;
mod status;

use std::{
    fmt, fs, io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::signal::kill,
    unistd::{Pid, User},
};
use thiserror::Error;

pub use elf::{Search, search_for_llama_cpp};
use namesakes::Namesakes;
use status::Status;

use crate::{
    attach::BREAKPOINT,
    probes::{Plan, Probe},
    requirements::{self, Capability},
    target::{self, MappedFile, printable},
};

/// Why a process cannot be traced, or not yet.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Untraceable {
    /// No process has the number.
    #[error(
        "no process {pid}: --pid takes a number of the PID namespace that expert-trace runs in{namesakes}"
    )]
    NoProcess {
        /// The number.
        pid: u32,
        /// Processes that have it in a PID namespace of their own.
        namesakes: Namesakes,
    },
    /// The number is a thread's.
    #[error("{tid} is a thread of process {process} ({command}): use --pid {process}{namesakes}")]
    Thread {
        /// The number.
        tid: u32,
        /// Its process.
        process: u32,
        /// The process' name.
        command: String,
        /// Other processes that the number could have meant.
        namesakes: Namesakes,
    },
    /// Only its exit status is left.
    #[error(
        "process {pid} ({command}) has ended, and only waits for its parent to take notice (a zombie): \
         there is nothing left to trace"
    )]
    Zombie {
        /// The process.
        pid: u32,
        /// Its name.
        command: String,
    },
    /// The kernel ties the probes of a process to its main thread.
    #[error(
        "the main thread of process {pid} ({command}) has ended, and the kernel sets no probes \
         without it: start the program with `expert-trace run`"
    )]
    NoMainThread {
        /// The process.
        pid: u32,
        /// Its name.
        command: String,
    },
    /// A thread of the kernel's own.
    #[error(
        "process {pid} ({command}) is a thread of the kernel: it has no program to trace{namesakes}"
    )]
    Kernel {
        /// The process.
        pid: u32,
        /// Its name.
        command: String,
        /// Other processes that the number could have meant.
        namesakes: Namesakes,
    },
    /// It was there, and is no more.
    #[error("process {pid} ended while it was being attached to")]
    Ended {
        /// The process.
        pid: u32,
    },
    /// We may not look at it.
    #[error("process {pid}{who} may not be looked at: {why}{namesakes}")]
    Forbidden {
        /// The process.
        pid: u32,
        /// Its name and owner, where they are shown.
        who: String,
        /// What is missing.
        why: &'static str,
        /// Other processes that the number could have meant.
        namesakes: Namesakes,
    },
    /// What it maps cannot be probed: another file has taken its place.
    #[error(
        "process {pid} goes on with {file} as it was before somebody changed it: its file system \
         (an overlay, as containers have it) then made a copy, and the kernel sets probes in that alone; \
         start the process again"
    )]
    ChangedFile {
        /// The process.
        pid: u32,
        /// The file.
        file: String,
    },
    /// Its code is not this machine's.
    #[error(
        "process {pid} runs {file}, which is built for {machine}, but this machine is {host}: \
         a foreign or emulated program cannot be traced; use a build for {host}"
    )]
    Foreign {
        /// The process.
        pid: u32,
        /// File with the code.
        file: String,
        /// What it is for.
        machine: String,
        /// What we are.
        host: String,
    },
    /// No file of its has anything to do with llama.cpp.
    #[error(
        "process {pid} ({exe}) is not llama.cpp: none of the files it maps contains it{unsearched}; \
         give the PID of the program that computes, which a launcher or a shell does not{namesakes}"
    )]
    NotLlamaCpp {
        /// The process.
        pid: u32,
        /// Its executable.
        exe: String,
        /// Files not looked through.
        unsearched: Unsearched,
        /// Other processes that the number could have meant.
        namesakes: Namesakes,
    },
    /// llama.cpp is there, and cannot be found by name.
    #[error(
        "{file} of process {pid} contains llama.cpp without symbols (a stripped static build): \
         use an unstripped build, or one with shared libraries"
    )]
    Stripped {
        /// The process.
        pid: u32,
        /// The file.
        file: String,
    },
    /// llama.cpp is there, and its CPU backend is not. No error for who can wait.
    #[error(
        "process {pid} has llama.cpp ({file}), but no CPU backend yet: \
         it is traced as soon as it loads one"
    )]
    NoBackendYet {
        /// The process.
        pid: u32,
        /// A file with llama.cpp.
        file: String,
    },
}

/// Files that were too large, or not to be read.
#[derive(Debug, PartialEq, Eq)]
pub struct Unsearched(Vec<String>);

impl fmt::Display for Unsearched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, " (not searched: {})", self.0.join(", "))
    }
}

/// Looks whether the breakpoint of a probe that the kernel has set is in the memory of a process, which
/// maps these files.
///
/// # Errors
/// When it is not.
pub fn check_probe(pid: u32, files: &[MappedFile], probe: &Probe) -> Result<(), Untraceable> {
    let offset = probe.definition.file_offset;
    let mut files = files.iter();
    let mapped = files.find(|file| file.reachable_path(pid) == probe.attach_path);
    let Some(address) = mapped.and_then(|file| file.address_of(offset)) else {
        return Ok(());
    };
    let (mut code, mut in_file) = ([0; BREAKPOINT], [0; BREAKPOINT]);
    let read = target::read_memory(pid, address, &mut code).and_then(|()| {
        let file = target::open_regular(&probe.attach_path)?;
        file.read_exact_at(&mut in_file, offset)
    });
    // Who has ended, or unmapped it, is none of this.
    if read.is_ok() && code == in_file {
        let file = printable(Path::new(&probe.file));
        return Err(Untraceable::ChangedFile { pid, file });
    }
    Ok(())
}

/// Looks whether `pid` is a process that we can look into.
///
/// # Errors
/// Says why not.
pub fn check_process(pid: u32) -> Result<(), Untraceable> {
    let status = match Status::read(pid) {
        Ok(status) => status,
        // A procfs mounted with hidepid shows nothing of others' processes; signals know them.
        Err(_) if exists(pid) => return Err(forbidden(pid, String::new())),
        Err(_) => return Err(no_process(pid)),
    };
    let command = status.name.clone();
    if status.process != pid {
        let process = status.process;
        // Threads have names of their own.
        let command = Status::read(process).map_or(command, |status| status.name);
        return Err(Untraceable::Thread {
            tid: pid,
            process,
            command,
            namesakes: Namesakes::of(pid),
        });
    }
    if status.ended {
        return Err(if target::goes_on_without_its_main_thread(pid) {
            Untraceable::NoMainThread { pid, command }
        } else {
            Untraceable::Zombie { pid, command }
        });
    }
    if status::is_kernel_thread(pid) {
        let namesakes = Namesakes::of(pid);
        return Err(Untraceable::Kernel {
            pid,
            command,
            namesakes,
        });
    }
    // Not by its maps: those are also shown to CAP_PERFMON, which may not open what is mapped
    // (`proc_mem_open` in fs/proc/base.c).
    match target::executable(pid) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let who = format!(" ({command}, of user {})", user(status.uid));
            return Err(forbidden(pid, who));
        }
        Err(_) if has_ended(pid) => return Err(Untraceable::Ended { pid }),
        // Whoever wants more will say what is wrong with it.
        Err(_) => {}
    }
    let exe = PathBuf::from(format!("/proc/{pid}/exe"));
    match foreign_machine(&exe) {
        Some(machine) => Err(foreign(
            pid,
            &target::executable(pid).unwrap_or(exe),
            machine,
        )),
        None => Ok(()),
    }
}

/// Says why nothing of `files`, which a process maps, shows expert ids; `plan` is what was found in
/// them.
pub fn no_expert_ids(pid: u32, files: &[MappedFile], plan: &Plan) -> Untraceable {
    if has_ended(pid) {
        return Untraceable::Ended { pid };
    }
    if let Some(probe) = plan.of_llama_cpp() {
        let file = printable(Path::new(&probe.file));
        return Untraceable::NoBackendYet { pid, file };
    }
    let mut unsearched = Vec::new();
    for file in files.iter().filter(|file| file.is_executable()) {
        match search_for_llama_cpp(&file.reachable_path(pid)) {
            Search::Found => {
                let file = printable(&file.path);
                return Untraceable::Stripped { pid, file };
            }
            Search::NotFound => {}
            Search::NotSearched => unsearched.push(printable(&file.path)),
        }
    }
    // An emulator is a program of this machine, and maps one that is not.
    for file in files {
        if let Some(machine) = foreign_machine(&file.reachable_path(pid)) {
            return foreign(pid, &file.path, machine);
        }
    }
    let exe = target::executable(pid).map_or_else(|_| "?".to_owned(), |exe| printable(&exe));
    Untraceable::NotLlamaCpp {
        pid,
        exe,
        unsearched: Unsearched(unsearched),
        namesakes: Namesakes::of(pid),
    }
}

/// The result of something done to a process. Where it failed and the process has ended, that is
/// the reason.
///
/// # Errors
/// When it failed.
pub fn unless_ended<T, E: Into<anyhow::Error>>(
    pid: u32,
    result: Result<T, E>,
) -> anyhow::Result<T> {
    result.map_err(|error| {
        if has_ended(pid) {
            Untraceable::Ended { pid }.into()
        } else {
            error.into()
        }
    })
}

fn has_ended(pid: u32) -> bool {
    match Status::read(pid) {
        Ok(status) => status.ended && !target::goes_on_without_its_main_thread(pid),
        Err(_) => !exists(pid),
    }
}

/// Whether there is such a process, also when we may not signal it.
fn exists(pid: u32) -> bool {
    i32::try_from(pid).is_ok_and(|pid| kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH))
}

fn no_process(pid: u32) -> Untraceable {
    let namesakes = Namesakes::of(pid);
    Untraceable::NoProcess { pid, namesakes }
}

/// A process is open to who could trace it (`ptrace_may_access` in kernel/ptrace.c): its own user,
/// unless it has capabilities that we lack; or CAP_SYS_PTRACE.
fn forbidden(pid: u32, who: String) -> Untraceable {
    let why = if requirements::has(Capability::SysPtrace) {
        "a security module or a user namespace forbids it in spite of CAP_SYS_PTRACE; \
         run expert-trace on the host, outside of any container"
    } else {
        "the capability CAP_SYS_PTRACE is missing; run expert-trace with sudo"
    };
    Untraceable::Forbidden {
        pid,
        who,
        why,
        namesakes: Namesakes::of(pid),
    }
}

fn foreign_machine(path: &Path) -> Option<u16> {
    let host = elf::machine(Path::new("/proc/self/exe"))?;
    elf::machine(path).filter(|machine| *machine != host)
}

fn foreign(pid: u32, file: &Path, machine: u16) -> Untraceable {
    Untraceable::Foreign {
        pid,
        file: printable(file),
        machine: elf::machine_name(machine),
        host: std::env::consts::ARCH.to_owned(),
    }
}

fn user(uid: u32) -> String {
    let known = User::from_uid(uid.into()).ok().flatten();
    known.map_or_else(|| uid.to_string(), |user| user.name)
}

/// Whether an executable file contains llama.cpp, for programs that have ended.
pub fn contains_llama_cpp(path: &Path) -> bool {
    fs::metadata(path).is_ok() && search_for_llama_cpp(path) == Search::Found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sleeper() -> std::process::Child {
        Command::new("cat").stdin(Stdio::piped()).spawn().unwrap()
    }

    #[test]
    fn what_fails_on_a_process_that_has_ended_is_its_end() {
        let mut child = sleeper();
        let pid = child.id();
        let refused = || Err::<(), _>(io::Error::from_raw_os_error(libc::ESRCH));
        let error = unless_ended(pid, refused()).unwrap_err();
        assert_eq!(error.to_string(), refused().unwrap_err().to_string());

        // Dead and not waited for, then gone.
        child.kill().unwrap();
        let info = nix::sys::wait::waitid(
            nix::sys::wait::Id::Pid(Pid::from_raw(pid as i32)),
            nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT,
        );
        info.unwrap();
        assert!(matches!(
            check_process(pid),
            Err(Untraceable::Zombie { .. })
        ));
        let expected = format!("process {pid} ended while it was being attached to");
        for _ in 0..2 {
            let error = unless_ended(pid, refused()).unwrap_err();
            assert_eq!(error.to_string(), expected);
            let _ = child.wait();
        }
        assert_eq!(
            no_expert_ids(pid, &[], &Plan::default()),
            Untraceable::Ended { pid }
        );
    }

    #[test]
    fn a_living_process_can_be_looked_into() {
        let mut child = sleeper();
        assert_eq!(check_process(child.id()), Ok(()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
