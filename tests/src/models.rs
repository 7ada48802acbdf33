//! Small models for tests, written without llama.cpp and without Python.
//!
//! All kinds have the tensors and keys that llama.cpp's source of their architecture asks for, in
//! `src/models`, and the tokenizer of an existing vocabulary-only GGUF file. The same [`ModelSpec`] or
//! [`Shape`] and vocabulary give the same bytes on every machine.
//!
//! # Known routing
//!
//! [`write_known_routing`] makes a model whose routing is known without running it:
//!
//! - Token `t` has the class `t mod n_embd`, and its embedding is 1 at its class, else 0.
//! - The output of attention and of every expert is multiplied by zero, so the embedding is also what
//!   each layer's router sees, scaled by `sqrt(n_embd)` in the RMS norm.
//! - A router row is therefore a table of logits by class. The chosen experts' logits lie 0.375
//!   apart, which no rounding to F16, TF32 or BF16 can bridge: ids and their order are the same on
//!   every build, instruction set and backend.
//! - Every class is followed by one certain token, through all classes, so that generation produces
//!   `n_embd` different tokens before it repeats, at any usual temperature. None ends the text.
//!
//! # Random
//!
//! [`write_random`] fills the same tensors with normally distributed weights: routing depends on
//! everything, and is known only to an oracle that runs the model.
//!
//! # Shapes
//!
//! [`write_shape`] does the same for other architectures, with their kinds of routers.
//!
//! # Dense
//!
//! [`write_dense`] makes a `llama` model that has no experts at all.
//!
//! # Adapters
//!
//! [`write_lora`] makes a LoRA adapter for the models of a [`ModelSpec`].

mod dense;
mod file;
mod lora;
mod model;
pub(crate) mod rng;
mod shapes;

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};

pub use dense::write_dense;
use file::Data;
pub use file::WeightType;
pub use lora::write_lora;
use model::Model;
use rng::Rng;
pub use shapes::{Architecture, Shape, write_shape};

/// Distance between the logits of neighbouring ranks, down to the first expert not chosen.
const STEP: f32 = 0.375;
/// What must remain of it after rounding.
const MIN_GAP: f32 = 0.1;
const N_HEAD: u32 = 4;
const N_HEAD_KV: u32 = 2;

/// What a [`ModelSpec`] can be written as: architectures whose experts are chosen from the logits as
/// they are, and where nothing but attention and experts is added to the residual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlainArchitecture {
    /// `qwen3moe`.
    Qwen3Moe,
    /// `llama` with experts, as Mixtral. Builds of llama.cpp know it that are too old for `qwen3moe`.
    Llama,
}

impl PlainArchitecture {
    /// `general.architecture`.
    fn name(self) -> &'static str {
        match self {
            PlainArchitecture::Qwen3Moe => "qwen3moe",
            PlainArchitecture::Llama => "llama",
        }
    }
}

/// The shape of a model to write.
#[derive(Debug, Clone, Copy)]
pub struct ModelSpec {
    /// Decides keys and tensors, not the routing.
    pub architecture: PlainArchitecture,
    /// All of them have experts.
    pub layers: u32,
    /// Experts per layer.
    pub n_expert: u32,
    /// Experts chosen per token.
    pub k: u32,
    /// Width of the residual; a power of two of at least 64.
    pub n_embd: u32,
    /// Width of one expert; a multiple of 32.
    pub n_ff: u32,
    /// How the experts of a model with known routing are stored; `n_embd` and `n_ff` are multiples of
    /// its block. Models with other weights have one type for all of them.
    pub experts: WeightType,
    /// Models that differ only in this differ in all weights, and in routing.
    pub seed: u64,
    /// Whether each expert's weights are multiplied by a scale (of 1), as some quantizations have it.
    pub scales: bool,
}

