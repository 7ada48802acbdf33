//! What a user can change so that layers are seen: options of llama.cpp's programs and of ours, for
//! exactly the layers that are not. Pure.
//!
//! An option is named only when, by the program's command line and environment, it would do what it is
//! named for: an override of the user's own can stand before it.

use std::fmt;

use serde::Serialize;

use crate::{
    gguf::ModelShape,
    placement::{Options, Place, Position, Role},
    router_on_cpu,
};

/// Who has to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Whose {
    /// `expert-trace run`.
    ExpertTrace,
    /// The program that is traced, if it takes the options of llama.cpp's common/arg.cpp.
    Program,
    /// Neither: no option does it.
    Other,
}

/// One thing that a user can change. It is enough by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Remedy {
    /// Whose options they are.
    pub whose: Whose,
    /// Options and their values, word by word; none where no option does it.
    pub options: Vec<String>,
    /// Where the program's options go among those that it has.
    pub position: Option<Position>,
    /// The same in words.
    pub text: String,
    /// What it costs.
    pub cost: Option<&'static str>,
}

impl Remedy {
    /// One that is no option.
    pub fn other(text: &str) -> Self {
        Self {
            whose: Whose::Other,
            options: Vec::new(),
            position: None,
            text: text.to_owned(),
            cost: None,
        }
    }

    /// The same, with something else that it takes.
    pub fn and(mut self, what: &str) -> Self {
        self.text += &format!(", {what}");
        self
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        match self.cost {
            Some(cost) => write!(f, " ({cost})"),
            None => Ok(()),
        }
    }
}

/// Remedies as one sentence.
pub fn sentence(remedies: &[Remedy]) -> String {
    let texts: Vec<String> = remedies.iter().map(Remedy::to_string).collect();
    texts.join("; or ")
}

/// What keeps layers out of sight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Router and experts are on a device.
    OffTheDevice,
    /// Longer prompts are computed on a device, with weights that are streamed to it.
    NotStreamed,
}

/// How the program was started, and with what it is traced.
#[derive(Clone, Copy, Debug)]
pub struct Program<'a> {
    /// Its options.
    pub options: &'a Options,
    /// Which of its models the layers are of; none where that is not known, and there are two.
    pub role: Option<Role>,
    /// Whether ids by which weights are streamed to a device are certain to be seen.
    pub sees_streams: bool,
    /// Whether it was started with routers on the CPU already.
    pub router_on_cpu: bool,
    /// Whether it was running before it was traced.
    pub attached: bool,
}

/// Layers with experts; none where it is not known which there are.
#[derive(Clone, Copy, Debug)]
pub struct Layers<'a> {
    /// Those that are to be seen, ascending.
    pub wanted: &'a [u32],
    /// Their model.
    pub shape: &'a ModelShape,
}

/// What brings the ids of layers to the host, best first. Empty when the program's own options are in
/// the way of all.
pub fn remedies(need: Need, layers: Option<Layers<'_>>, program: &Program<'_>) -> Vec<Remedy> {
    let changes: &[Change] = match need {
        Need::OffTheDevice => &[
            Change::RouterOnCpu,
            Change::ExpertsOnCpu,
            Change::NoLayersOnDevice,
        ],
        Need::NotStreamed => &[Change::NoOpOffload],
    };
    let (router, changes): (Vec<Change>, Vec<Change>) = changes
        .iter()
        .partition(|change| **change == Change::RouterOnCpu);
    let changes = changes.iter();
    let options = changes.filter_map(|change| change.for_program(layers, program));
    let by_server = need == Need::OffTheDevice && program.options.rpc;
    let by_server = by_server.then(|| Remedy::other(TRACE_SERVER));
    let others: Vec<Remedy> = options.chain(by_server).collect();
    let router = router
        .iter()
        .filter_map(|_| router_on_cpu(layers, program))
        .collect();
    // What is done by one option comes first, and what may not be enough last.
    match program.options.adds_router && program.role.is_some() {
        true => [router, others].concat(),
        false => [others, router].concat(),
    }
}

/// An RPC server can be a CPU llama.cpp itself.
const TRACE_SERVER: &str = "attach to the RPC server's process, if it computes on its CPU";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    RouterOnCpu,
    ExpertsOnCpu,
    NoLayersOnDevice,
    NoOpOffload,
}

