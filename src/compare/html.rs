//! One self-contained page: tables, and curves as inline SVG. No script, no network.

use std::fmt::Write;

use super::Sheet;

/// A line chart.
pub struct Chart {
    pub title: String,
    /// Label and points (x, y) of each line, by ascending x.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
    /// Whether the y axis is logarithmic, as for falling losses; values must be positive.
    pub logarithmic: bool,
}

/// Colours that the colour-blind can tell apart (six of Okabe & Ito 2008, and two more), by order of first appearance of a
/// label.
const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f"];

const STYLE: &str = "
:root { color-scheme: light dark; --line: #8884; --soft: #8889; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th.name, td.name { text-align: left; }
.legend span { margin-right: 1.2rem; white-space: nowrap; } .legend i { display: inline-block; width: 1.4em; height: .25em;
vertical-align: middle; margin-right: .4em; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .2rem; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke-width: 1.6; }
";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A page of tables, and of charts under a heading.
pub fn page(title: &str, sheets: &[Sheet], (heading, charts): (&str, &[Chart])) -> String {
    let mut labels: Vec<&str> = Vec::new();
    for (label, _) in charts.iter().flat_map(|chart| &chart.lines) {
        if !labels.contains(&label.as_str()) {
            labels.push(label);
        }
    }
    let colour = |label: &str| {
        let at = labels.iter().position(|known| *known == label).unwrap_or(0);
        COLOURS[at % COLOURS.len()]
    };
    let title = escaped(title);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width\">\n<title>{title}</title>\n<style>{STYLE}</style>\n<h1>{title}</h1>\n"
    );
    for sheet in sheets {
        out += &table(sheet);
    }
    if !charts.is_empty() {
        let _ = write!(out, "<h2>{}</h2>\n<p class=\"legend\">", escaped(heading));
        for label in &labels {
            let _ = write!(out, "<span><i style=\"background:{}\"></i>{}</span>", colour(label), escaped(label));
        }
        out += "</p>\n<div class=\"charts\">\n";
        for chart in charts {
            out += &figure(chart, &colour);
        }
        out += "</div>\n";
    }
    out + "</html>\n"
}

fn table(sheet: &Sheet) -> String {
    let mut out = format!("<h2>{}</h2>\n<div class=\"wide\"><table>\n", escaped(&sheet.title));
    let row = |cells: &[String], tag: &str| {
        let cell = |(i, text): (usize, &String)| {
            let class = if i < sheet.n_names { " class=\"name\"" } else { "" };
            format!("<{tag}{class}>{}</{tag}>", escaped(text))
        };
        format!("<tr>{}</tr>\n", cells.iter().enumerate().map(cell).collect::<String>())
    };
    out += &row(&sheet.header, "th");
    for cells in &sheet.rows {
        out += &row(cells, "td");
    }
    out + "</table></div>\n"
}

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 220.0;
/// Room for the numbers at the axes: left, right, top, bottom.
const MARGINS: [f64; 4] = [46.0, 8.0, 8.0, 24.0];

