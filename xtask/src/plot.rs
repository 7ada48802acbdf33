//! Line plots as SVG, for documents: both axes logarithmic.

use std::fmt::Write as _;

/// A plot.
pub struct Plot<'a> {
    pub title: &'a str,
    /// What the axes show, with units.
    pub x_label: &'a str,
    pub y_label: &'a str,
    pub series: Vec<Series<'a>>,
}

/// Points that a line goes through.
pub struct Series<'a> {
    pub name: &'a str,
    /// All above zero.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
/// Around the area of the lines: left, right, top, bottom.
const MARGINS: [f64; 4] = [90.0, 20.0, 40.0, 60.0];
/// Colours that people who see few of them tell apart (Okabe and Ito).
const COLOURS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];

impl Plot<'_> {
    /// The file's text.
    pub fn svg(&self) -> String {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x = Axis::around(points().map(|point| point.0));
        let y = Axis::around(points().map(|point| point.1));
        let [left, right, top, bottom] = MARGINS;
        let at_x = |value: f64| left + x.place(value) * (WIDTH - left - right);
        let at_y = |value: f64| HEIGHT - bottom - y.place(value) * (HEIGHT - top - bottom);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        let text = |svg: &mut String, x: f64, y: f64, anchor: &str, more: &str, text: &str| {
            // Writing to a string does not fail.
            let _ = writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"{more}>{}</text>",
                escaped(text)
            );
        };
        text(
            &mut svg,
            WIDTH / 2.0,
            22.0,
            "middle",
            " font-size=\"15\"",
            self.title,
        );
        text(
            &mut svg,
            WIDTH / 2.0,
            HEIGHT - 15.0,
            "middle",
            "",
            self.x_label,
        );
        let turned = format!(" transform=\"rotate(-90 18 {:.1})\"", HEIGHT / 2.0);
        text(
            &mut svg,
            18.0,
            HEIGHT / 2.0,
            "middle",
            &turned,
            self.y_label,
        );
        let line = |svg: &mut String, from: (f64, f64), to: (f64, f64)| {
            let _ = writeln!(
                svg,
                "<path d=\"M{:.1} {:.1}L{:.1} {:.1}\" stroke=\"#ddd\"/>",
                from.0, from.1, to.0, to.1
            );
        };
        for value in x.marks() {
            let at = at_x(value);
            line(&mut svg, (at, top), (at, HEIGHT - bottom));
            text(
                &mut svg,
                at,
                HEIGHT - bottom + 18.0,
                "middle",
                "",
                &short(value),
            );
        }
        for value in y.marks() {
            let at = at_y(value);
            line(&mut svg, (left, at), (WIDTH - right, at));
            text(&mut svg, left - 8.0, at + 4.0, "end", "", &short(value));
        }
        for (index, series) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let places = series.points.iter();
            let places: Vec<String> = places
                .map(|(x, y)| format!("{:.1},{:.1}", at_x(*x), at_y(*y)))
                .collect();
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                places.join(" ")
            );
            for place in &places {
                let (x, y) = place.split_once(',').unwrap_or_default();
                let _ = writeln!(
                    svg,
                    "<circle cx=\"{x}\" cy=\"{y}\" r=\"3.5\" fill=\"{colour}\"/>"
                );
            }
            let at = top + 18.0 * (index as f64 + 1.0);
            let fill = format!(" fill=\"{colour}\"");
            text(&mut svg, left + 12.0, at, "start", &fill, series.name);
        }
        svg + "</svg>\n"
    }
}

/// Powers of ten between which all values are.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    fn around(values: impl Iterator<Item = f64>) -> Self {
        let logarithms: Vec<f64> = values.map(f64::log10).collect();
        let low = logarithms
            .iter()
            .copied()
            .fold(f64::INFINITY, f64::min)
            .floor();
        let high = logarithms
            .iter()
            .copied()
            .fold(f64::NEG_INFINITY, f64::max)
            .ceil();
        if low.is_finite() && high > low {
            Self { low, high }
        } else {
            let low = if low.is_finite() { low } else { 0.0 };
            Self {
                low,
                high: low + 1.0,
            }
        }
    }

    /// From 0 to 1.
    fn place(&self, value: f64) -> f64 {
        (value.log10() - self.low) / (self.high - self.low)
    }

    fn marks(&self) -> impl Iterator<Item = f64> + use<> {
        (self.low as i32..=self.high as i32).map(|power| 10_f64.powi(power))
    }
}

/// A power of ten with a prefix of the SI.
fn short(value: f64) -> String {
    let (unit, prefix) = match value {
        1e9.. => (1e9, " G"),
        1e6.. => (1e6, " M"),
        1e3.. => (1e3, " k"),
        _ => (1.0, ""),
    };
    format!("{}{prefix}", value / unit)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: &[(f64, f64)]) -> String {
        let series = Series {
            name: "a < b",
            points: points.to_vec(),
        };
        Plot {
            title: "Title",
            x_label: "x",
            y_label: "y",
            series: vec![series],
        }
        .svg()
    }

    #[test]
    fn points_are_where_their_logarithms_are() {
        let svg = plot(&[(1e3, 1.0), (1e5, 100.0)]);
        let corner = (MARGINS[0], HEIGHT - MARGINS[3]);
        let other = (WIDTH - MARGINS[1], MARGINS[2]);
        let line = format!(
            "<polyline points=\"{:.1},{:.1} {:.1},{:.1}\"",
            corner.0, corner.1, other.0, other.1
        );
        assert!(svg.contains(&line), "{svg}");
        for text in [">1 k<", ">10 k<", ">100 k<", ">a &lt; b<", ">Title<"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
    }

    #[test]
    fn one_point_or_none_is_a_plot() {
        assert!(!plot(&[(10.0, 10.0)]).contains("NaN"));
        assert!(!plot(&[]).contains("NaN"));
    }
}
