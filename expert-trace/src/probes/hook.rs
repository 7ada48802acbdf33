//! The functions that can be probed, by what their probes are for.

use expert_trace_common::Route;
use serde::Serialize;

/// A function to probe, and what its probe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hook {
    /// Expert ids, when the router runs on the CPU.
    ExpertIds,
    /// A pass begins in a scheduler.
    PassBegin,
    /// Positions and sequences of the tokens of such a pass.
    Ubatch,
    /// A pass begins in a `llama_context`: whose it is, and the same as `Ubatch`.
    Context,
    /// A `llama_context` ends.
    ContextEnd,
    /// A scheduler ends, which is the context of programs that use ggml without llama.cpp.
    SchedulerEnd,
    /// The list of loaded libraries changes.
    Libraries,
    /// Expert ids that a device has chosen for experts on the CPU: the CPU's part of a graph begins.
    Split,
    /// Router logits that the CPU has computed for experts on a device: the same ends.
    SplitDone,
    /// The scheduler fetches expert ids, to stream the weights of the chosen experts.
    Fetch,
    /// … and has them, since the weights follow.
    WeightsFollow,
    /// The target's own code asks for the data of a tensor, as eval callbacks do.
    TensorGet,
    /// … and has it.
    TensorGetDone,
    /// The target sets an eval callback.
    EvalCallback,
    /// A device computes with expert ids.
    DeviceMulMatId,
    /// … and copies them to the host, or has them there, since more copies follow.
    DeviceMemcpy,
}

impl Hook {
    /// All hooks. The one that makes a library worth probing comes first.
    pub const ALL: [Hook; 16] = [
        Hook::ExpertIds,
        Hook::PassBegin,
        Hook::Ubatch,
        Hook::Context,
        Hook::ContextEnd,
        Hook::SchedulerEnd,
        Hook::Libraries,
        Hook::Split,
        Hook::SplitDone,
        Hook::Fetch,
        Hook::WeightsFollow,
        Hook::TensorGet,
        Hook::TensorGetDone,
        Hook::EvalCallback,
        Hook::DeviceMulMatId,
        Hook::DeviceMemcpy,
    ];

    /// Symbols of the function, and of others that are as good.
    pub const fn symbols(self) -> &'static [&'static str] {
        match self {
            Hook::ExpertIds => &["ggml_compute_forward_get_rows"],
            Hook::PassBegin => &["ggml_backend_sched_graph_compute_async"],
            // llm_graph_result::set_inputs(llama_ubatch const *), since b5922.
            Hook::Ubatch => &["_ZN16llm_graph_result10set_inputsEPK12llama_ubatch"],
            // llama_context::process_ubatch(llama_ubatch const &, llm_graph_type,
            // llama_memory_context_i *, ggml_status &): as of b11434. Where the signature differs,
            // schedulers stand for contexts.
            Hook::Context => &[
                "_ZN13llama_context14process_ubatchERK12llama_ubatch14llm_graph_type\
                 P22llama_memory_context_iR11ggml_status",
            ],
            Hook::ContextEnd => &["llama_free"],
            Hook::SchedulerEnd => &["ggml_backend_sched_free"],
            // What glibc's and musl's dynamic linkers call whenever their list has changed, before
            // any code of a new library runs (elf/dl-debug.c, ldso/dynlink.c).
            Hook::Libraries => &["_dl_debug_state"],
            Hook::Split | Hook::SplitDone => &["ggml_graph_compute"],
            // Compilers put the API's functions into the scheduler, which is in the same file. What
            // they call by pointer stays: a device's own functions, where their names are kept.
            Hook::Fetch => &[
                "ggml_backend_tensor_get_async",
                "_ZL34ggml_backend_cuda_get_tensor_asyncP12ggml_backendPK11ggml_tensorPvmm",
                "_ZL32ggml_backend_vk_get_tensor_asyncP12ggml_backendPK11ggml_tensorPvmm",
            ],
            Hook::WeightsFollow => &[
                "ggml_backend_tensor_set_async",
                "_ZL34ggml_backend_cuda_set_tensor_asyncP12ggml_backendP11ggml_tensorPKvmm",
                "_ZL32ggml_backend_vk_set_tensor_asyncP12ggml_backendP11ggml_tensorPKvmm",
            ],
            Hook::TensorGet | Hook::TensorGetDone => &["ggml_backend_tensor_get"],
            Hook::EvalCallback => &["ggml_backend_sched_set_eval_callback"],
            Hook::DeviceMulMatId => {
                &["_ZL20ggml_cuda_mul_mat_idR25ggml_backend_cuda_contextP11ggml_tensor"]
            }
            Hook::DeviceMemcpy => &["cudaMemcpyAsync"],
        }
    }

    /// Routes that it serves; none when it serves them all. So does the one of routers on the CPU: it
    /// sees tokens, and what a library's tensors are like.
    pub const fn routes(self) -> &'static [Route] {
        match self {
            Hook::Split => &[Route::SplitInput, Route::Logits],
            Hook::SplitDone => &[Route::Logits],
            Hook::Fetch | Hook::WeightsFollow => &[Route::Fetch],
            Hook::TensorGet | Hook::TensorGetDone => &[Route::Callback],
            Hook::DeviceMulMatId | Hook::DeviceMemcpy => &[Route::DeviceCopy],
            _ => &[],
        }
    }

    /// Whether the probe is hit when the function returns, which costs about three times as much.
    pub const fn on_return(self) -> bool {
        matches!(self, Hook::SplitDone | Hook::TensorGetDone)
    }

    /// Another one without which this one shows nothing. Programs that have nothing to do with
    /// llama.cpp use CUDA, too; and where schedulers stand for contexts, what frees a context ends none.
    pub(super) const fn needs(self) -> Option<Hook> {
        match self {
            Hook::DeviceMemcpy => Some(Hook::DeviceMulMatId),
            Hook::ContextEnd => Some(Hook::Context),
            _ => None,
        }
    }

    /// BPF program that answers for it.
    pub const fn program(self) -> &'static str {
        match self {
            Hook::ExpertIds => "get_rows",
            Hook::PassBegin => "graph_compute",
            Hook::Ubatch => "set_inputs",
            Hook::Context => "process_ubatch",
            Hook::ContextEnd | Hook::SchedulerEnd => "leave_context",
            Hook::Libraries => "libraries",
            Hook::Split => "cpu_split",
            Hook::SplitDone => "cpu_split_done",
            Hook::Fetch => "fetch",
            Hook::WeightsFollow => "weights_follow",
            Hook::TensorGet => "tensor_get",
            Hook::TensorGetDone => "tensor_get_done",
            Hook::EvalCallback => "eval_callback",
            Hook::DeviceMulMatId => "device_mul_mat_id",
            Hook::DeviceMemcpy => "device_memcpy",
        }
    }
}
