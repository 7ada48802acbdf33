//! Frames on a terminal in memory.

use std::time::{Duration, Instant};

use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    layout::Rect,
};

use super::{
    draw::{draw, places},
    heat_map, help,
    palette::{Colours, Palette},
    picture::{ContextPicture, LayerPicture, Picture},
    state::{Effect, State},
};

const MONO: Palette = Palette {
    colours: Colours::None,
    utf8: false,
};

/// Expert `e` of layer `l` has `(l + 1) × e` activations, the odd ones in prompts.
fn picture(layers: u16, experts: usize) -> Picture {
    let layer = |number: u16| {
        let counts = |id: usize| (u64::from(number) + 1) * id as u64;
        let both = |id| match id % 2 {
            0 => [0, counts(id)],
            _ => [counts(id), 0],
        };
        LayerPicture {
            number,
            k: Some(2),
            tokens: [10, 30],
            experts: (0..experts).map(both).collect(),
            unseen: false,
        }
    };
    Picture {
        contexts: vec![ContextPicture {
            pid: 7,
            model: Some("a.gguf".to_owned()),
            passes: 5,
            layers: (0..layers).map(layer).collect(),
            unseen_layers: 0,
        }],
        complete: true,
        integrity: "Complete: nothing lost.".to_owned(),
        ..Picture::default()
    }
}

fn state(layers: u16, experts: usize) -> State {
    let mut state = State::default();
    state.show(picture(layers, experts), Instant::now());
    state
}

fn press(state: &mut State, code: KeyCode) -> Effect {
    let [_, map, _] = places(Rect::new(0, 0, 80, 24));
    let (cells, lines) = heat_map::size(map);
    state.key(KeyEvent::new(code, KeyModifiers::NONE), cells, lines)
}

fn lines(state: &State, palette: Palette) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
    let now = Instant::now();
    terminal
        .draw(|frame| draw(frame, state, palette, "expert-trace top 7", now))
        .unwrap();
    let buffer = terminal.backend().buffer();
    let line = |y| (0..80).map(|x| buffer[(x, y)].symbol()).collect();
    (0..24).map(line).collect()
}

#[test]
fn the_cursor_tells_exact_counts() {
    let mut state = state(3, 8);
    for code in [
        KeyCode::Down,
        KeyCode::Right,
        KeyCode::Right,
        KeyCode::Right,
    ] {
        assert_eq!(press(&mut state, code), Effect::Draw);
    }
    let shown = lines(&state, MONO);
    assert!(shown[0].starts_with("expert-trace top 7 | a.gguf | 3 layers of 8 experts, 2 of them"));
    assert!(shown[1].contains("prefill 10, decode 30 | 5 passes | shown: all tokens"));
    let expected = "layer 1, expert 3: 6 activations (prefill 6, decode 0), 10.71 %";
    assert!(shown[21].starts_with(expected), "{}", shown[21]);
    assert!(shown[22].starts_with("Complete: nothing lost."));
    // Hottest first.
    press(&mut state, KeyCode::Char('s'));
    press(&mut state, KeyCode::Home);
    let expected = "layer 1, expert 7: 14 activations (prefill 14, decode 0), 25.00 %";
    assert!(lines(&state, MONO)[21].starts_with(expected));
    // Generated ones alone.
    press(&mut state, KeyCode::Char('f'));
    press(&mut state, KeyCode::Char('f'));
    let expected = "layer 1, expert 6: 12 activations (prefill 0, decode 12), 50.00 %";
    assert!(lines(&state, MONO)[21].starts_with(expected));
}

#[test]
fn large_models_fit_a_small_terminal() {
    let mut state = state(94, 512);
    let shown = lines(&state, MONO);
    assert!(
        shown[2].contains("experts by id, 9 in each cell"),
        "{}",
        shown[2]
    );
    assert!(shown[3].starts_with("    0 "));
    // The hottest of 0, 1, …, 511 has twice the mean; 350 of them have 90 % of the sum.
    assert!(
        shown[3].trim_end().ends_with("    2.0     350"),
        "{}",
        shown[3]
    );
    assert!(shown[20].starts_with("   17 "));
    press(&mut state, KeyCode::End);
    press(&mut state, KeyCode::PageDown);
    press(&mut state, KeyCode::PageDown);
    let shown = lines(&state, MONO);
    assert!(shown[20].starts_with("   36 "), "{}", shown[20]);
    assert!(
        shown[21].starts_with("layer 36, experts 504-511: "),
        "{}",
        shown[21]
    );
    press(&mut state, KeyCode::Char('a'));
    let shown = lines(&state, MONO);
    assert!(shown[18].starts_with("   90 "), "{shown:#?}");
    for _ in 0..9 {
        press(&mut state, KeyCode::Char('+'));
    }
    press(&mut state, KeyCode::Char('a'));
    press(&mut state, KeyCode::End);
    assert!(lines(&state, MONO)[21].contains("expert 511: "));
}

#[test]
fn every_terminal_shows_which_is_hottest() {
    let state = state(1, 4);
    let cells = |palette| -> Vec<String> {
        let line = &lines(&state, palette)[3];
        line.chars().skip(6).take(4).map(String::from).collect()
    };
    assert_eq!(cells(MONO)[1..], ["*", "%", "@"]);
    let shades = Palette { utf8: true, ..MONO };
    assert_eq!(cells(shades)[1..], ["▓", "█", "█"]);
    let letters: String = lines(&state, MONO).concat();
    assert!(letters.is_ascii());
}

#[test]
fn help_names_every_key() {
    let mut state = state(1, 4);
    press(&mut state, KeyCode::Char('?'));
    let shown = lines(&state, MONO).concat();
    for (key, what) in help::KEYS {
        assert!(shown.contains(key) && shown.contains(what), "{key}");
    }
    assert_eq!(press(&mut state, KeyCode::Char('x')), Effect::Draw);
    assert!(!state.help);
    for (key, effect) in [
        ('q', Effect::Leave),
        ('r', Effect::Reset),
        ('w', Effect::Save),
    ] {
        assert_eq!(press(&mut state, KeyCode::Char(key)), effect);
    }
    let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(state.key(interrupt, 1, 1), Effect::End);
}

#[test]
fn nothing_seen_is_said_and_bears_every_key() {
    let mut state = State::default();
    for code in [
        KeyCode::Down,
        KeyCode::End,
        KeyCode::PageDown,
        KeyCode::Tab,
        KeyCode::Char('a'),
        KeyCode::Char('+'),
        KeyCode::Char('-'),
        KeyCode::Char('s'),
    ] {
        press(&mut state, code);
        assert!(lines(&state, MONO)[2].starts_with("No routing has been counted yet."));
    }
}

#[test]
fn rates_are_of_the_last_seconds() {
    let mut state = State::default();
    let begin = Instant::now();
    let at = |seconds| begin + Duration::from_secs(seconds);
    let of = |tokens| {
        let mut picture = picture(1, 1);
        picture.contexts[0].layers[0].tokens = [0, tokens];
        picture
    };
    assert_eq!(state.tokens_per_second(begin), None);
    for (seconds, tokens) in [(0, 0), (1, 100), (2, 200), (10, 200), (12, 240)] {
        state.show(of(tokens), at(seconds));
    }
    assert_eq!(state.tokens_per_second(at(12)), Some(4.0));
    // Counting begins anew.
    state.show(of(1), at(13));
    state.show(of(3), at(14));
    assert_eq!(state.tokens_per_second(at(14)), Some(2.0));
}
