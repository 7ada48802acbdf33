//! `--router-on-cpu`: what makes llama.cpp compute the routers' logits on the host, so that they can be
//! read there while everything else stays on a device.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

use crate::target::option_name;

/// Keeps the routers' weights on the CPU, with the biases that take part in the choice; the gates of
/// shared experts (`ffn_gate_inp_shexp`) stay where they are. A value of llama.cpp's
/// `--override-tensor`, which searches for the pattern in the names of tensors.
pub const OVERRIDE: &str = r"blk\.[0-9]+\.(ffn_gate_inp\.(weight|bias)|exp_probs_b.*)=CPU";

/// What every override of the routers' weights has in it.
const ROUTER_TENSOR: &str = "ffn_gate_inp";

/// The variable that llama.cpp's programs read overrides from (common/arg.cpp, since b7525).
pub const OVERRIDE_VARIABLE: &str = "LLAMA_ARG_OVERRIDE_TENSOR";

/// Set to anything, it keeps the Vulkan backend from computing several operations in one; other
/// backends do not look at it.
///
/// Fused, the choice of experts can write the weights of some tokens over the logits of others before
/// those are read. That inputs and outputs lie apart is checked (`ggml_backend_vk_graph_compute` in
/// ggml-vulkan.cpp), but not of inputs that come from another backend, as the logits then do: tokens
/// of a prompt would get other experts than by their logits.
pub const NO_FUSION_VARIABLE: &str = "GGML_VK_DISABLE_FUSION";

/// Options for a program, and where among its arguments they go: before all others, since of several
/// overrides that match, llama.cpp takes the first. Those of [`OVERRIDE_VARIABLE`] come before options.
#[derive(Debug, PartialEq, Eq)]
pub struct Insertion {
    position: usize,
    options: &'static [&'static str],
}

impl Insertion {
    /// Puts them into a command line.
    pub fn apply(&self, command: &mut Vec<OsString>) {
        let options = self.options.iter().map(OsString::from);
        command.splice(self.position..self.position, options);
    }
}

/// llama.cpp's programs that take the options of common/arg.cpp. Others have names that begin alike.
const PROGRAMS: [&str; 14] = [
    "llama-batched-bench",
    "llama-cli",
    "llama-completion",
    "llama-embedding",
    "llama-eval-callback",
    "llama-imatrix",
    "llama-lookup",
    "llama-mtmd-cli",
    "llama-parallel",
    "llama-perplexity",
    "llama-retrieval",
    "llama-server",
    "llama-speculative",
    "llama-speculative-simple",
];

/// The options for a command line; `None` when the program is none of llama.cpp's, or has to be told in
/// another way.
pub fn insertion(command: &[impl AsRef<OsStr>]) -> Option<Insertion> {
    let name = Path::new(command.first()?.as_ref()).file_name()?.to_str()?;
    let common = |position| Insertion {
        position,
        options: &["--override-tensor", OVERRIDE, "--no-op-offload"],
    };
    match name {
        // To it, options that are given again are more configurations to measure.
        "llama-bench" if command.iter().any(|argument| is_setting(argument.as_ref())) => None,
        "llama-bench" => Some(Insertion {
            position: 1,
            options: &["--override-tensor", OVERRIDE, "--no-op-offload", "1"],
        }),
        // One program for all of them: the first argument says which it is to be.
        "llama" if command.len() > 1 => Some(common(2)),
        _ if PROGRAMS.contains(&name) => Some(common(1)),
        _ => None,
    }
}

/// Whether a program is one of llama.cpp's that take the options of common/arg.cpp.
pub fn takes_common_options(program: &OsStr) -> bool {
    let name = Path::new(program).file_name().and_then(OsStr::to_str);
    name.is_some_and(|name| name == "llama" || PROGRAMS.contains(&name))
}

fn is_setting(argument: &OsStr) -> bool {
    let settings = ["-ot", "--override-tensor", "-nopo", "--no-op-offload"];
    settings.contains(&&*option_name(&argument.to_string_lossy()))
}

