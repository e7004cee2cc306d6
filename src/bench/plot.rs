//! How values are distributed, as a picture: SVG that needs nothing else, with a
//! line for each series that rises from 0 to 1, in one panel or in several, one below the other.

use anyhow::{Result, anyhow, bail};
use plotters::coord::Shift;
use plotters::prelude::*;

/// Width and least height in pixels, and what of the width the legend has.
const WIDTH: u32 = 1280;
const LEAST_HEIGHT: u32 = 420;
const LEGEND: u32 = 330;
/// Pixels of a line of the legend, and of what is above the first and below the last.
const LABEL: u32 = 20;
const AROUND: u32 = 80;
/// Pixels of a line of the title.
const TITLE: u32 = 24;
/// Steps of a line at most: more are not seen.
const STEPS: usize = 200;

/// Values of one kind, of one side.
pub(super) struct Line {
    /// What the legend says.
    pub label: String,
    /// Lines of one family have one colour, the later the lighter.
    pub family: usize,
    /// In any order.
    pub values: Vec<f64>,
    /// Drawn thin: what the others are compared with.
    pub thin: bool,
}

/// What a picture stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ground {
    /// White, whatever is around it.
    Paper,
    /// That of the page, light or dark.
    Page,
}

/// What is to be seen beside the panels.
pub(super) struct Labels<'l> {
    /// Lines above all.
    pub title: &'l [String],
    /// What values are in.
    pub unit: &'l str,
    pub ground: Ground,
}

/// Lines over one axis.
pub(super) struct Panel {
    /// Above it; may be empty.
    pub title: String,
    pub lines: Vec<Line>,
}

/// A line that has values, and those that can be shown.
type Shown<'p> = (&'p Line, Vec<f64>);

/// The picture as SVG. Panels without a value are left out.
///
/// # Errors
/// There is no value above 0, which a logarithmic axis cannot do without.
pub(super) fn cdf(labels: &Labels<'_>, panels: &[Panel]) -> Result<String> {
    let mut drawn = Vec::new();
    let mut height = u32::try_from(labels.title.len())?.saturating_mul(TITLE);
    for panel in panels {
        let shown: Vec<Shown<'_>> = panel
            .lines
            .iter()
            .map(|line| (line, sorted(&line.values)))
            .filter(|(_, values)| !values.is_empty())
            .collect();
        if shown.is_empty() {
            continue;
        }
        let legend = u32::try_from(shown.len())?.saturating_mul(LABEL);
        let own = LEAST_HEIGHT.max(legend.saturating_add(AROUND));
        height = height.saturating_add(own);
        drawn.push((panel, shown, own));
    }
    if drawn.is_empty() {
        bail!("Drawing the plot: nothing was measured");
    }
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        draw(root, labels, &drawn).map_err(|error| anyhow!("Drawing the plot: {error}"))?;
    }
    Ok(svg)
}

