//! Where llama.cpp will keep routers and experts, by the options of a command line and its
//! environment, as common/arg.cpp and `llama_model_base::load_tensors` of b11434 have it. Pure.

use std::{
    ffi::{OsStr, OsString},
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

/// Which of a program's models options are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The one that `-m` names.
    Main,
    /// The one that proposes tokens (`-md`), which has options of its own.
    Draft,
}

/// Device backends of ggml, and functions by which each is known in the file that has it: what registers
/// it (ggml/src/ggml-backend-reg.cpp), and what starts it, as there was before. HIP and MUSA are built from
/// CUDA's sources.
pub const DEVICES: [(&str, &str); 18] = [
    ("ggml_backend_cuda_reg", "cuda"),
    ("ggml_backend_cuda_init", "cuda"),
    ("ggml_backend_vk_reg", "vulkan"),
    ("ggml_backend_vk_init", "vulkan"),
    ("ggml_backend_sycl_reg", "sycl"),
    ("ggml_backend_sycl_init", "sycl"),
    ("ggml_backend_metal_reg", "metal"),
    ("ggml_backend_metal_init", "metal"),
    ("ggml_backend_opencl_reg", "opencl"),
    ("ggml_backend_cann_reg", "cann"),
    ("ggml_backend_cann_init", "cann"),
    ("ggml_backend_rpc_reg", "rpc"),
    ("ggml_backend_rpc_init", "rpc"),
    ("ggml_backend_webgpu_reg", "webgpu"),
    ("ggml_backend_virtgpu_reg", "virtgpu"),
    ("ggml_backend_hexagon_reg", "hexagon"),
    ("ggml_backend_openvino_reg", "openvino"),
    ("ggml_backend_zdnn_reg", "zdnn"),
];

/// Device backends that a process has loaded, from few to many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backends {
    /// None.
    #[default]
    None,
    /// For RPC servers only, to which no weights are streamed (ggml-rpc.cpp, `offload_op`).
    Rpc,
    /// Some for devices of the machine, or it is not known.
    Any,
}

impl Backends {
    /// Those of devices of these kinds (`cuda`, `rpc`, …).
    pub fn of_devices(devices: &[impl AsRef<str>]) -> Self {
        match devices {
            [] => Backends::None,
            devices if devices.iter().all(|device| device.as_ref() == "rpc") => Backends::Rpc,
            _ => Backends::Any,
        }
    }

    /// Those of a process that maps files of these names. Where ggml's base is a library of its own, so is
    /// each backend (`ggml_add_backend_library` in ggml/src/CMakeLists.txt).
    pub fn of_files<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let parts: Vec<&str> = names.filter_map(library_part).collect();
        let backends = parts.iter().map(|part| Self::of_part(part));
        match parts.contains(&"base") {
            true => backends.max().unwrap_or_default(),
            false => Backends::Any,
        }
    }

    /// Those in a file of this name, which defines the functions of these devices. Where its name tells of a
    /// backend that is not known here, that is a device's.
    pub fn in_file(name: &str, devices: &[&str]) -> Self {
        let by_name = library_part(name).map_or(Backends::None, Self::of_part);
        by_name.max(Self::of_devices(devices))
    }

    fn of_part(part: &str) -> Self {
        match part {
            "base" | "cpu" | "blas" => Backends::None,
            "rpc" => Backends::Rpc,
            _ => Backends::Any,
        }
    }
}

