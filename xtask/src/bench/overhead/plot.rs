//! The intervals as an SVG picture that can be read on light and dark ground.

use std::fmt::Write as _;

use serde_json::Value;

use super::{Interval, by_configuration, name, text};

/// Per cent at the two ends of the axis; what lies beyond is drawn at the end, with its number.
const ENDS: (f64, f64) = (-2.0, 8.0);
/// Where names end and the axis begins and ends, and the height of a line.
const NAMES: f64 = 350.0;
const RIGHT: f64 = 760.0;
const WIDTH: f64 = 860.0;
const LINE: f64 = 16.0;

const STYLE: &str = "<style>\
    text{font:12px sans-serif;fill:#333}\
    .head{font-weight:bold}\
    .axis{stroke:#888;stroke-width:1}\
    .goal{fill:#2a8f4f;fill-opacity:.25}\
    .wall{stroke:#c5601a;fill:#c5601a}\
    .cpu{stroke:#2b6cb0;fill:#2b6cb0}\
    text.wall,text.cpu{stroke:none}\
    @media(prefers-color-scheme:dark){text{fill:#ddd}.wall{stroke:#f0924c;fill:#f0924c}\
    .cpu{stroke:#6cacf0;fill:#6cacf0}}\
    </style>";

/// One line for each comparison and phase: wall time above, CPU time below.
pub fn plot(results: &[Value]) -> String {
    let mut body = String::new();
    let mut y = 2.0 * LINE;
    for ((model, threads), results) in by_configuration(results) {
        put_text(
            &mut body,
            8.0,
            y,
            "head",
            "start",
            &format!("{model}; threads: {threads}"),
        );
        y += LINE;
        let top = y - LINE / 2.0;
        for pair in results.chunks(2) {
            let [wall, cpu] = pair else { continue };
            let label = format!("{}, {}", name(wall), text(wall, "phase"));
            put_text(&mut body, NAMES - 10.0, y + 4.0, "", "end", &label);
            if let Some((low, high)) = allowed(wall) {
                let (left, right) = (at(low), at(high));
                let (top, width) = (y - LINE / 2.0 + 1.0, right - left);
                body += &format!(
                    "<rect class=\"goal\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{:.1}\"/>\n",
                    LINE - 2.0
                );
            }
            put_interval(&mut body, "wall", Interval::of(wall), y - 3.0);
            put_interval(&mut body, "cpu", Interval::of(cpu), y + 3.0);
            y += LINE;
        }
        for percent in [ENDS.0, 0.0, 2.0, 4.0, 6.0, ENDS.1] {
            let x = at(percent);
            let bottom = y - LINE / 2.0;
            body += &format!(
                "<line class=\"axis\" x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" \
                 stroke-opacity=\"{}\"/>\n",
                if percent == 0.0 { 1.0 } else { 0.3 }
            );
            put_text(
                &mut body,
                x,
                y + 8.0,
                "",
                "middle",
                &format!("{percent:+} %"),
            );
        }
        y += 3.0 * LINE;
    }
    let height = y;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\">\n{STYLE}\n{}{body}</svg>\n",
        legend()
    )
}

fn legend() -> String {
    let mut legend = String::new();
    for (class, x, label) in [
        ("wall", NAMES, "wall time"),
        ("cpu", NAMES + 100.0, "CPU time"),
    ] {
        let _ = writeln!(
            legend,
            "<line class=\"{class}\" x1=\"{x}\" y1=\"12\" x2=\"{}\" y2=\"12\" stroke-width=\"2\"/>",
            x + 20.0
        );
        put_text(&mut legend, x + 25.0, 16.0, "", "start", label);
    }
    let x = NAMES + 200.0;
    let _ = writeln!(
        legend,
        "<rect class=\"goal\" x=\"{x}\" y=\"6\" width=\"20\" height=\"12\"/>"
    );
    put_text(
        &mut legend,
        x + 25.0,
        16.0,
        "",
        "start",
        "where a goal is met",
    );
    legend
}

/// Where the goal of a result wants its interval to end, in per cent.
fn allowed(result: &Value) -> Option<(f64, f64)> {
    let goal = result["goal_percent"].as_array()?;
    let end = |i: usize| goal.get(i).and_then(Value::as_f64);
    Some((end(0).unwrap_or(ENDS.0), end(1)?))
}

fn put_interval(body: &mut String, class: &str, interval: Interval, y: f64) {
    let Interval { low, median, high } = interval;
    let (left, middle, right) = (at(low), at(median), at(high));
    let _ = writeln!(
        body,
        "<line class=\"{class}\" x1=\"{left:.1}\" y1=\"{y:.1}\" x2=\"{right:.1}\" y2=\"{y:.1}\" \
         stroke-width=\"1.5\"/><circle class=\"{class}\" cx=\"{middle:.1}\" cy=\"{y:.1}\" r=\"2\"/>"
    );
    if median > ENDS.1 {
        // Wall time is to the left of CPU time.
        let x = RIGHT + if class == "wall" { 6.0 } else { 52.0 };
        put_text(
            body,
            x,
            y.round() + 3.0,
            class,
            "start",
            &format!("{median:+.0} %"),
        );
    }
}

fn put_text(body: &mut String, x: f64, y: f64, class: &str, anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        body,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
    );
}

/// Place of a percentage on the axis.
fn at(percent: f64) -> f64 {
    let (first, last) = ENDS;
    NAMES + (percent.clamp(first, last) - first) / (last - first) * (RIGHT - NAMES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::overhead::tests::results;

    #[test]
    fn intervals_are_where_their_numbers_are() {
        let picture = plot(&results());
        let (left, right) = (at(-0.1), at(0.5));
        assert!(picture.contains(&format!("x1=\"{left:.1}\"")), "{picture}");
        assert!(picture.contains(&format!("x2=\"{right:.1}\"")), "{picture}");
        assert_eq!(picture.matches("<circle").count(), results().len());
        assert!(at(-100.0) >= NAMES && at(1000.0) <= RIGHT);
    }
}
