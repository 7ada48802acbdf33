//! The answers for people: a table for each question, and the verdict.

use std::fmt::{self, Write as _};

use super::{
    Analysis,
    balance::{Evenness, Means},
    cache::{Cache, MIB, Row},
    structure::{Pair, Structure},
    time::Time,
    verdict::{Recommendation, mib},
};

/// Layers and pairs that are listed; JSON has all.
const TOP: usize = 5;

impl Analysis {
    /// For people; `--json` has more figures.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> fmt::Result {
        self.source(text)?;
        self.balance(text)?;
        if let Some(time) = &self.time {
            write_time(text, time)?;
        }
        write_structure(text, &self.structure)?;
        if let Some(cache) = &self.cache {
            write_cache(text, cache)?;
        }
        self.verdict(text)?;
        if !self.cost.is_empty() {
            let costs = self.cost.iter();
            let costs: Vec<String> = costs
                .map(|cost| format!("{} {:.2} s", cost.work, cost.seconds))
                .collect();
            writeln!(text, "\nTime: {}.", costs.join(", "))?;
        }
        Ok(())
    }

    fn source(&self, text: &mut String) -> fmt::Result {
        let source = &self.source;
        writeln!(text, "{}, context {}", source.file, source.context)?;
        writeln!(
            text,
            "Layers: {}; experts: {}, {} per token; tokens: {} of prompts, {} generated",
            source.layers, source.n_expert, source.k, source.prefill_tokens, source.decode_tokens
        )
    }

    fn balance(&self, text: &mut String) -> fmt::Result {
        title(text, "Balance: how evenly are experts used?")?;
        writeln!(
            text,
            "{:<16} {:>6} {:>6} {:>8} {:>7} {:>8} {:>5} {:>5}  Experts for 50/80/90/99 %",
            "", "Used", "Dead", "Entropy", "exp(H)", "Max/mean", "Gini", "CV"
        )?;
        let balance = &self.balance;
        for (name, means) in [
            ("all tokens", &balance.all),
            ("prefill", &balance.prefill),
            ("decode", &balance.decode),
        ] {
            write_means(text, name, means)?;
        }
        let mut layers: Vec<(u16, &Evenness)> = balance
            .layers
            .iter()
            .filter_map(|layer| Some((layer.layer_id, layer.all.as_ref()?)))
            .collect();
        layers.sort_by(|(_, a), (_, b)| a.effective_percent.total_cmp(&b.effective_percent));
        let extremes = match layers.as_slice() {
            [first, .., last] => vec![("least even", first), ("most even", last)],
            only => only.iter().map(|only| ("only layer", only)).collect(),
        };
        for (name, (layer, of)) in extremes {
            let coverage: Vec<String> = of
                .coverage
                .iter()
                .map(|point| point.experts.to_string())
                .collect();
            writeln!(
                text,
                "{:<16} {:>6} {:>6} {:>8.2} {:>5.1} % {:>8.2} {:>5.2} {:>5.2}  {}",
                format!("{name}: {layer}"),
                of.used,
                of.dead,
                of.entropy_bits,
                of.effective_percent,
                of.max_over_mean,
                of.gini,
                of.cv,
                coverage.join(" / ")
            )?;
        }
        let jsd = self
            .balance
            .layers
            .iter()
            .filter_map(|layer| layer.prefill_decode_jsd_bits);
        if let Some(mean) = super::balance::mean(jsd) {
            writeln!(
                text,
                "Prefill and decode differ by {mean:.3} bits on average (Jensen-Shannon; 0: equal, 1: nothing in common)."
            )?;
        }
        if !balance.split.is_empty() {
            let splits = balance.split.iter();
            let splits: Vec<String> = splits
                .map(|split| format!("{} devices: {:.2}", split.devices, split.busiest_over_mean))
                .collect();
            writeln!(
                text,
                "Split by expert, the busiest device has so many times the mean: {}.",
                splits.join(", ")
            )?;
        }
        Ok(())
    }

    fn verdict(&self, text: &mut String) -> fmt::Result {
        let verdict = &self.verdict;
        title(text, "Verdict")?;
        let name = match verdict.recommendation {
            Recommendation::StaticPin => "static pin",
            Recommendation::Lru => "LRU",
            Recommendation::Neither => "neither",
            Recommendation::NotKnown => "not known",
        };
        writeln!(text, "{name}: {}", verdict.summary)?;
        for line in verdict.figures.iter().chain(&verdict.warnings) {
            writeln!(text, "- {line}")?;
        }
        if !verdict.options.is_empty() {
            writeln!(text, "\nWhat llama.cpp can hold of it, whole layers:")?;
        }
        for option in &verdict.options {
            let percent = option.percent.map_or_else(String::new, |percent| {
                format!(" with {percent:.1} % of the decode activations")
            });
            writeln!(
                text,
                "  {}\n      holds {}{percent}",
                option.option,
                mib(option.holds_mib)
            )?;
        }
        writeln!(text, "\nWhat this cannot know:")?;
        for line in &verdict.cannot_know {
            writeln!(text, "- {line}")?;
        }
        for unanswered in &self.unanswered {
            writeln!(text, "- {}: {}", unanswered.question, unanswered.why)?;
        }
        Ok(())
    }
}