type Area<'s> = DrawingArea<SVGBackend<'s>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(root: Area<'_>, labels: &Labels<'_>, panels: &[(&Panel, Vec<Shown<'_>>, u32)]) -> Drawn {
    if labels.ground == Ground::Paper {
        root.fill(&WHITE)?;
    }
    let mut rest = root.clone();
    for line in labels.title {
        let (above, below) = rest.split_vertically(TITLE);
        above.draw(&Text::new(line.as_str(), (12, 6), ("sans-serif", 15)))?;
        rest = below;
    }
    for (panel, shown, height) in panels {
        let (above, below) = rest.split_vertically(*height);
        draw_panel(&above, labels, panel, shown)?;
        rest = below;
    }
    root.present()?;
    Ok(())
}

fn draw_panel(area: &Area<'_>, labels: &Labels<'_>, panel: &Panel, shown: &[Shown<'_>]) -> Drawn {
    let all = || shown.iter().flat_map(|(_, values)| values).copied();
    let least = all().fold(f64::INFINITY, f64::min);
    let most = all().fold(0.0, f64::max);
    let (left, right) = area.split_horizontally(WIDTH - LEGEND);
    let mut builder = ChartBuilder::on(&left);
    if !panel.title.is_empty() {
        builder.caption(&panel.title, ("sans-serif", 18));
    }
    let mut chart = builder
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(52)
        .build_cartesian_2d((least * 0.8..most * 1.25).log_scale(), 0.0..1.0)?;
    chart
        .configure_mesh()
        .x_desc(labels.unit)
        .y_desc("part of the values that are not above")
        .x_label_formatter(&|value| tick(*value))
        .y_labels(11)
        .max_light_lines(4)
        .draw()?;
    for (place, (line, values)) in shown.iter().enumerate() {
        let style = style(line, &panel.lines, labels.ground);
        chart.draw_series(LineSeries::new(steps(values, most * 1.25), style))?;
        let y = 40 + i32::try_from(LABEL)? * i32::try_from(place)?;
        right.draw(&PathElement::new(vec![(0, y), (26, y)], style))?;
        let text = ("sans-serif", 13).into_font();
        right.draw(&Text::new(line.label.clone(), (34, y - 7), text))?;
    }
    Ok(())
}

/// By family and place in it.
fn style(line: &Line, lines: &[Line], ground: Ground) -> ShapeStyle {
    let family = lines.iter().filter(|other| other.family == line.family);
    let count = family.clone().count().max(1);
    let place = family
        .take_while(|other| !std::ptr::eq(*other, line))
        .count();
    // Far enough from each other for a handful of families.
    let hue = hue(line.family);
    // What is seen on white and on black is in between.
    let (least, more) = match ground {
        Ground::Paper => (0.28, 0.42),
        Ground::Page => (0.42, 0.22),
    };
    let lightness = least + more * place as f64 / count as f64;
    HSLColor(hue, 0.85, lightness).stroke_width(if line.thin { 1 } else { 2 })
}

/// The colour of one of several, 0 to 1: far from each other for a handful.
pub(super) fn hue(of: usize) -> f64 {
    (of as f64 * 0.61803) % 1.0
}

/// What a logarithmic axis can show, in order.
fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = values
        .iter()
        .copied()
        .filter(|value| *value > 0.0)
        .collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The corners of the stairs, from the first value on the ground to the right edge.
fn steps(sorted: &[f64], right: f64) -> Vec<(f64, f64)> {
    let count = sorted.len();
    let stairs = count.min(STEPS);
    let mut corners = Vec::with_capacity(2 * stairs + 1);
    let mut height = 0.0;
    for stair in 1..=stairs {
        let rank = stair * count / stairs;
        let value = sorted[rank - 1];
        corners.push((value, height));
        height = rank as f64 / count as f64;
        corners.push((value, height));
    }
    corners.push((right, 1.0));
    corners
}

fn tick(value: f64) -> String {
    if value >= 1.0 {
        format!("{value:.0}")
    } else {
        format!("{value}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAPER: Labels<'_> = Labels {
        title: &[],
        unit: "ms",
        ground: Ground::Paper,
    };

    fn panel(title: &str, lines: impl Into<Vec<Line>>) -> Panel {
        Panel {
            title: title.to_owned(),
            lines: lines.into(),
        }
    }

    fn height(svg: &str) -> u32 {
        let (_, behind) = svg.split_once("height=\"").unwrap();
        behind.split_once('"').unwrap().0.parse().unwrap()
    }

    fn line(label: &str, family: usize, values: &[f64]) -> Line {
        Line {
            label: label.to_owned(),
            family,
            values: values.to_vec(),
            thin: false,
        }
    }

    #[test]
    fn the_picture_has_a_line_and_a_name_for_each_series() {
        let plug = [
            line("1 vCPU", 0, &[3.0, 1.0, 2.0]),
            line("1G <acpi>", 1, &[100.0]),
            line("never done", 1, &[]),
        ];
        let panels = [
            panel("Plug", plug),
            panel("Nothing", [line("nothing", 0, &[])]),
            panel("Unplug", [line("2 vCPUs", 0, &[1.0])]),
        ];
        let labels = Labels {
            title: &["Times".into(), "of a machine".into()],
            ..PAPER
        };
        let svg = cdf(&labels, &panels).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for words in ["Times", "of a machine", "Plug", "1 vCPU", "1G &lt;acpi&gt;"] {
            assert!(svg.contains(words), "{words} in {svg}");
        }
        assert!(svg.contains("Unplug") && svg.contains("2 vCPUs"));
        assert!(!svg.contains("never done") && !svg.contains("othing"));
        assert_eq!(height(&svg), 2 * (TITLE + LEAST_HEIGHT));
        // Self-contained: no other file, and no script.
        assert!(!svg.contains("href") && !svg.contains("<script"));
    }

    #[test]
    fn a_picture_of_a_page_has_no_ground_of_its_own() {
        let labels = Labels {
            ground: Ground::Page,
            ..PAPER
        };
        let panels = [panel("", [line("a", 0, &[1.0])])];
        let white = "#FFFFFF";
        assert!(cdf(&PAPER, &panels).unwrap().contains(white));
        assert!(!cdf(&labels, &panels).unwrap().contains(white));
    }

    #[test]
    fn the_legend_has_room_for_all() {
        let lines: Vec<_> = (0..40).map(|at| line("x", at, &[1.0])).collect();
        let svg = cdf(&PAPER, &[panel("", lines)]).unwrap();
        assert_eq!(height(&svg), 880);
    }

    #[test]
    fn a_distribution_rises_to_1() {
        let corners = steps(&sorted(&[4.0, 0.0, 2.0]), 9.0);
        let expected = [(2.0, 0.0), (2.0, 0.5), (4.0, 0.5), (4.0, 1.0), (9.0, 1.0)];
        assert_eq!(corners, expected);
    }

    #[test]
    fn of_many_values_not_every_step_is_drawn() {
        let values: Vec<f64> = (1..=10_000).map(f64::from).collect();
        let corners = steps(&values, 20_000.0);
        assert_eq!(corners.len(), 2 * STEPS + 1);
        assert_eq!(corners[2 * STEPS - 1], (10_000.0, 1.0));
        assert!(corners.windows(2).all(|pair| pair[0].1 <= pair[1].1));
    }

    #[test]
    fn no_values_are_no_picture() {
        let error = cdf(&PAPER, &[panel("", [line("x", 0, &[0.0])])]).unwrap_err();
        assert!(error.to_string().contains("nothing was measured"));
    }

    #[test]
    fn lines_of_a_family_differ_in_lightness_alone() {
        let lines = [
            line("a", 0, &[1.0]),
            line("b", 0, &[1.0]),
            line("c", 1, &[1.0]),
        ];
        let color = |at: usize| style(&lines[at], &lines, Ground::Paper).color;
        assert_ne!(color(0), color(1));
        assert_ne!(color(0), color(2));
    }
}
