//! A llama-server that others have built, stripped, on the CPU: several users whose tokens share passes,
//! and two models in one process.

use std::{collections::BTreeMap, process::Command, thread};

use expert_trace_tests::{
    oracle::Oracle,
    server::Server,
    tracer::{self, Attached, Stats, count},
};
use serde_json::json;

use crate::support::{Files, Known, driver, ids, known_draft, known_small, prebuilt};

fn server(model: &Known, options: &[&str]) -> Command {
    let mut command = Command::new(prebuilt().vulkan_server.join("llama-server"));
    command.arg("-m").arg(&model.path).args(options);
    command.args(["--device", "none", "--no-warmup"]);
    command
}

fn start(mut command: Command, files: &Files) -> Server {
    command.env("LD_LIBRARY_PATH", &prebuilt().vulkan_server);
    Server::start(&mut command, &files.path("said")).unwrap()
}

/// Fails unless the rows are those of the tokens, in any order.
fn assert_rows(known: &Known, layer: u32, rows: &[Vec<u32>], tokens: &[u32]) {
    let mut expected: Vec<&[u32]> = tokens
        .iter()
        .map(|token| known.expected.ids(layer, *token))
        .collect();
    let mut rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    expected.sort_unstable();
    rows.sort_unstable();
    assert_eq!(rows, expected, "layer {layer}");
}

const USERS: u32 = 4;
const PROMPT: u32 = 30;
/// Tokens that each user gets; all but the last are decoded.
const ANSWER: u32 = 100;

/// Has the server answer all users at once; gives the tokens that have gone through the model, and those
/// of them whose output was wanted.
fn ask(server: &Server) -> (Vec<u32>, Vec<u32>) {
    let ask = |user: u32| {
        let prompt: Vec<u32> = (1000 + 50 * user..).take(PROMPT as usize).collect();
        let answer = server.complete(&prompt, ANSWER as usize).unwrap();
        let decoded = &answer[..ANSWER as usize - 1];
        let outputs = [&prompt[PROMPT as usize - 1..], decoded].concat();
        ([&prompt, decoded].concat(), outputs)
    };
    let ask = &ask;
    let (tokens, outputs): (Vec<Vec<u32>>, Vec<Vec<u32>>) = thread::scope(|scope| {
        let users: Vec<_> = (0..USERS)
            .map(|user| scope.spawn(move || ask(user)))
            .collect();
        users.into_iter().map(|user| user.join().unwrap()).unzip()
    });
    (tokens.concat(), outputs.concat())
}

/// Fails unless each token has its experts in each layer, and all that was generated is decode.
fn assert_users(files: &Files, (tokens, outputs): &(Vec<u32>, Vec<u32>)) {
    let known = known_small();
    let stats = files.stats();
    stats.assert_complete();
    let rows = files.rows();
    let counts = stats.counts();
    let layers = known.expected.layers();
    assert_eq!(counts.len(), layers as usize);
    for layer in 0..layers {
        let last = layer + 1 == layers;
        let tokens = if last { outputs } else { tokens };
        assert_rows(known, layer, &rows[&layer], tokens);
        let expected = tokens
            .iter()
            .map(|token| (layer, known.expected.ids(layer, *token)));
        assert_eq!(counts[&layer], count(expected)[&layer]);
        let of = |key: &str| stats.number(&format!("/contexts/0/layers/{layer}/{key}"));
        let prefill = if last { USERS } else { USERS * PROMPT };
        assert_eq!(of("prefill_tokens"), u64::from(prefill), "layer {layer}");
        assert_eq!(
            of("decode_tokens"),
            u64::from(USERS * (ANSWER - 1)),
            "layer {layer}"
        );
    }
    assert_eq!(stats.0["contexts"].as_array().map(Vec::len), Some(1));
    assert_eq!(stats.0["contexts"][0]["phase_source"], "ubatch");
    // One user at a time would have needed a pass for each token of the answers.
    let passes = stats.number("/contexts/0/passes");
    assert!(passes < u64::from(USERS * ANSWER) / 2, "{passes} passes");
}

const SLOTS: [&str; 4] = ["-np", "4", "-c", "2048"];

#[test]
fn parallel_slots_from_the_start() {
    let files = Files::new();
    let command = tracer::run(&files.options(), &server(known_small(), &SLOTS)).unwrap();
    let server = start(command, &files);
    let asked = ask(&server);
    let (status, said) = server.stop().unwrap();
    assert!(status.success(), "{said}");
    assert_users(&files, &asked);
}

#[test]
fn parallel_slots_of_a_running_server() {
    let files = Files::new();
    let server = start(server(known_small(), &SLOTS), &files);
    let attached = Attached::to(server.pid(), &files.options()).unwrap();
    let asked = ask(&server);
    attached.interrupt().unwrap();
    let (status, said) = server.stop().unwrap();
    assert!(status.success(), "{said}");
    assert_users(&files, &asked);
}

/// Of a prompt that it is asked again the server evaluates the last token anew, and no other.
#[test]
fn a_prompt_asked_again() {
    let files = Files::new();
    let command = server(known_small(), &["-np", "1", "-c", "512"]);
    let server = start(tracer::run(&files.options(), &command).unwrap(), &files);
    let prompt: Vec<u32> = (1000..1012).collect();
    let question = json!({ "prompt": prompt, "n_predict": 4, "temperature": 0 });
    for evaluated in [12, 1] {
        let answer = server.post("/completion", &question).unwrap();
        assert_eq!(answer["timings"]["prompt_n"], evaluated, "{answer}");
    }
    let (status, said) = server.stop().unwrap();
    assert!(status.success(), "{said}");
    let stats = files.stats();
    stats.assert_complete();
    let of = |key: &str| stats.number(&format!("/contexts/0/layers/0/{key}"));
    assert_eq!((of("prefill_tokens"), of("decode_tokens")), (12 + 1, 3 + 3));
}

