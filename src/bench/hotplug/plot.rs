//! How times are distributed, as a picture: one SVG file that needs nothing
//! else, with a line for each operation that rises from 0 to 1 over time.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

/// Width and height in pixels, and what of the width the legend has.
const SIZE: (u32, u32) = (1280, 760);
const LEGEND: u32 = 330;

/// One operation of one VMM.
pub(super) struct Line {
    /// What the legend says.
    pub label: String,
    /// Lines of one family have one colour, the later the lighter.
    pub family: usize,
    /// Milliseconds, in any order.
    pub values: Vec<f64>,
    /// Drawn thin: what ours is compared with.
    pub thin: bool,
}

/// The picture as SVG.
///
/// # Errors
/// There is no value above 0, which a logarithmic axis cannot do without.
pub(super) fn cdf(title: &str, lines: &[Line]) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        draw(&root, title, lines).map_err(|error| anyhow!("Drawing the plot: {error}"))?;
    }
    Ok(svg)
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(root: &DrawingArea<SVGBackend<'_>, Shift>, title: &str, lines: &[Line]) -> Drawn {
    let shown: Vec<(&Line, Vec<f64>)> = lines
        .iter()
        .map(|line| (line, sorted(&line.values)))
        .filter(|(_, values)| !values.is_empty())
        .collect();
    let all = || shown.iter().flat_map(|(_, values)| values);
    let least = all().copied().reduce(f64::min);
    let most = all().copied().reduce(f64::max);
    let (Some(least), Some(most)) = (least, most) else {
        return Err("nothing was measured".into());
    };
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(SIZE.0 - LEGEND);
    let mut chart = ChartBuilder::on(&left)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(52)
        .build_cartesian_2d((least * 0.8..most * 1.25).log_scale(), 0.0..1.0)?;
    chart
        .configure_mesh()
        .x_desc("ms")
        .y_desc("part of the rounds that took no longer")
        .x_label_formatter(&|ms| tick(*ms))
        .y_labels(11)
        .draw()?;
    for (place, (line, values)) in shown.iter().enumerate() {
        let style = style(line, lines);
        chart.draw_series(LineSeries::new(steps(values, most * 1.25), style))?;
        let y = 40 + 20 * i32::try_from(place)?;
        right.draw(&PathElement::new(vec![(0, y), (26, y)], style))?;
        let text = ("sans-serif", 13).into_font();
        right.draw(&Text::new(line.label.clone(), (34, y - 7), text))?;
    }
    root.present()?;
    Ok(())
}

/// By family and place in it.
fn style(line: &Line, lines: &[Line]) -> ShapeStyle {
    let family = lines.iter().filter(|other| other.family == line.family);
    let count = family.clone().count().max(1);
    let place = family
        .take_while(|other| !std::ptr::eq(*other, line))
        .count();
    // Far enough from each other for a handful of families.
    let hue = (line.family as f64 * 0.61803) % 1.0;
    let lightness = 0.28 + 0.42 * place as f64 / count as f64;
    HSLColor(hue, 0.85, lightness).stroke_width(if line.thin { 1 } else { 2 })
}

/// What a logarithmic axis can show, in order.
fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|ms| *ms > 0.0).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The corners of the stairs, from the first value on the ground to the right edge.
fn steps(sorted: &[f64], right: f64) -> Vec<(f64, f64)> {
    let count = sorted.len() as f64;
    let mut corners = Vec::with_capacity(2 * sorted.len() + 1);
    for (place, ms) in sorted.iter().enumerate() {
        corners.push((*ms, place as f64 / count));
        corners.push((*ms, (place + 1) as f64 / count));
    }
    corners.push((right, 1.0));
    corners
}

fn tick(ms: f64) -> String {
    if ms >= 1.0 {
        format!("{ms:.0}")
    } else {
        format!("{ms}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(label: &str, family: usize, values: &[f64]) -> Line {
        Line {
            label: label.to_owned(),
            family,
            values: values.to_vec(),
            thin: false,
        }
    }

    #[test]
    fn the_picture_has_a_line_and_a_name_for_each_operation() {
        let lines = [
            line("plug 1 vCPU", 0, &[3.0, 1.0, 2.0]),
            line("plug 1G <acpi>", 1, &[100.0]),
            line("never done", 1, &[]),
        ];
        let svg = cdf("Times", &lines).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for words in ["Times", "plug 1 vCPU", "plug 1G &lt;acpi&gt;"] {
            assert!(svg.contains(words), "{words} in {svg}");
        }
        assert!(!svg.contains("never done"));
        // Self-contained: no other file, and no script.
        assert!(!svg.contains("href") && !svg.contains("<script"));
    }

    #[test]
    fn a_distribution_rises_to_1() {
        let corners = steps(&sorted(&[4.0, 0.0, 2.0]), 9.0);
        let expected = [(2.0, 0.0), (2.0, 0.5), (4.0, 0.5), (4.0, 1.0), (9.0, 1.0)];
        assert_eq!(corners, expected);
    }

    #[test]
    fn no_values_are_no_picture() {
        let error = cdf("Times", &[line("x", 0, &[0.0])]).unwrap_err();
        assert!(error.to_string().contains("nothing was measured"));
    }

    #[test]
    fn lines_of_a_family_differ_in_lightness_alone() {
        let lines = [
            line("a", 0, &[1.0]),
            line("b", 0, &[1.0]),
            line("c", 1, &[1.0]),
        ];
        let color = |at: usize| style(&lines[at], &lines).color;
        assert_ne!(color(0), color(1));
        assert_ne!(color(0), color(2));
    }
}
