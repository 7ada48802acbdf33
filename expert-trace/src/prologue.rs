//! Where in a function its probe costs least, by the function's code; no I/O.
//!
//! The kernel puts a breakpoint in the place of an instruction. At each hit it then does by itself what the
//! instruction does, if it knows how, or has the processor execute a copy of it and trap once more, which costs
//! many times as much. A function's arguments are in their registers until something writes those, and what was
//! called has returned nowhere yet until something moves the stack pointer (the kernel finds the return address
//! by it). So the best place is the first instruction that the kernel emulates, as long as what stands before
//! it does neither, cannot lead elsewhere, and is executed as often as the function is entered.
//!
//! On other architectures than x86-64, the place is the entry.

use serde::Serialize;

/// How the kernel gets past an instruction that has a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// It does itself what the instruction does.
    Emulated,
    /// It has the processor execute a copy of the instruction, and trap behind it.
    SingleStepped,
}

/// Where in a function to probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Bytes between the function's entry and the instruction.
    pub offset: u64,
    /// How the kernel gets past it; none where that is not known.
    pub step: Option<Step>,
}

/// Most bytes of a function that are looked at.
pub const MAX_CODE: u64 = 32 << 10;

/// The cheapest place in a function. `code` begins with its entry; what is missing at the end is taken
/// for unknown. `size` is the function's, in bytes, and 0 when it is not known.
#[cfg(target_arch = "x86_64")]
pub fn point(code: &[u8], size: u64) -> Point {
    x86_64::point(code, size)
}

