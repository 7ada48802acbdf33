//! Traces of any size with the habits of real ones, for benchmarks.

use std::io::Write;

use anyhow::Result;
use expert_trace::trace::{Capture, ContextDetail, Kind, Row, file::TraceFile};
use expert_trace_common::Phase;
use serde_json::json;

/// A model and a text.
#[derive(Clone, Copy, Debug)]
pub struct Synthetic {
    /// Layers with experts.
    pub layers: u16,
    /// Experts of each.
    pub n_expert: u16,
    /// Experts per token.
    pub k: u16,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Generated tokens.
    pub generated: u32,
}

impl Synthetic {
    /// The shape of `qwen3-30b-a3b.route.csv` of BigMoeOnEdge.
    pub const SMALL: Self = Self {
        layers: 48,
        n_expert: 128,
        k: 6,
        prompt: 28,
        generated: 128,
    };

    /// 100 million activations.
    pub const LARGE: Self = Self {
        layers: 48,
        n_expert: 128,
        k: 8,
        prompt: 1024,
        generated: 259_393,
    };

    /// (token, expert) pairs.
    pub fn activations(&self) -> u64 {
        let tokens = u64::from(self.prompt) + u64::from(self.generated);
        tokens * u64::from(self.layers) * u64::from(self.k)
    }

    /// Writes the trace: a token keeps about a third of the experts of the token before, and draws the others,
    /// some of them often. The same every time.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn write(&self, out: impl Write) -> Result<()> {
        let capture = Capture {
            mode: Capture::IMPORT.to_owned(),
            ..Capture::default()
        };
        let mut trace = TraceFile::begin(out, &capture)?;
        let bytes = (0..self.layers).map(|layer| {
            json!({"layer_id": layer, "expert_bytes": 2_654_208 + 405_504 * u32::from(layer % 2), "dense_bytes": 0})
        });
        let detail = serde_json::to_string(&ContextDetail {
            pid: 0,
            models: vec![json!({
                "layers": self.layers,
                "n_expert": self.n_expert,
                "layer_bytes": bytes.collect::<Vec<_>>(),
            })],
        })?;
        trace.push(&Row {
            context: Some(0),
            detail: Some(&detail),
            ..Row::of(Kind::Context)
        })?;
        let mut dice = 1;
        let mut last = vec![Vec::new(); usize::from(self.layers)];
        let prompt = (0..self.prompt).map(|row| (0, Phase::Prefill, row));
        for layer in 0..self.layers {
            for (pass, phase, row) in prompt.clone() {
                self.push(&mut trace, &mut last, &mut dice, (pass, phase, row, layer))?;
            }
        }
        for token in 0..self.generated {
            for layer in 0..self.layers {
                let place = (1 + token, Phase::Decode, 0, layer);
                self.push(&mut trace, &mut last, &mut dice, place)?;
            }
        }
        Ok(trace.finish()?)
    }

    fn push(
        &self,
        trace: &mut TraceFile<impl Write>,
        last: &mut [Vec<u16>],
        dice: &mut u64,
        (pass, phase, row, layer): (u32, Phase, u32, u16),
    ) -> Result<()> {
        let experts = &mut last[usize::from(layer)];
        experts.retain(|_| below(dice, 3) == 0);
        while experts.len() < usize::from(self.k) {
            let expert = below(dice, self.n_expert.into()) * below(dice, self.n_expert.into());
            // Other ones are hot in every layer.
            let expert = expert / u64::from(self.n_expert) + 37 * u64::from(layer);
            let expert = (expert % u64::from(self.n_expert)) as u16;
            if !experts.contains(&expert) {
                experts.push(expert);
            }
        }
        let token = if phase == Phase::Prefill {
            row
        } else {
            self.prompt + pass - 1
        };
        Ok(trace.push(&Row {
            context: Some(0),
            pass: Some(pass),
            phase: Some(phase),
            layer: Some(layer),
            row: Some(row),
            sequence: Some(0),
            position: Some(token as i32),
            experts,
            ..Row::of(Kind::Routed)
        })?)
    }
}

/// A number from 0 to less than `end`: xorshift64.
fn below(state: &mut u64, end: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) % end
}
