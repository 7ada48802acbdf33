//! What may be told of a command line.
//!
//! Prompts, keys and tokens never stand in a default output. What is not known to be harmless is
//! hidden, also the name of an option that we have never heard of: it can be a prompt that begins
//! with a dash.

use std::ffi::OsString;

/// Stands for what is hidden.
pub const HIDDEN: &str = "<redacted>";

/// What an option of llama.cpp's programs takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    Nothing,
    /// A number, or `on`, `off`, `auto`. Anything else is hidden: other programs give the same
    /// letters another meaning (`python3 -c`).
    Number,
    /// A model file, shown when it is named like one.
    Model,
    /// Tensors and where they go, shown when it looks so.
    Pattern,
    /// A device, a type, a mode: shown when it is known.
    Word,
    /// A text of the user's, or a secret.
    Hidden,
}

fn takes(option: &str) -> Option<Takes> {
    Some(match option {
        "-t" | "--threads" | "-tb" | "--threads-batch" | "-c" | "--ctx-size" | "-n"
        | "--predict" | "--n-predict" | "-b" | "--batch-size" | "-ub" | "--ubatch-size"
        | "-ngl" | "--gpu-layers" | "--n-gpu-layers" | "-ncmoe" | "--n-cpu-moe" | "-np"
        | "--parallel" | "-fa" | "--flash-attn" | "-s" | "--seed" | "--temp" | "--top-k"
        | "--top-p" | "--min-p" | "-mg" | "--main-gpu" | "-ts" | "--tensor-split" | "--chunks"
        | "--port" | "--moe-cache-mib" => Takes::Number,
        "-m" | "--model" | "-md" | "--model-draft" => Takes::Model,
        "-ot" | "--override-tensor" => Takes::Pattern,
        "-ctk" | "--cache-type-k" | "-ctv" | "--cache-type-v" | "-dev" | "--device" | "-sm"
        | "--split-mode" | "--numa" | "-lm" | "--load-mode" => Takes::Word,
        "--no-mmap"
        | "--mlock"
        | "-cmoe"
        | "--cpu-moe"
        | "--no-op-offload"
        | "--no-warmup"
        | "--warmup"
        | "-st"
        | "--single-turn"
        | "-cnv"
        | "-no-cnv"
        | "--no-conversation"
        | "--ignore-eos"
        | "-v"
        | "--verbose"
        | "--no-perf"
        | "--embedding"
        | "--embeddings"
        | "--rerank"
        | "--no-display-prompt"
        | "--jinja"
        | "-h"
        | "--help"
        | "--version"
        | "--simple-io"
        | "-nkvo"
        | "--no-kv-offload"
        | "--metrics"
        | "--parse-special" => Takes::Nothing,
        "-p"
        | "--prompt"
        | "-f"
        | "--file"
        | "-sys"
        | "--system-prompt"
        | "-sysf"
        | "--system-prompt-file"
        | "--api-key"
        | "--api-key-file"
        | "-hf"
        | "--hf-repo"
        | "-hft"
        | "--hf-token"
        | "-r"
        | "--reverse-prompt"
        | "--grammar"
        | "--grammar-file"
        | "-j"
        | "--json-schema"
        | "--host"
        | "-o"
        | "--output"
        | "--log-file"
        | "-a"
        | "--alias"
        | "--chat-template"
        | "--lora"
        | "--prompt-cache" => Takes::Hidden,
        _ => return None,
    })
}

/// Types of the KV cache, ways to split, NUMA strategies, ways to load.
const KNOWN_WORDS: [&str; 18] = [
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "iq4_nl",
    "none",
    "layer",
    "row",
    "tensor",
    "distribute",
    "isolate",
    "numactl",
    "mmap",
    "dio",
];