impl ModelSpec {
    /// 4 layers with 32 experts, 4 of them chosen, as in gpt-oss-20b.
    pub const SMALL: ModelSpec = ModelSpec {
        architecture: PlainArchitecture::Qwen3Moe,
        layers: 4,
        n_expert: 32,
        k: 4,
        n_embd: 128,
        n_ff: 64,
        experts: WeightType::F16,
        seed: 1,
        scales: false,
    };
    /// 4 layers with 128 experts, 4 of them chosen, as in gpt-oss-120b.
    pub const MEDIUM: ModelSpec = ModelSpec {
        architecture: PlainArchitecture::Qwen3Moe,
        layers: 4,
        n_expert: 128,
        k: 4,
        n_embd: 128,
        n_ff: 32,
        experts: WeightType::F16,
        seed: 3,
        scales: false,
    };
    /// 3 layers with 512 experts, 10 of them chosen, as in qwen3next.
    pub const WIDE: ModelSpec = ModelSpec {
        architecture: PlainArchitecture::Qwen3Moe,
        layers: 3,
        n_expert: 512,
        k: 10,
        n_embd: 128,
        n_ff: 32,
        experts: WeightType::F16,
        seed: 2,
        scales: false,
    };
    /// As the small one, with experts in Q4_K, and rows that suit every [`WeightType`].
    pub const QUANTIZED: ModelSpec = ModelSpec {
        n_embd: 256,
        n_ff: 256,
        experts: WeightType::Q4K,
        seed: 5,
        ..ModelSpec::SMALL
    };
    /// 8 layers as wide as those of Qwen3-30B-A3B, with 128 experts, 8 of them chosen.
    pub const REFERENCE: ModelSpec = ModelSpec {
        architecture: PlainArchitecture::Qwen3Moe,
        layers: 8,
        n_expert: 128,
        k: 8,
        n_embd: 2048,
        n_ff: 768,
        experts: WeightType::F16,
        seed: 4,
        scales: false,
    };

    /// Bytes of one expert of a layer, and of all other tensors of the layer, of a model with known routing.
    pub fn layer_bytes(&self) -> (u64, u64) {
        let f32s = |n| WeightType::F32.bytes(n);
        let (n_embd, head_dim) = (self.n_embd, self.n_embd / N_HEAD);
        let scales = if self.scales { f32s(3) } else { 0 };
        let expert = 3 * self.experts.bytes(n_embd * self.n_ff) + scales;
        let norms = match self.architecture {
            PlainArchitecture::Qwen3Moe => f32s(2 * n_embd + 2 * head_dim),
            PlainArchitecture::Llama => f32s(2 * n_embd),
        };
        let attention = 2 * n_embd * (n_embd + head_dim * N_HEAD_KV);
        let dense = norms + f32s(n_embd * self.n_expert) + WeightType::F16.bytes(attention);
        (expert, dense)
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.n_embd.is_power_of_two() && self.n_embd >= 64,
            "n_embd {} is not a power of two of at least 64",
            self.n_embd
        );
        ensure!(
            self.n_ff > 0 && self.n_ff.is_multiple_of(32),
            "n_ff {} is not a multiple of 32",
            self.n_ff
        );
        let block = self.experts.block();
        ensure!(
            self.n_embd.is_multiple_of(block) && self.n_ff.is_multiple_of(block),
            "{:?} has blocks of {block}, and rows of {} and {}",
            self.experts,
            self.n_embd,
            self.n_ff
        );
        ensure!(
            0 < self.k && self.k < self.n_expert,
            "cannot choose {} of {} experts",
            self.k,
            self.n_expert
        );
        ensure!(
            self.n_expert <= self.n_embd * self.k,
            "{} classes of {} choices cannot reach {} experts",
            self.n_embd,
            self.k,
            self.n_expert
        );
        Ok(())
    }
}

/// Which experts a model with known routing uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// By layer, then by class of the token: expert ids in router order.
    routing: Vec<Vec<Vec<u32>>>,
}