fn figure(chart: &Chart, colour: &dyn Fn(&str) -> &'static str) -> String {
    let points = || chart.lines.iter().flat_map(|(_, points)| points);
    let ends = |of: fn(&(f64, f64)) -> f64| {
        points().map(of).fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)))
    };
    let scale = |value: f64| if chart.logarithmic { value.max(1e-9).log10() } else { value };
    let range = |low: f64, high: f64| if high > low { (low, high) } else { (low - 0.5, low + 0.5) };
    let (x_values, y_values) = (ends(|point| point.0), ends(|point| point.1));
    let x_range = range(x_values.0, x_values.1);
    let y_range = range(scale(y_values.0), scale(y_values.1));
    let [left, right, top, bottom] = MARGINS;
    let x = |value: f64| left + (value - x_range.0) / (x_range.1 - x_range.0) * (WIDTH - left - right);
    let y =
        |value: f64| HEIGHT - bottom - (scale(value) - y_range.0) / (y_range.1 - y_range.0) * (HEIGHT - top - bottom);
    let mut out = format!(
        "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">",
        escaped(&chart.title)
    );
    let unscaled = |value: f64| if chart.logarithmic { 10f64.powf(value) } else { value };
    let y_shown = (unscaled(y_range.0), unscaled(y_range.1));
    for tick in if chart.logarithmic { log_ticks(y_shown) } else { ticks(y_shown) } {
        let at = y(tick);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{left}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text x=\"{}\" y=\"{:.1}\" \
             text-anchor=\"end\">{}</text>",
            WIDTH - right,
            left - 5.0,
            at + 4.0,
            short(tick)
        );
    }
    for tick in ticks(x_range) {
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x(tick),
            HEIGHT - 6.0,
            short(tick)
        );
    }
    for (label, points) in &chart.lines {
        let path: Vec<String> = points.iter().map(|&(px, py)| format!("{:.1},{:.1}", x(px), y(py))).collect();
        let _ = write!(
            out,
            "<polyline stroke=\"{}\" points=\"{}\"><title>{}</title></polyline>",
            colour(label),
            path.join(" "),
            escaped(label)
        );
    }
    out + "</svg></figure>\n"
}

/// Round numbers within a range, about four of them.
fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let rough = (high - low) / 4.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// Powers of ten within a positive range, with their multiples by 2 and 5 if there are few; linear ticks if fewer than
/// two lie in the range.
fn log_ticks((low, high): (f64, f64)) -> Vec<f64> {
    let powers = low.max(1e-9).log10().floor() as i32..=high.max(1e-9).log10().ceil() as i32;
    let factors: &[f64] = if high > 1000.0 * low { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all = powers.flat_map(|power| factors.iter().map(move |factor| factor * 10f64.powi(power)));
    let within: Vec<f64> = all.filter(|tick| (low..=high).contains(tick)).collect();
    if within.len() > 1 { within } else { ticks((low, high)) }
}

/// A number of few characters: 0.25, 3000.
fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks((0.0, 1000.0)), [0.0, 500.0, 1000.0]);
        assert_eq!(
            log_ticks((0.04, 3.0)).iter().map(|t| short(*t)).collect::<Vec<_>>(),
            ["0.05", "0.1", "0.2", "0.5", "1", "2"]
        );
        assert_eq!(log_ticks((0.51, 0.73)).iter().map(|t| short(*t)).collect::<Vec<_>>(), ["0.6", "0.7"]);
        assert_eq!(ticks((0.12, 0.31)).iter().map(|t| short(*t)).collect::<Vec<_>>(), ["0.15", "0.2", "0.25", "0.3"]);
    }

    #[test]
    fn a_page_needs_nothing_from_elsewhere_and_escapes_names() {
        let chart = Chart {
            title: "loss <a>".into(),
            lines: vec![("equal".into(), vec![(0.0, 1.0), (10.0, 0.5)]), ("flat".into(), vec![(3.0, 0.7)])],
            logarithmic: true,
        };
        let sheet = Sheet { title: "T".into(), header: vec!["x".into()], n_names: 1, rows: vec![vec!["a & b".into()]] };
        let page = page("study", &[sheet], ("curves", &[chart]));
        assert!(page.contains("loss &lt;a&gt;") && page.contains("a &amp; b") && page.contains("<polyline"), "{page}");
        // A line of one value lies in the middle of its axis.
        let flat = Chart { title: "f".into(), lines: vec![("flat".into(), vec![(3.0, 0.2)])], logarithmic: true };
        let shown = super::page("flat", &[], ("curves", &[flat]));
        assert!(shown.contains(">0.1<") && shown.contains(">0.5<") && !shown.contains(">0.01<"), "{shown}");
        assert!(!page.contains("http") && !page.contains("<script") && !page.contains("NaN"), "{page}");
    }
}