/// Which of ggml's libraries a file is: `cpu` for `libggml-cpu-haswell.so`.
fn library_part(name: &str) -> Option<&str> {
    let name = name.strip_prefix("libggml-")?;
    let end = name.find(|c: char| !c.is_ascii_alphanumeric());
    Some(&name[..end.unwrap_or(name.len())])
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
    /// Whether `--router-on-cpu` adds to the command line that is run what that takes.
    pub adds_router: bool,
    /// Whether it is known to have an eval callback that asks for all expert ids.
    pub asks_for_ids: bool,
    /// Whether RPC servers are named, which are devices.
    pub rpc: bool,
    /// Whether long prompts are computed on a device with weights streamed to it.
    op_offload: bool,
    /// Whether the draft model is one of its own.
    names_draft: bool,
    role: Role,
    backends: Backends,
    files: Files,
    no_device: bool,
    /// Whether the draft model's devices are told apart from the main model's.
    own_device: bool,
    /// Whether llama.cpp looks for what there is room for.
    fits: bool,
    offloaded: Offloaded,
    overrides: Vec<Override>,
    /// What it was read from: variables that are set, and the words of the command line.
    variables: Vec<(&'static str, String)>,
    words: Vec<String>,
}

/// Files of a program's models.
#[derive(Clone, Debug, Default)]
struct Files {
    main: Option<String>,
    draft: Option<String>,
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
            let is_flag = ["--cpu-moe", "--cpu-moe-draft"].contains(option);
            let is_on = ["1", "on", "true", "enabled"].contains(&&*value);
            (!is_flag || is_on).then_some((*option, value))
        });
        let words = command.iter().map(|word| word.to_string_lossy().into());
        Self::of(Role::Main, set.collect(), words.collect())
    }

    /// The same where options can come from a file (`has_config_file`), too: then these are not all.
    pub fn beside(self, has_config_file: bool) -> Options {
        Options {
            understood: self.understood && !has_config_file,
            ..self
        }
    }

    fn of(role: Role, variables: Vec<(&'static str, String)>, words: Vec<String>) -> Options {
        let program = words.first().map(OsStr::new).unwrap_or_default();
        let mut options = Options {
            understood: router_on_cpu::takes_common_options(program),
            adds_router: router_on_cpu::insertion(&words).is_some(),
            asks_for_ids: eval_callback::asks_for_ids(program),
            rpc: false,
            op_offload: true,
            names_draft: false,
            role,
            backends: Backends::Any,
            files: Files::default(),
            no_device: false,
            own_device: false,
            fits: true,
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
        self.anew(self.role, words)
    }

    /// Those of the draft model.
    pub fn of_draft(&self) -> Options {
        self.anew(Role::Draft, self.words.clone())
    }

    fn anew(&self, role: Role, words: Vec<String>) -> Options {
        Options {
            backends: self.backends,
            files: self.files.clone(),
            ..Self::of(role, self.variables.clone(), words)
        }
    }

    /// The same of a process that has loaded these backends, with the files of its models, by the names
    /// under which they are known.
    pub fn of_process(
        self,
        backends: Backends,
        main: Option<String>,
        draft: Option<String>,
    ) -> Options {
        Options {
            backends,
            files: Files { main, draft },
            ..self
        }
    }

    /// Which options a model takes, by its file; none when that cannot be told, as of one that is not
    /// known where there is a draft model.
    pub fn role_of(&self, model: Option<&str>) -> Option<Role> {
        let Files { main, draft } = &self.files;
        if !self.names_draft {
            return Some(Role::Main);
        }
        let is = |file: &Option<String>| file.as_deref() == model;
        match (model.is_some() && is(main), model.is_some() && is(draft)) {
            (true, false) => Some(Role::Main),
            (false, true) => Some(Role::Draft),
            (true, true) => None,
            (false, false) => {
                model?;
                let other = draft.as_ref().map(|_| Role::Main);
                other.or(main.as_ref().map(|_| Role::Draft))
            }
        }
    }

    /// Name of the draft model's file.
    pub fn draft_model(&self) -> Option<&str> {
        let pairs = self.words.windows(2).rev();
        let mut pairs = pairs.map(|pair| (&*pair[0], &pair[1]));
        let variables = self.variables.iter();
        let mut variables = variables.map(|(name, value)| (*name, value));
        let is_draft = |of: &(&str, &String)| DRAFT_MODEL.contains(&&*option_name(of.0));
        let named = pairs.find(is_draft).or_else(|| variables.find(is_draft));
        named.map(|(_, name)| name.as_str())
    }

    fn take(&mut self, option: &str, value: &str) {
        let option = option_name(option);
        if DRAFT_MODEL.contains(&&*option) || DRAFT_REPOSITORY.contains(&&*option) {
            self.names_draft = true;
        }
        let (role, option) = of_role(&option);
        match (role, self.role) {
            (Some(role), own) if role != own => return,
            (Some(Role::Draft), _) if option == "-dev" => self.own_device = true,
            (None, Role::Draft) if option == "-dev" && self.own_device => return,
            _ => {}
        }
        match option {
            "-ngl" => {
                self.offloaded = match value {
                    "auto" | "-1" => Offloaded::Fitting,
                    number => match number.parse() {
                        Ok(layers) => Offloaded::Last(layers),
                        // `all`, and what is below -1.
                        Err(_) => Offloaded::All,
                    },
                }
            }
            "-fit" | "--fit" => {
                self.fits = !["off", "disabled", "false", "0"].contains(&value);
            }
            "-dev" => self.no_device = value == "none",
            // The second is llama-bench's.
            "--rpc" | "-rpc" => self.rpc = true,
            "--op-offload" => self.op_offload = true,
            "--no-op-offload" => self.op_offload = false,
            "-cmoe" => self.keep_experts_on_host(u32::MAX),
            // What is no number ends llama.cpp.
            "-ncmoe" => self.keep_experts_on_host(value.parse().unwrap_or(0)),
            "-ot" => {
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

    /// Whether RPC servers may be devices of the program. Others than llama.cpp's can name them in their own
    /// way.
    pub fn may_use_rpc(&self) -> bool {
        self.rpc || !self.understood
    }

    /// Whether a device may compute the model of this role, or one of both.
    pub fn has_device(&self, role: Option<Role>) -> bool {
        let is_there = match self.backends {
            Backends::None => false,
            Backends::Rpc => self.may_use_rpc(),
            Backends::Any => true,
        };
        let of_main = || !self.uses_no_device();
        let of_draft = || !self.of_draft().uses_no_device();
        is_there
            && match role {
                Some(Role::Main) => of_main(),
                Some(Role::Draft) => of_draft(),
                None => of_main() || of_draft(),
            }
    }

    /// Whether longer prompts can be computed on a device with weights that are streamed to it.
    pub fn streams(&self) -> bool {
        self.op_offload && self.backends == Backends::Any
    }

    /// Whether llama.cpp decides by the devices' free memory which layers go there.
    pub fn is_fitted(&self) -> bool {
        self.understood && self.fits && self.offloaded == Offloaded::Fitting
    }

    /// Where a layer of a model of so many layers is, as far as no override says otherwise.
    ///
    /// The output counts as the last layer (`i_gpu_start`). It has not always done so: the layer at
    /// the edge is on either side.
    pub fn layer(&self, layer: u32, layers: u32) -> Place {
        match self.offloaded {
            _ if self.uses_no_device() => Place::Host,
            _ if !self.understood => Place::Unknown,
            Offloaded::Fitting if self.fits => Place::Unknown,
            Offloaded::Fitting | Offloaded::All => Place::Device,
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
/// The same: where it is downloaded from.
const DRAFT_REPOSITORY: [&str; 4] = ["-hfd", "-hfrd", "--hf-repo-draft", "--spec-draft-hf"];

/// Whose an option is, where each model has its own, and the main model's name of it. The draft model
/// uses the main model's devices unless it is given others (common/arg.cpp, and
/// `common_base_params_to_speculative` in common/speculative.cpp).
fn of_role(option: &str) -> (Option<Role>, &str) {
    let main = Some(Role::Main);
    let draft = Some(Role::Draft);
    match option {
        "-ngl" | "--gpu-layers" | "--n-gpu-layers" => (main, "-ngl"),
        "-ngld" | "--gpu-layers-draft" | "--n-gpu-layers-draft" | "--spec-draft-ngl" => {
            (draft, "-ngl")
        }
        "-dev" | "--device" => (None, "-dev"),
        "-devd" | "--device-draft" | "--spec-draft-device" => (draft, "-dev"),
        "-ot" | "--override-tensor" => (main, "-ot"),
        "-otd" | "--override-tensor-draft" | "--spec-draft-override-tensor" => (draft, "-ot"),
        "-cmoe" | "--cpu-moe" => (main, "-cmoe"),
        "-cmoed" | "--cpu-moe-draft" | "--spec-draft-cpu-moe" => (draft, "-cmoe"),
        "-ncmoe" | "--n-cpu-moe" => (main, "-ncmoe"),
        "-ncmoed" | "--n-cpu-moe-draft" | "--spec-draft-n-cpu-moe" | "--spec-draft-ncmoe" => {
            (draft, "-ncmoe")
        }
        other => (None, other),
    }
}

/// Variables that stand for options, in the order in which they are taken.
pub const VARIABLES: &[(&str, &str)] = &[
    ("LLAMA_ARG_RPC", "--rpc"),
    ("LLAMA_ARG_DEVICE", "--device"),
    (router_on_cpu::OVERRIDE_VARIABLE, "--override-tensor"),
    ("LLAMA_ARG_CPU_MOE", "--cpu-moe"),
    ("LLAMA_ARG_N_CPU_MOE", "--n-cpu-moe"),
    ("LLAMA_ARG_N_GPU_LAYERS", "--gpu-layers"),
    ("LLAMA_ARG_FIT", "--fit"),
    ("LLAMA_ARG_SPEC_DRAFT_HF_REPO", "--hf-repo-draft"),
    ("LLAMA_ARG_SPEC_DRAFT_CPU_MOE", "--cpu-moe-draft"),
    ("LLAMA_ARG_SPEC_DRAFT_N_CPU_MOE", "--n-cpu-moe-draft"),
    ("LLAMA_ARG_N_GPU_LAYERS_DRAFT", "--gpu-layers-draft"),
    ("LLAMA_ARG_SPEC_DRAFT_MODEL", "--model-draft"),
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
    fn without_fitting_all_layers_go_to_the_device() {
        let place = |text: &str| (options(text).layer(0, 4), options(text).is_fitted());
        assert_eq!(place("llama-cli"), (Unknown, true));
        assert_eq!(place("llama-cli --fit off"), (Device, false));
        assert_eq!(place("llama-cli -fit off -ngl 4"), (Unknown, false));
        assert_eq!(place("llama-cli --fit off --fit on"), (Unknown, true));
    }

    #[test]
    fn a_draft_model_has_options_of_its_own() {
        let draft = |text: &str| options(text).of_draft();
        let place = |text: &str| draft(text).layer(0, 4);
        assert_eq!(place("llama-cli -md d -ngl 0 -ngld 99"), Device);
        assert_eq!(options("llama-cli -ngl 0 -ngld 99").layer(0, 4), Host);
        assert_eq!(place("llama-cli -ngl 99 --spec_draft_ngl 0"), Host);
        assert_eq!(place("llama-cli -ngld 99 -dev none"), Host);
        assert_eq!(place("llama-cli -devd CUDA0 -ngld 99 -dev none"), Device);
        assert_eq!(place("llama-cli -ngld 99 -dev CUDA0 -devd none"), Host);
        let experts = |text: &str| draft(text).overridden(UP);
        assert_eq!(experts("llama-cli --cpu-moe -ot exps=CPU"), None);
        assert_eq!(experts("llama-cli --cpu-moe-draft"), Some(Host));
        assert_eq!(experts("llama-cli -otd exps=CUDA0 -cmoed"), Some(Device));
        assert!(!draft("llama-cli --no-op-offload").streams());
    }

    #[test]
    fn a_models_file_tells_whose_options_it_takes() {
        let of = |text: &str, main: Option<&str>, draft: Option<&str>, model: Option<&str>| {
            let [main, draft] = [main, draft].map(|file| file.map(str::to_owned));
            let options = options(text).of_process(Backends::Any, main, draft);
            options.role_of(model)
        };
        let [main, draft] = [Some("/a/m.gguf"), Some("/b/m.gguf")];
        let both = "llama-cli -m a/m.gguf -md b/m.gguf";
        assert_eq!(of(both, main, draft, main), Some(Role::Main));
        assert_eq!(of(both, main, draft, draft), Some(Role::Draft));
        assert_eq!(of(both, main, draft, None), None);
        assert_eq!(of(both, main, main, main), None);
        let downloaded = "llama-cli -m a/m.gguf -hfd x/y";
        assert_eq!(of(downloaded, main, None, draft), Some(Role::Draft));
        assert_eq!(of(downloaded, None, None, draft), None);
        assert_eq!(of("llama-cli", main, None, None), Some(Role::Main));
        assert_eq!(options(both).draft_model(), Some("b/m.gguf"));
    }

    #[test]
    fn backends_are_libraries_of_their_own() {
        let of = |names: &str| Backends::of_files(names.split(' '));
        let shared = "llama-cli libggml.so.0 libggml-base.so.0 libggml-cpu-haswell.so libllama.so";
        assert_eq!(of(shared), Backends::None);
        assert_eq!(of(&format!("{shared} libggml-rpc.so.0")), Backends::Rpc);
        let cuda = format!("{shared} libggml-cuda-4f8e.so libggml-rpc.so");
        assert_eq!(of(&cuda), Backends::Any);
        let devices = |names: &[&str]| Backends::of_devices(names);
        assert_eq!(devices(&[]), Backends::None);
        assert_eq!(devices(&["rpc"]), Backends::Rpc);
        assert_eq!(devices(&["rpc", "vulkan"]), Backends::Any);
        let in_file = |name: &str| Backends::in_file(name, &[]);
        assert_eq!(in_file("libggml-cpu-x64.so"), Backends::None);
        assert_eq!(in_file("libggml-rpc.so.0"), Backends::Rpc);
        assert_eq!(in_file("libggml-new.so"), Backends::Any);
        assert_eq!(in_file("llama-cli"), Backends::None);
        assert_eq!(Backends::in_file("llama-cli", &["rpc"]), Backends::Rpc);
        assert_eq!(Backends::in_file("x.so", &["rpc", "sycl"]), Backends::Any);
        // Linked statically, or of a time in which all was in one library.
        assert_eq!(of("llama-cli"), Backends::Any);
        assert_eq!(of("llama-cli libggml.so libllama.so"), Backends::Any);

        let of = |text: &str, backends| options(text).of_process(backends, None, None);
        let rpc = of("llama-cli --rpc h:1", Backends::Rpc);
        let main = Some(Role::Main);
        assert!(rpc.has_device(main) && !rpc.streams());
        assert!(!of("llama-cli", Backends::Rpc).has_device(main));
        assert!(of("./serve.py", Backends::Rpc).has_device(main));
        assert!(!of("./serve.py", Backends::None).has_device(main));
        let draft = of("llama-cli -dev none -devd CUDA0", Backends::Any);
        assert!(!draft.has_device(main) && draft.has_device(Some(Role::Draft)));
        assert!(draft.has_device(None));
        assert!(of("llama-cli", Backends::Any).streams());
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