impl Expected {
    /// The experts that `layer` uses for `token`, the one with the largest logit first.
    ///
    /// # Panics
    ///
    /// If the model has no such layer.
    pub fn ids(&self, layer: u32, token: u32) -> &[u32] {
        let classes = &self.routing[layer as usize];
        &classes[token as usize % classes.len()]
    }

    /// Number of layers.
    pub fn layers(&self) -> u32 {
        self.routing.len() as u32
    }

    /// Writes the routing to a JSON file: `[layer][class][rank]`, where the class of a token is its
    /// id modulo the number of classes.
    pub fn save(&self, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        serde_json::to_writer(file, &self.routing)?;
        Ok(())
    }

    /// Reads what [`Expected::save`] wrote.
    pub fn load(path: &Path) -> Result<Expected> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let routing = serde_json::from_str(&text)
            .with_context(|| format!("{} is no expected routing", path.display()))?;
        Ok(Expected { routing })
    }
}

/// Writes a model whose routing is the returned one to `path`, with the tokenizer of the
/// vocabulary-only GGUF file `vocab`. A `path` that ends in `-00001-of-00003.gguf` gets that many files.
///
/// # Errors
///
/// A `spec` that makes no model, a `vocab` without tokenizer or with too few tokens, or a failure to
/// read or write.
pub fn write_known_routing(path: &Path, vocab: &Path, spec: &ModelSpec) -> Result<Expected> {
    let mut model = without_layers(vocab, spec)?;
    let classes = spec.n_embd as usize;
    model.embedding(Data::F16(one_hot_rows(model.n_vocab(), classes)));
    let mut rng = Rng::new(spec.seed);
    let mut routing = Vec::new();
    for layer in 0..spec.layers {
        let (router, ids) = known_router(spec, &mut rng);
        check_gaps(&router, &ids)?;
        let attention = || Data::Zero(WeightType::F16);
        let experts = || Data::Zero(spec.experts);
        add_layer(
            &mut model,
            spec,
            layer,
            Data::F32(router),
            attention,
            experts,
        );
        routing.push(ids);
    }
    let output = successor_rows(model.n_vocab(), classes, &mut rng)?;
    model.output(Data::F16(output));
    model.write(path, &mut rng)?;
    Ok(Expected { routing })
}

/// Writes a model with random weights to `path`, with the tokenizer of the vocabulary-only GGUF
/// file `vocab`.
///
/// # Errors
///
/// As [`write_known_routing`].
pub fn write_random(path: &Path, vocab: &Path, spec: &ModelSpec) -> Result<()> {
    write_drawn(path, vocab, spec, || Data::NormalF16 { std: 0.05 })
}

/// The same with Q4_0 weights, except for the routers.
///
/// # Errors
///
/// As [`write_known_routing`].
pub fn write_quantized(path: &Path, vocab: &Path, spec: &ModelSpec) -> Result<()> {
    // Uniform quants from -8 to 7 have a standard deviation of 4.6.
    write_drawn(path, vocab, spec, || Data::RandomQ4 { scale: 0.05 / 4.6 })
}

fn write_drawn(
    path: &Path,
    vocab: &Path,
    spec: &ModelSpec,
    weights: impl Fn() -> Data + Copy,
) -> Result<()> {
    let mut model = without_layers(vocab, spec)?;
    let mut rng = Rng::new(spec.seed);
    model.embedding(weights());
    for layer in 0..spec.layers {
        // The router's input has an RMS of 1, so logits get a standard deviation of 3, enough to
        // keep neighbouring ones apart.
        let std = 3.0 / (spec.n_embd as f32).sqrt();
        add_layer(
            &mut model,
            spec,
            layer,
            Data::NormalF32 { std },
            weights,
            weights,
        );
    }
    model.output(weights());
    model.write(path, &mut rng)
}