/// A value for [`OVERRIDE_VARIABLE`]. llama.cpp reads the variable before its options, so that an override
/// in it would win.
pub fn with_override(variable: &OsStr) -> OsString {
    let mut value = OsString::from(OVERRIDE);
    value.push(",");
    value.push(variable);
    value
}

/// Whether a process was started with routers on the CPU, as far as its arguments and environment tell.
pub fn is_asked_for(command: &[OsString], variable: Option<&OsStr>) -> bool {
    let names_router = |text: &OsStr| text.to_string_lossy().contains(ROUTER_TENSOR);
    let mut arguments = command.iter().skip_while(|argument| {
        let argument = argument.to_string_lossy();
        let option = option_name(&argument);
        option != "-ot"
            && option != "--override-tensor"
            && !option.starts_with("--override-tensor=")
    });
    arguments.any(|argument| names_router(argument)) || variable.is_some_and(names_router)
}

/// Says what has been added to a command line, and what that costs.
pub fn added(insertion: &Insertion) -> String {
    let options: Vec<String> = insertion
        .options
        .iter()
        .map(|option| {
            if option.contains('\\') {
                format!("'{option}'")
            } else {
                (*option).to_owned()
            }
        })
        .collect();
    format!(
        "--router-on-cpu adds to the program's options: {}\n\
         and sets {NO_FUSION_VARIABLE}, without which Vulkan devices may choose otherwise than by logits \
         that come from the CPU.\n\
         The device now waits for the host once in every MoE layer of every pass, and prompts are no \
         longer computed with weights streamed to it: the program is slower than without. The \
         experts are chosen from the logits by expert-trace.",
        options.join(" ")
    )
}

/// Says what a program that does not take llama.cpp's options has to be told.
pub fn equivalent(program: &OsStr) -> String {
    let pattern = OVERRIDE.trim_end_matches("=CPU");
    format!(
        "--router-on-cpu: {} is not known to take llama.cpp's options; nothing is added to its command \
         line. It has to set the same by itself: llama_model_params.tensor_buft_overrides with the \
         pattern {pattern} and the CPU's buffer type, and llama_context_params.op_offload = false. \
         {NO_FUSION_VARIABLE}, which Vulkan devices need for this, is set",
        Path::new(program).display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    fn changed(text: &str) -> Option<String> {
        let mut command = words(text);
        insertion(&command)?.apply(&mut command);
        Some(command.join(OsStr::new(" ")).into_string().unwrap())
    }

    #[test]
    fn options_come_before_the_users() {
        assert_eq!(
            changed("/opt/llama-cli -ot .*=CUDA0").unwrap(),
            format!("/opt/llama-cli --override-tensor {OVERRIDE} --no-op-offload -ot .*=CUDA0")
        );
        assert_eq!(
            changed("llama-bench -m m").unwrap(),
            format!("llama-bench --override-tensor {OVERRIDE} --no-op-offload 1 -m m")
        );
        assert_eq!(
            changed("llama serve -m m").unwrap(),
            format!("llama serve --override-tensor {OVERRIDE} --no-op-offload -m m")
        );
        for other in [
            "python3 serve.py",
            "sh llama-cli",
            "llama",
            "llama-swap --config x",
            "llama-bench -m m -ot exps=CPU",
            "",
        ] {
            assert_eq!(changed(other), None, "{other}");
        }
    }

    #[test]
    fn a_process_that_was_started_so_is_recognised() {
        let asked = |text: &str| is_asked_for(&words(text), None);
        assert!(asked(r"llama-server -m m -ot blk\.\d+\.ffn_gate_inp.*=CPU"));
        assert!(asked("llama-server --override-tensor=ffn_gate_inp=CPU"));
        assert!(asked("llama-server --override_tensor ffn_gate_inp=CPU"));
        assert!(!asked("llama-server -m ffn_gate_inp.gguf -ot exps=CPU"));
        assert!(!asked("llama-server -p ffn_gate_inp"));
        assert!(is_asked_for(&[], Some("ffn_gate_inp=CPU".as_ref())));
        assert!(!is_asked_for(&[], Some("exps=CPU".as_ref())));
    }
}
