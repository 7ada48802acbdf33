//! What the view shows, and what keys do to it. Pure: no terminal, no clock.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::picture::{ContextPicture, Phases, Picture};

/// Over how long tokens per second are taken.
const RATE_OVER: Duration = Duration::from_secs(3);

/// Experts of a cell are doubled up to this.
const MAX_ZOOM: usize = 512;

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing but another look.
    Draw,
    /// Nothing.
    None,
    /// To begin to count anew.
    Reset,
    /// To write the document.
    Save,
    /// To end the view: `q`.
    Leave,
    /// To end the capture, or the program: Ctrl-C.
    End,
}

/// In which order the experts of a layer stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// By their ids.
    #[default]
    Id,
    /// Those with most activations first, each layer for itself.
    Heat,
}

/// What the hottest colour stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// The hottest expert of all layers.
    #[default]
    All,
    /// The hottest expert of each layer.
    Layer,
}

/// All that the view remembers.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// What was shown last.
    pub picture: Picture,
    /// Context that was chosen; the main one before.
    context: Option<usize>,
    /// Row of layers and place in it that the cursor is at.
    pub cursor: (usize, usize),
    /// Experts of a cell, when it was chosen; else as few as fit.
    pub zoom: Option<usize>,
    /// Whether several layers share a line, so that all fit.
    pub all_layers: bool,
    pub order: Order,
    pub scale: Scale,
    pub phases: Phases,
    pub paused: bool,
    pub help: bool,
    /// What was done last, for the user.
    pub message: Option<String>,
    /// Tokens of all contexts at times.
    tokens: VecDeque<(Instant, u64)>,
}

impl State {
    /// Takes a picture that was made at this time.
    pub fn show(&mut self, picture: Picture, now: Instant) {
        let tokens = picture.tokens();
        // Fewer than before: counting has begun anew.
        if self
            .tokens
            .back()
            .is_some_and(|(_, before)| tokens < *before)
        {
            self.tokens.clear();
        }
        self.tokens.push_back((now, tokens));
        self.picture = picture;
        self.tick(now);
    }

    /// Time has gone by, and nothing was counted.
    pub fn tick(&mut self, now: Instant) {
        // The last one before the time stays, to count from.
        while self
            .tokens
            .get(1)
            .is_some_and(|(at, _)| now.duration_since(*at) >= RATE_OVER)
        {
            self.tokens.pop_front();
        }
    }

    /// Tokens per second, over the last few.
    pub fn tokens_per_second(&self, now: Instant) -> Option<f64> {
        let (first, before) = self.tokens.front()?;
        let (_, after) = self.tokens.back()?;
        let seconds = now.duration_since(*first).as_secs_f64();
        (seconds >= 0.2).then(|| (after - before) as f64 / seconds)
    }

    /// The context that is shown, and its number.
    pub fn context(&self) -> Option<(usize, &ContextPicture)> {
        let number = self.context.unwrap_or(self.picture.main);
        let context = self.picture.contexts.get(number)?;
        Some((number, context))
    }

    /// Experts of a cell, where `cells` fit in a line.
    pub fn per_cell(&self, cells: usize) -> usize {
        let width = self.context().map_or(0, |(_, context)| context.width());
        let fit = width.div_ceil(cells.max(1)).max(1);
        self.zoom.unwrap_or(fit)
    }

    /// Layers of a line, where `lines` fit.
    pub fn per_line(&self, lines: usize) -> usize {
        let layers = self
            .context()
            .map_or(0, |(_, context)| context.layers.len());
        match self.all_layers {
            true => layers.div_ceil(lines.max(1)).max(1),
            false => 1,
        }
    }

    /// Does what a key asks for. `cells` and `lines` are those of the map on the screen.
    pub fn key(&mut self, key: KeyEvent, cells: usize, lines: usize) -> Effect {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        self.message = None;
        if control {
            return match key.code {
                KeyCode::Char('c') => Effect::End,
                KeyCode::Char('l') => Effect::Draw,
                _ => Effect::None,
            };
        }
        if self.help {
            self.help = false;
            return match key.code {
                KeyCode::Char('q') => Effect::Leave,
                _ => Effect::Draw,
            };
        }
        let (line, place) = &mut self.cursor;
        match key.code {
            KeyCode::Char('q') => return Effect::Leave,
            KeyCode::Char('r') => return Effect::Reset,
            KeyCode::Char('w') => return Effect::Save,
            KeyCode::Char('?') | KeyCode::F(1) => self.help = true,
            KeyCode::Char('p' | ' ') => self.paused ^= true,
            KeyCode::Char('f') => self.phases = self.phases.next(),
            KeyCode::Char('a') => self.all_layers ^= true,
            KeyCode::Char('s') => {
                self.order = match self.order {
                    Order::Id => Order::Heat,
                    Order::Heat => Order::Id,
                }
            }
            KeyCode::Char('n') => {
                self.scale = match self.scale {
                    Scale::All => Scale::Layer,
                    Scale::Layer => Scale::All,
                }
            }
            KeyCode::Char('+' | '=') => self.zoom = Some((self.per_cell(cells) / 2).max(1)),
            KeyCode::Char('-') => self.zoom = Some((self.per_cell(cells) * 2).min(MAX_ZOOM)),
            KeyCode::Char('0') => self.zoom = None,
            KeyCode::Char('c') | KeyCode::Tab => {
                let number = self.context.unwrap_or(self.picture.main) + 1;
                self.context = Some(number % self.picture.contexts.len().max(1));
            }
            KeyCode::Up | KeyCode::Char('k') => *line = line.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => *line += 1,
            KeyCode::Left | KeyCode::Char('h') => *place = place.saturating_sub(1),
            KeyCode::Right | KeyCode::Char('l') => *place += 1,
            KeyCode::PageUp => *line = line.saturating_sub(lines),
            KeyCode::PageDown => *line += lines,
            KeyCode::Home => *place = 0,
            KeyCode::End => *place = usize::MAX,
            _ => return Effect::None,
        }
        self.keep_cursor(cells, lines);
        Effect::Draw
    }

    /// Has the cursor stay on the map.
    pub fn keep_cursor(&mut self, cells: usize, lines: usize) {
        let (layers, width) = match self.context() {
            Some((_, context)) => (context.layers.len(), context.width()),
            None => (0, 0),
        };
        let all_lines = layers.div_ceil(self.per_line(lines));
        let all_cells = width.div_ceil(self.per_cell(cells));
        let (line, place) = &mut self.cursor;
        *line = (*line).min(all_lines.saturating_sub(1));
        *place = (*place).min(all_cells.saturating_sub(1));
    }
}
