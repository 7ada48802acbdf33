use std::io::Cursor;
use std::path::{Path, PathBuf};

use super::*;

fn str_bytes(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

/// A GGUF file being put together.
#[derive(Default)]
pub struct Builder {
    n_kv: u64,
    kv: Vec<u8>,
    n_tensors: u64,
    tensors: Vec<u8>,
}

impl Builder {
    fn raw(mut self, key: &str, value_type: u32, value: &[u8]) -> Self {
        self.n_kv += 1;
        self.kv.extend(str_bytes(key));
        self.kv.extend(value_type.to_le_bytes());
        self.kv.extend(value);
        self
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub fn string(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &str_bytes(value))
    }

    fn array(self, key: &str, element_type: u32, len: u64, elements: &[u8]) -> Self {
        let header = [&element_type.to_le_bytes()[..], &len.to_le_bytes()].concat();
        self.raw(key, 9, &[&header, elements].concat())
    }

    pub fn tensor(self, name: &str, shape: &[u64]) -> Self {
        self.typed(name, shape, 0)
    }

    /// The same, of a type by its number in `enum ggml_type`.
    pub fn typed(mut self, name: &str, shape: &[u64], ggml_type: u32) -> Self {
        self.n_tensors += 1;
        self.tensors.extend(str_bytes(name));
        self.tensors.extend((shape.len() as u32).to_le_bytes());
        for n in shape {
            self.tensors.extend(n.to_le_bytes());
        }
        self.tensors.extend(ggml_type.to_le_bytes());
        self.tensors.extend(0u64.to_le_bytes());
        self
    }

    /// The file up to the start of its tensor data.
    pub fn bytes(self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.n_tensors.to_le_bytes());
        out.extend(self.n_kv.to_le_bytes());
        out.extend(self.kv);
        out.extend(self.tensors);
        out.resize(out.len().next_multiple_of(32), 0);
        out
    }

    pub fn gguf(self) -> Gguf {
        parse(&self.bytes()).unwrap()
    }
}

fn parse(bytes: &[u8]) -> Result<Gguf, GgufError> {
    Gguf::read(&mut Cursor::new(bytes))
}

/// A model of three layers, without tensors.
pub fn moe() -> Builder {
    Builder::default()
        .string("general.architecture", "qwen3moe")
        .string("general.name", "Test")
        .u32("qwen3moe.block_count", 3)
        .u32("qwen3moe.expert_count", 8)
        .u32("qwen3moe.expert_used_count", 2)
}

#[test]
fn reads_every_kind_of_value() {
    let strings = [str_bytes("<s>"), str_bytes("")].concat();
    let file = moe()
        .raw("i8", 1, &[0xff])
        .raw("f32", 6, &1.5f32.to_le_bytes())
        .raw("flag", 7, &[1])
        .raw("u64", 10, &u64::MAX.to_le_bytes())
        .array("bools", 7, 3, &[1, 0, 1])
        .array(
            "ids",
            5,
            2,
            &[&(-1i32).to_le_bytes()[..], &[7, 0, 0, 0]].concat(),
        )
        .array("floats", 6, 1, &[0; 4])
        .array("huge", 10, 1, &u64::MAX.to_le_bytes())
        .array("long", 0, 4097, &[0; 4097])
        .array("tokens", 8, 2, &strings)
        .string("text", &"x".repeat((1 << 20) + 1))
        .tensor("blk.0.ffn_gate_inp.weight", &[128, 8])
        .bytes();
    let gguf = parse(&file).unwrap();

    assert_eq!(gguf.arch(), Some("qwen3moe"));
    assert_eq!(gguf.arch_u64("expert_count"), Some(8));
    assert_eq!(gguf.u64("u64"), Some(u64::MAX));
    assert_eq!(gguf.u64("i8"), None);
    assert_eq!(gguf.kv["i8"], Value::Int(-1));
    assert_eq!(gguf.kv["f32"], Value::Float(1.5));
    assert_eq!(gguf.kv["flag"], Value::Bool(true));
    assert_eq!(gguf.kv["bools"], Value::Ints(vec![1, 0, 1]));
    assert_eq!(gguf.kv["ids"], Value::Ints(vec![-1, 7]));
    for (key, element_type, len) in [
        ("floats", 6, 1),
        ("huge", 10, 1),
        ("long", 0, 4097),
        ("tokens", 8, 2),
        ("text", 8, (1 << 20) + 1),
    ] {
        assert_eq!(gguf.kv[key], Value::Skipped { element_type, len }, "{key}");
    }
    assert_eq!(gguf.tensors[0].shape, [128, 8]);
    assert_eq!(gguf.data_offset, file.len() as u64);

    let span = gguf.kv_spans["ids"].clone();
    let copied = &file[span.start as usize..span.end as usize];
    assert!(copied.starts_with(&str_bytes("ids")));
    assert!(copied.ends_with(&[7, 0, 0, 0]));
}