/// Tokens that a draft model proposes at a time.
const DRAFTED: usize = 3;

/// What both models evaluate for an answer. Their next tokens differ everywhere, so that no proposal is
/// taken.
struct Speculation {
    prompt: Vec<u32>,
    /// Of each step: the token that is certain, and what is proposed to follow it.
    steps: Vec<Vec<u32>>,
}

impl Speculation {
    fn of(prompt: &[u32], answer: &[u32]) -> Self {
        let draft = &mut driver(&known_draft().path, &["-t", "1"]);
        let mut draft = Oracle::spawn(draft).unwrap();
        let left = (0..answer.len() - 1).rev();
        let step = |(token, left): (&u32, usize)| {
            draft.command("clear 0").unwrap();
            let proposed = draft
                .command(&format!("generate 0 {DRAFTED} {token}"))
                .unwrap();
            let proposed = ids(&proposed);
            assert!(!answer.contains(&proposed[0]), "a proposal that is taken");
            [&[*token][..], &proposed[..DRAFTED.min(left)]].concat()
        };
        Self {
            steps: answer.iter().zip(left).map(step).collect(),
            prompt: prompt.to_owned(),
        }
    }

    /// The model checks each step in one pass.
    fn checked(&self) -> Vec<u32> {
        self.steps.concat()
    }

    /// The draft model proposes token by token, and then evaluates what was checked, too.
    fn drafted(&self) -> Vec<u32> {
        let steps = self.steps.iter();
        steps
            .flat_map(|step| [&step[..step.len() - 1], step].concat())
            .collect()
    }
}

#[test]
fn a_draft_model_is_a_context_of_its_own_from_the_start() {
    // Both contexts are tried with two tokens.
    assert_eq!(draft_model(false).excluded("warmup"), (2, 4));
}

#[test]
fn a_draft_model_is_a_context_of_its_own_in_a_running_server() {
    assert_eq!(draft_model(true).excluded("warmup"), (0, 0));
}

/// Fails unless what each model evaluates is in a context of its own.
fn draft_model(runs_already: bool) -> Stats {
    let (known, draft) = (known_small(), known_draft());
    let draft_path = draft.path.to_str().unwrap();
    let options = [
        "-np",
        "1",
        "-c",
        "512",
        "--spec-type",
        "draft-simple",
        "-md",
        draft_path,
    ];
    let of_draft = [
        "--spec-draft-device",
        "none",
        "--spec-draft-n-max",
        &DRAFTED.to_string(),
    ];
    let files = Files::new();
    let server = server(known, &[&options[..], &of_draft].concat());
    let (server, attached) = if runs_already {
        let server = start(server, &files);
        let attached = Attached::to(server.pid(), &files.options()).unwrap();
        (server, Some(attached))
    } else {
        let command = tracer::run(&files.options(), &server).unwrap();
        (start(command, &files), None)
    };
    let prompt: Vec<u32> = (1000..1020).collect();
    let answer = server.complete(&prompt, 12).unwrap();
    if let Some(attached) = attached {
        attached.interrupt().unwrap();
    }
    let (status, said) = server.stop().unwrap();
    assert!(status.success(), "{said}");

    let expected = Speculation::of(&prompt, &answer);
    let stats = files.stats();
    stats.assert_complete();
    let contexts = stats.0["contexts"].as_array().unwrap();
    assert_eq!(contexts.len(), 2);
    // The log has no contexts; the models choose different numbers of experts.
    let mut rows: BTreeMap<(usize, u32), Vec<Vec<u32>>> = BTreeMap::new();
    for (layer, ids) in files.log() {
        rows.entry((ids.len(), layer)).or_default().push(ids);
    }
    // What is guessed and checked is generated, and no prompt. What the draft model evaluates after a check
    // looks like the next prompt: the last of several tokens has an output.
    let several = expected.steps.iter().filter(|step| step.len() > 1);
    let evaluated_anew = several.map(Vec::len).sum();
    for (known, evaluated, evaluated_anew) in [
        (known, expected.checked(), 0),
        (draft, expected.drafted(), evaluated_anew),
    ] {
        let path = known.path.to_str().unwrap();
        let models = stats.0["models"].as_array().unwrap();
        let model = models
            .iter()
            .position(|model| model["path"] == path)
            .unwrap();
        let id = contexts
            .iter()
            .position(|context| context["model"] == model)
            .unwrap();
        let tokens = [&expected.prompt[..], &evaluated].concat();
        let layers = known.expected.layers();
        assert_eq!(
            contexts[id]["layers"].as_array().unwrap().len(),
            layers as usize
        );
        for layer in 0..layers - 1 {
            let ids = tokens.iter().map(|token| known.expected.ids(layer, *token));
            assert_eq!(
                rows[&(known.spec.k as usize, layer)],
                ids.clone().collect::<Vec<_>>()
            );
            let counts = count(ids.map(|ids| (layer, ids)));
            assert_eq!(stats.context_counts(id)[&layer], counts[&layer]);
            let of = |key: &str| stats.number(&format!("/contexts/{id}/layers/{layer}/{key}"));
            let prompt = expected.prompt.len() + evaluated_anew;
            assert_eq!(of("prefill_tokens"), prompt as u64);
            assert_eq!(of("decode_tokens"), (tokens.len() - prompt) as u64);
        }
        assert_eq!(contexts[id]["layers_not_visible"].to_string(), "[]");
    }
    stats
}
