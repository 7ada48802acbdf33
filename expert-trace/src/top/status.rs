//! The lines above and below the map.

use std::time::Instant;

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Modifier, Style},
    widgets::Widget,
};

use super::{
    heat_map::{Pointed, ordered},
    palette::Palette,
    state::State,
};

/// What is traced, and how fast it goes. Two lines.
pub struct Head<'a> {
    pub state: &'a State,
    pub palette: Palette,
    pub title: &'a str,
    pub now: Instant,
}

impl Widget for Head<'_> {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let separator = self.palette.separator();
        let state = self.state;
        let mut first = vec![self.title.to_owned()];
        let mut second = Vec::new();
        if let Some((number, context)) = state.context() {
            first.extend(context.model.clone());
            let all = state.picture.contexts.len();
            if all > 1 {
                first.push(format!(
                    "context {} of {all}, process {}",
                    number + 1,
                    context.pid
                ));
            }
            let k = context.layers.iter().filter_map(|layer| layer.k).max();
            let k = k.map_or(String::new(), |k| format!(", {k} of them chosen"));
            let layers = context.layers.len();
            first.push(format!("{layers} layers of {} experts{k}", context.width()));
            let [prefill, decode] = context.tokens();
            let rate = state.tokens_per_second(self.now);
            second.push(rate.map_or("- tokens/s".to_owned(), |rate| {
                format!("{rate:.1} tokens/s")
            }));
            second.push(format!("prefill {prefill}, decode {decode}"));
            second.push(format!("{} passes", context.passes));
            second.push(format!("shown: {}", state.phases.name()));
        }
        if state.paused {
            second.push("PAUSED".to_owned());
        }
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let width = area.width.into();
        buffer.set_stringn(area.x, area.y, first.join(separator), width, bold);
        let y = area.y + 1;
        buffer.set_stringn(area.x, y, second.join(separator), width, Style::new());
    }
}

/// What the cursor is at, how far it is to be believed, and keys. Three lines.
pub struct Foot<'a> {
    pub state: &'a State,
    pub palette: Palette,
    pub pointed: Option<Pointed>,
}

const KEYS: &str = "? help  q leave  p pause  r reset  w save  s sort  f phase  + - zoom";

impl Foot<'_> {
    fn at_cursor(&self) -> Option<String> {
        let (_, context) = self.state.context()?;
        let Pointed { layers, experts } = self.pointed.as_ref()?;
        let phases = self.state.phases;
        let (mut sum, mut of_layers) = ([0; 2], 0);
        let mut ids = Vec::new();
        for layer in layers {
            let layer = &context.layers[*layer];
            let counts = layer.counts(phases);
            of_layers += counts.iter().sum::<u64>();
            let order = ordered(&counts, self.state.order);
            ids = experts
                .iter()
                .filter_map(|place| order.get(*place).copied())
                .collect();
            for [prefill, decode] in ids.iter().map(|id| layer.experts[*id]) {
                sum = [sum[0] + prefill, sum[1] + decode];
            }
        }
        let range = |of: &[usize], of_one: &str| match of {
            [one] => format!("{of_one} {one}"),
            many => format!("{of_one}s {}-{}", many[0], many[many.len() - 1]),
        };
        let numbers: Vec<usize> = layers
            .iter()
            .map(|layer| context.layers[*layer].number.into())
            .collect();
        let experts = match (ids.as_slice(), layers.len()) {
            ([one], 1) => format!("expert {one}"),
            ([], _) => return None,
            _ if self.state.order == super::state::Order::Heat => range(
                &experts.iter().map(|place| place + 1).collect::<Vec<_>>(),
                "heat rank",
            ),
            _ => range(experts, "expert"),
        };
        let [prefill, decode] = sum;
        let shown = phases.of(sum);
        let share = match of_layers {
            0 => 0.0,
            all => 100.0 * shown as f64 / all as f64,
        };
        Some(format!(
            "{}, {experts}: {} activations (prefill {prefill}, decode {decode}), {share:.2} %",
            range(&numbers, "layer"),
            prefill + decode,
        ))
    }

    /// What was not seen, and what the tracing costs.
    fn belief(&self) -> String {
        let picture = &self.state.picture;
        let mut parts = vec![picture.integrity.clone()];
        let unseen = self
            .state
            .context()
            .map_or(0, |(_, context)| context.unseen_layers);
        match unseen {
            0 => {}
            1 => parts.push("1 layer not always visible".to_owned()),
            many => parts.push(format!("{many} layers not always visible")),
        }
        if picture.not_visible > 0 {
            parts.push(format!("{} contexts not visible", picture.not_visible));
        }
        if let Some(percent) = picture.cost_percent {
            let each = picture.ns_per_token.map_or(String::new(), |ns| {
                format!(" ({:.1} us per token)", ns / 1e3)
            });
            parts.push(format!("cost {percent:.2} %{each}"));
        }
        parts.join(self.palette.separator())
    }
}

impl Widget for Foot<'_> {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let width = area.width.into();
        let at_cursor = self.at_cursor().unwrap_or_default();
        buffer.set_stringn(area.x, area.y, at_cursor, width, Style::new());
        let style = match self.state.picture.complete {
            true => Style::new(),
            false => self.palette.warning(),
        };
        if !self.state.picture.integrity.is_empty() {
            buffer.set_stringn(area.x, area.y + 1, self.belief(), width, style);
        }
        let last = self.state.message.as_deref().unwrap_or(KEYS);
        let style = Style::new().add_modifier(Modifier::REVERSED);
        let padded = format!("{last:<width$}", width = area.width.into());
        buffer.set_stringn(area.x, area.y + 2, padded, width, style);
    }
}