fn title(text: &mut String, title: &str) -> fmt::Result {
    writeln!(text, "\n=== {title} ===")
}

fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
}

fn write_means(text: &mut String, name: &str, means: &Means) -> fmt::Result {
    let coverage: Vec<String> = means
        .coverage
        .iter()
        .map(|point| format!("{:.1}", point.experts))
        .collect();
    writeln!(
        text,
        "{name:<16} {:>6} {:>6} {:>8} {:>5} % {:>8} {:>5} {:>5}  {}",
        number(means.used.map(|used| used.mean), 1),
        means.dead,
        number(means.entropy_bits, 2),
        number(means.effective_percent, 1),
        number(means.max_over_mean, 2),
        number(means.gini, 2),
        number(means.cv, 2),
        coverage.join(" / ")
    )
}

fn write_time(text: &mut String, time: &Time) -> fmt::Result {
    title(
        text,
        "Time: how does the choice change from token to token?",
    )?;
    if let Some(why) = &time.refused {
        writeln!(text, "Not told: {why}.")?;
    } else {
        let overlap: Vec<String> = time
            .overlap
            .iter()
            .map(|of| format!("{} back {} %", of.lag, number(of.percent, 1)))
            .collect();
        writeln!(
            text,
            "Experts in common with the token {}.",
            overlap.join(", ")
        )?;
        let guess = &time.predictors;
        writeln!(
            text,
            "Of a token's experts, known beforehand by the token before {} %, by the hottest of the run {} %, of the \
             prompts {} %.",
            number(guess.previous_token, 1),
            number(guess.static_hot, 1),
            number(guess.prompt_hot, 1)
        )?;
        writeln!(
            text,
            "In the second half: by the hottest of the first half {} %, by the token before {} %.",
            number(guess.first_half_hot, 1),
            number(guess.previous_token_second_half, 1)
        )?;
    }
    let of = |distance: Option<u64>| distance.map_or_else(|| "-".to_owned(), |of| of.to_string());
    writeln!(
        text,
        "Passes until an expert is used again: half of the time {}, 90 % {}, at most {}; {} first uses.",
        of(time.reuse.p50),
        of(time.reuse.p90),
        of(time.reuse.max),
        time.reuse.first_uses
    )?;
    let growth: Vec<String> = time
        .growth
        .iter()
        .map(|point| match point.mib {
            Some(bytes) => format!("{}: {:.1} ({})", point.passes, point.experts, mib(bytes)),
            None => format!("{}: {:.1}", point.passes, point.experts),
        })
        .collect();
    writeln!(
        text,
        "Distinct experts per layer after so many decode passes: {}.",
        growth.join(", ")
    )
}

