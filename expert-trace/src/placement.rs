//! Where llama.cpp will keep routers and experts, by the options of a command line and its
//! environment, as common/arg.cpp and `llama_model_base::load_tensors` of b11434 have it. Pure.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
    sync::LazyLock,
};

use regex_lite::{Regex, RegexBuilder};
use serde::Serialize;

use crate::{eval_callback, router_on_cpu, target::option_name};

/// Where a layer's part is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the host.
    Host,
    /// On a device.
    Device,
    /// The options do not say.
    Unknown,
}

/// Layers that go to devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offloaded {
    /// As many as llama.cpp finds room for, its default.
    Fitting,
    All,
    Last(u32),
}

/// Tensors that go to a buffer type of their own.
#[derive(Clone, Debug)]
struct Override {
    tensors: Tensors,
    place: Place,
}

/// Which tensors an override is about.
#[derive(Clone, Debug)]
enum Tensors {
    /// Those in whose names it is found.
    Named(Regex),
    /// Experts of so many first layers.
    ExpertsBelow(u32),
    /// Its syntax is not known here, or it is too large.
    Unknown,
}

impl Tensors {
    fn named(pattern: &str) -> Self {
        let regex = RegexBuilder::new(pattern).size_limit(MAX_REGEX).build();
        regex.map_or(Self::Unknown, Self::Named)
    }
}

/// Most overrides that are kept; what comes after them is not known.
const MAX_OVERRIDES: usize = 256;
/// Bytes of a compiled pattern. One that names each layer of a large model takes less.
const MAX_REGEX: usize = 64 << 10;

/// Options that decide about places.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether the program is known to take llama.cpp's common options.
    pub understood: bool,
    /// Whether it is known to have an eval callback that asks for all expert ids.
    pub asks_for_ids: bool,
    /// Whether RPC servers are named, which are devices.
    pub rpc: bool,
    /// Whether long prompts are computed on a device with weights streamed to it.
    pub op_offload: bool,
    no_device: bool,
    offloaded: Offloaded,
    overrides: Vec<Override>,
    /// What it was read from: variables that are set, and the words of the command line.
    variables: Vec<(&'static str, String)>,
    words: Vec<String>,
}

/// Where further options go among those of a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    /// Before all others: the first override that matches a tensor counts.
    BeforeOthers,
    /// Behind all others: of what is given again, the last counts.
    AfterOthers,
}

/// common/common.h, `LLM_FFN_EXPS_REGEX`, behind the layer.
static EXPERTS: LazyLock<Regex> = LazyLock::new(|| {
    const PATTERN: &str = r"^blk\.([0-9]+)\.ffn_(up|down|gate|gate_up)_(ch|)exps";
    Regex::new(PATTERN).expect("a pattern that the tests use")
});

/// Layer of a tensor with experts.
fn layer_of_experts(tensor: &str) -> Option<u32> {
    EXPERTS.captures(tensor)?.get(1)?.as_str().parse().ok()
}

