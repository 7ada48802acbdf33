//! What a target consists of: its files, what can be probed in them, and its models. Looks, and
//! starts nothing.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use expert_trace_common::Route;

use super::{
    age::{self, Age},
    callback::Callbacks,
    elf::{self, Anatomy},
    linker::{Code, Linker, Search},
    report::{Answer, Build, Check, Loaded, Planned, TargetKind},
};
use crate::{
    bounded::{self, Bounded},
    caller::{Account, Environment},
    diagnosis::{self, Untraceable},
    gguf::shard_paths,
    launch,
    layout::Layout,
    models::{self, KnownModels},
    placement::Options,
    probes::{Change, Hook, Mapper, Plan, Probe},
    redact, router_on_cpu,
    routes::Routes,
    silence,
    stats::ModelFile,
    summary::ranges,
    target::{self, Reach, is_gguf, open_regular, printable, script_interpreter},
};

/// A command as `run` would start it.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// The program and its arguments.
    pub arguments: &'a [OsString],
    /// Its environment.
    pub environment: &'a Environment,
    /// Who would run it.
    pub account: &'a Account,
    /// Ways to read routing.
    pub routes: Routes,
}

/// What was found of a target.
#[derive(Debug)]
pub struct Survey {
    /// How it was named.
    pub kind: TargetKind,
    /// The process.
    pub pid: Option<u32>,
    /// Its command line, redacted.
    pub command: Vec<String>,
    /// What was looked at.
    pub checks: Vec<Check>,
    /// Files that matter.
    pub files: Vec<Build>,
    /// The probes, in their order.
    pub plan: Plan,
    /// So many of them are in files that the target certainly has.
    pub certain: usize,
    /// Whether it has an eval callback.
    pub callbacks: Callbacks,
    /// Model files.
    pub models: Vec<ModelFile>,
    /// What its command line says.
    pub options: Options,
    /// First shard of the model that its command line or environment names.
    named_model: Option<PathBuf>,
}

impl Survey {
    fn new(kind: TargetKind, plan: Plan, options: Options) -> Self {
        Self {
            kind,
            pid: None,
            command: Vec::new(),
            checks: Vec::new(),
            files: Vec::new(),
            plan,
            certain: 0,
            callbacks: Callbacks::default(),
            models: Vec::new(),
            options,
            named_model: None,
        }
    }

    /// Adds a file, which `probes` of the plan are in. Those that have nothing to do with llama.cpp are
    /// left out, but for the first, which is the program.
    fn add(&mut self, path: &Path, anatomy: &Anatomy, build_id: Option<String>, loaded: Loaded) {
        let shown = path.to_string_lossy().into_owned();
        if anatomy.eval_callback || !anatomy.eval_callbacks.is_empty() {
            self.callbacks.add(&shown, &anatomy.eval_callbacks);
        }
        let matters = self.files.is_empty()
            || !anatomy.devices.is_empty()
            || self.plan.probes.iter().any(|probe| probe.file == shown);
        if matters {
            self.files.push(Build {
                path: shown,
                build_id,
                loaded,
                is_static: anatomy.is_static(),
                stripped: !anatomy.symtab,
                devices: anatomy.devices.iter().map(|of| (*of).to_owned()).collect(),
            });
        }
    }

    /// Devices that the target has or may load. RPC servers are none unless they are named.
    pub fn devices(&self) -> Vec<String> {
        let mut devices: Vec<String> = Vec::new();
        for device in self.files.iter().flat_map(|file| &file.devices) {
            if !devices.contains(device) && (device != "rpc" || self.options.rpc) {
                devices.push(device.clone());
            }
        }
        devices
    }

    /// Index of the model that the options are about.
    pub fn main_model(&self) -> Option<usize> {
        let named = match (self.models.as_slice(), &self.named_model) {
            ([_], _) => return Some(0),
            (_, named) => named.as_deref()?,
        };
        let called = |name: &Path| -> Vec<usize> {
            let models = self.models.iter().enumerate();
            models
                .filter(|(_, model)| Path::new(&model.path).ends_with(name))
                .map(|(index, _)| index)
                .collect()
        };
        let mut by_name = [named, Path::new(named.file_name()?)]
            .map(called)
            .into_iter();
        // Another directory can have a file of the same name.
        by_name.find_map(|models| match models.as_slice() {
            [only] => Some(*only),
            _ => None,
        })
    }