fn write_structure(text: &mut String, structure: &Structure) -> fmt::Result {
    title(text, "Structure: which experts go together?")?;
    let similar: Vec<String> = structure
        .similar_layers
        .iter()
        .take(TOP)
        .map(|of| {
            format!(
                "{} and {} ({:.3} bits)",
                of.layers[0], of.layers[1], of.jsd_bits
            )
        })
        .collect();
    if !similar.is_empty() {
        writeln!(
            text,
            "Layers with the most similar load, by expert id: {}.",
            similar.join(", ")
        )?;
    }
    let listed = |pairs: &[Pair]| -> String {
        let pairs = pairs.iter().take(TOP).map(|pair| {
            let [a, b] = pair.layers;
            let [from, to] = pair.experts;
            format!(
                "{a}/{from} and {b}/{to}: {:.1}x ({} tokens)",
                pair.lift, pair.tokens
            )
        });
        pairs.collect::<Vec<_>>().join(", ")
    };
    let support = structure.min_support;
    for (name, pairs) in [
        ("Together in a layer", &structure.co_activation),
        ("From layer to layer", &structure.transitions),
    ] {
        if !pairs.is_empty() {
            writeln!(
                text,
                "{name}, layer/expert, times as often as by chance ({support} tokens at least): {}.",
                listed(pairs)
            )?;
        }
    }
    let Some(tokens) = &structure.tokens else {
        return Ok(());
    };
    for of in tokens.by_token.iter().take(TOP) {
        let experts = of.experts.iter();
        let experts: Vec<String> = experts
            .map(|of| format!("{}/{} {:.1}x", of.layer_id, of.expert_id, of.lift))
            .collect();
        writeln!(
            text,
            "Token {} ({} rows): {}",
            of.token,
            of.rows,
            experts.join(", ")
        )?;
    }
    for of in tokens.by_expert.iter().take(TOP) {
        let tokens = of.tokens.iter();
        let tokens: Vec<String> = tokens
            .map(|of| format!("{} {:.1}x", of.token, of.lift))
            .collect();
        writeln!(
            text,
            "Expert {}/{}: tokens {}",
            of.layer_id,
            of.expert_id,
            tokens.join(", ")
        )?;
    }
    Ok(())
}

fn write_cache(text: &mut String, cache: &Cache) -> fmt::Result {
    title(
        text,
        "Cache: which share of the lookups of generated tokens would hit?",
    )?;
    let [least, most] = cache.expert_bytes.map(|bytes| mib(bytes as f64 / MIB));
    let of_expert = match least == most {
        true => most,
        false => format!("{least} to {most}"),
    };
    let pass = cache.pass_mib.map_or_else(String::new, |pass| {
        format!(
            "; a decode pass touches {}, at most {}",
            mib(pass.mean),
            mib(pass.max)
        )
    });
    writeln!(
        text,
        "An expert takes {of_expert}, all of them {}{pass}.",
        mib(cache.all_experts_mib)
    )?;
    writeln!(
        text,
        "{:>10} {:>7} {:>7} {:>6} {:>6} {:>6} {:>9} {:>9} {:>6}",
        "MiB", "Share %", "Belady", "LRU", "LFU", "Random", "Layer LRU", "Layer LFU", "Pin"
    )?;
    for row in &cache.table {
        write_row(text, row)?;
    }
    writeln!(
        text,
        "Random's seed is {}. Pin, chosen with knowledge of the whole run, begins full: the others begin empty.",
        cache.seed
    )?;
    let marks = [
        (
            cache.table.iter().any(|row| row.below_working_set),
            "* is less than one decode pass touches.",
        ),
        (
            cache.table.iter().any(|row| row.layer_holds_mib.is_some()),
            "! is exceeded by the per-layer caches.",
        ),
    ];
    for (_, mark) in marks.iter().filter(|(is_there, _)| *is_there) {
        writeln!(text, "{mark}")?;
    }
    if let Some(sampled) = cache.sampled {
        writeln!(
            text,
            "The table is of the first {} of {} activations; it has taken {:.0} MiB.",
            sampled.activations, sampled.of, cache.memory_mib
        )?;
    }
    Ok(())
}

fn write_row(text: &mut String, row: &Row) -> fmt::Result {
    let budget = match row.budget_mib {
        mib if mib < 10.0 => format!("{mib:.3}"),
        mib => format!("{mib:.0}"),
    };
    let mark = match (row.below_working_set, row.layer_holds_mib.is_some()) {
        (true, true) => " *!",
        (true, false) => " *",
        (false, true) => " !",
        (false, false) => "",
    };
    writeln!(
        text,
        "{budget:>10} {:>7.1} {:>7} {:>6} {:>6} {:>6} {:>9} {:>9} {:>6}{mark}",
        row.share_percent,
        number(row.belady, 1),
        number(row.lru, 1),
        number(row.lfu, 1),
        number(row.random, 1),
        number(row.layer_lru, 1),
        number(row.layer_lfu, 1),
        number(row.static_pin, 1)
    )
}