#[test]
fn every_truncation_is_an_error() {
    let strings = [str_bytes("<s>"), str_bytes("</s>")].concat();
    let file = moe()
        .array("tokens", 8, 2, &strings)
        .array("ids", 5, 1, &[0; 4])
        .tensor("blk.0.ffn_gate_inp.weight", &[128, 8])
        .bytes();
    assert!(parse(&file).is_ok());
    for len in 0..file.len() {
        match parse(&file[..len]) {
            Err(GgufError::Truncated { file_len, .. }) => assert_eq!(file_len, len as u64),
            other => panic!("{len} bytes: {other:?}"),
        }
    }
}

#[test]
fn damaged_bytes_never_panic() {
    let file = moe().tensor("blk.0.ffn_up_exps.weight", &[1]).bytes();
    for at in 0..file.len() {
        for byte in [0, 1, 9, 0x7f, 0x80, 0xff] {
            let mut damaged = file.clone();
            damaged[at] = byte;
            if let Ok(gguf) = parse(&damaged) {
                let _ = ModelShape::from_ggufs(&[gguf]);
            }
        }
    }
}

#[test]
fn absurd_numbers_are_refused() {
    let absurd = u64::MAX.to_le_bytes();
    let with = |at: usize| {
        let mut file = moe().bytes();
        file[at..at + 8].copy_from_slice(&absurd);
        parse(&file).unwrap_err().to_string()
    };
    assert_eq!(
        with(8),
        "number of tensors of 18446744073709551615 at offset 8 exceeds the limit of 1048576"
    );
    assert_eq!(
        with(16),
        "number of keys of 18446744073709551615 at offset 16 exceeds the limit of 65536"
    );
    assert_eq!(
        with(24),
        "name length of 18446744073709551615 at offset 24 exceeds the limit of 65536"
    );
    for element_type in [0, 8, 12] {
        let file = Builder::default().array("a", element_type, u64::MAX, &[]);
        assert!(matches!(
            parse(&file.bytes()),
            Err(GgufError::Truncated { .. })
        ));
    }
    let string = Builder::default().raw("s", 8, &absurd);
    assert!(matches!(
        parse(&string.bytes()),
        Err(GgufError::Truncated { .. })
    ));
}

#[test]
fn malformed_headers_say_what_is_wrong() {
    let message = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
    assert!(message(b"GGML\x03\0\0\0").starts_with("not a GGUF file"));
    assert!(message(b"GGUF\x01\0\0\0").contains("version 1"));
    assert!(message(b"GGUF\0\0\0\x03").contains("little-endian"));
    let file = moe().u32("general.name", 1).bytes();
    assert!(message(&file).starts_with("second occurrence of key \"general.name\""));
    let file = moe().raw("x", 13, &[]).bytes();
    assert!(message(&file).starts_with("unknown value type 13"));
    let file = moe().array("x", 9, 1, &[]).bytes();
    assert!(message(&file).starts_with("unknown value type 9"));
    let file = moe().u32("general.alignment", 48).bytes();
    assert!(message(&file).contains("power of two"));
    let file = moe().tensor("t", &[1; 5]).bytes();
    assert!(message(&file).starts_with("number of dimensions of 5"));
}