    /// The probes, for the report: those in files that it certainly has, and others.
    pub fn planned(&self) -> (Vec<Planned>, Vec<Planned>) {
        let (certain, possible) = self.plan.probes.split_at(self.certain);
        let planned = |probes: &[Probe]| probes.iter().map(planned).collect();
        (planned(certain), planned(possible))
    }

    /// What is known of the layouts of libraries with expert ids, in the order of their probes.
    pub fn layouts(&self) -> Vec<Layout> {
        self.plan.of(Hook::ExpertIds).map(declared_layout).collect()
    }

    /// Looks for the functions that show expert ids, and for what the layout is.
    /// Files that are passed over although they have the functions.
    fn take_refusals(&mut self, changes: impl IntoIterator<Item = Change>) {
        let refusals = changes.into_iter().filter_map(|change| change.refusal);
        let checks = refusals.map(|refusal| Check::no(FUNCTIONS, refusal, "another build of it"));
        self.checks.extend(checks);
    }

    fn check_functions(&mut self, otherwise: impl FnOnce(&Self) -> Check) {
        let showing: Vec<&Probe> = self.plan.of(Hook::ExpertIds).collect();
        let certain = self.plan.probes[..self.certain].iter();
        let is_certain = certain.clone().any(|of| of.hook == Hook::ExpertIds);
        let check = match showing.as_slice() {
            [] => otherwise(self),
            [probe, ..] if is_certain => Check::yes(
                FUNCTIONS,
                format!("{} in {}", probe.symbol, printable(probe.file.as_ref())),
            ),
            [probe, ..] => Check::yes(
                FUNCTIONS,
                format!(
                    "{} in {}, of which one is loaded when the program looks for backends: {}",
                    probe.symbol,
                    count(showing.len(), "file"),
                    printable(probe.file.as_ref())
                ),
            ),
        };
        self.checks.push(check);
        if !showing.is_empty() {
            self.checks.push(check_layout(&showing));
        }
    }
}

const PROGRAM: &str = "program";
const FUNCTIONS: &str = "functions";
const LAYOUT: &str = "layout";
const MODEL: &str = "model";

fn count(number: usize, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        number => format!("{number} {what}s"),
    }
}

/// The layout of ggml's structs that a library declares; all of it is unknown where tensors have to
/// show it.
fn declared_layout(probe: &Probe) -> Layout {
    Layout::new(probe.declared, None)
}

/// Whether the layout of ggml's structs is one that the probes know: the worst of all libraries.
fn check_layout(showing: &[&Probe]) -> Check {
    let checks = showing.iter().map(|probe| check_layout_of(probe));
    let worst = checks.reduce(|worst, next| match next.answer > worst.answer {
        true => next,
        false => worst,
    });
    worst.unwrap_or_else(|| Check::yes(LAYOUT, "no library needs one"))
}

fn check_layout_of(probe: &Probe) -> Check {
    const TRACE_IT: &str = "trace it: the summary says whether the layout is known";
    let shown = printable(probe.file.as_ref());
    let layout = declared_layout(probe);
    match (layout.found_by, layout.builds) {
        (Some(_), Some(builds)) => {
            let finding = format!("of ggml_tensor: declared by DWARF ({builds})");
            return Check::yes(LAYOUT, finding);
        }
        (Some(_), None) => {
            let finding = format!(
                "of ggml_tensor: DWARF in {shown} declares one of no known build, which is read for \
                 routers on the CPU alone"
            );
            return Check::could_not_tell(LAYOUT, finding, TRACE_IT);
        }
        (None, _) => {}
    }
    match open_regular(&probe.attach_path).and_then(|file| age::of(&file)) {
        Ok(Age::Known) => Check::yes(
            LAYOUT,
            "of ggml_tensor: of b3209 or newer, by the words of its code; names of the first tensors \
             show which, and none is assumed before",
        ),
        Ok(Age::TooOld) => Check::no(
            LAYOUT,
            format!("ggml in {shown} is older than b3209, by the words of its code"),
            "a build of b3209 (2024-06-24) or newer, or one with DWARF (-g)",
        ),
        Ok(Age::Unknown) => Check::could_not_tell(
            LAYOUT,
            format!("nothing in {shown} says whether its ggml is of b3209 or newer"),
            TRACE_IT,
        ),
        Err(error) => {
            Check::could_not_tell(LAYOUT, format!("cannot read {shown}: {error}"), TRACE_IT)
        }
    }
}