/// Whether routers of these layers were asked to be on the CPU.
pub fn has_router_on_cpu(layers: Option<Layers<'_>>, program: &Program<'_>) -> bool {
    let is_draft = program.role == Some(Role::Draft);
    let options = match is_draft {
        true => &program.options.of_draft(),
        false => program.options,
    };
    let asked_for = |layer: &u32| {
        let router = options.overridden(&router_tensor(*layer));
        !options.understood || router == Some(Place::Host)
    };
    let were_asked = match layers {
        Some(Layers { wanted, .. }) => wanted.iter().any(asked_for),
        None => !is_draft,
    };
    program.router_on_cpu && were_asked
}

fn router_on_cpu(layers: Option<Layers<'_>>, program: &Program<'_>) -> Option<Remedy> {
    const OPTION: &str = "--router-on-cpu";
    let by_token = layers.is_some_and(|Layers { wanted, shape }| {
        let mut wanted = wanted.iter();
        wanted.any(|layer| shape.chosen_by_token.contains(layer))
    });
    let is_draft = program.role == Some(Role::Draft);
    if has_router_on_cpu(layers, program) || is_draft || by_token {
        return None;
    }
    let mut text = match program.attached {
        true => format!("start it with expert-trace run {OPTION}"),
        false => format!("trace with {OPTION}"),
    };
    if !program.options.adds_router {
        text += &format!(
            ", and have the program set what --override-tensor '{}' --no-op-offload does in llama.cpp's \
             programs",
            router_on_cpu::OVERRIDE
        );
    }
    if program.role.is_none() {
        text += ", unless they are the draft model's";
    }
    Some(Remedy {
        whose: Whose::ExpertTrace,
        options: vec![OPTION.to_owned()],
        position: None,
        text,
        cost: Some("slower: the device waits for the host in every layer with experts"),
    })
}

impl Change {
    fn for_program(self, layers: Option<Layers<'_>>, program: &Program<'_>) -> Option<Remedy> {
        let Program {
            options,
            role,
            sees_streams,
            ..
        } = *program;
        let roles = match role {
            Some(role) => vec![role],
            // Whose they are is not known, so both models are told.
            None => vec![Role::Main, Role::Draft],
        };
        let own: Vec<(Role, Options)> = roles
            .into_iter()
            .map(|role| match role {
                Role::Main => (role, options.clone()),
                Role::Draft => (role, options.of_draft()),
            })
            .collect();
        let mut words: Vec<String> = own
            .iter()
            .flat_map(|(role, options)| self.words(*role, layers, options))
            .collect();
        let streams = options.streams() && !sees_streams;
        if streams || self == Change::NoOpOffload {
            words.push("--no-op-offload".to_owned());
        }
        let works = |position| {
            own.iter().all(|(_, options)| {
                self.is_done_by(&options.with(&words, position), layers, sees_streams)
            })
        };
        let certain = options.understood;
        let [before, after] =
            [Position::BeforeOthers, Position::AfterOthers].map(|at| match certain {
                true => works(at),
                // Of overrides the first counts, and of what is given again the last.
                false => (self == Change::NoLayersOnDevice) == (at == Position::AfterOthers),
            });
        let (position, place) = match (before, after) {
            (true, true) => (Position::BeforeOthers, ""),
            (true, false) => (Position::BeforeOthers, " before its other options"),
            (false, true) => (Position::AfterOthers, " behind its other options"),
            (false, false) => return None,
        };
        let shown: Vec<String> = words.iter().map(|word| quoted(word)).collect();
        let shown = shown.join(" ");
        let text = match options.understood {
            true => format!("start the program with {shown}{place}"),
            false => format!("have the program do what {shown} does in llama.cpp's programs"),
        };
        Some(Remedy {
            whose: Whose::Program,
            options: words,
            position: Some(position),
            text,
            cost: Some(self.cost(options.streams() && !streams)),
        })
    }

    /// The options for a model, which has these already.
    fn words(self, role: Role, layers: Option<Layers<'_>>, options: &Options) -> Vec<String> {
        let mut words = match self {
            Change::ExpertsOnCpu => experts_on_cpu(layers, options),
            Change::NoLayersOnDevice => vec!["-ngl".to_owned(), "0".to_owned()],
            Change::NoOpOffload | Change::RouterOnCpu => Vec::new(),
        };
        if role == Role::Draft {
            let words = words.iter_mut();
            words.for_each(|word| word.push_str(draft_suffix(word)));
        }
        words
    }