/// A model of `spec` without layers.
fn without_layers(vocab: &Path, spec: &ModelSpec) -> Result<Model> {
    spec.check()?;
    let architecture = spec.architecture.name();
    let mut model = Model::new(vocab, architecture, "expert-trace test model", spec.n_embd)?;
    let head_dim = spec.n_embd / N_HEAD;
    model.keys(&[
        ("block_count", spec.layers),
        ("feed_forward_length", spec.n_ff),
        ("expert_feed_forward_length", spec.n_ff),
        ("expert_count", spec.n_expert),
        ("expert_used_count", spec.k),
        ("attention.head_count", N_HEAD),
        ("attention.head_count_kv", N_HEAD_KV),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
    ]);
    Ok(model)
}

/// Adds a layer with the given router, and weights made by `attention` and `experts`.
fn add_layer(
    model: &mut Model,
    spec: &ModelSpec,
    layer: u32,
    router: Data,
    attention: impl Fn() -> Data,
    experts: impl Fn() -> Data,
) {
    let ModelSpec {
        n_expert,
        n_embd,
        n_ff,
        ..
    } = *spec;
    let head_dim = n_embd / N_HEAD;
    let name = |part: &str| format!("blk.{layer}.{part}.weight");
    model.norm(name("attn_norm"), n_embd);
    if spec.architecture == PlainArchitecture::Qwen3Moe {
        model.norm(name("attn_q_norm"), head_dim);
        model.norm(name("attn_k_norm"), head_dim);
    }
    model.norm(name("ffn_norm"), n_embd);
    model.tensor(name("ffn_gate_inp"), &[n_embd, n_expert], router);
    for (part, shape) in [
        ("attn_q", [n_embd, n_embd]),
        ("attn_k", [n_embd, head_dim * N_HEAD_KV]),
        ("attn_v", [n_embd, head_dim * N_HEAD_KV]),
        ("attn_output", [n_embd, n_embd]),
    ] {
        model.tensor(name(part), &shape, attention());
    }
    for (part, shape) in [
        ("ffn_gate_exps", [n_embd, n_ff, n_expert]),
        ("ffn_up_exps", [n_embd, n_ff, n_expert]),
        ("ffn_down_exps", [n_ff, n_embd, n_expert]),
    ] {
        model.tensor(name(part), &shape, experts());
        if spec.scales {
            model.norm(format!("blk.{layer}.{part}.scale"), n_expert);
        }
    }
}

/// F16 rows of length `classes` for `n_vocab` tokens: 1 at the token's class, else 0.
fn one_hot_rows(n_vocab: u32, classes: usize) -> Vec<u16> {
    let mut rows = vec![0; n_vocab as usize * classes];
    for (token, row) in rows.chunks_exact_mut(classes).enumerate() {
        row[token % classes] = file::f16(1.0);
    }
    rows
}

/// An F16 language model head that follows every class by one certain token.
///
/// The class after `c` is `(5 c + b) mod classes` with an odd `b`, which visits all classes (Hull and
/// Dobell) as `classes` is a power of two. The token of a class is taken from the middle half of the
/// vocabulary, away from control and byte tokens.
fn successor_rows(n_vocab: u32, classes: usize, rng: &mut Rng) -> Result<Vec<u16>> {
    let n_vocab = n_vocab as usize;
    let (first, periods) = (
        (n_vocab / 4).next_multiple_of(classes),
        n_vocab / 2 / classes,
    );
    ensure!(
        periods > 1,
        "a vocabulary of {n_vocab} is too small for {classes} classes"
    );
    let b = 2 * rng.below(classes / 2) + 1;
    let mut rows = vec![0; n_vocab * classes];
    for class in 0..classes {
        let next = (5 * class + b) % classes;
        let token = first + next + classes * rng.below(periods - 1);
        // Times sqrt(classes), at least 8: a logit of 32 or more, while all others are 0.
        rows[token * classes + class] = file::f16(4.0);
    }
    Ok(rows)
}