#[test]
fn shape_needs_router_and_experts_and_looks_at_all_shards() {
    let mut shards = vec![
        moe()
            .u32("split.no", 0)
            .u32("split.count", 3)
            .u32("qwen3moe.nextn_predict_layers", 1)
            .u32("qwen3moe.expert_gating_func", 2)
            .u32("qwen3moe.expert_group_count", 4)
            .tensor("blk.0.ffn_gate_inp.weight", &[128, 8])
            .tensor("blk.1.ffn_gate_inp.weight", &[128, 8])
            .gguf(),
        Builder::default()
            .u32("split.no", 1)
            .tensor("blk.1.ffn_gate_up_exps.weight", &[1])
            .tensor("blk.2.ffn_down_exps.weight", &[1])
            .tensor("blk.0.ffn_gate_inp.bias", &[8])
            .tensor("blk.1.exp_probs_b.bias", &[8])
            .tensor("blk.2.exp_probs_b", &[8])
            .tensor("blk.9.exp_probs_b.bias", &[8])
            .tensor("blk.2.ffn_gate_tid2eid.weight", &[1])
            .gguf(),
        Builder::default()
            .u32("split.no", 2)
            .tensor("blk.2.ffn_gate_inp.weight", &[128, 8])
            .tensor("blk.9.ffn_gate_inp.weight", &[128, 8])
            .tensor("blk.9.ffn_up_exps.weight", &[1])
            .gguf(),
    ];
    let shape = ModelShape::from_ggufs(&shards).unwrap();
    assert_eq!(
        shape,
        ModelShape {
            arch: "qwen3moe".to_owned(),
            name: Some("Test".to_owned()),
            layers: 3,
            n_expert: 8,
            n_expert_used: ExpertsUsed::Uniform(2),
            nextn_predict_layers: 1,
            moe_layers: vec![1, 2],
            layer_bytes: vec![],
            expert_gating_func: Some(2),
            expert_group_count: 4,
            expert_group_used_count: 0,
            second_block_experts: None,
            router_bias: [0].into(),
            selection_bias: [1, 2].into(),
            chosen_by_token: [2].into(),
        }
    );

    shards.swap(1, 2);
    let error = ModelShape::from_ggufs(&shards).unwrap_err().to_string();
    assert!(error.contains("split.no"), "{error}");
    shards.pop();
    let error = ModelShape::from_ggufs(&shards).unwrap_err().to_string();
    assert!(error.contains("split.count"), "{error}");
}

#[test]
fn nextn_blocks_are_the_last() {
    let shape = |nextn| {
        let gguf = moe().u32("qwen3moe.nextn_predict_layers", nextn).gguf();
        ModelShape::from_ggufs(&[gguf])
    };
    let of = |nextn| shape(nextn).map(|shape| (shape.main_layers(), shape.first_nextn()));
    assert_eq!(of(0).unwrap(), (3, None));
    assert_eq!(of(1).unwrap(), (2, Some(2)));
    assert_eq!(of(3).unwrap(), (0, Some(0)));
    assert!(of(4).is_err());
}

#[test]
fn a_second_block_is_told_by_its_tensors() {
    let gguf = |name: &str, shape: &[u64]| moe().tensor(name, shape).gguf();
    let experts = |gguf| {
        ModelShape::from_ggufs(&[gguf])
            .unwrap()
            .second_block_experts
    };
    assert_eq!(experts(moe().gguf()), None);
    let name = "blk.1.ffn_down_chexps.weight";
    assert_eq!(experts(gguf(name, &[64, 128, 16])), Some(16));
    assert_eq!(experts(gguf(name, &[64, 128])), None);
    assert_eq!(experts(gguf(name, &[1, 1, 1 << 40])), None);
}

#[test]
fn experts_may_be_a_tensor_each() {
    let model = moe()
        .tensor("blk.0.ffn_gate_inp.weight", &[128, 8])
        .tensor("blk.0.ffn_down.7.weight", &[1])
        .tensor("blk.1.ffn_gate_inp.weight", &[128, 8])
        .tensor("blk.1.ffn_up.0.weight", &[1])
        // A router beside a dense block.
        .tensor("blk.2.ffn_gate_inp.weight", &[128, 8])
        .tensor("blk.2.ffn_gate.weight", &[1])
        .tensor("blk.2.ffn_up.bias", &[1])
        .gguf();
    let shape = ModelShape::from_ggufs(&[model]).unwrap();
    assert_eq!(shape.moe_layers, [0, 1]);
}

