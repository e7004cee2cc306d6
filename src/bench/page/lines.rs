//! How the values of a table are distributed: a picture for each group of rows
//! that one axis can show.

use anyhow::Result;
use maud::{Markup, PreEscaped, html};

use crate::bench::plot::{Ground, Labels, Line, Panel, cdf};
use crate::bench::report::{Report, Row, Unit};

/// Values below which a distribution is none.
const LEAST: usize = 3;

/// Rows of a unit; sums, whose names begin so, are apart from what they are sums of.
fn groups<'r, 'v>(rows: &'r [Row<'v>]) -> Vec<(Unit, Vec<&'r Row<'v>>)> {
    let mut groups: Vec<(Unit, bool, Vec<&Row<'_>>)> = Vec::new();
    for row in rows.iter().filter(|row| can_be_shown(row)) {
        let key = (row.unit, row.name.starts_with('='));
        match groups
            .iter_mut()
            .find(|(unit, sum, _)| (*unit, *sum) == key)
        {
            Some((_, _, rows)) => rows.push(row),
            None => groups.push((key.0, key.1, vec![row])),
        }
    }
    groups
        .into_iter()
        .map(|(unit, _, rows)| (unit, rows))
        .collect()
}

/// There are enough values, and a logarithmic axis has all of them.
fn can_be_shown(row: &Row<'_>) -> bool {
    let mut all = row.values.iter().copied().flatten();
    all.all(|value| *value > 0.0) && row.values.iter().any(|values| values.len() >= LEAST)
}

/// The pictures of a table.
pub(super) fn pictures(table: &Report) -> Result<Vec<Markup>> {
    let rows = table.rows();
    let picture = |(unit, rows): (Unit, Vec<&Row<'_>>)| {
        let mut lines = Vec::new();
        for (family, row) in rows.iter().enumerate() {
            for (at, (side, values)) in table.sides.iter().zip(&row.values).enumerate() {
                let label = match table.sides.len() {
                    1 => row.name.to_owned(),
                    _ => format!("{}: {}", row.name, side.name),
                };
                lines.push(Line {
                    label,
                    family,
                    values: values.to_vec(),
                    thin: at > 0,
                });
            }
        }
        let labels = Labels {
            title: &[],
            unit: unit.label(),
            ground: Ground::Page,
        };
        let title = String::new();
        let svg = cdf(&labels, &[Panel { title, lines }])?;
        Ok(html! {
            figure { figcaption { "How the values are distributed" } (PreEscaped(svg)) }
        })
    };
    groups(&rows).into_iter().map(picture).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_grouped_by_unit_and_sums_are_apart() {
        let mut table = Report::new("cat", ["nacre"]);
        for value in [1.0, 2.0, 3.0] {
            for (row, unit) in [
                ("round-trip", Unit::Ms),
                ("rate", Unit::MibPerSecond),
                ("close", Unit::Ms),
                ("= all", Unit::Ms),
            ] {
                table.add("nacre", row, unit, value);
            }
            table.add("nacre", "growth", Unit::Kib, value - 2.0);
        }
        table.add("nacre", "once", Unit::Ms, 1.0);
        let rows = table.rows();
        let names: Vec<Vec<_>> = groups(&rows)
            .into_iter()
            .map(|(_, rows)| rows.iter().map(|row| row.name).collect())
            .collect();
        assert_eq!(
            names,
            [vec!["round-trip", "close"], vec!["rate"], vec!["= all"]]
        );
        assert_eq!(pictures(&table).unwrap().len(), 3);
    }

    #[test]
    fn sides_are_named_where_there_are_several() {
        let mut table = Report::new("exec", ["nacre", "runc"]);
        for value in [1.0, 2.0, 3.0] {
            table.add("nacre", "cycle", Unit::Ms, value);
            table.add("runc", "cycle", Unit::Ms, value);
        }
        let picture = pictures(&table).unwrap().remove(0).into_string();
        roxmltree::Document::parse(&picture).unwrap();
        assert!(picture.contains("cycle: nacre") && picture.contains("cycle: runc"));
    }
}
