//! A comparison for people, and as JSON.

use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::Comparison;
use super::judge::{Row, Verdict};
use crate::bench::document::{Document, FORMAT};
use crate::bench::report::{Better, number};

impl Comparison {
    /// What differs around the runs, then the rows, what has changed in front.
    pub fn text(&self, a: &Path, b: &Path) -> String {
        let mut lines = vec![format!("Scenario {}", self.a.scenario)];
        for (name, file, document) in [("A", a, &self.a), ("B", b, &self.b)] {
            lines.push(format!(
                "{name}: {}, build {}",
                file.display(),
                document.build
            ));
        }
        lines.extend(self.warnings());
        let mut text = lines.join("\n");
        text.push_str(&format!("\n\n{}\n", self.table()));
        let left = self.judged.left.all();
        if !left.is_empty() {
            text.push_str(&format!("\n{}\n", left.join("\n")));
        }
        text.push_str(&format!("\n{}", self.summary()));
        text
    }

    /// What is to be known before the figures.
    fn warnings(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.differences.is_empty() {
            lines.push("Machine, kernels and settings are the same".to_owned());
        } else {
            lines.push("What differs beside the build, and may be the cause:".to_owned());
            lines.extend(self.differences.iter().map(|what| format!("  {what}")));
        }
        if self.a.machine.emulated && self.b.machine.emulated {
            lines.push(
                "Both are emulated: times mean little there, ratios and counts more".to_owned(),
            );
        }
        if let Some(why) = self.ratios {
            lines.push(format!(
                "{why}: times and rates are compared as ratios of the first side to the others, which alone mean something across machines"
            ));
        }
        for (name, document) in [("A", &self.a), ("B", &self.b)] {
            lines.extend(unfinished(name, document));
        }
        lines
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        let header = [
            "table", "row", "side", "", "n", "A", "B", "change", "95 %", "verdict", "why",
        ];
        table.set_header(header);
        for row in &self.judged.rows {
            table.add_row(cells(row));
        }
        for column in 4..9 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }

    fn summary(&self) -> String {
        let count = |verdict| self.count(verdict);
        format!(
            "{} rows: {} worse, {} better, {} changed otherwise, {} unchanged, {} with too few values (threshold {} %)",
            self.judged.rows.len(),
            count(Verdict::Worse),
            count(Verdict::Better),
            count(Verdict::Changed),
            count(Verdict::Unchanged),
            count(Verdict::TooFewValues),
            self.threshold
        )
    }

    /// All of it.
    pub fn json(&self, a: &Path, b: &Path) -> Value {
        let run = |file: &Path, document: &Document| {
            json!({
                "file": file,
                "build": document.build,
                "machine": document.machine,
                "guest_kernel": document.guest_kernel,
                "complete": document.complete,
            })
        };
        json!({
            "format": FORMAT,
            "compared": self.a.scenario,
            "a": run(a, &self.a),
            "b": run(b, &self.b),
            "threshold": self.threshold,
            "ratios": self.ratios.is_some(),
            "differences": self.differences,
            "rows": self.judged.rows,
            "lost": self.judged.left.lost,
            "notes": self.judged.left.notes,
        })
    }
}

/// That it has not all rounds, and why, if so.
pub(super) fn unfinished(name: &str, document: &Document) -> Option<String> {
    let why = document
        .ended_by
        .as_deref()
        .unwrap_or("it does not say why");
    (!document.complete).then(|| format!("{name} is not complete: {why}"))
}

fn cells(row: &Row) -> [String; 11] {
    let (a, b) = row.counts;
    [
        row.table.clone(),
        row.row.clone(),
        row.side.clone(),
        row.unit.map_or("", |unit| unit.label()).to_owned(),
        if a == b {
            a.to_string()
        } else {
            format!("{a}/{b}")
        },
        number(row.a),
        number(row.b),
        row.change
            .map_or_else(|| "from 0".to_owned(), |change| format!("{change:+.1} %")),
        row.interval.map_or_else(String::new, |(low, high)| {
            format!("{low:+.1} to {high:+.1}")
        }),
        word(row).to_owned(),
        row.why.clone(),
    ]
}

/// The verdict, as one says it of such a row.
fn word(row: &Row) -> &'static str {
    let timed = row.unit.is_none_or(|unit| unit.is_of_the_machine());
    let less = row.b < row.a;
    match row.verdict {
        Verdict::Unchanged => "unchanged",
        Verdict::TooFewValues => "too few values",
        Verdict::Better if timed => "faster",
        Verdict::Worse if timed => "slower",
        Verdict::Better | Verdict::Worse | Verdict::Changed => match (row.better, less) {
            (Better::Neither, true) => "less",
            (Better::Neither, false) => "more",
            (_, true) if row.verdict == Verdict::Better => "less: better",
            (_, true) => "less: worse",
            (_, false) if row.verdict == Verdict::Better => "more: better",
            (_, false) => "more: worse",
        },
    }
}
