//! Reading the target: memory, and who is running.

use aya_ebpf::{
    EbpfContext,
    helpers::{
        bpf_get_current_pid_tgid, bpf_probe_read_user,
        generated::{bpf_get_attach_cookie, bpf_probe_read_user as read_user_raw},
    },
};
use expert_trace_common::Site;

/// An address in the target. It is never believed: every read can fail.
#[derive(Clone, Copy)]
pub struct Address(pub u64);

impl Address {
    #[inline(always)]
    pub const fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// Reads a plain value. `T` must be valid for every pattern of bits.
    #[inline(always)]
    pub fn read<T>(self) -> Option<T> {
        // SAFETY: the helper checks the source; the destination is a `T` on the stack.
        unsafe { bpf_probe_read_user(self.0 as *const T) }.ok()
    }

    /// Reads `len` bytes to `destination`.
    ///
    /// # Safety
    /// `destination` must have room for `len` bytes, in a way that the verifier can see.
    #[inline(always)]
    pub unsafe fn read_to(self, destination: *mut u8, len: u32) -> Option<()> {
        // SAFETY: by the caller's promise.
        let result = unsafe { read_user_raw(destination.cast(), len, self.0 as *const _) };
        (result == 0).then_some(())
    }
}

/// Process and thread: the key of `THREADS`.
#[inline(always)]
pub fn process_and_thread() -> u64 {
    bpf_get_current_pid_tgid()
}

#[inline(always)]
pub fn process() -> u32 {
    (process_and_thread() >> 32) as u32
}

#[inline(always)]
pub fn thread() -> u32 {
    process_and_thread() as u32
}

/// The probe that was hit.
#[inline(always)]
pub fn site<C: EbpfContext>(ctx: &C) -> Site {
    // SAFETY: the context is the one the program was called with.
    Site::of_cookie(unsafe { bpf_get_attach_cookie(ctx.as_ptr()) })
}
