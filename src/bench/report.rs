//! What was measured, as tables for people and as JSON. Quantiles are values
//! that were measured (nearest rank), not interpolated ones.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// What a series counts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Unit {
    /// Milliseconds.
    Ms,
    /// Microseconds.
    Us,
    /// MiB a second.
    MibPerSecond,
    /// Operations a second.
    PerSecond,
    /// KiB.
    Kib,
    /// A plain number.
    Count,
}

impl Unit {
    fn label(self) -> &'static str {
        match self {
            Self::Ms => "ms",
            Self::Us => "µs",
            Self::MibPerSecond => "MiB/s",
            Self::PerSecond => "1/s",
            Self::Kib => "KiB",
            Self::Count => "",
        }
    }
}

/// Values of one kind, of one shim.
#[derive(Debug, Clone, Serialize)]
struct Series {
    name: &'static str,
    unit: Unit,
    values: Vec<f64>,
}

/// What was measured of one shim.
#[derive(Debug, Clone, Serialize)]
struct Measured {
    shim: &'static str,
    series: Vec<Series>,
}

/// A scenario's outcome.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    scenario: String,
    /// The first is the one that ratios are about, the others what they are relative to.
    shims: Vec<Measured>,
    notes: Vec<String>,
}

/// The value that `percent` of all are not above; 0 if there are none.
pub(super) fn quantile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

impl Report {
    /// An empty one about these shims, in the order in which they are shown.
    pub fn new(scenario: impl Into<String>, shims: impl IntoIterator<Item = &'static str>) -> Self {
        let shims = shims.into_iter();
        Self {
            scenario: scenario.into(),
            shims: shims
                .map(|shim| Measured {
                    shim,
                    series: Vec::new(),
                })
                .collect(),
            notes: Vec::new(),
        }
    }

    /// Adds a value to a series of one of the shims.
    pub fn add(&mut self, shim: &'static str, name: &'static str, unit: Unit, value: f64) {
        let Some(measured) = self.shims.iter_mut().find(|known| known.shim == shim) else {
            return;
        };
        let all = &mut measured.series;
        match all.iter_mut().find(|known| known.name == name) {
            Some(series) => series.values.push(value),
            None => all.push(Series {
                name,
                unit,
                values: vec![value],
            }),
        }
    }

    /// The values of a series; none if there is no such series.
    pub fn values(&self, shim: &str, name: &str) -> &[f64] {
        let measured = self.shims.iter().find(|known| known.shim == shim);
        let mut all = measured.into_iter().flat_map(|measured| &measured.series);
        let found = all.find(|series| series.name == name);
        found.map_or(&[], |series| &series.values)
    }

    /// Adds a sentence for people.
    pub fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// A table with a row for each series, the first shim's order.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        let mut header = vec![self.scenario.clone(), String::new(), "n".to_owned()];
        for measured in &self.shims {
            for what in ["median", "p90", "p99"] {
                header.push(format!("{} {what}", measured.shim));
            }
        }
        if let [first, others @ ..] = self.shims.as_slice() {
            for other in others {
                header.push(format!("{}/{}", first.shim, other.shim));
            }
        }
        let columns = header.len();
        table.set_header(header);
        let rows = self.shims.first().map_or(&[][..], |first| &first.series);
        for row in rows {
            let mut cells = vec![
                row.name.to_owned(),
                row.unit.label().to_owned(),
                row.values.len().to_string(),
            ];
            let mut medians = Vec::new();
            for measured in &self.shims {
                let found = measured.series.iter().find(|other| other.name == row.name);
                let values = found.map_or(&[][..], |series| &series.values);
                medians.push(quantile(values, 50.0));
                cells.extend([50.0, 90.0, 99.0].map(|percent| {
                    if values.is_empty() {
                        String::new()
                    } else {
                        number(quantile(values, percent))
                    }
                }));
            }
            if let [ours, others @ ..] = medians.as_slice() {
                for theirs in others {
                    cells.push(if *theirs > 0.0 {
                        format!("{:.2}", ours / theirs)
                    } else {
                        String::new()
                    });
                }
            }
            table.add_row(cells);
        }
        for column in 2..columns {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let mut text = table.to_string();
        for note in &self.notes {
            text.push('\n');
            text.push_str(note);
        }
        text
    }

    /// The report with its quantiles, and every value.
    pub fn json(&self) -> serde_json::Value {
        let mut value = serde_json::json!(self);
        for (shim, measured) in self.shims.iter().enumerate() {
            for (at, series) in measured.series.iter().enumerate() {
                let quantiles = &mut value["shims"][shim]["series"][at];
                for (name, percent) in [("median", 50.0), ("p90", 90.0), ("p99", 99.0)] {
                    quantiles[name] = quantile(&series.values, percent).into();
                }
            }
        }
        value
    }
}

fn number(value: f64) -> String {
    if value.abs() >= 1000.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=10).map(f64::from).collect();
        assert_eq!(quantile(&values, 50.0), 5.0);
        assert_eq!(quantile(&values, 90.0), 9.0);
        assert_eq!(quantile(&values, 99.0), 10.0);
        assert_eq!(quantile(&[7.0], 50.0), 7.0);
        assert_eq!(quantile(&[], 50.0), 0.0);
    }

    #[test]
    fn the_first_is_compared_with_each_of_the_others() {
        let mut report = Report::new("reads", ["nacre", "runc", "qemu"]);
        for (shim, value) in [("nacre", 30.0), ("runc", 40.0), ("qemu", 20.0)] {
            report.add(shim, "cold", Unit::MibPerSecond, value);
        }
        let text = report.table();
        for words in ["nacre/runc", "nacre/qemu", "0.75", "1.50", "MiB/s"] {
            assert!(text.contains(words), "{words} in {text}");
        }
    }

    #[test]
    fn the_table_has_the_ratio_of_medians_and_json_has_all_values() {
        let mut report = Report::new("exec", ["nacre", "runc"]);
        for (shim, values) in [("runc", [3.0, 4.0, 3.5]), ("nacre", [6.0, 8.0, 7.0])] {
            for value in values {
                report.add(shim, "cycle", Unit::Ms, value);
            }
        }
        report.note("a note".to_owned());
        let text = report.table();
        assert!(
            text.contains("nacre/runc") && text.contains("2.00"),
            "{text}"
        );
        assert!(text.ends_with("a note"), "{text}");
        let json = report.json();
        assert_eq!(json["shims"][0]["series"][0]["median"], 7.0);
        assert_eq!(json["shims"][1]["series"][0]["values"][1], 4.0);
        assert_eq!(json["shims"][1]["series"][0]["unit"], "ms");
    }
}