fn planned(probe: &Probe) -> Planned {
    let mut code = [0; 16];
    let read = open_regular(&probe.attach_path)
        .and_then(|file| file.read_at(&mut code, probe.definition.file_offset))
        .unwrap_or(0);
    Planned {
        on_return: probe.hook.on_return(),
        hit_per: hit_per(probe.hook),
        single_stepped: elf::is_single_stepped(&code[..read]),
        probe: probe.clone(),
    }
}

/// How often a function is entered.
fn hit_per(hook: Hook) -> &'static str {
    match hook {
        Hook::ExpertIds => "GET_ROWS node and thread",
        Hook::Split | Hook::SplitDone => "part of a graph on the CPU",
        Hook::Fetch => "copy that is asked of a device",
        Hook::WeightsFollow => "copy to a device",
        Hook::TensorGet | Hook::TensorGetDone => "tensor that the program asks for",
        Hook::EvalCallback => "graph that is allocated",
        Hook::DeviceMulMatId => "MUL_MAT_ID node on CUDA",
        Hook::DeviceMemcpy => "copy by CUDA",
        Hook::PassBegin | Hook::Ubatch | Hook::Context => "pass",
        Hook::ContextEnd | Hook::SchedulerEnd => "end of a context",
        Hook::Libraries => "change of the loaded libraries",
    }
}

/// Looks at a command. Files are opened with the rights of who would run it.
pub fn command(command: &Command<'_>) -> Survey {
    let Command {
        arguments,
        environment,
        account,
        routes,
    } = *command;
    let options = Options::parse(arguments, |name| environment.get(name));
    let has_config_file = target::has_config_file("/".as_ref(), |name| environment.get(name));
    let options = options.beside(has_config_file);
    let plan = Plan::gated().with_routes(routes);
    let mut survey = Survey::new(TargetKind::Command, plan, options);
    survey.command = redact::command(arguments);
    let program = arguments
        .first()
        .map(OsString::as_os_str)
        .unwrap_or_default();
    let looked = account.with_rights(|| {
        let found = launch::find(program, environment.get("PATH"))
            .and_then(|path| launch::check(&path).map(|()| path));
        match found {
            Ok(path) => look_at_program(&mut survey, &path, environment),
            Err(error) => {
                let fix = "give the path of a program that is built for this machine";
                survey
                    .checks
                    .push(Check::no(PROGRAM, error.to_string(), fix));
            }
        }
        Ok(())
    });
    if let Err(error) = looked {
        let fix = "call expert-trace with sudo";
        survey
            .checks
            .push(Check::no(PROGRAM, error.to_string(), fix));
    }
    if survey.files.is_empty() {
        return survey;
    }
    let reach = Reach::of_account(account.clone()).ok();
    let directory = std::env::current_dir().unwrap_or_default();
    let variable = environment.get("LLAMA_ARG_MODEL");
    let found = models::named(arguments, variable, &directory, reach.as_ref());
    survey.look_at_models(found, arguments, variable, reach.as_ref());
    survey
}

/// Looks at a program or a library that nobody has named a model for.
pub fn binary(path: &Path, environment: &Environment, account: &Account) -> Survey {
    let options = Options::parse(&[path.into()], |_| None);
    let mut survey = Survey::new(TargetKind::Binary, Plan::gated(), options);
    let looked = account.with_rights(|| {
        look_at_program(&mut survey, path, environment);
        Ok(())
    });
    if let Err(error) = looked {
        let fix = "call expert-trace with sudo";
        survey
            .checks
            .push(Check::no(PROGRAM, error.to_string(), fix));
    }
    survey
}

