//! What is known of the traced processes, beside their events.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::{
    eval_callback::EvalCallback,
    model::Context,
    models::{self, KnownModels},
    placement::{self, Backends, Options},
    probes::build_id,
    redact,
    router_on_cpu::{self, OVERRIDE_VARIABLE},
    stats,
    target::{self, Reach},
    trace::ContextDetail,
};

/// A target that shows no model in so many looks has none that we can read.
const MODEL_LOOKS: u32 = 20;

/// Of more eval callbacks, no program of a kind that we know has use.
const MAX_CALLBACKS: usize = 64;

/// The processes, and the models they map.
#[derive(Debug, Default)]
pub struct Targets {
    /// The one that was started or attached to.
    pub main: Target,
    /// Others that have shown events, by their ids.
    others: BTreeMap<u32, Target>,
    /// Model files.
    pub models: KnownModels,
    /// Eval callbacks that processes have set.
    pub eval_callbacks: Vec<EvalCallback>,
    /// Where they are: each scheduler of a process tells of its own.
    callback_addresses: BTreeSet<(u32, u64)>,
}

/// A process.
#[derive(Debug, Default)]
pub struct Target {
    /// Its arguments.
    pub command: Vec<OsString>,
    /// Of its environment.
    pub variables: Variables,
    /// Its working directory.
    pub directory: PathBuf,
    exe: Option<PathBuf>,
    build_id: Option<String>,
    /// What it could open when it was last seen alive.
    reach: Option<Reach>,
    /// How often its models have been looked for in vain.
    looks: u32,
    computes: bool,
    backends: Option<Backends>,
    /// Arguments that it computes with: a script can have become another program.
    computes_with: Vec<OsString>,
}

/// Variables that stand for options of llama.cpp's programs (common/arg.cpp).
#[derive(Debug, Default)]
pub struct Variables {
    /// `LLAMA_ARG_MODEL`: the model.
    pub model: Option<OsString>,
    /// `LLAMA_ARG_OVERRIDE_TENSOR`: where tensors go.
    pub override_tensor: Option<OsString>,
    /// All that decide about places, by name.
    placing: BTreeMap<&'static str, OsString>,
    /// There are options in a file, too.
    has_config_file: bool,
}

impl Variables {
    /// Those of an environment, for a program with this root directory.
    pub fn from(root: &Path, get: impl Fn(&str) -> Option<OsString>) -> Self {
        let of_config = ["XDG_CONFIG_HOME", "HOME"].map(|name| (name, get(name)));
        let of_config = |wanted: &str| {
            let (_, value) = of_config.iter().find(|(name, _)| *name == wanted)?;
            value.as_deref()
        };
        Self {
            model: get("LLAMA_ARG_MODEL"),
            override_tensor: get(OVERRIDE_VARIABLE),
            placing: placement::VARIABLES
                .iter()
                .filter_map(|(name, _)| Some((*name, get(name)?)))
                .collect(),
            has_config_file: target::has_config_file(root, of_config),
        }
    }
}

impl Target {
    /// Looks at the process while it lives. What is known already is kept.
    pub fn look(&mut self, pid: u32) {
        if let Ok(exe) = target::executable(pid) {
            self.build_id = build_id(format!("/proc/{pid}/exe").as_ref());
            self.exe = Some(exe);
        }
        if let Ok(directory) = std::fs::read_link(format!("/proc/{pid}/cwd")) {
            self.directory = directory;
        }
        if let Some(reach) = Reach::of(pid) {
            self.reach = Some(reach);
        }
    }

    /// The process is about to run this file: it can have ended before we look again.
    pub fn begins(&mut self, pid: u32, file: &Path) {
        self.look(pid);
        self.build_id = build_id(file);
        self.exe = Some(file.to_owned());
    }

    /// Options of its arguments, and of the variables that stand for options.
    pub fn options_of_command(&self) -> Options {
        self.options_of(&self.command)
    }

    fn options_of(&self, command: &[OsString]) -> Options {
        let variables = &self.variables.placing;
        let options = Options::parse(command, |name| variables.get(name).map(OsString::as_os_str));
        options.beside(self.variables.has_config_file)
    }

    /// Its executable, as it sees it.
    pub fn exe(&self) -> Option<String> {
        let exe = self.exe.as_deref()?;
        Some(exe.to_string_lossy().into_owned())
    }

    /// Whether a name of the process' own leads to the file that it has under this path.
    fn is_named(&self, name: &OsStr, path: &Path) -> bool {
        let file = |name: &Path| {
            let file = self.reach.as_ref()?.open(name).ok()?;
            let metadata = file.metadata().ok()?;
            Some((metadata.dev(), metadata.ino()))
        };
        match (file(name.as_ref()), file(path)) {
            (Some(named), Some(known)) => named == known,
            _ => self.directory.join(name) == path,
        }
    }

    /// For the document.
    pub fn describe(&self, pid: u32) -> stats::Process {
        stats::Process {
            pid,
            exe: self.exe(),
            build_id: self.build_id.clone(),
            command: redact::command(&self.command),
        }
    }
}

