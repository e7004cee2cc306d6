//! A table of what was measured: a row for each series, its sides beside one
//! another. Quantiles are values that were measured (nearest rank), not
//! interpolated ones.

use std::collections::BTreeMap;

use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

/// What a series counts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
    /// As people write it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Ms => "ms",
            Self::Us => "µs",
            Self::MibPerSecond => "MiB/s",
            Self::PerSecond => "1/s",
            Self::Kib => "KiB",
            Self::Count => "",
        }
    }

    /// What is better where a report says nothing else.
    fn better(self) -> Better {
        match self {
            Self::Ms | Self::Us | Self::Kib => Better::Less,
            Self::MibPerSecond | Self::PerSecond => Better::More,
            Self::Count => Better::Neither,
        }
    }

    /// Whether it is a time or a rate, which is another on another machine even if all else is the same.
    pub fn is_of_the_machine(self) -> bool {
        match self {
            Self::Ms | Self::Us | Self::MibPerSecond | Self::PerSecond => true,
            Self::Kib | Self::Count => false,
        }
    }
}

/// Which values of a row are the better ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Better {
    Less,
    More,
    Neither,
}

/// Values of one kind, of one side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Series {
    pub name: String,
    pub unit: Unit,
    pub better: Better,
    pub values: Vec<f64>,
    /// The round of each value. Files of before have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<u64>,
}

impl Series {
    /// The value of each round; None where that is not known, or a round has several.
    pub fn by_round(&self) -> Option<BTreeMap<u64, f64>> {
        let rounds = self.rounds.iter().copied();
        let values: BTreeMap<u64, f64> = rounds.zip(self.values.iter().copied()).collect();
        let all = self.rounds.len() == self.values.len() && values.len() == self.values.len();
        all.then_some(values)
    }
}

/// What was measured of one shim or VMM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Side {
    pub name: String,
    pub series: Vec<Series>,
}

/// A table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    pub title: String,
    /// The first is the one that ratios are about, the others what they are relative to.
    pub sides: Vec<Side>,
    /// Rows that are times which follow one another, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<String>,
    /// Rows that are times since one beginning, in their order: what is between two of them is a phase.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub milestones: Vec<String>,
    #[serde(default)]
    pub notes: Vec<String>,
    /// The round that values are of which are added now.
    #[serde(skip)]
    pub round: u64,
}

/// A row of a table.
pub(super) struct Row<'r> {
    pub name: &'r str,
    pub unit: Unit,
    /// The values of each side; none where it has no such series.
    pub values: Vec<&'r [f64]>,
}

impl Row<'_> {
    /// How many values each side has, as one word where that is the same.
    pub fn counts(&self) -> String {
        let mut counts: Vec<_> = self.values.iter().map(|values| values.len()).collect();
        counts.dedup();
        let words: Vec<_> = counts.iter().map(usize::to_string).collect();
        words.join("/")
    }

    /// The first side's median relative to that of another; None without a value, or if that is not above 0.
    pub fn ratio(&self, other: usize) -> Option<f64> {
        let median = |side: usize| {
            let values = self.values.get(side).filter(|values| !values.is_empty());
            values.map(|values| quantile(values, 50.0))
        };
        let theirs = median(other).filter(|theirs| *theirs > 0.0)?;
        Some(median(0)? / theirs)
    }
}

/// The value that `percent` of all are not above; 0 if there are none.
pub(super) fn quantile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

/// The quantiles that are shown, by name.
pub(super) const QUANTILES: [(&str, f64); 3] = [("median", 50.0), ("p90", 90.0), ("p99", 99.0)];

impl Side {
    /// The series of that name.
    pub fn series(&self, name: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.name == name)
    }
}

impl Report {
    /// An empty one about these sides, in the order in which they are shown.
    pub fn new<S: Into<String>>(
        title: impl Into<String>,
        sides: impl IntoIterator<Item = S>,
    ) -> Self {
        let side = |name: S| Side {
            name: name.into(),
            series: Vec::new(),
        };
        Self {
            title: title.into(),
            sides: sides.into_iter().map(side).collect(),
            phases: Vec::new(),
            milestones: Vec::new(),
            notes: Vec::new(),
            round: 0,
        }
    }

    /// Says which rows are phases that follow one another: they are also shown as the parts of a bar.
    pub fn phases(&mut self, names: &[&str]) {
        self.phases = names.iter().map(|name| (*name).to_owned()).collect();
    }

    /// Says which rows are times since one beginning: what is between two of them is also shown as a part of a bar.
    pub fn milestones(&mut self, names: &[&str]) {
        self.milestones = names.iter().map(|name| (*name).to_owned()).collect();
    }

    fn series_mut(&mut self, side: &str, name: &str) -> Option<&mut Series> {
        let side = self.sides.iter_mut().find(|known| known.name == side)?;
        side.series.iter_mut().find(|known| known.name == name)
    }

    /// Adds a value to a series of one of the sides. What is no number has no place in JSON: it is left out, and noted.
    pub fn add(&mut self, side: &str, name: &str, unit: Unit, value: f64) {
        if !value.is_finite() {
            self.note(format!("{side}, {name}: {value} is left out"));
            return;
        }
        let round = self.round;
        if let Some(series) = self.series_mut(side, name) {
            series.values.push(value);
            series.rounds.push(round);
        } else if let Some(side) = self.sides.iter_mut().find(|known| known.name == side) {
            side.series.push(Series {
                name: name.to_owned(),
                unit,
                better: unit.better(),
                values: vec![value],
                rounds: vec![round],
            });
        }
    }