impl Options {
    /// Reads them. Of options that are given again the last one counts, and options count more than
    /// variables; of overrides that match, the first, and those of variables come first.
    pub fn parse<'a>(
        command: &[OsString],
        variable: impl Fn(&str) -> Option<&'a OsStr>,
    ) -> Options {
        let set = VARIABLES.iter().filter_map(|(name, option)| {
            let value = variable(name)?.to_string_lossy().into_owned();
            let is_flag = *option == "--cpu-moe";
            let is_on = ["1", "on", "true", "enabled"].contains(&&*value);
            (!is_flag || is_on).then_some((*option, value))
        });
        let words = command.iter().map(|word| word.to_string_lossy().into());
        Self::of(set.collect(), words.collect())
    }

    fn of(variables: Vec<(&'static str, String)>, words: Vec<String>) -> Options {
        let program = words.first().map(OsStr::new).unwrap_or_default();
        let mut options = Options {
            understood: router_on_cpu::takes_common_options(program),
            asks_for_ids: eval_callback::asks_for_ids(program),
            rpc: false,
            op_offload: true,
            no_device: false,
            offloaded: Offloaded::Fitting,
            overrides: Vec::new(),
            variables: Vec::new(),
            words: Vec::new(),
        };
        for (option, value) in &variables {
            options.take(option, value);
        }
        for (index, word) in words.iter().enumerate().skip(1) {
            let value = words.get(index + 1).map(AsRef::as_ref).unwrap_or_default();
            options.take(word, value);
        }
        Options {
            variables,
            words,
            ..options
        }
    }

    /// What they would be with further options.
    pub fn with(&self, further: &[String], position: Position) -> Options {
        let mut words = self.words.clone();
        let at = match position {
            Position::BeforeOthers => words.len().min(1),
            Position::AfterOthers => words.len(),
        };
        words.splice(at..at, further.iter().cloned());
        Self::of(self.variables.clone(), words)
    }

    /// Whether the command line names this file as its draft model, which has options of its own.
    pub fn is_draft(&self, model: &str) -> bool {
        let named = self.words.windows(2).filter_map(|of| match of {
            [option, value] if DRAFT_MODEL.contains(&&**option) => Path::new(value).file_name(),
            _ => None,
        });
        let model = Path::new(model).file_name();
        named.into_iter().any(|named| model == Some(named))
    }

    fn take(&mut self, option: &str, value: &str) {
        match &*option_name(option) {
            "-ngl" | "--gpu-layers" | "--n-gpu-layers" => {
                self.offloaded = match value {
                    "auto" | "-1" => Offloaded::Fitting,
                    number => match number.parse() {
                        Ok(layers) => Offloaded::Last(layers),
                        // `all`, and what is below -1.
                        Err(_) => Offloaded::All,
                    },
                }
            }
            "-dev" | "--device" => self.no_device = value == "none",
            "--rpc" => self.rpc = true,
            "--op-offload" => self.op_offload = true,
            "--no-op-offload" => self.op_offload = false,
            "-cmoe" | "--cpu-moe" => self.keep_experts_on_host(u32::MAX),
            // What is no number ends llama.cpp.
            "-ncmoe" | "--n-cpu-moe" => self.keep_experts_on_host(value.parse().unwrap_or(0)),
            "-ot" | "--override-tensor" => {
                for (pattern, buffer) in value.split(',').filter_map(|of| of.split_once('=')) {
                    if self.overrides.len() > MAX_OVERRIDES {
                        break;
                    }
                    // A device's host buffer is the host's memory.
                    let on_host = buffer == "CPU" || buffer.ends_with("_Host");
                    let place = if on_host { Place::Host } else { Place::Device };
                    self.override_tensors(Tensors::named(pattern), place);
                }
            }
            _ => {}
        }
    }

    fn keep_experts_on_host(&mut self, layers: u32) {
        let are_kept =
            |of: &Override| matches!(of.tensors, Tensors::ExpertsBelow(of) if of >= layers);
        if !self.overrides.iter().any(are_kept) {
            self.override_tensors(Tensors::ExpertsBelow(layers), Place::Host);
        }
    }

    fn override_tensors(&mut self, tensors: Tensors, place: Place) {
        let further = match self.overrides.len() {
            0..MAX_OVERRIDES => Override { tensors, place },
            MAX_OVERRIDES => Override {
                tensors: Tensors::Unknown,
                place: Place::Unknown,
            },
            _ => return,
        };
        self.overrides.push(further);
    }

    /// Whether the program is told to use no device.
    pub fn uses_no_device(&self) -> bool {
        self.understood && self.no_device
    }

    /// Where a layer of a model of so many layers is, as far as no override says otherwise.
    ///
    /// The output counts as the last layer (`i_gpu_start`). It has not always done so: the layer at
    /// the edge is on either side.
    pub fn layer(&self, layer: u32, layers: u32) -> Place {
        match self.offloaded {
            _ if self.uses_no_device() => Place::Host,
            _ if !self.understood => Place::Unknown,
            Offloaded::Fitting => Place::Unknown,
            Offloaded::All => Place::Device,
            Offloaded::Last(on_device) => {
                let behind = layers.saturating_sub(layer);
                match on_device {
                    _ if on_device > behind => Place::Device,
                    _ if on_device < behind => Place::Host,
                    _ => Place::Unknown,
                }
            }
        }
    }

    /// Where a tensor is that an override names; none when no override does.
    pub fn overridden(&self, tensor: &str) -> Option<Place> {
        if !self.understood {
            return None;
        }
        let overrides = self.overrides.iter();
        overrides
            .map(|of| match &of.tensors {
                Tensors::Named(pattern) => pattern.is_match(tensor).then_some(of.place),
                Tensors::ExpertsBelow(layers) => {
                    let is_below = layer_of_experts(tensor).is_some_and(|of| of < *layers);
                    is_below.then_some(of.place)
                }
                Tensors::Unknown => Some(Place::Unknown),
            })
            .find_map(|place| place)
    }
}

/// common/arg.cpp
const DRAFT_MODEL: [&str; 3] = ["-md", "--model-draft", "--spec-draft-model"];

/// Variables that stand for options, in the order in which they are taken.
pub const VARIABLES: &[(&str, &str)] = &[
    ("LLAMA_ARG_RPC", "--rpc"),
    ("LLAMA_ARG_DEVICE", "--device"),
    (router_on_cpu::OVERRIDE_VARIABLE, "--override-tensor"),
    ("LLAMA_ARG_CPU_MOE", "--cpu-moe"),
    ("LLAMA_ARG_N_CPU_MOE", "--n-cpu-moe"),
    ("LLAMA_ARG_N_GPU_LAYERS", "--gpu-layers"),
];