/// A router `[n_expert][n_embd]` and the experts it chooses by class, in order.
///
/// Some experts are much more popular than others, yet every one is chosen for at least one class.
fn known_router(spec: &ModelSpec, rng: &mut Rng) -> (Vec<f32>, Vec<Vec<u32>>) {
    let (n_expert, classes, k) = (
        spec.n_expert as usize,
        spec.n_embd as usize,
        spec.k as usize,
    );
    // Only operations that IEEE 754 defines to the bit: a logarithm would differ between machines.
    let popularity: Vec<f32> = (0..n_expert)
        .map(|_| {
            let x = rng.unit();
            x * x * x + 0.02
        })
        .collect();
    // RMS norm turns the 1 of an embedding into sqrt(n_embd).
    let scale = (classes as f32).sqrt();
    let mut router = vec![0.0; n_expert * classes];
    let mut routing = Vec::new();
    for class in 0..classes {
        // The smallest draws win, and those of popular experts are small. The experts that this
        // class has to cover come before all others.
        let mut drawn: Vec<(f32, usize)> = (0..n_expert)
            .map(|e| {
                let covered_here = e % classes == class;
                let key = rng.unit() / popularity[e];
                (if covered_here { -1.0 } else { key }, e)
            })
            .collect();
        drawn.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (chosen, rest) = drawn.split_at_mut(k);
        rng.shuffle(chosen);
        for (rank, (_, e)) in chosen.iter().enumerate() {
            router[e * classes + class] = (k - rank) as f32 * STEP / scale;
        }
        for (_, e) in rest {
            router[*e * classes + class] = -2.0 * rng.unit() / scale;
        }
        routing.push(chosen.iter().map(|(_, e)| *e as u32).collect());
    }
    (router, routing)
}

