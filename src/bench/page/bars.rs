//! Rows that are phases, one after another, as the parts of one bar a side.

use maud::{Markup, html};

use crate::bench::plot::hue;
use crate::bench::report::{Report, quantile};

/// Pixels: of the whole, of the names at the left, of the totals at the right, of a bar, and from one to the next.
const WIDTH: f64 = 1000.0;
const NAMES: f64 = 120.0;
const TOTALS: f64 = 110.0;
const BAR: f64 = 26.0;
const STEP: f64 = 38.0;
/// Pixels that the text in a part needs.
const ROOM: f64 = 52.0;

/// A part of a bar.
#[derive(Debug, PartialEq)]
struct Part {
    from: f64,
    median: f64,
}

/// The rows that parts are called by.
fn names(table: &Report) -> &[String] {
    match table.phases.as_slice() {
        [] => &table.milestones,
        phases => phases,
    }
}

/// What a bar is made of; None if it has no parts.
fn parts(table: &Report, side: &str) -> Option<Vec<Part>> {
    let parts = match table.phases.as_slice() {
        [] => Some(between(table, side)),
        _ => phases(table, side),
    };
    parts.filter(|parts| !parts.is_empty())
}

/// From each milestone's median to the next one's, as far as the side has come.
fn between(table: &Report, side: &str) -> Vec<Part> {
    let reached = table.milestones.iter().map_while(|milestone| {
        let values = table.values(side, milestone);
        (!values.is_empty()).then(|| quantile(values, 50.0))
    });
    let mut from = 0.0;
    reached
        .map(|until: f64| {
            // Medians of few rounds may be in another order.
            let part = Part {
                from,
                median: (until - from).max(0.0),
            };
            from += part.median;
            part
        })
        .collect()
}

/// The medians of all phases, each from where the one before ends; None if the side lacks one.
fn phases(table: &Report, side: &str) -> Option<Vec<Part>> {
    let mut from = 0.0;
    let part = |phase: &String| {
        let values = table.values(side, phase);
        let median = quantile((!values.is_empty()).then_some(values)?, 50.0);
        let part = Part { from, median };
        from += median;
        Some(part)
    };
    table.phases.iter().map(part).collect()
}

/// The picture, with a legend; none if no side has all of the phases.
pub(super) fn bars(table: &Report) -> Option<Markup> {
    let names = names(table);
    let sides = table.sides.iter();
    let sides: Vec<_> = sides
        .filter_map(|side| Some((side.name.as_str(), parts(table, &side.name)?)))
        .collect();
    let total = |parts: &[Part]| parts.last().map_or(0.0, |part| part.from + part.median);
    let longest = sides
        .iter()
        .map(|(_, parts)| total(parts))
        .fold(0.0, f64::max);
    if longest <= 0.0 {
        return None;
    }
    let unit = table
        .rows()
        .into_iter()
        .find(|row| names.iter().any(|name| name == row.name));
    let unit = unit.map_or("", |row| row.unit.label());
    let scale = (WIDTH - NAMES - TOTALS) / longest;
    let height = STEP * sides.len() as f64;
    Some(html! {
        figure {
            figcaption {
                @if table.phases.is_empty() { "What is between milestones, each part by the one that ends it, medians in " (unit) "." }
                @else { "Phases one after another, medians in " (unit) ". Their sum need not be the median of the whole." }
            }
            svg xmlns="http://www.w3.org/2000/svg" width=(WIDTH) height=(height) viewBox=(format!("0 0 {WIDTH} {height}")) role="img" {
                @for (line, (side, parts)) in sides.iter().enumerate() {
                    @let top = STEP * line as f64 + (STEP - BAR) / 2.0;
                    text x="0" y=(top + 18.0) font-size="14" { (side) }
                    @for (at, part) in parts.iter().enumerate() {
                        @let (x, width) = (NAMES + part.from * scale, part.median * scale);
                        rect x=(format!("{x:.1}")) y=(top) width=(format!("{width:.1}")) height=(BAR) fill=(colour(at)) {
                            title { (side) ", " (names[at]) ": " (format!("{:.2}", part.median)) " " (unit) }
                        }
                        @if width >= ROOM {
                            text.on-colour x=(format!("{:.1}", x + 5.0)) y=(top + 18.0) font-size="12" { (format!("{:.1}", part.median)) }
                        }
                    }
                    text x=(format!("{:.1}", NAMES + total(parts) * scale + 8.0)) y=(top + 18.0) font-size="14" {
                        (format!("{:.1}", total(parts))) " " (unit)
                    }
                }
            }
            ul.legend {
                @for (at, phase) in names.iter().enumerate() {
                    li {
                        svg xmlns="http://www.w3.org/2000/svg" width="12" height="12" viewBox="0 0 12 12" { rect width="12" height="12" fill=(colour(at)) { } }
                        (phase)
                    }
                }
            }
        }
    })
}