fn look_at_program(survey: &mut Survey, path: &Path, environment: &Environment) {
    let shown = printable(path);
    if let Ok(file) = open_regular(path)
        && let Some(interpreter) = script_interpreter(&file)
    {
        let interpreter = printable(&interpreter);
        survey.checks.push(Check::could_not_tell(
            PROGRAM,
            format!("{shown} is a script for {interpreter}: what it starts shows when it runs (run follows it)"),
            "expert-trace doctor -- the command that the script ends in",
        ));
        return;
    }
    let program = match Code::open(path) {
        Ok(program) => program,
        Err(error) => {
            let finding = format!("{shown}: {error}");
            let fix = "give a readable program or library of this machine";
            survey.checks.push(Check::no(PROGRAM, finding, fix));
            return;
        }
    };
    let directory = program.path.parent().map(Path::to_owned);
    let mut linker = Linker::new(Search {
        library_path: environment.get("LD_LIBRARY_PATH").map(Into::into),
        preload: environment.get("LD_PRELOAD").map(Into::into),
    });
    let mut closure = linker.closure(program);
    let files = closure.files.len();
    for code in &closure.files {
        add_code(survey, code, Loaded::AtStart);
    }
    survey.certain = survey.plan.probes.len();
    if survey.plan.of_llama_cpp().is_some()
        && let Some(directory) = directory
    {
        let mut backends = backends(&directory);
        backends.extend(self::backends(Path::new(".")));
        backends.extend(environment.get("GGML_BACKEND_PATH").map(PathBuf::from));
        linker.gave_up |= backends.len() > MAX_BACKENDS;
        backends.truncate(MAX_BACKENDS);
        let backends = backends.iter().filter_map(|path| Code::open(path).ok());
        for code in backends.flat_map(|code| linker.closure(code).files) {
            if !closure.files.iter().any(|known| known.is(&code)) {
                add_code(survey, &code, Loaded::Perhaps);
                closure.files.push(code);
            }
        }
    }
    survey.checks.push(if linker.gave_up {
        Check::could_not_tell(
            PROGRAM,
            format!("{shown} asks for more libraries, or in more directories, than are looked at"),
            "start it, if you trust it, and: sudo expert-trace doctor --pid PID",
        )
    } else if closure.missing.is_empty() {
        let finding = match files - 1 {
            0 => shown,
            libraries => format!("{shown}, with {libraries} libraries"),
        };
        Check::yes(PROGRAM, finding)
    } else {
        let names: Vec<String> = closure
            .missing
            .iter()
            .map(|name| printable(name.as_ref()))
            .collect();
        let finding = format!(
            "{shown} needs {}, which was not found, or may not be read",
            names.join(", ")
        );
        Check::no(PROGRAM, finding, "name its directory in LD_LIBRARY_PATH")
    });
    survey.check_functions(|survey| without_functions(survey, &closure.files));
}

/// Stands for the process that a program has not become yet.
const THE_PROGRAM: u32 = 0;

fn add_code(survey: &mut Survey, code: &Code, loaded: Loaded) {
    let options = survey.options.clone();
    let mapper = Mapper {
        process: Some(THE_PROGRAM),
        options: &|| Some(options.clone()),
    };
    match survey
        .plan
        .add_file(&code.file, &code.path, &code.path, mapper)
    {
        Ok(change) => survey.take_refusals([change]),
        Err(error) => tracing::debug!("{}: {error}", printable(&code.path)),
    }
    let build_id = crate::probes::build_id(&code.path);
    survey.add(&code.path, &code.anatomy, build_id, loaded);
}

/// Most backends that are looked at. ggml has some dozens, each for some processors or a device.
const MAX_BACKENDS: usize = 256;

/// Backends in a directory, in the order of their names. ggml looks for them beside the executable and in
/// the current directory (`ggml_backend_load_best` in ggml/src/ggml-backend-reg.cpp), and loads the one
/// that the variable `GGML_BACKEND_PATH` names.
fn backends(directory: &Path) -> Vec<PathBuf> {
    let is_backend = |name: &OsStr| {
        let name = name.to_string_lossy();
        name.starts_with("libggml-") && name.ends_with(".so")
    };
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .filter(|entry| is_backend(&entry.file_name()))
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths
}