#[test]
fn k_may_differ_per_layer() {
    let model = |ks: &[u32]| {
        let elements: Vec<u8> = ks.iter().flat_map(|k| k.to_le_bytes()).collect();
        Builder::default()
            .string("general.architecture", "a")
            .u32("a.block_count", 3)
            .u32("a.expert_count", 8)
            .array("a.expert_used_count", 4, ks.len() as u64, &elements)
            .gguf()
    };
    let shape = ModelShape::from_ggufs(&[model(&[0, 4, 8])]).unwrap();
    let ks = [0, 1, 2, 3].map(|layer| shape.n_expert_used.of(layer));
    assert_eq!(ks, [0, 4, 8, 0]);
    assert_eq!(
        serde_json::to_value(&shape.n_expert_used).unwrap(),
        serde_json::json!([0, 4, 8])
    );
    for bad in [&[1, 2][..], &[1, 2, 9]] {
        let error = ModelShape::from_ggufs(&[model(bad)]).unwrap_err();
        assert!(error.to_string().contains("a.expert_used_count"), "{error}");
    }
}

#[test]
fn shape_says_which_key_is_wrong() {
    let error = |gguf: Builder| {
        ModelShape::from_ggufs(&[gguf.gguf()])
            .unwrap_err()
            .to_string()
    };
    let arch = || Builder::default().string("general.architecture", "a");
    assert_eq!(
        error(Builder::default()),
        "key \"general.architecture\" is missing"
    );
    assert_eq!(error(arch()), "key \"a.block_count\" is missing");
    assert_eq!(
        error(arch().u32("a.block_count", u32::MAX)),
        "key \"a.block_count\" is not a number in its range"
    );
    assert_eq!(
        ModelShape::from_ggufs(&[]).unwrap_err().to_string(),
        "key \"general.architecture\" is missing"
    );
}

#[test]
fn shards_are_the_numbered_siblings() {
    let paths = |s: &str| shard_paths(Path::new(s));
    assert_eq!(
        paths("/m/a-00001-of-00003.gguf"),
        [1, 2, 3].map(|i| PathBuf::from(format!("/m/a-0000{i}-of-00003.gguf")))
    );
    for alone in [
        "/m/a.gguf",
        "/m/a-00004-of-00003.gguf",
        "/m/a-00000-of-00000.gguf",
        "/m/a-1-of-3.gguf",
        "/m/a-+0001-of-+0003.gguf",
        "/",
    ] {
        assert_eq!(paths(alone), [Path::new(alone)]);
    }
}

#[test]
fn special_tokens_follow_llama_cpp() {
    let tokens = |n: u64| vec![0; 8 * n as usize];
    let vocab = |model: &str, n: u64| {
        Builder::default()
            .string("tokenizer.ggml.model", model)
            .array("tokenizer.ggml.tokens", 8, n, &tokens(n))
    };
    let check = |builder: Builder, bos, eos| {
        assert_eq!(special_tokens(&builder.gguf()), SpecialTokens { bos, eos });
    };
    check(vocab("llama", 32), Some(1), Some(2));
    check(vocab("llama", 2), Some(1), None);
    check(vocab("bert", 200), Some(101), None);
    check(vocab("gpt2", 32), Some(11), Some(11));
    check(
        vocab("gpt2", 32).string("tokenizer.ggml.pre", "glm4"),
        None,
        Some(11),
    );
    check(vocab("t5", 32), None, Some(1));
    check(vocab("gemma4", 32), None, None);
    let keys = |b: Builder| {
        b.u32("tokenizer.ggml.bos_token_id", 7)
            .u32("tokenizer.ggml.eos_token_id", 32)
    };
    check(keys(vocab("llama", 32)), Some(7), Some(2));
    check(keys(vocab("none", 32)), None, None);
    check(keys(Builder::default()), None, None);
}