    /// Says of a series that is there what is better in it, where that is not as usual with its unit.
    pub fn better(&mut self, side: &str, name: &str, better: Better) {
        if let Some(series) = self.series_mut(side, name) {
            series.better = better;
        }
    }

    /// The values of a series; none if there is no such series.
    pub fn values(&self, side: &str, name: &str) -> &[f64] {
        let side = self.sides.iter().find(|known| known.name == side);
        let found = side.and_then(|side| side.series(name));
        found.map_or(&[], |series| &series.values)
    }

    /// Adds a sentence for people.
    pub fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// Every row that a side has, in the order of the first side that has it.
    pub fn rows(&self) -> Vec<Row<'_>> {
        let mut rows: Vec<Row<'_>> = Vec::new();
        for series in self.sides.iter().flat_map(|side| &side.series) {
            if rows.iter().any(|row| row.name == series.name) {
                continue;
            }
            let values = self.sides.iter().map(|side| {
                let found = side.series(&series.name);
                found.map_or(&[][..], |series| series.values.as_slice())
            });
            rows.push(Row {
                name: &series.name,
                unit: series.unit,
                values: values.collect(),
            });
        }
        rows
    }

    /// What ratios are of: the first side and each of the others.
    pub fn ratios(&self) -> Vec<String> {
        let Some((first, others)) = self.sides.split_first() else {
            return Vec::new();
        };
        let name = |other: &Side| format!("{}/{}", first.name, other.name);
        others.iter().map(name).collect()
    }

    /// As text, with a line for each row.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        let mut header = vec![self.title.clone(), String::new(), "n".to_owned()];
        for side in &self.sides {
            header.extend(QUANTILES.map(|(what, _)| format!("{} {what}", side.name)));
        }
        header.extend(self.ratios());
        let columns = header.len();
        table.set_header(header);
        for row in self.rows() {
            let mut cells = vec![
                row.name.to_owned(),
                row.unit.label().to_owned(),
                row.counts(),
            ];
            for values in &row.values {
                cells.extend(QUANTILES.map(|(_, percent)| shown(values, percent)));
            }
            for other in 1..self.sides.len() {
                let ratio = row.ratio(other);
                cells.push(ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")));
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
}

/// A quantile as it is shown; nothing where there are no values.
pub(super) fn shown(values: &[f64], percent: f64) -> String {
    if values.is_empty() {
        String::new()
    } else {
        number(quantile(values, percent))
    }
}

/// A number of four digits or so.
pub(super) fn number(value: f64) -> String {
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
        for (side, value) in [("nacre", 30.0), ("runc", 40.0), ("qemu", 20.0)] {
            report.add(side, "cold", Unit::MibPerSecond, value);
        }
        let text = report.table();
        for words in ["nacre/runc", "nacre/qemu", "0.75", "1.50", "MiB/s"] {
            assert!(text.contains(words), "{words} in {text}");
        }
    }

    #[test]
    fn the_table_has_the_ratio_of_medians() {
        let mut report = Report::new("exec", ["nacre", "runc"]);
        for (side, values) in [("runc", [3.0, 4.0, 3.5]), ("nacre", [6.0, 8.0, 7.0])] {
            for value in values {
                report.add(side, "cycle", Unit::Ms, value);
            }
        }
        report.note("a note".to_owned());
        let text = report.table();
        assert!(
            text.contains("nacre/runc") && text.contains("2.00"),
            "{text}"
        );
        assert!(text.ends_with("a note"), "{text}");
    }

    #[test]
    fn a_row_that_only_another_side_has_is_shown() {
        let mut report = Report::new("exec", ["nacre", "runc"]);
        report.add("runc", "cycle", Unit::Ms, 3.0);
        let rows = report.rows();
        assert_eq!((rows[0].name, rows[0].counts().as_str()), ("cycle", "0/1"));
        assert_eq!(rows[0].ratio(1), None);
    }

    #[test]
    fn what_is_better_follows_the_unit_unless_it_is_said() {
        let mut report = Report::new("execs", ["nacre"]);
        for (name, unit) in [
            ("cycle", Unit::Ms),
            ("rate", Unit::PerSecond),
            ("threads", Unit::Count),
            ("descriptors", Unit::Count),
        ] {
            report.add("nacre", name, unit, 1.0);
        }
        report.better("nacre", "descriptors", Better::Less);
        let better: Vec<_> = report.sides[0]
            .series
            .iter()
            .map(|all| all.better)
            .collect();
        let expected = [Better::Less, Better::More, Better::Neither, Better::Less];
        assert_eq!(better, expected);
    }

    #[test]
    fn what_is_no_number_is_left_out_and_noted() {
        let mut report = Report::new("cat", ["nacre"]);
        report.add("nacre", "rate", Unit::MibPerSecond, f64::INFINITY);
        assert!(report.rows().is_empty());
        assert_eq!(report.notes, ["nacre, rate: inf is left out"]);
    }
}