/// The cheapest place in a function: its entry.
#[cfg(not(target_arch = "x86_64"))]
pub fn point(_code: &[u8], _size: u64) -> Point {
    Point {
        offset: 0,
        step: None,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use iced_x86::{
        Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
        OpAccess, Register,
    };

    use super::{Point, Step};

    /// Registers that must be as at the entry: those of the first six arguments in the System V ABI, and
    /// the one by which the kernel finds the return address.
    const KEPT: [Register; 7] = [
        Register::RDI,
        Register::RSI,
        Register::RDX,
        Register::RCX,
        Register::R8,
        Register::R9,
        Register::RSP,
    ];

    /// Compilers that load something before the first push or branch do so by a few instructions.
    const MAX_SKIPPED: usize = 16;

    pub fn point(code: &[u8], size: u64) -> Point {
        let mut before = Before {
            info: InstructionInfoFactory::new(),
            does_something: false,
        };
        for instruction in decode(code).take(MAX_SKIPPED + 1) {
            let offset = instruction.ip() as usize;
            let bytes = code.get(offset..).unwrap_or_default();
            if is_emulated(bytes) {
                let function = Function { code, size };
                if before.does_something && function.may_come_back(offset as u64, &instruction) {
                    break;
                }
                return Point {
                    offset: offset as u64,
                    step: Some(Step::Emulated),
                };
            }
            if !before.add(&instruction) {
                break;
            }
        }
        Point {
            offset: 0,
            step: Some(Step::SingleStepped),
        }
    }

    /// Instructions up to the first one that cannot be decoded. Their addresses are their offsets.
    fn decode(code: &[u8]) -> impl Iterator<Item = Instruction> {
        Decoder::new(64, code, DecoderOptions::NONE)
            .into_iter()
            .take_while(|instruction| !instruction.is_invalid())
    }

    /// What kernels since 4.x emulate (`branch_setup_xol_ops` and `push_setup_xol_ops` in
    /// arch/x86/kernel/uprobes.c): near jumps, calls and conditional jumps to fixed places, the one-byte nop,
    /// and pushes of a register. Newer kernels know more. Prefixes are left out but for that of r8 to r15: old
    /// kernels refuse some, and take `xchg r8, rax` for a nop.
    fn is_emulated(instruction: &[u8]) -> bool {
        matches!(
            instruction,
            [0x50..=0x57 | 0x70..=0x7f | 0x90 | 0xe8 | 0xe9 | 0xeb, ..]
                | [0x41, 0x50..=0x57, ..]
                | [0x0f, 0x80..=0x8f, ..]
        )
    }

    /// Whether control cannot come by again without a new call: a prologue is in no loop, since the stack
    /// would grow with each turn.
    fn is_push(instruction: &Instruction) -> bool {
        matches!(instruction.code(), Code::Push_r64)
    }

    /// Instructions that a probe is set behind.
    struct Before {
        info: InstructionInfoFactory,
        /// Whether there is one that is not a mere marker. A jump back to behind those is as good as one
        /// to the entry.
        does_something: bool,
    }

    impl Before {
        /// Adds the next one, unless the arguments, the return address, or what the arguments point to
        /// could be others behind it, or control somewhere else.
        fn add(&mut self, instruction: &Instruction) -> bool {
            self.does_something |=
                !matches!(instruction.mnemonic(), Mnemonic::Endbr64 | Mnemonic::Nop);
            if instruction.flow_control() != FlowControl::Next || instruction.is_privileged() {
                return false;
            }
            let writes = |access| {
                matches!(
                    access,
                    OpAccess::Write
                        | OpAccess::CondWrite
                        | OpAccess::ReadWrite
                        | OpAccess::ReadCondWrite
                )
            };
            let info = self.info.info(instruction);
            let registers = info.used_registers().iter();
            let mut written = registers.filter(|used| writes(used.access()));
            let mut memory = info.used_memory().iter();
            written.all(|used| !KEPT.contains(&used.register().full_register()))
                && memory.all(|used| !writes(used.access()))
        }
    }

    struct Function<'a> {
        code: &'a [u8],
        size: u64,
    }

    impl Function<'_> {
        /// Whether the instruction at `offset` may be executed again in one call of the function: when
        /// that cannot be told, it may.
        fn may_come_back(&self, offset: u64, instruction: &Instruction) -> bool {
            let Self { code, size } = *self;
            let body = usize::try_from(size).ok().and_then(|size| code.get(..size));
            let Some(code) = body.filter(|body| !body.is_empty()) else {
                return true;
            };
            let is_push = is_push(instruction);
            let mut end = 0;
            for instruction in decode(code) {
                end = instruction.next_ip();
                let may = match instruction.flow_control() {
                    // The parts of a function that compilers put elsewhere are entered by conditional
                    // jumps, and can come back.
                    FlowControl::ConditionalBranch => {
                        let target = instruction.near_branch_target();
                        (1..=offset).contains(&target) || (target >= size && !is_push)
                    }
                    FlowControl::UnconditionalBranch | FlowControl::Call => {
                        (1..=offset).contains(&instruction.near_branch_target())
                    }
                    // By a table of a switch, unless it is an address of the linker's: a tail call.
                    FlowControl::IndirectBranch => {
                        !is_push && !instruction.is_ip_rel_memory_operand()
                    }
                    FlowControl::XbeginXabortXend => true,
                    _ => false,
                };
                if may {
                    return true;
                }
            }
            end != size
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex
            .chars()
            .filter_map(|digit| digit.to_digit(16))
            .map(|digit| digit as u8)
            .collect();
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    }

    fn of(hex: &str) -> (u64, Option<Step>) {
        let code = bytes(hex);
        let Point { offset, step } = point(&code, code.len() as u64);
        (offset, step)
    }

    const ENTRY: (u64, Option<Step>) = (0, Some(Step::SingleStepped));

    fn behind(offset: u64) -> (u64, Option<Step>) {
        (offset, Some(Step::Emulated))
    }

    /// Whole functions of builds of llama.cpp, as they are in the files.
    #[test]
    fn functions_as_compilers_made_them() {
        for (what, code, expected) in [
            (
                "llama_free, GCC: test, je, push",
                "4885ff741b534889fbe892f1ffff4889dfbe100400005be9141ff7ff0f1f4000c3",
                behind(3),
            ),
            (
                "llama_free, GCC with CET: endbr64, test, jne",
                "f30f1efa4885ff7417554889fde82e8ffbff4889efbee00300005de9b05afbffc3",
                behind(7),
            ),
            (
                "ggml_backend_sched_set_eval_callback, GCC with link-time optimisation",
                "4885ff740f4889b7f0030000488997f8030000c350488d0da11c070031c0488d156bcf0600be9a08\
                 0000488d3d07040700e8bad4fdff",
                behind(3),
            ),
            (
                "the same, Clang: push",
                "504885ff74104889b7f0030000488997f803000058c3488d3de7230700488d15cae50600488d0d96\
                 2a0700be9a08000031c0e849b9fdff",
                behind(0),
            ),
            (
                "the same of 2024, GCC: nothing to emulate",
                "4889b7d0030000488997d8030000c3",
                ENTRY,
            ),
            (
                "the same with CET",
                "f30f1efa4889b72004000048899728040000c3",
                ENTRY,
            ),
            (
                "ggml_backend_vk_get_tensor_async, GCC: sub of rsp, mov to r9, push",
                "4883ec0841b90100000041504150e89df9ffff4883c418c3",
                ENTRY,
            ),
        ] {
            assert_eq!(of(code), expected, "{what}");
        }
    }

    #[test]
    fn a_marker_is_passed_whatever_follows_the_first_push() {
        // What a table leads to, and where the function ends, need not be known.
        for code in ["f30f1efa 55 ffe0", "6690 4154 ffe0", "f30f1efa 55 06"] {
            assert_ne!(of(code).0, 0, "{code}");
            assert_eq!(of(code).1, Some(Step::Emulated), "{code}");
        }
        assert_eq!(point(&bytes("f30f1efa 55"), 0).offset, 4);
        assert_eq!(point(&bytes("f30f1efa 55"), u64::MAX).offset, 4);
    }

    #[test]
    fn every_instruction_that_is_emulated_ends_the_search() {
        for (code, expected) in [
            ("8b07 50 c3", behind(2)),
            ("8b07 4157 c3", behind(2)),
            ("8b07 90 c3", behind(2)),
            ("8b07 7200 c3", behind(2)),
            ("8b07 0f8f00000000 c3", behind(2)),
            ("8b07 eb00 c3", behind(2)),
            ("8b07 e900000000 c3", behind(2)),
            ("8b07 e800000000 c3", behind(2)),
            // With prefixes, kernels disagree.
            ("8b07 667200 c3", ENTRY),
            ("8b07 4990 c3", ENTRY),
            // Not by old kernels.
            ("0f1f440000 c3", ENTRY),
            ("8b07 58 c3", ENTRY),
        ] {
            assert_eq!(of(code), expected, "{code}");
        }
    }

    #[test]
    fn arguments_and_return_address_stay_as_they_came() {
        for code in [
            "31ff 50 c3",     // xor edi, edi
            "40b701 50 c3",   // mov dil, 1
            "b501 50 c3",     // mov ch, 1
            "4d89c1 50 c3",   // mov r9, r8
            "4883ec08 50 c3", // sub rsp, 8
            "f7e0 50 c3",     // mul eax, to edx
            "480f44d0 50 c3", // cmove rdx, rax
            "48893e 50 c3",   // mov [rsi], rdi
            "f348ab 50 c3",   // rep stosq
            "c8000000 50 c3", // enter
            "5f 50 c3",       // pop rdi
        ] {
            assert_eq!(of(code), ENTRY, "{code}");
        }
        // mov rax, [rsi]; movss xmm0, [rdi]; lea r10, [rdx+rcx]
        assert_eq!(of("488b06 f30f1007 4c8d140a 53 5b c3"), behind(11));
    }

    #[test]
    fn nothing_before_leads_elsewhere() {
        for code in [
            "ff17 50 c3",         // call [rdi]
            "c3 50 c3",           // ret
            "0f05 50 c3",         // syscall
            "cc 50 c3",           // int3
            "f4 50 c3",           // hlt
            "e300 50 c3",         // jrcxz
            "c7f800000000 50 c3", // xbegin
            "06 50 c3",           // not in 64-bit mode
        ] {
            assert_eq!(of(code), ENTRY, "{code}");
        }
    }

    #[test]
    fn a_place_that_is_executed_again_in_one_call_is_none() {
        // test rdi, rdi; je end; mov rdi, [rdi]; jmp to the entry, and to the je.
        assert_eq!(of("4885ff 7405 488b3f ebf6 c3"), behind(3));
        assert_eq!(of("4885ff 7405 488b3f ebf9 c3"), ENTRY);
        // Into the middle of an instruction before it.
        assert_eq!(of("4885ff 7405 488b3f ebf7 c3"), ENTRY);
        // By a condition, and by a call.
        assert_eq!(of("4885ff 7405 488b3f 75f9 c3"), ENTRY);
        assert_eq!(of("4885ff 7405 e8f9ffffff c3"), ENTRY);
        // A part that is elsewhere can come back, another function that is jumped to in the end does not.
        assert_eq!(of("4885ff 0f8400100000 c3"), ENTRY);
        assert_eq!(of("4885ff 7405 e900100000 c3"), behind(3));
        // A table of a switch can, and what the linker has put in place does not.
        assert_eq!(of("4885ff 7402 ffe0 c3"), ENTRY);
        assert_eq!(of("4885ff 7406 ff2500100000 c3"), behind(3));
        // A push is in no loop.
        assert_eq!(of("8b07 50 ffe0"), behind(2));
        assert_eq!(of("8b07 50 0f8400100000 c3"), behind(2));
    }

    #[test]
    fn what_is_not_known_is_probed_at_its_entry() {
        let code = bytes("4885ff 7400 c3");
        let offset = |code: &[u8], size| point(code, size).offset;
        assert_eq!(offset(&code, 6), 3);
        // A size that is not told, or beyond what was read; and one that ends within an instruction.
        for size in [0, 7, u64::MAX] {
            assert_eq!(offset(&code, size), 0, "{size}");
        }
        assert_eq!(offset(&bytes("4885ff 7400 e8000000"), 8), 0);
        assert_eq!(offset(&[], 0), 0);
        let long = [bytes("488b06").repeat(40), bytes("53c3")].concat();
        assert_eq!(offset(&long, long.len() as u64), 0);
    }

    #[test]
    fn any_bytes_have_an_answer() {
        // A xorshift generator: the same bytes in each run.
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut moved = 0;
        for _ in 0..20_000 {
            let mut code: Vec<u8> = (0..next() % 48).map(|_| next() as u8).collect();
            // Beginnings that functions have, so that more than the first bytes matter.
            if next() % 2 == 0 {
                code.splice(..0, bytes("f30f1efa4885ff"));
            }
            let size = match next() % 4 {
                0 => next(),
                _ => code.len() as u64,
            };
            let Point { offset, step } = point(&code, size);
            assert!(offset == 0 || step == Some(Step::Emulated), "{code:x?}");
            assert!(offset == 0 || offset < code.len() as u64, "{code:x?}");
            moved += u32::from(offset > 0);
        }
        assert!(moved > 50, "{moved}");
    }
}