fn shown(takes: Takes, value: &str) -> String {
    let digits = |text: &str| text.chars().all(|c| c.is_ascii_digit());
    let is_number = !value.is_empty()
        && value.len() <= 10
        && value
            .chars()
            .all(|c| c.is_ascii_digit() || ".,-".contains(c));
    let is_place = |text: &str| {
        ["CPU", "CUDA", "ROCm", "Vulkan", "SYCL", "RPC", "Metal"]
            .iter()
            .any(|kind| text.strip_prefix(kind).is_some_and(digits))
    };
    let shows = match takes {
        Takes::Number => is_number || ["on", "off", "auto", "all"].contains(&value),
        Takes::Model => value.ends_with(".gguf"),
        Takes::Pattern => value.split_once('=').is_some_and(|(tensors, place)| {
            is_place(place)
                && ["blk", "ffn", "exps", "attn"]
                    .iter()
                    .any(|name| tensors.contains(name))
        }),
        Takes::Word => is_place(value) || KNOWN_WORDS.contains(&value),
        Takes::Nothing | Takes::Hidden => false,
    };
    if shows {
        value.to_owned()
    } else {
        HIDDEN.to_owned()
    }
}

/// The command line with all that is not known to be harmless hidden. The program's name stays, up
/// to its first blank.
pub fn command(arguments: &[OsString]) -> Vec<String> {
    let mut words = arguments.iter().map(|argument| argument.to_string_lossy());
    // A process can rename itself, arguments and all.
    let program = words
        .next()
        .and_then(|name| name.split_whitespace().next().map(str::to_owned));
    let mut line: Vec<String> = program.into_iter().collect();
    while let Some(word) = words.next() {
        let (option, attached) = match word.split_once('=') {
            Some((option, value)) => (option, Some(value)),
            None => (&*word, None),
        };
        match (takes(option), attached) {
            (None, _) => line.push(HIDDEN.to_owned()),
            (Some(takes), Some(value)) => line.push(format!("{option}={}", shown(takes, value))),
            (Some(Takes::Nothing), None) => line.push(option.to_owned()),
            (Some(takes), None) => {
                line.push(option.to_owned());
                line.extend(words.next().map(|value| shown(takes, &value)));
            }
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redacted(line: &[&str]) -> String {
        let arguments: Vec<OsString> = line.iter().map(Into::into).collect();
        command(&arguments).join(" ")
    }

    #[test]
    fn what_is_needed_stays_and_texts_go() {
        let line = "llama-cli -m /m/a.gguf -p secret -t 4 -fa on -st --api-key sk-1 stray -ngl 99";
        assert_eq!(
            redacted(&line.split(' ').collect::<Vec<_>>()),
            "llama-cli -m /m/a.gguf -p <redacted> -t 4 -fa on -st --api-key <redacted> <redacted> -ngl 99"
        );
    }

    #[test]
    fn values_are_shown_by_their_form() {
        for (line, shown) in [
            (["x", "-ot", "exps=CPU"], true),
            (["x", "-ot", "blk.[0-9].ffn_.*_exps.=CUDA1"], true),
            (["x", "-ot", "password=hunter2"], false),
            (["x", "-dev", "CUDA0"], true),
            (["x", "-dev", "sk-abcdef"], false),
            (["x", "-ctk", "q8_0"], true),
            (["x", "-s", "4294967295"], true),
            (["x", "-t", "123456789012"], false),
            (["x", "-md", "draft.gguf"], true),
            (["x", "-m", "secret"], false),
        ] {
            assert_eq!(redacted(&line) == line.join(" "), shown, "{line:?}");
        }
    }

    #[test]
    fn texts_that_look_like_options_go() {
        assert_eq!(
            redacted(&[
                "x",
                "-p",
                "-m",
                "-m",
                "a.gguf",
                "--my-secret",
                "--api-key=sk-1"
            ]),
            "x -p <redacted> -m a.gguf <redacted> --api-key=<redacted>"
        );
        assert_eq!(
            redacted(&["x", "-p", "--threads", "--secret=1", "-t"]),
            "x -p <redacted> <redacted> -t"
        );
    }

    #[test]
    fn a_process_that_has_renamed_itself_shows_its_name() {
        assert_eq!(redacted(&["llama-server --api-key sk-1"]), "llama-server");
    }

    #[test]
    fn options_that_mean_something_else_elsewhere_show_nothing() {
        assert_eq!(
            redacted(&[
                "python3",
                "-c",
                "ask('secret')",
                "-m",
                "secret",
                "-ot",
                "secret"
            ]),
            "python3 -c <redacted> -m <redacted> -ot <redacted>"
        );
    }
}
