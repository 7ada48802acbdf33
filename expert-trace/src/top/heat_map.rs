//! Layers × experts, with the balance of each layer beside it.

use std::cmp::Reverse;

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Modifier, Style},
    widgets::Widget,
};

use crate::analyze::balance::Evenness;

use super::{
    palette::Palette,
    picture::LayerPicture,
    state::{Order, Scale, State},
};

/// Share of the activations, in percent, of which the experts are counted that have it: one of those of
/// [`Evenness::coverage`].
const COVERED: u32 = 90;

/// Columns of a layer's number.
const NUMBER: u16 = 6;
/// Columns of its balance.
const BALANCE: u16 = 16;

/// Cells and lines of a map in such a place.
pub fn size(area: Rect) -> (usize, usize) {
    let cells = area.width.saturating_sub(NUMBER + BALANCE);
    (cells.into(), area.height.saturating_sub(1).into())
}

/// What the cursor is at: layers, and places among their experts, in the order that is shown.
pub struct Pointed {
    pub layers: Vec<usize>,
    pub experts: Vec<usize>,
}

/// The map of a state.
pub struct HeatMap<'a> {
    pub state: &'a State,
    pub palette: Palette,
}

/// Experts of a layer in the order that is shown.
pub fn ordered(counts: &[u64], order: Order) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..counts.len()).collect();
    if order == Order::Heat {
        ids.sort_by_key(|id| Reverse(counts[*id]));
    }
    ids
}

/// The layers of a line.
fn of_line(line: usize, per_line: usize, layers: usize) -> std::ops::Range<usize> {
    line * per_line..layers.min((line + 1) * per_line)
}

/// Where the cursor of a state is.
pub fn pointed(state: &State, area: Rect) -> Option<Pointed> {
    let (_, context) = state.context()?;
    let (cells, lines) = size(area);
    let (line, place) = state.cursor;
    let per_cell = state.per_cell(cells);
    let layers: Vec<usize> = of_line(line, state.per_line(lines), context.layers.len()).collect();
    let experts: Vec<usize> =
        (place * per_cell..context.width().min((place + 1) * per_cell)).collect();
    (!layers.is_empty() && !experts.is_empty()).then_some(Pointed { layers, experts })
}

impl HeatMap<'_> {
    /// Mean activations of the experts of each cell of a line; none of a cell beyond all experts.
    fn line(&self, layers: &[LayerPicture], per_cell: usize, cells: usize) -> Vec<Option<f64>> {
        let mut sums = vec![(0_u64, 0_u64); cells];
        for layer in layers {
            let counts = layer.counts(self.state.phases);
            for (place, id) in ordered(&counts, self.state.order).into_iter().enumerate() {
                if let Some((sum, experts)) = sums.get_mut(place / per_cell) {
                    *sum += counts[id];
                    *experts += 1;
                }
            }
        }
        let mean = |(sum, experts): (u64, u64)| (experts > 0).then(|| sum as f64 / experts as f64);
        sums.into_iter().map(mean).collect()
    }

    fn balance(&self, layers: &[LayerPicture]) -> String {
        if layers.iter().all(|layer| layer.unseen) {
            return "not visible".to_owned();
        }
        let spread = layers
            .iter()
            .filter_map(|layer| Evenness::of(&layer.counts(self.state.phases)));
        let spread: Vec<Evenness> = spread.collect();
        let n = spread.len() as f64;
        if spread.is_empty() {
            return "-".to_owned();
        }
        let max: f64 = spread.iter().map(|of| of.max_over_mean).sum::<f64>() / n;
        let covering = spread.iter().flat_map(|of| &of.coverage);
        let covering = covering.filter(|of| of.percent == COVERED);
        let covering: usize = covering.map(|of| of.experts).sum();
        format!("{max:>7.1} {:>7.0}", covering as f64 / n)
    }
}

impl Widget for HeatMap<'_> {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let (cells, lines) = size(area);
        let Some((_, context)) = self.state.context() else {
            let text = "No routing has been counted yet.";
            buffer.set_stringn(area.x, area.y, text, area.width.into(), Style::new());
            return;
        };
        let per_cell = self.state.per_cell(cells);
        let per_line = self.state.per_line(lines);
        let (cursor_line, cursor_place) = self.state.cursor;
        let first_place = cursor_place.saturating_sub(cells.saturating_sub(1));
        let first_line = cursor_line.saturating_sub(lines.saturating_sub(1));
        let all_cells = context.width().div_ceil(per_cell);
        let shown = cells.min(all_cells.saturating_sub(first_place));
        let all: Vec<(usize, Vec<Option<f64>>)> = (0..context.layers.len().div_ceil(per_line))
            .map(|line| {
                let layers = of_line(line, per_line, context.layers.len());
                (
                    line,
                    self.line(&context.layers[layers], per_cell, all_cells),
                )
            })
            .collect();
        let hottest = |cells: &[Option<f64>]| cells.iter().flatten().copied().fold(0.0, f64::max);
        let of_all = all
            .iter()
            .map(|(_, cells)| hottest(cells))
            .fold(0.0, f64::max);

        let heading = Style::new().add_modifier(Modifier::UNDERLINED);
        let what = match self.state.order {
            Order::Id => "experts by id",
            Order::Heat => "experts by heat",
        };
        let text = match per_cell {
            1 => what.to_owned(),
            many => format!("{what}, {many} in each cell"),
        };
        let balance_x = area.x + NUMBER + cells as u16;
        buffer.set_stringn(area.x, area.y, "layer", NUMBER.into(), heading);
        buffer.set_stringn(area.x + NUMBER, area.y, text, cells, heading);
        let text = format!(" max/avg {COVERED}% in");
        buffer.set_stringn(balance_x, area.y, text, BALANCE.into(), heading);

        for (y, (line, heats)) in (area.y + 1..area.bottom()).zip(&all[first_line.min(all.len())..])
        {
            let layers = &context.layers[of_line(*line, per_line, context.layers.len())];
            let number = layers.first().map_or(0, |layer| layer.number);
            buffer.set_stringn(
                area.x,
                y,
                format!("{number:>5}"),
                NUMBER.into(),
                Style::new(),
            );
            let most = match self.state.scale {
                Scale::All => of_all,
                Scale::Layer => hottest(heats),
            };
            for (x, place) in (area.x + NUMBER..).zip(first_place..first_place + shown) {
                // A square root: most experts are far below the hottest.
                let heat = heats[place].map(|heat| (heat / most.max(f64::MIN_POSITIVE)).sqrt());
                let Some(heat) = heat else {
                    continue;
                };
                let mut cell = self.palette.cell(heat);
                if (*line, place) == (cursor_line, cursor_place) {
                    cell = self.palette.at_cursor(cell);
                }
                buffer[(x, y)].set_symbol(cell.0).set_style(cell.1);
            }
            let text = self.balance(layers);
            buffer.set_stringn(balance_x, y, text, BALANCE.into(), Style::new());
        }
    }
}