/// Why no function was found that shows expert ids.
fn without_functions(survey: &Survey, files: &[Code]) -> Check {
    const PID: &str = "start it, and: sudo expert-trace doctor --pid PID";
    if let Some(probe) = survey.plan.of_llama_cpp() {
        return Check::could_not_tell(
            FUNCTIONS,
            format!(
                "llama.cpp is there ({}), and no CPU backend among the files that it is known to load",
                printable(probe.file.as_ref())
            ),
            PID,
        );
    }
    let stripped = files
        .iter()
        .find(|code| diagnosis::contains_llama_cpp(&code.path));
    match stripped {
        Some(code) => Check::no(
            FUNCTIONS,
            silence::without_symbols(&code.path),
            "an unstripped build, or one with shared libraries",
        ),
        None => Check::could_not_tell(
            FUNCTIONS,
            "none of its files contains llama.cpp: what it starts or loads shows when it runs",
            PID,
        ),
    }
}

/// Looks at a process, as `attach` does.
pub fn process(pid: u32, router_on_cpu: bool, routes: &[Route]) -> Survey {
    let arguments = target::command_line(pid).unwrap_or_default();
    let environment = target::environment(pid);
    let override_tensor = environment.get(router_on_cpu::OVERRIDE_VARIABLE);
    let logits = router_on_cpu || router_on_cpu::is_asked_for(&arguments, override_tensor);
    let options = Options::parse(&arguments, |name| environment.get(name));
    let has_config_file = target::has_config_file(&target::root(pid), |name| environment.get(name));
    let options = options.beside(has_config_file);
    let plan = Plan::default().with_routes(Routes::asked_for(routes, logits));
    let mut survey = Survey::new(TargetKind::Process, plan, options);
    survey.pid = Some(pid);
    survey.command = redact::command(&arguments);
    if let Err(error) = diagnosis::check_process(pid) {
        survey
            .checks
            .push(Check::no(PROGRAM, error.to_string(), fix(&error)));
        return survey;
    }
    let files = match target::mapped_files(pid) {
        Ok(files) => files,
        Err(error) => {
            let finding = format!("cannot read what process {pid} maps: {error}");
            survey
                .checks
                .push(Check::no(PROGRAM, finding, "call expert-trace with sudo"));
            return survey;
        }
    };
    let exe = target::executable(pid).unwrap_or_default();
    survey.checks.push(Check::yes(PROGRAM, printable(&exe)));
    let changes = survey.plan.extend(pid, &files);
    survey.take_refusals(changes);
    survey.certain = survey.plan.probes.len();
    let (executable, libraries): (Vec<_>, Vec<_>) = files
        .iter()
        .filter(|file| file.is_executable())
        .partition(|file| file.path == exe);
    for file in executable.into_iter().chain(libraries) {
        let path = file.reachable_path(pid);
        if let Ok(anatomy) = open_regular(&path).and_then(|open| anatomy(&open)) {
            let build_id = crate::probes::build_id(&path);
            survey.add(&file.path, &anatomy, build_id, Loaded::Mapped);
        }
    }
    survey.check_functions(|survey| {
        let error = diagnosis::no_expert_ids(pid, &files, &survey.plan);
        match error {
            Untraceable::NoBackendYet { .. } => {
                let fix = format!("sudo expert-trace attach --pid {pid}");
                Check::could_not_tell(FUNCTIONS, error.to_string(), fix)
            }
            error => Check::no(FUNCTIONS, error.to_string(), fix(&error)),
        }
    });
    let reach = Reach::of(pid);
    let variable = environment.get("LLAMA_ARG_MODEL");
    let mut found = models::mapped(pid, &files, reach.as_ref(), &KnownModels::default());
    if found.has_none() {
        let directory = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        found = models::named(&arguments, variable, &directory, reach.as_ref());
    }
    survey.look_at_models(found, &arguments, variable, reach.as_ref());
    survey
}

fn anatomy(file: &File) -> io::Result<Anatomy> {
    let cache = bounded::cache(file);
    elf::look(Bounded(&cache)).map_err(io::Error::other)
}

/// What to do about a process that cannot be traced.
fn fix(error: &Untraceable) -> &'static str {
    match error {
        Untraceable::Forbidden { .. } => "call expert-trace with sudo, on the host",
        Untraceable::NoMainThread { .. } => "expert-trace run -- COMMAND",
        Untraceable::Stripped { .. } => "an unstripped build, or one with shared libraries",
        Untraceable::Foreign { .. } => "a build for this machine",
        _ => "expert-trace doctor --pid PID, of the process that computes: pgrep -a llama",
    }
}

