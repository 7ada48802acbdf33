//! Functions of our own that probes are tried on: what they begin with is known, and they do nothing.

use std::{
    fs, io,
    path::PathBuf,
    time::{Duration, Instant},
};

use expert_trace_common::Site;

use crate::{
    probes::{FileId, Hook, Probe},
    symbols::{Definition, Table},
};

/// Calls that are timed together.
const BATCH: usize = 32;
/// Batches; the median of them is told.
const BATCHES: usize = 15;
/// How often [`call_ns`] calls.
pub const CALLS: usize = BATCH * BATCHES;

/// A function that does nothing.
pub type Function = extern "C" fn();

// The first instruction decides what a probe costs, so that it is written out.

/// Begins with an instruction that the kernel emulates, as compilers' functions mostly do.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
pub extern "C" fn emulated() {
    std::arch::naked_asm!("push rbp", "pop rbp", "ret")
}

/// Begins with an instruction that the kernel has the processor step over.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
pub extern "C" fn single_stepped() {
    std::arch::naked_asm!("sub rsp, 8", "add rsp, 8", "ret")
}

/// Begins with an instruction as compilers' functions do.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
pub extern "C" fn emulated() {
    std::arch::naked_asm!(
        "stp x29, x30, [sp, #-16]!",
        "ldp x29, x30, [sp], #16",
        "ret"
    )
}

/// As the first, and another function.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
pub extern "C" fn returning() {
    std::arch::naked_asm!("push rbx", "pop rbx", "ret")
}

/// As the first, and another function.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
pub extern "C" fn returning() {
    std::arch::naked_asm!(
        "stp x19, x30, [sp, #-16]!",
        "ldp x19, x30, [sp], #16",
        "ret"
    )
}

/// Begins with another one.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
pub extern "C" fn single_stepped() {
    std::arch::naked_asm!("sub sp, sp, #16", "add sp, sp, #16", "ret")
}

/// Median time of a call, in nanoseconds.
pub fn call_ns(function: Function) -> f64 {
    let function = std::hint::black_box(function);
    let mut batches = [Duration::ZERO; BATCHES];
    for batch in &mut batches {
        let begin = Instant::now();
        for _ in 0..BATCH {
            function();
        }
        *batch = begin.elapsed();
    }
    batches.sort_unstable();
    batches[BATCHES / 2].as_nanos() as f64 / BATCH as f64
}

/// A probe on a function of ours. It is found by where it is mapped, since our own symbols can have
/// been stripped.
pub fn probe(hook: Hook, number: u32, function: Function) -> io::Result<Probe> {
    const OWN: &str = "/proc/self/exe";
    let address = function as usize as u64;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let file_offset = maps
        .lines()
        .find_map(|line| file_offset(line, address))
        .ok_or(io::ErrorKind::NotFound)?;
    Ok(Probe {
        hook,
        symbol: "a function of expert-trace",
        file: OWN.to_owned(),
        build_id: None,
        definition: Definition {
            table: Table::Symtab,
            address,
            file_offset,
            skipped: 0,
            instruction: None,
        },
        site: Site {
            source: 0,
            probe: number,
        },
        declared: None,
        file_id: FileId::default(),
        attach_path: PathBuf::from(OWN),
    })
}

/// Offset of an address in the file that a line of `/proc/PID/maps` shows there.
fn file_offset(line: &str, address: u64) -> Option<u64> {
    let mut fields = line.split(' ');
    let (from, to) = fields.next()?.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let (from, to) = (number(from)?, number(to)?);
    let offset = number(fields.nth(1)?)?;
    (from..to)
        .contains(&address)
        .then(|| offset + (address - from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_is_that_of_the_mapping() {
        let line = "55d0c0a21000-55d0c0b00000 r-xp 00021000 fe:00 1311 /opt/llama cpp/llama-cli";
        assert_eq!(file_offset(line, 0x55d0c0a21010), Some(0x21010));
        assert_eq!(file_offset(line, 0x55d0c0b00000), None);
        assert_eq!(file_offset("nothing", 1), None);
    }

    #[test]
    fn our_functions_are_where_their_probes_sit() {
        let code = fs::read("/proc/self/exe").unwrap();
        for function in [emulated as Function, single_stepped, returning] {
            let place = probe(Hook::Libraries, 0, function).unwrap().definition;
            // SAFETY: the functions are at least this long.
            let loaded = unsafe { std::slice::from_raw_parts(function as *const u8, 4) };
            let start = place.file_offset as usize;
            assert_eq!(&code[start..start + 4], loaded);
        }
    }
}