/// Makes sure that the router as stored chooses `routing`, even if a backend rounds weights and
/// results to the 8 significant bits of BF16, the coarsest type in use.
fn check_gaps(router: &[f32], routing: &[Vec<u32>]) -> Result<()> {
    let classes = routing.len();
    let scale = (classes as f32).sqrt();
    for (class, ids) in routing.iter().enumerate() {
        let mut logits: Vec<(f32, u32)> = router
            .chunks_exact(classes)
            .zip(0..)
            .map(|(row, e)| (row[class] * scale, e))
            .collect();
        logits.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (rank, pair) in logits.windows(2).take(ids.len()).enumerate() {
            let [(high, e), (low, _)] = [pair[0], pair[1]];
            let rounding = (high.abs() + low.abs()) / 256.0;
            ensure!(
                e == ids[rank] && high - low - rounding >= MIN_GAP,
                "class {class}, rank {rank}: expert {e} is only {} ahead",
                high - low
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use expert_trace::gguf::{Gguf, LayerBytes, ModelShape, shard_paths};

    use super::{file::GgufFile, *};

    /// A file of a vocabulary of so many tokens.
    fn vocabulary(path: &Path, tokens: u64) {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let (array, string) = (9_u32, 8_u32);
        let mut pair = text("tokenizer.ggml.tokens");
        pair.extend([array.to_le_bytes(), string.to_le_bytes()].concat());
        pair.extend(tokens.to_le_bytes());
        (0..tokens).for_each(|_| pair.extend(text("x")));
        let mut file = GgufFile::default();
        file.copied(&pair);
        file.write(path, &mut Rng::new(1)).unwrap();
    }

    #[test]
    fn layers_take_what_was_written_of_them() {
        let directory = tempfile::tempdir().unwrap();
        let vocab = directory.path().join("vocab.gguf");
        vocabulary(&vocab, 2048);
        let llama = ModelSpec {
            architecture: PlainArchitecture::Llama,
            scales: true,
            ..ModelSpec::SMALL
        };
        for (name, spec) in [
            ("small.gguf", ModelSpec::SMALL),
            ("quantized.gguf", ModelSpec::QUANTIZED),
            ("llama-00001-of-00003.gguf", llama),
        ] {
            let path = directory.path().join(name);
            write_known_routing(&path, &vocab, &spec).unwrap();
            let files = shard_paths(&path);
            let shards: Vec<Gguf> = files
                .iter()
                .map(|path| Gguf::read(&mut File::open(path).unwrap()).unwrap())
                .collect();
            let (expert_bytes, dense_bytes) = spec.layer_bytes();
            let expected: Vec<LayerBytes> = (0..spec.layers)
                .map(|layer_id| LayerBytes {
                    layer_id,
                    expert_bytes,
                    dense_bytes,
                })
                .collect();
            let shape = ModelShape::from_ggufs(&shards).unwrap();
            assert_eq!(shape.layer_bytes, expected, "{name}");
        }
        // F16: gate, up and down.
        assert_eq!(ModelSpec::SMALL.layer_bytes().0, 3 * 128 * 64 * 2);
        // Q4_K: blocks of 256 in 144 bytes.
        assert_eq!(ModelSpec::QUANTIZED.layer_bytes().0, 3 * 256 * 144);
    }

    #[test]
    fn known_routers_cover_all_experts_unevenly() {
        for spec in [
            ModelSpec::SMALL,
            ModelSpec::MEDIUM,
            ModelSpec::WIDE,
            ModelSpec::QUANTIZED,
        ] {
            let (router, routing) = known_router(&spec, &mut Rng::new(spec.seed));
            check_gaps(&router, &routing).unwrap();
            let mut uses = vec![0; spec.n_expert as usize];
            for id in routing.iter().flatten() {
                uses[*id as usize] += 1;
            }
            let (min, max) = (uses.iter().min().unwrap(), uses.iter().max().unwrap());
            assert!(*min >= 1 && *max >= 5 * min, "{spec:?}: {uses:?}");
        }
    }

    #[test]
    fn rows_that_are_no_whole_blocks_are_refused() {
        let all = [
            WeightType::F32,
            WeightType::F16,
            WeightType::Q4_0,
            WeightType::Q8_0,
            WeightType::Q4K,
        ];
        for experts in all {
            let spec = ModelSpec {
                experts,
                ..ModelSpec::QUANTIZED
            };
            spec.check().unwrap();
        }
        let spec = ModelSpec {
            experts: WeightType::Q4K,
            ..ModelSpec::SMALL
        };
        assert!(spec.check().is_err());
    }

    #[test]
    fn a_close_gap_is_noticed() {
        let spec = ModelSpec::SMALL;
        let (mut router, routing) = known_router(&spec, &mut Rng::new(1));
        let at = |rank: usize| routing[7][rank] as usize * routing.len() + 7;
        router[at(1)] = router[at(0)] - 0.1 / (spec.n_embd as f32).sqrt();
        assert!(check_gaps(&router, &routing).is_err());
    }

    #[test]
    fn generation_visits_every_class() {
        let (n_vocab, classes) = (1000, 64);
        let rows = successor_rows(n_vocab, classes, &mut Rng::new(3)).unwrap();
        let next = |class: usize| {
            let ones: Vec<usize> = (0..n_vocab as usize)
                .filter(|token| rows[token * classes + class] != 0)
                .collect();
            assert_eq!(ones.len(), 1);
            assert!((250..750).contains(&ones[0]));
            ones[0] % classes
        };
        let mut class = 0;
        let visited: std::collections::BTreeSet<usize> = (0..classes)
            .map(|_| {
                class = next(class);
                class
            })
            .collect();
        assert_eq!(visited.len(), classes);
    }

    #[test]
    fn expected_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("expected.json");
        let expected = Expected {
            routing: vec![vec![vec![3, 1], vec![0, 2]]],
        };
        expected.save(&path).unwrap();
        assert_eq!(Expected::load(&path).unwrap(), expected);
        assert_eq!(expected.ids(0, 7), [0, 2]);
    }
}