impl Survey {
    fn look_at_models(
        &mut self,
        found: KnownModels,
        arguments: &[OsString],
        variable: Option<&OsStr>,
        reach: Option<&Reach>,
    ) {
        self.models = found.into_files();
        let named = target::model_argument(arguments).or(variable);
        self.named_model = named.and_then(|name| shard_paths(Path::new(name)).into_iter().next());
        let check = match self
            .models
            .iter()
            .find(|of| !of.shape.moe_layers.is_empty())
        {
            Some(model) => Check::yes(MODEL, describe(model)),
            None => match self.models.first() {
                Some(model) => Check::no(
                    MODEL,
                    silence::dense(model),
                    "a model with experts: there is nothing to route in this one",
                ),
                None => without_model(arguments, variable, reach),
            },
        };
        self.checks.push(check);
    }

    /// The worst of what is expected of layers that run without being asked for.
    pub fn check_coverage(&mut self, coverage: &[super::coverage::Expectation]) {
        let mut expected = coverage.iter().filter(|of| of.always_run);
        if expected.clone().next().is_none() {
            return;
        }
        let answer = Answer::worst(expected.clone().map(|of| of.answer));
        let check = match expected.find(|of| of.answer == answer) {
            Some(of) if answer != Answer::Yes => Check {
                check: COVERAGE,
                answer,
                finding: format!("layers {}: {}", ranges(&of.layers), of.finding),
                fix: of.fix.clone(),
            },
            _ => Check::yes(COVERAGE, "every layer with experts is expected to be seen"),
        };
        self.checks.push(check);
    }
}

const COVERAGE: &str = "coverage";

fn describe(model: &ModelFile) -> String {
    let shape = &model.shape;
    let shards = shard_paths(Path::new(&model.path)).len();
    let used: Vec<u32> = shape
        .moe_layers
        .iter()
        .map(|of| shape.n_expert_used.of(*of))
        .collect();
    let (least, most) = (used.iter().min(), used.iter().max());
    let k = match (least, most) {
        (Some(least), Some(most)) if least != most => format!("{least} to {most}"),
        (_, most) => most.copied().unwrap_or(0).to_string(),
    };
    let shards = match shards {
        1 => String::new(),
        shards => format!(", {shards} shards"),
    };
    format!(
        "{}: {}, {} of {} layers with {} experts, {k} of them chosen per token{shards}",
        printable(Path::new(&model.path)),
        printable(Path::new(&shape.arch)),
        shape.moe_layers.len(),
        shape.layers,
        shape.n_expert,
    )
}

/// Why there is no model.
fn without_model(arguments: &[OsString], variable: Option<&OsStr>, reach: Option<&Reach>) -> Check {
    const NAME_IT: &str = "name a GGUF file: -m FILE";
    let Some(name) = target::model_argument(arguments).or(variable) else {
        return Check::could_not_tell(
            MODEL,
            "no model file is mapped, or named by -m, --model or LLAMA_ARG_MODEL",
            NAME_IT,
        );
    };
    let name = Path::new(name);
    let opened = match reach {
        Some(reach) => reach.open(name),
        None => Err(io::ErrorKind::NotFound.into()),
    };
    let why = match opened {
        Err(error) => error.to_string(),
        Ok(file) if !is_gguf(&file) => "is no GGUF file".to_owned(),
        Ok(_) => "its header, or one of its files, cannot be read, as the warning says".to_owned(),
    };
    Check::no(MODEL, format!("{}: {why}", printable(name)), NAME_IT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_as_people_write_them() {
        assert_eq!(ranges(&[]), "");
        assert_eq!(ranges(&[3]), "3");
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
    }

    #[test]
    fn backends_are_those_of_ggml() {
        let directory = tempfile::tempdir().unwrap();
        for name in [
            "libggml-cuda.so",
            "libggml-cpu-haswell.so",
            "libllama.so",
            "libggml-cpu.so.0",
        ] {
            File::create(directory.path().join(name)).unwrap();
        }
        let found = backends(directory.path());
        let names: Vec<_> = found.iter().filter_map(|path| path.file_name()).collect();
        assert_eq!(names, ["libggml-cpu-haswell.so", "libggml-cuda.so"]);
        assert_eq!(backends(Path::new("/no/such")), Vec::<PathBuf>::new());
    }
}