    /// What it costs; `streams` says that longer prompts are computed on a device all the same.
    fn cost(self, streams: bool) -> &'static str {
        match (self, streams) {
            (Change::ExpertsOnCpu, true) => "slower: the CPU computes these experts",
            (Change::ExpertsOnCpu, false) => {
                "slower, prompts most: the CPU computes these experts always"
            }
            (Change::NoLayersOnDevice, true) => "slowest: the CPU computes all but longer prompts",
            (Change::NoLayersOnDevice, false) => "slowest: the CPU computes everything",
            (Change::NoOpOffload | Change::RouterOnCpu, _) => {
                "slower prompts: the CPU computes what is in its memory"
            }
        }
    }

    /// Whether a program with these options does it.
    fn is_done_by(self, options: &Options, layers: Option<Layers<'_>>, sees_streams: bool) -> bool {
        if options.streams() && (!sees_streams || self == Change::NoOpOffload) {
            return false;
        }
        let (wanted, of) = layers.map_or((&STAND_INS[..], STAND_INS.len() as u32), |layers| {
            (layers.wanted, layers.shape.layers)
        });
        wanted.iter().all(|layer| match self {
            Change::ExpertsOnCpu => has_experts_on_cpu(*layer, of, options),
            Change::NoLayersOnDevice => {
                let router = options.overridden(&router_tensor(*layer));
                options.layer(*layer, of) == Place::Host
                    && router.is_none_or(|place| place == Place::Host)
                    && has_experts_on_cpu(*layer, of, options)
            }
            Change::NoOpOffload | Change::RouterOnCpu => true,
        })
    }
}

/// Layers that an option is tried on where those of the model are not known.
const STAND_INS: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

fn router_tensor(layer: u32) -> String {
    format!("blk.{layer}.ffn_gate_inp.weight")
}

/// Whether the experts of a layer, of so many, are in the host's memory.
fn has_experts_on_cpu(layer: u32, of: u32, options: &Options) -> bool {
    let on = options.layer(layer, of);
    ["up", "gate", "down"].into_iter().all(|part| {
        let place = options.overridden(&format!("blk.{layer}.ffn_{part}_exps.weight"));
        place.unwrap_or(on) == Place::Host
    })
}

/// The shortest option that keeps the experts of these layers, and of no others, in the host's memory.
fn experts_on_cpu(layers: Option<Layers<'_>>, options: &Options) -> Vec<String> {
    let all = || vec!["--cpu-moe".to_owned()];
    let Some(Layers { wanted, shape }) = layers else {
        return all();
    };
    let main = shape.main_layers();
    let mut with_experts = shape.moe_layers.iter().filter(|layer| **layer < main);
    let are_there =
        |layer: &u32| wanted.contains(layer) || has_experts_on_cpu(*layer, shape.layers, options);
    if with_experts.clone().all(|layer| wanted.contains(layer)) {
        return all();
    }
    let end = wanted.last().map_or(0, |last| last + 1);
    if with_experts.all(|layer| *layer >= end || are_there(layer)) {
        return vec!["--n-cpu-moe".to_owned(), end.to_string()];
    }
    let numbers: Vec<String> = wanted.iter().map(u32::to_string).collect();
    let numbers = match numbers.as_slice() {
        [one] => one.clone(),
        several => format!("({})", several.join("|")),
    };
    vec![
        "-ot".to_owned(),
        format!(r"blk\.{numbers}\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"),
    ]
}

