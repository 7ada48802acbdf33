//! The view's thread: keys and time in, frames out.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use ratatui::{
    crossterm::event::{self, Event, KeyEventKind},
    layout::{Position, Rect, Size},
};
use tokio::sync::mpsc;

use super::{
    draw::{draw, places},
    heat_map,
    palette::Palette,
    picture::Picture,
    state::{Effect, State},
    terminal::Screen,
    view::{Asked, ask},
};

/// Time from one look at the counts to the next.
const FRAME: Duration = Duration::from_millis(250);

/// Time from one look at what the program has printed to the next, when the view was left.
const OUTPUT: Duration = Duration::from_millis(50);

/// Shows what is counted until the user, or the capture, ends it.
pub fn run(mut screen: Screen, title: &str, asks: &mpsc::Sender<Asked>) {
    // An error is the end of the terminal, or of the capture, which nobody here can tell.
    let _ = until_over(&mut screen, title, asks);
    let mut output = screen.leave();
    // Who has gone does not hear it.
    let _ = asks.blocking_send(Asked::Leave);
    while !asks.is_closed() {
        output.show();
        thread::sleep(OUTPUT);
    }
    output.show();
}

fn until_over(screen: &mut Screen, title: &str, asks: &mpsc::Sender<Asked>) -> io::Result<()> {
    let palette = Palette::of_environment();
    let mut state = State::default();
    let mut due = Instant::now();
    let mut changed = true;
    let mut shown = Size::ZERO;
    loop {
        let now = Instant::now();
        if now >= due {
            due = now + FRAME;
            changed |= look(&mut state, asks)?;
        }
        let area = screen.terminal.size()?;
        changed |= area != shown;
        shown = area;
        let [_, map, _] = places(Rect::from((Position::ORIGIN, area)));
        let (cells, lines) = heat_map::size(map);
        if changed {
            state.keep_cursor(cells, lines);
            let now = Instant::now();
            screen
                .terminal
                .draw(|frame| draw(frame, &state, palette, title, now))?;
            changed = false;
        }
        screen.wait(due.saturating_duration_since(Instant::now()))?;
        if !event::poll(Duration::ZERO)? {
            continue;
        }
        let effect = match event::read()? {
            Event::Key(key) if key.kind != KeyEventKind::Release => state.key(key, cells, lines),
            _ => Effect::None,
        };
        match effect {
            Effect::None => continue,
            Effect::Draw => {}
            Effect::Leave => return Ok(()),
            Effect::End => {
                let _ = asks.blocking_send(Asked::End);
                return Ok(());
            }
            Effect::Reset => {
                let wrong = ask(asks, Asked::Reset)?;
                let done = || "counting begins anew".to_owned();
                state.message = Some(wrong.unwrap_or_else(done));
                due = Instant::now();
            }
            Effect::Save => state.message = Some(ask(asks, Asked::Save)?),
        }
        changed = true;
    }
}

/// Takes the counts as they are now. Gives whether there is something to draw.
fn look(state: &mut State, asks: &mpsc::Sender<Asked>) -> io::Result<bool> {
    if state.paused {
        // The capture may be over.
        return match asks.is_closed() {
            true => Err(io::ErrorKind::BrokenPipe.into()),
            false => Ok(false),
        };
    }
    let now = Instant::now();
    let was = state.tokens_per_second(now);
    match ask(asks, Asked::Stats)? {
        Some(stats) => state.show(Picture::of(&stats), now),
        None => {
            state.tick(now);
            // A rate that falls to nothing is to be seen.
            return Ok(was.is_some_and(|rate| rate > 0.0));
        }
    }
    Ok(true)
}