/// Of a phase; white text is to be read on it.
fn colour(phase: usize) -> String {
    let degrees = hue(phase) * 360.0;
    format!("hsl({degrees:.0} 55% 38%)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Unit;

    fn table() -> Report {
        let mut table = Report::new("plug", ["nacre", "qemu"]);
        for (side, row, value) in [
            ("nacre", "host call", 10.0),
            ("nacre", "noticed", 30.0),
            ("nacre", "= total", 40.0),
            ("qemu", "host call", 5.0),
        ] {
            table.add(side, row, Unit::Ms, value);
        }
        table.phases(&["host call", "noticed"]);
        table
    }

    #[test]
    fn parts_follow_one_another() {
        let part = |from, median| Part { from, median };
        let expected = vec![part(0.0, 10.0), part(10.0, 30.0)];
        assert_eq!(parts(&table(), "nacre"), Some(expected));
        assert_eq!(parts(&table(), "qemu"), None);
    }

    #[test]
    fn a_side_without_all_phases_has_no_bar_and_the_legend_names_each() {
        let picture = bars(&table()).unwrap().into_string();
        roxmltree::Document::parse(&picture).unwrap();
        assert!(picture.contains(">nacre<") && !picture.contains("qemu"));
        for phase in ["host call", "noticed"] {
            assert!(picture.contains(&format!("{phase}</li>")), "{picture}");
        }
        // The longer part has three quarters of what is between names and totals.
        assert!(picture.contains("width=\"577.5\""), "{picture}");
    }

    #[test]
    fn what_is_between_milestones_is_a_part_as_far_as_a_side_came() {
        let mut table = Report::new("boot", ["shim", "vmctl"]);
        for (side, row, value) in [
            ("shim", "T1 main", 10.0),
            ("shim", "T2 ready", 40.0),
            ("shim", "T3 first byte", 38.0),
            ("vmctl", "T1 main", 5.0),
            ("vmctl", "T2 ready", 30.0),
        ] {
            table.add(side, row, Unit::Ms, value);
        }
        table.milestones(&["T1 main", "T2 ready", "T3 first byte"]);
        let part = |from, median| Part { from, median };
        let shim = vec![part(0.0, 10.0), part(10.0, 30.0), part(40.0, 0.0)];
        assert_eq!(parts(&table, "shim"), Some(shim));
        let vmctl = vec![part(0.0, 5.0), part(5.0, 25.0)];
        assert_eq!(parts(&table, "vmctl"), Some(vmctl));
        let picture = bars(&table).unwrap().into_string();
        assert!(picture.contains(">vmctl<") && picture.contains("T3 first byte</li>"));
    }

    #[test]
    fn without_phases_or_times_there_is_no_picture() {
        let mut table = table();
        table.phases(&["noticed"]);
        table.sides.remove(0);
        assert!(bars(&table).is_none());
        table.phases(&[]);
        assert!(bars(&table).is_none());
    }
}
