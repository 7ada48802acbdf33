//! What a report has of a file.

use serde_json::json;

use super::{
    HeatMap, LayerContent, colour,
    facts::{Document, Facts},
    svg,
};

fn layer(id: u16, decode: &[u64]) -> LayerContent {
    LayerContent {
        id,
        coverage: None,
        tokens: [0, decode.iter().sum()],
        prefill: vec![0; decode.len()],
        decode: decode.to_vec(),
    }
}

#[test]
fn facts_tell_what_was_not_visible() {
    let document = json!({
        "tool": {"version": "1.2.3"},
        "target": {"pid": 7, "exe": "/a b", "command": ["/a b", "-m", "c"]},
        "capture": {"mode": "run", "started": "then", "duration_s": 1.25, "ended": "target_exited", "counted_since": null},
        "integrity": {"complete": false, "problems": ["3 rows lost"]},
        "contexts": [{"gaps": [{"layers": [7, 8], "coverage": "not_visible", "explanation": "on a device"}]}],
        "not_visible": [{"pid": 9, "tokens": 4, "gaps": [{"layers": null, "coverage": "not_visible", "explanation": "dense"}]}],
        "excluded": [{"kind": "warmup", "passes": 1, "tokens": 2}],
        "cost": {"window_percent": 0.25, "ns_per_token": 1500.0},
        "of_a_newer_program": {},
    });
    let facts = Facts::of(serde_json::from_value(document).unwrap());
    assert_eq!((facts.complete, facts.problems.len()), (Some(false), 1));
    assert_eq!(
        facts.not_visible,
        [
            "layers 7, 8 (not visible): on a device",
            "A context of process 9 (4 tokens): dense"
        ]
    );
    let text = format!("{:?}", facts.table);
    for part in [
        "/a b -m c",
        "1.2 s",
        "target exited",
        "1 passes, 2 tokens: warmup",
        "1.5 µs per token",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(Facts::of(Document::default()), Facts::default());
}

#[test]
fn cells_have_the_colours_of_their_counts() {
    let map = HeatMap::of(&[layer(3, &[0, 4, 16]), layer(4, &[1])]);
    let [left, top] = map.origin;
    assert_eq!(map.cell, 16);
    assert_eq!(
        map.cells[0],
        [colour::NEVER, colour::of(0.5), colour::of(1.0)]
    );
    assert_eq!(map.cells[1], [colour::of(0.25)]);
    let text = svg::text(&map);
    let rect = format!(
        "<rect x=\"{}\" y=\"{top}\" width=\"16\" height=\"16\" fill=\"#fde725\"/>",
        left + 32
    );
    assert!(text.contains(&rect), "{text}");
    assert!(text.contains(">3</text>") && text.contains(">4</text>"));
}

#[test]
fn large_and_empty_maps_are_pictures_too() {
    let wide = vec![1; 512];
    let layers: Vec<LayerContent> = (0..94).map(|id| layer(id, &wide)).collect();
    let map = HeatMap::of(&layers);
    assert_eq!(map.cell, 2);
    assert!(map.size[0] > 1024 && map.size[1] > 188);
    // Numbers of layers do not run into each other.
    let mut lines: Vec<usize> = map
        .words
        .iter()
        .filter(|(_, at)| at[0] < map.origin[0])
        .map(|(_, at)| at[1])
        .collect();
    lines.sort_unstable();
    assert!(lines.windows(2).all(|of| of[1] - of[0] >= 10), "{lines:?}");
    for map in [map, HeatMap::of(&[]), HeatMap::of(&[layer(0, &[])])] {
        let mut png = Vec::new();
        super::png::write(&map, &mut png).unwrap();
        assert!(png.starts_with(b"\x89PNG"));
    }
}