/// What makes an option one of the draft model (common/arg.cpp).
fn draft_suffix(word: &str) -> &'static str {
    match word {
        "-ot" | "-ngl" => "d",
        "--cpu-moe" | "--n-cpu-moe" => "-draft",
        _ => "",
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=".contains(c);
    match word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{word}'"),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::{OsStr, OsString};

    use super::*;
    use crate::placement::Backends;

    /// Six layers, of which the first is dense.
    fn shape() -> ModelShape {
        ModelShape::with_experts_in(6, &[1, 2, 3, 4, 5])
    }

    fn program(options: &Options) -> Program<'_> {
        Program {
            options,
            role: Some(Role::Main),
            sees_streams: true,
            router_on_cpu: false,
            attached: false,
        }
    }

    fn options(command: &str) -> Options {
        let words: Vec<OsString> = command.split(' ').map(OsString::from).collect();
        Options::parse(&words, |_| None)
    }

    /// Options of all remedies for layers, with blanks between them.
    fn told(program: &Program<'_>, shape: &ModelShape, wanted: &[u32]) -> Vec<String> {
        let layers = Layers { wanted, shape };
        let remedies = remedies(Need::OffTheDevice, Some(layers), program);
        let remedies = remedies.iter().map(|remedy| remedy.options.join(" "));
        remedies.collect()
    }

    fn of_command(command: &str, wanted: &[u32]) -> Vec<String> {
        told(&program(&options(command)), &shape(), wanted)
    }

    #[test]
    fn options_name_exactly_the_layers() {
        let none = "-ngl 0";
        let router = "--router-on-cpu";
        let expect = |command, wanted: &[u32], experts| {
            assert_eq!(of_command(command, wanted), [router, experts, none]);
        };
        let all = [1, 2, 3, 4, 5];
        expect("llama-cli -ngl 99", &all, "--cpu-moe");
        expect("llama-cli", &all, "--cpu-moe");
        // The dense layer has no experts to move.
        expect("llama-cli -ngl 99", &[1, 2], "--n-cpu-moe 3");
        expect("llama-cli -ngl 99 -ncmoe 3", &[3, 4], "--n-cpu-moe 5");
        expect("llama-cli -ngl 2", &[4], "--n-cpu-moe 5");
        expect(
            "llama-cli -ngl 99",
            &[3, 5],
            r"-ot blk\.(3|5)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU",
        );
        let told = of_command("./serve.py -ngl 99", &all);
        assert_eq!(told, ["--cpu-moe", none, router]);
    }

    #[test]
    fn streams_that_may_be_out_of_sight_are_switched_off() {
        let options = options("llama-cli -ngl 99");
        let blind = Program {
            sees_streams: false,
            ..program(&options)
        };
        let told = told(&blind, &shape(), &[1, 2, 3, 4, 5]);
        let expected = [
            "--router-on-cpu",
            "--cpu-moe --no-op-offload",
            "-ngl 0 --no-op-offload",
        ];
        assert_eq!(told, expected);
        let streamed = remedies(Need::NotStreamed, None, &blind);
        assert_eq!(streamed[0].options, ["--no-op-offload"]);
        assert_eq!(streamed[0].text, "start the program with --no-op-offload");
    }

    /// To RPC servers, no weights are streamed.
    #[test]
    fn op_offload_is_told_of_where_there_is_any() {
        let options = |backends| {
            let options = options("llama-cli -ngl 99 --rpc h:1");
            options.of_process(backends, None, None)
        };
        let first = |options: &Options| {
            let blind = Program {
                sees_streams: false,
                ..program(options)
            };
            let told = remedies(Need::OffTheDevice, None, &blind);
            (told[1].options.join(" "), told[1].cost.unwrap())
        };
        let cost = "slower, prompts most: the CPU computes these experts always";
        let expected = |words: &str| (words.to_owned(), cost);
        assert_eq!(first(&options(Backends::Rpc)), expected("--cpu-moe"));
        let any = first(&options(Backends::Any));
        assert_eq!(any, expected("--cpu-moe --no-op-offload"));
    }

    /// Of the layers nobody knows which there are; that a later option wins is known.
    #[test]
    fn options_for_unknown_layers_work_among_the_users_own() {
        let remedies_for = |command| {
            let options = options(command);
            let remedies = remedies(Need::OffTheDevice, None, &program(&options));
            let told = remedies.into_iter().filter(|of| of.whose == Whose::Program);
            told.map(|of| (of.options.join(" "), of.position.unwrap()))
                .collect::<Vec<_>>()
        };
        let experts = ("--cpu-moe".to_owned(), Position::BeforeOthers);
        let none = |position| ("-ngl 0".to_owned(), position);
        let after = none(Position::AfterOthers);
        assert_eq!(
            remedies_for("llama-cli -ngl 99"),
            [experts.clone(), after.clone()]
        );
        assert_eq!(remedies_for("llama-cli -ngl 1"), [experts.clone(), after]);
        let before = none(Position::BeforeOthers);
        assert_eq!(remedies_for("llama-cli"), [experts.clone(), before]);
        // -ngl 0 would leave these experts on their device.
        let own = "llama-cli -ngl 99 -ot exps=CUDA0";
        assert_eq!(remedies_for(own), [experts]);
    }

    /// Of overrides the first that matches counts, of other options the last, and variables come before
    /// both.
    #[test]
    fn options_of_the_users_own_can_be_in_the_way() {
        let wanted = [3, 5];
        let own = options("llama-cli -ngl 99 -ot exps=CUDA0");
        let shape = shape();
        let layers = Some(Layers {
            wanted: &wanted,
            shape: &shape,
        });
        let [router, experts] = &remedies(Need::OffTheDevice, layers, &program(&own))[..] else {
            panic!("-ngl 0 leaves experts on the device");
        };
        assert_eq!(router.position, None);
        assert_eq!(experts.position, Some(Position::BeforeOthers));
        assert!(experts.text.ends_with(" before its other options"));
        assert!(experts.text.contains(" -ot 'blk"), "{experts}");

        let plain = options("llama-cli -ngl 99");
        let none = remedies(Need::OffTheDevice, layers, &program(&plain)).pop();
        assert_eq!(none.unwrap().position, Some(Position::AfterOthers));

        let variable = |name: &str| {
            let is_override = name == "LLAMA_ARG_OVERRIDE_TENSOR";
            is_override.then_some(OsStr::new("exps=CUDA0"))
        };
        let command = ["llama-cli", "-ot", r"blk\.[2-5]\.ffn_gate_inp=CPU"].map(OsString::from);
        let own = Options::parse(&command, variable);
        let asked = Program {
            router_on_cpu: true,
            ..program(&own)
        };
        assert_eq!(remedies(Need::OffTheDevice, layers, &asked), []);
        // The router of another layer was asked for.
        let router = &told(&asked, &shape, &[1])[..];
        assert_eq!(router, ["--router-on-cpu"]);
    }

    #[test]
    fn what_cannot_work_is_not_told() {
        let mut shape = shape();
        shape.chosen_by_token.insert(1);
        let rpc = options("llama-server -ngl 99 --rpc localhost:1 -md /m/draft.gguf");
        let all = [1, 2, 3, 4, 5];
        // Logits choose nothing in the first; what an RPC server computes can be seen there.
        assert_eq!(
            told(&program(&rpc), &shape, &all),
            ["--cpu-moe", "-ngl 0", ""]
        );
        assert_eq!(
            told(&program(&rpc), &shape, &all[1..])[0],
            "--router-on-cpu"
        );
        let draft = Program {
            role: Some(Role::Draft),
            ..program(&rpc)
        };
        let told = told(&draft, &shape, &all);
        assert_eq!(told, ["--cpu-moe-draft", "-ngld 0", ""]);
    }

    /// Of a draft model, the main model's options change nothing.
    #[test]
    fn a_draft_model_is_told_by_its_own_options() {
        let options = options("llama-cli -ngl 0 -ngld 99 -md /m/draft.gguf");
        let of_role = |role| {
            let program = Program {
                role,
                ..program(&options)
            };
            let told = remedies(Need::OffTheDevice, None, &program).into_iter();
            let told = told.map(|of| (of.options.join(" "), of.position));
            told.collect::<Vec<_>>()
        };
        let [before, after] = [Position::BeforeOthers, Position::AfterOthers].map(Some);
        let draft = [
            ("--cpu-moe-draft".to_owned(), before),
            ("-ngld 0".to_owned(), after),
        ];
        assert_eq!(of_role(Some(Role::Draft)), draft);
        let either = [
            ("--cpu-moe --cpu-moe-draft".to_owned(), before),
            ("-ngl 0 -ngld 0".to_owned(), after),
            ("--router-on-cpu".to_owned(), None),
        ];
        assert_eq!(of_role(None), either);
    }

    /// To a program that takes no options of llama.cpp's, `--router-on-cpu` adds nothing.
    #[test]
    fn what_a_program_has_to_do_by_itself_is_told() {
        let told = |command| {
            let options = options(command);
            remedies(Need::OffTheDevice, None, &program(&options))
        };
        let other = told("./my-server -ngl 99");
        let [experts, none, router] = &other[..] else {
            panic!("{other:?}");
        };
        assert_eq!(experts.position, Some(Position::BeforeOthers));
        assert_eq!(none.position, Some(Position::AfterOthers));
        assert_eq!(router.options, ["--router-on-cpu"]);
        let pattern = router_on_cpu::OVERRIDE;
        assert!(router.text.contains(pattern), "{router}");
        let bench = &told("llama-bench -m m")[0];
        assert_eq!(bench.text, "trace with --router-on-cpu");
        assert!(told("llama-bench -ot x=CPU")[2].text.contains(pattern));
    }
}