impl Targets {
    /// The process has shown an event: looks at it and its models, as long as that can bring
    /// something. A target that computes has mapped its model, and with a new context perhaps another.
    ///
    /// `key` is how its events name it. Gives whether the models were looked for.
    pub fn computes(&mut self, pid: u32, key: u32, is_main: bool, new_context: bool) -> bool {
        let target = if is_main {
            &mut self.main
        } else {
            self.others.entry(pid).or_default()
        };
        target.computes = true;
        if !new_context && target.looks >= MODEL_LOOKS {
            return false;
        }
        target.looks += 1;
        target.look(pid);
        if !is_main && target.command.is_empty() {
            target.command = target::command_line(pid).unwrap_or_default();
        }
        // A script can have set variables for what it became.
        let environment = target::environment(pid);
        if environment.iter().next().is_some() {
            let get = |name: &str| environment.get(name).map(Into::into);
            target.variables = Variables::from(&target::root(pid), get);
        }
        let files = target::mapped_files(pid).unwrap_or_default();
        if !files.is_empty() {
            let names = files
                .iter()
                .filter_map(|file| file.path.file_name()?.to_str());
            target.backends = Some(Backends::of_files(names));
        }
        let reach = target.reach.as_ref();
        // A script can have become another program, which need not have the script's arguments.
        let now = target::command_line(pid).unwrap_or_default();
        let mut found = models::mapped(pid, &files, reach, &self.models);
        for command in [&now, &target.command] {
            if found.has_none() && !self.models.knows(key) {
                let variable = target.variables.model.as_deref();
                found = models::named(command, variable, &target.directory, reach);
            }
        }
        if !found.is_empty() {
            target.looks = MODEL_LOOKS;
        }
        target.computes_with = match now.is_empty() {
            true => target.command.clone(),
            false => now,
        };
        self.models.add_process(key, &target.computes_with, found);
        true
    }

    /// Options that decide where a process has its tensors; `main` is the first process.
    pub fn options(&self, pid: u32, main: u32) -> Options {
        let target = match pid == main {
            true => Some(&self.main),
            false => self.others.get(&pid),
        };
        let Some(target) = target else {
            return Options::parse(&[], |_| None);
        };
        let options = target.options_of(&target.computes_with);
        let model = target.variables.model.as_deref();
        let file = |name: &OsStr| {
            let mut files = self.models.files().iter();
            let known = files.find(|known| target.is_named(name, known.path.as_ref()))?;
            Some(known.path.clone())
        };
        let main_file = target::model_argument(&target.computes_with).or(model);
        let main_file = main_file.and_then(file);
        let draft_file = options.draft_model().and_then(|name| file(name.as_ref()));
        let backends = target.backends.unwrap_or(Backends::Any);
        let mut options = options.of_process(backends, main_file, draft_file);
        // What a script starts gets no options of ours.
        options.adds_router = pid == main && router_on_cpu::insertion(&self.main.command).is_some();
        options
    }

    /// A process has set an eval callback, which is at this address.
    pub fn sets_callback(&mut self, pid: u32, address: u64) {
        let known = &mut self.callback_addresses;
        if known.len() == MAX_CALLBACKS || !known.insert((pid, address)) {
            return;
        }
        let callback = EvalCallback::at(pid, address);
        if !self.eval_callbacks.contains(&callback) {
            self.eval_callbacks.push(callback);
        }
    }

    /// What a trace says of a context, whose process is `pid` in our PID namespace.
    pub fn describe_context(&self, context: &Context, pid: u32) -> ContextDetail {
        let files = self.models.files();
        let of_process = self.models.indices_of(context.process);
        let fitting = stats::fitting_models(context, files, &of_process);
        let models = fitting.iter().map(|index| &files[*index]);
        ContextDetail {
            pid,
            models: models
                .filter_map(|model| serde_json::to_value(model).ok())
                .collect(),
        }
    }

    /// Processes that have shown events, for the document.
    pub fn describe(&self, main: u32) -> Vec<stats::Process> {
        let main = self.main.computes.then(|| self.main.describe(main));
        let others = self
            .others
            .iter()
            .map(|(pid, target)| target.describe(*pid));
        main.into_iter().chain(others).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{gguf::tests::Builder, placement::Role};

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn models_of_one_name_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["a", "b"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("m.gguf"), moe()).unwrap();
        }
        std::os::unix::fs::symlink(path("a/m.gguf"), path("draft.gguf")).unwrap();
        let command = format!(
            "llama-cli -m {} -md {}",
            path("b/m.gguf").display(),
            path("draft.gguf").display()
        );
        let pid = std::process::id();
        let reach = Reach::of(pid);
        let read = |name| {
            let command = words(&format!("llama-cli -m {}", path(name).display()));
            models::named(&command, None, directory.path(), reach.as_ref())
        };
        let mut targets = Targets::default();
        for name in ["a/m.gguf", "b/m.gguf"] {
            targets.models.add_process(pid, &[], read(name));
        }
        targets.main = Target {
            command: words("./script.sh"),
            computes_with: words(&command),
            reach: Reach::of(pid),
            ..Target::default()
        };
        let options = targets.options(pid, pid);
        let role = |name: &str| options.role_of(path(name).to_str());
        assert_eq!(role("a/m.gguf"), Some(Role::Draft));
        assert_eq!(role("b/m.gguf"), Some(Role::Main));
        // The script does not hand on what its own command line is given.
        assert!(options.understood && !options.adds_router);
        targets.main.command = words(&command);
        assert!(targets.options(pid, pid).adds_router);
    }

    fn moe() -> Vec<u8> {
        let model: Builder = crate::gguf::tests::moe();
        let model = model.tensor("blk.0.ffn_gate_inp.weight", &[8]);
        model.tensor("blk.0.ffn_up_exps.weight", &[8]).bytes()
    }

    #[test]
    fn what_a_script_became_has_variables_of_its_own() {
        let mut targets = Targets::default();
        targets.main.variables.override_tensor = Some("of the script".into());
        let pid = std::process::id();
        targets.computes(pid, pid, true, true);
        let now = std::env::var_os(OVERRIDE_VARIABLE);
        assert_eq!(targets.main.variables.override_tensor, now);
    }
}