#[cfg(test)]
mod tests {
    use super::{
        Place::{Device, Host, Unknown},
        *,
    };

    fn options(text: &str) -> Options {
        let words: Vec<OsString> = text.split(' ').map(OsString::from).collect();
        Options::parse(&words, |_| None)
    }

    const UP: &str = "blk.3.ffn_up_exps.weight";
    const ROUTER: &str = "blk.3.ffn_gate_inp.weight";

    #[test]
    fn layers_are_counted_from_the_output() {
        let place = |text: &str, layer| options(text).layer(layer, 4);
        assert_eq!(place("llama-cli -ngl 99", 0), Device);
        assert_eq!(place("llama-cli -ngl all", 0), Device);
        assert_eq!(place("llama-cli --n_gpu_layers all", 0), Device);
        assert_eq!(place("llama-cli -ngl 99 -ngl 0", 0), Host);
        assert_eq!(place("llama-cli -ngl 99 -dev none", 0), Host);
        assert_eq!(place("llama-cli", 0), Unknown);
        assert_eq!(place("llama-cli -ngl auto", 0), Unknown);
        assert_eq!(place("python3 -ngl 99", 0), Unknown);
        // b11434: the output and the last layer; before, the last two layers.
        let two = [0, 1, 2, 3].map(|layer| place("llama-cli -ngl 2", layer));
        assert_eq!(two, [Host, Host, Unknown, Device]);
    }

    #[test]
    fn the_first_override_that_matches_counts() {
        let place = |text: &str, tensor| options(text).overridden(tensor);
        assert_eq!(place("llama-cli -ngl 99", UP), None);
        assert_eq!(place("llama-cli --cpu-moe", UP), Some(Host));
        assert_eq!(place("llama-cli --cpu_moe", UP), Some(Host));
        assert_eq!(place("llama-cli --cpu-moe", ROUTER), None);
        assert_eq!(place("llama-cli -ncmoe 3", UP), None);
        assert_eq!(place("llama-cli -ncmoe 4", UP), Some(Host));
        let text = "llama-cli -ot exps=CUDA0,ffn_gate_inp=CPU --cpu-moe";
        assert_eq!(place(text, UP), Some(Device));
        assert_eq!(place(text, ROUTER), Some(Host));
        assert_eq!(place("llama-cli -ot .*=CUDA_Host", ROUTER), Some(Host));
        // A syntax that only ECMAScript has.
        assert_eq!(place("llama-cli -ot (?!blk)=CPU", UP), Some(Unknown));
        assert_eq!(place("python3 --cpu-moe", UP), None);
        // Each is void after one that names more layers.
        let text = format!("llama-cli{}", " -ncmoe 1024 -cmoe -ncmoe 3".repeat(3000));
        assert_eq!(options(&text).overrides.len(), 2);
        let large = "llama-cli -ot ((a{99}){99}){99}=CPU";
        assert_eq!(place(large, UP), Some(Unknown));
        let other = " -ot blk.9=CPU".repeat(MAX_OVERRIDES);
        assert_eq!(place(&format!("llama-cli{other}"), UP), None);
        let text = format!("llama-cli{other} --cpu-moe");
        assert_eq!(options(&text).overridden(UP), Some(Unknown));
    }

    #[test]
    fn variables_come_before_options() {
        let command = ["llama-cli", "-ngl", "0", "-ot", "exps=CPU"].map(OsString::from);
        let variable = |name: &str| match name {
            "LLAMA_ARG_N_GPU_LAYERS" => Some(OsStr::new("99")),
            "LLAMA_ARG_OVERRIDE_TENSOR" => Some(OsStr::new("exps=Vulkan0")),
            "LLAMA_ARG_CPU_MOE" => Some(OsStr::new("0")),
            _ => None,
        };
        let options = Options::parse(&command, variable);
        assert_eq!(options.layer(0, 4), Host);
        assert_eq!(options.overridden(UP), Some(Device));
        assert!(options.op_offload && !options.rpc);
        assert!(!options.uses_no_device());
    }

    #[test]
    fn routers_on_the_cpu() {
        let text = format!(
            "llama-cli --override-tensor {} --no-op-offload -ngl 99",
            router_on_cpu::OVERRIDE
        );
        let options = options(&text);
        assert_eq!(options.overridden(ROUTER), Some(Host));
        assert_eq!(options.overridden("blk.3.exp_probs_b.bias"), Some(Host));
        assert_eq!(options.overridden(UP), None);
        assert!(!options.op_offload);
    }
}
