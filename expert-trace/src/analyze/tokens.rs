//! Experts by token, and tokens by expert.

use std::{cmp::Reverse, collections::HashMap};

use serde::Serialize;

use super::{pairs::Pairs, routing::Routing, structure::MIN_SUPPORT};

/// Most frequent token ids that are looked at.
const MAX_TOKENS: usize = 1000;
/// Counters in memory at most: 64 MiB.
const MAX_CELLS: usize = 16 << 20;
/// Tokens, and experts, that are listed.
const TOP: usize = 20;
/// What is listed of each.
const TOP_OF_EACH: usize = 5;

/// Experts and token ids.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tokens {
    /// Distinct token ids.
    pub distinct: usize,
    /// The most frequent ones, which alone were looked at.
    pub looked_at: usize,
    /// The most frequent tokens, with the experts that they choose more often than others do.
    pub by_token: Vec<OfToken>,
    /// The experts that are most particular about tokens, with those.
    pub by_expert: Vec<OfExpert>,
}

/// A token and its experts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OfToken {
    /// Its id.
    pub token: i32,
    /// Rows of it in the layer that has most.
    pub rows: u64,
    /// Experts with the highest lift.
    pub experts: Vec<TokenExpert>,
}

/// An expert and its tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OfExpert {
    /// Its layer.
    pub layer_id: u16,
    /// Its number.
    pub expert_id: u16,
    /// Tokens with the highest lift.
    pub tokens: Vec<TokenExpert>,
}

/// A token and an expert.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenExpert {
    /// The token's id.
    pub token: i32,
    /// The expert's layer.
    pub layer_id: u16,
    /// Its number.
    pub expert_id: u16,
    /// Rows of this token that chose it.
    pub rows: u64,
    /// Those, of this token's rows in the layer, in percent.
    pub percent: f64,
    /// Those / rows that would by chance.
    pub lift: f64,
}

impl Tokens {
    /// What a trace tells; none without token ids.
    pub fn of(routing: &Routing) -> Option<Self> {
        if !routing.has_tokens() {
            return None;
        }
        let mut rows: HashMap<i32, u64> = HashMap::new();
        // A layer tells all tokens once; the first one computes them all.
        for batch in routing.batches().filter(|batch| batch.layer == 0) {
            for token in batch.rows().filter_map(|row| row.token) {
                *rows.entry(token).or_default() += 1;
            }
        }
        let mut frequent: Vec<(i32, u64)> =
            rows.iter().map(|(token, rows)| (*token, *rows)).collect();
        frequent.sort_by_key(|(token, rows)| (Reverse(*rows), *token));
        frequent.truncate(MAX_TOKENS.min(MAX_CELLS / routing.keys().max(1)));
        let numbers = frequent.iter().zip(0_u16..);
        let numbers: HashMap<i32, u16> = numbers
            .map(|((token, _), number)| (*token, number))
            .collect();
        let mut layers: Vec<Pairs> = routing
            .layers()
            .iter()
            .map(|layer| Pairs::new(frequent.len() + 1, layer.n_expert as usize))
            .collect();
        for batch in routing.batches() {
            for row in batch.rows() {
                let Some(token) = row.token else { continue };
                // All others count together: chance is that of all rows.
                let others = frequent.len() as u16;
                let number = numbers.get(&token).copied().unwrap_or(others);
                layers[batch.layer].add(&[number], row.experts);
            }
        }
        let mut all: Vec<TokenExpert> = Vec::new();
        for (pairs, layer) in layers.iter().zip(routing.layers()) {
            let strongest =
                pairs.strongest(MIN_SUPPORT, usize::MAX, |token, _| token < frequent.len());
            all.extend(strongest.into_iter().map(|of| TokenExpert {
                token: frequent[of.a].0,
                layer_id: layer.id,
                expert_id: of.b as u16,
                rows: of.both.into(),
                percent: of.percent,
                lift: of.lift,
            }));
        }
        all.sort_by(|a, b| b.lift.total_cmp(&a.lift).then(b.rows.cmp(&a.rows)));
        let by_token = frequent.iter().take(TOP).map(|(token, rows)| {
            let experts = all.iter().filter(|of| of.token == *token);
            OfToken {
                token: *token,
                rows: *rows,
                experts: experts.take(TOP_OF_EACH).cloned().collect(),
            }
        });
        let by_token = by_token.collect();
        Some(Self {
            distinct: rows.len(),
            looked_at: frequent.len(),
            by_token,
            by_expert: by_expert(&all),
        })
    }
}

/// Tokens of the experts that come first in this list.
fn by_expert(all: &[TokenExpert]) -> Vec<OfExpert> {
    let mut experts: Vec<OfExpert> = Vec::new();
    let mut places: HashMap<(u16, u16), usize> = HashMap::new();
    for of in all {
        let expert = (of.layer_id, of.expert_id);
        let place = match places.get(&expert) {
            Some(place) => *place,
            None if experts.len() == TOP => continue,
            None => {
                experts.push(OfExpert {
                    layer_id: of.layer_id,
                    expert_id: of.expert_id,
                    tokens: Vec::new(),
                });
                places.insert(expert, experts.len() - 1);
                experts.len() - 1
            }
        };
        if experts[place].tokens.len() < TOP_OF_EACH {
            experts[place].tokens.push(of.clone());
        }
    }
    experts
}
