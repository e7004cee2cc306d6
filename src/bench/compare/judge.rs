//! What of two runs' rows has changed, and how that is known.

use serde::Serialize;

use super::chance::{corrected, interval, least_p, p_value, percent};
use crate::bench::document::Document;
use crate::bench::report::{Better, Report, Series, Unit, quantile};

/// A change is not to be chance more often than so.
const ALPHA: f64 = 0.05;

/// What has become of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Verdict {
    Worse,
    Better,
    /// It differs, and neither is the better.
    Changed,
    TooFewValues,
    Unchanged,
}

impl Verdict {
    /// Whether it differs beyond the noise.
    pub fn has_changed(self) -> bool {
        match self {
            Self::Worse | Self::Better | Self::Changed => true,
            Self::TooFewValues | Self::Unchanged => false,
        }
    }
}

/// A row of one side, or of the ratio of two, in both runs.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub table: String,
    pub row: String,
    /// `nacre`, or `nacre/runc` for a ratio.
    pub side: String,
    /// None for a ratio, whose values have none.
    pub unit: Option<Unit>,
    pub better: Better,
    /// Medians, and how many values there are.
    pub a: f64,
    pub b: f64,
    pub counts: (usize, usize),
    /// Of the median, in percent; None from 0.
    pub change: Option<f64>,
    /// Where the change is with 95 %, as far as the values go.
    pub interval: Option<(f64, f64)>,
    /// After correction for all rows; None where nothing was tested.
    pub p: Option<f64>,
    pub verdict: Verdict,
    pub why: String,
}

/// All rows that both runs have, what has changed in front; and what there is to be said.
pub(super) struct Judged {
    pub rows: Vec<Row>,
    pub left: Left,
}

/// What is not compared.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// Of A, and nothing of B is like it: something that was measured is measured no more.
    pub lost: Vec<String>,
    /// All else.
    pub notes: Vec<String>,
}

impl Left {
    /// All of it, in sentences.
    pub fn all(&self) -> Vec<&str> {
        let all = self.lost.iter().chain(&self.notes);
        all.map(String::as_str).collect()
    }
}

/// How it is judged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// Changes below so many percent are none, but for exact counts.
    pub threshold: f64,
    /// Times and rates are compared as ratios of the first side to each of the others.
    pub ratios: bool,
}

/// A row's values in both runs.
pub(super) struct Pair {
    pub row: Row,
    a: Vec<f64>,
    b: Vec<f64>,
}

/// Compares all rows that both have.
pub(super) fn judge(a: &Document, b: &Document, terms: Terms) -> Judged {
    let (pairs, left) = decide(a, b, terms);
    let with_interval = |pair: Pair| Row {
        interval: interval(&pair.a, &pair.b),
        ..pair.row
    };
    let mut rows: Vec<Row> = pairs.into_iter().map(with_interval).collect();
    // Rows that are alike stay in their order.
    rows.sort_by(|one, other| {
        let order = order(one).cmp(&order(other));
        order.then(size(other).total_cmp(&size(one)))
    });
    Judged { rows, left }
}

/// The same without intervals, in the order of A; and what there is to be said.
pub(super) fn decide(a: &Document, b: &Document, terms: Terms) -> (Vec<Pair>, Left) {
    let mut left = Left::default();
    let mut pairs = Vec::new();
    for table in &a.tables {
        match b.tables.iter().find(|other| other.title == table.title) {
            Some(other) => pair(table, other, terms, &mut pairs, &mut left),
            None => left.lost.push(format!("Only in A: table {}", table.title)),
        }
    }
    for table in &b.tables {
        if !a.tables.iter().any(|other| other.title == table.title) {
            let only = format!("Only in B: table {}", table.title);
            left.notes.push(only);
        }
    }
    verdicts(&mut pairs, terms);
    (pairs, left)
}

fn order(row: &Row) -> usize {
    match row.verdict {
        Verdict::Worse => 0,
        Verdict::Changed => 1,
        Verdict::Better => 2,
        Verdict::TooFewValues => 3,
        Verdict::Unchanged => 4,
    }
}

/// How big a change is, where that matters.
fn size(row: &Row) -> f64 {
    match row.verdict.has_changed() {
        true => row.change.map_or(f64::INFINITY, f64::abs),
        false => 0.0,
    }
}

/// The rows of a table that both have.
fn pair(a: &Report, b: &Report, terms: Terms, pairs: &mut Vec<Pair>, left: &mut Left) {
    let Left { lost, notes } = left;
    for (from, to, which, only) in [(a, b, "A", &mut *lost), (b, a, "B", &mut *notes)] {
        for (side, row) in rows_of(from) {
            if series(to, side, &row.name).is_none() {
                only.push(format!(
                    "Only in {which}: {}, {}, {side}",
                    from.title, row.name
                ));
            }
        }
    }
    for (side, ours) in rows_of(a) {
        let Some(theirs) = series(b, side, &ours.name) else {
            continue;
        };
        let place = format!("{}, {}, {side}", a.title, ours.name);
        if (ours.unit, ours.better) != (theirs.unit, theirs.better) {
            lost.push(format!(
                "Not the same unit or direction, and not compared: {place}"
            ));
            continue;
        }
        // What is the beginning of time in both says nothing of either.
        let mut all = ours.values.iter().chain(&theirs.values);
        if ours.unit.is_of_the_machine() && all.all(|value| *value == 0.0) {
            continue;
        }
        if !terms.ratios || !ours.unit.is_of_the_machine() {
            let row = row(a, ours, side.to_owned(), Some(ours.unit));
            pairs.push(row(ours.values.clone(), theirs.values.clone()));
            continue;
        }
        if a.sides.first().is_none_or(|first| first.name != side) {
            continue;
        }
        let mut references = 0;
        for reference in a.sides.iter().skip(1) {
            let values = |table: &Report, of: &Series| {
                let reference = series(table, &reference.name, &ours.name);
                let ratios = reference.map(|reference| ratios(of, reference));
                ratios.filter(|ratios| !ratios.is_empty())
            };
            if let (Some(from), Some(to)) = (values(a, ours), values(b, theirs)) {
                let row = row(a, ours, format!("{side}/{}", reference.name), None);
                pairs.push(row(from, to));
                references += 1;
            }
        }
        if references == 0 {
            notes.push(format!(
                "Nothing to relate it to, and not compared: {place}"
            ));
        }
    }
}

fn rows_of(table: &Report) -> impl Iterator<Item = (&str, &Series)> {
    table.sides.iter().flat_map(|side| {
        let all = side
            .series
            .iter()
            .filter(|series| !series.values.is_empty());
        all.map(|series| (side.name.as_str(), series))
    })
}

fn series<'t>(table: &'t Report, side: &str, row: &str) -> Option<&'t Series> {
    let side = table.sides.iter().find(|known| known.name == side)?;
    side.series(row).filter(|series| !series.values.is_empty())
}

/// Each value relative to the reference's of the same round, which was measured right before or after it; where rounds are not known, of
/// the same place.
fn ratios(ours: &Series, theirs: &Series) -> Vec<f64> {
    let pairs: Vec<(f64, f64)> = match (ours.by_round(), theirs.by_round()) {
        (Some(ours), Some(theirs)) => {
            let both = ours.iter();
            both.filter_map(|(round, value)| Some((*value, *theirs.get(round)?)))
                .collect()
        }
        _ => {
            let values = ours.values.iter().copied();
            values.zip(theirs.values.iter().copied()).collect()
        }
    };
    let above = pairs.into_iter().filter(|(_, theirs)| *theirs > 0.0);
    above.map(|(ours, theirs)| ours / theirs).collect()
}

/// A row that has no verdict yet, once it has its values.
fn row(
    table: &Report,
    series: &Series,
    side: String,
    unit: Option<Unit>,
) -> impl Fn(Vec<f64>, Vec<f64>) -> Pair {
    let (table, name, better) = (table.title.clone(), series.name.clone(), series.better);
    move |a, b| {
        let medians = (quantile(&a, 50.0), quantile(&b, 50.0));
        Pair {
            row: Row {
                table: table.clone(),
                row: name.clone(),
                side: side.clone(),
                unit,
                better,
                a: medians.0,
                b: medians.1,
                counts: (a.len(), b.len()),
                change: percent(medians.0, medians.1),
                interval: None,
                p: None,
                verdict: Verdict::Unchanged,
                why: String::new(),
            },
            a,
            b,
        }
    }
}

/// Whether a row is a count that was the same each time, in each run. Of one value nobody knows that.
fn is_certain(pair: &Pair) -> bool {
    let all_equal =
        |values: &[f64]| values.len() > 1 && values.windows(2).all(|two| two[0] == two[1]);
    pair.row.unit == Some(Unit::Count) && all_equal(&pair.a) && all_equal(&pair.b)
}

fn verdicts(pairs: &mut [Pair], terms: Terms) {
    let test = |pair: &Pair| {
        let testable = !is_certain(pair) && least_p(pair.a.len(), pair.b.len()) <= ALPHA;
        testable.then(|| p_value(&pair.a, &pair.b))
    };
    let tests: Vec<Option<f64>> = pairs.iter().map(test).collect();
    let tested: Vec<f64> = tests.iter().copied().flatten().collect();
    let mut results = corrected(&tested).into_iter().enumerate();
    for (pair, p) in pairs.iter_mut().zip(tests) {
        let certain = is_certain(pair);
        let row = &mut pair.row;
        let result = p.and_then(|_| results.next());
        let (changed, why) = match result {
            Some((at, corrected)) => {
                row.p = Some(corrected);
                let deaf = is_deaf(&tested, at, least_p(row.counts.0, row.counts.1));
                tested_row(row, corrected, deaf, terms.threshold)
            }
            None if certain => {
                let why = "a count, the same each time".to_owned();
                (Some(row.a != row.b), why)
            }
            None => (None, too_few(row.counts)),
        };
        row.why = why;
        row.verdict = match changed {
            None => Verdict::TooFewValues,
            Some(false) => Verdict::Unchanged,
            Some(true) => direction(row),
        };
    }
}

/// Whether a test would not call its row changed, beside all the others, even with the least value that it can have.
fn is_deaf(tested: &[f64], at: usize, least: f64) -> bool {
    let mut tested = tested.to_vec();
    tested[at] = least;
    corrected(&tested)[at] > ALPHA
}

/// Whether it has changed, if that can be said; and why.
fn tested_row(row: &Row, p: f64, deaf: bool, threshold: f64) -> (Option<bool>, String) {
    let big = row.change.is_none_or(|change| change.abs() >= threshold);
    let by_chance = format!("p = {}", probability(p));
    let (a, b) = row.counts;
    match (p <= ALPHA, big) {
        (true, true) => (Some(true), by_chance),
        (true, false) => (Some(false), format!("{by_chance}, but below {threshold} %")),
        (false, _) if deaf => (
            None,
            format!("of so many rows one may differ by chance as far as {a} and {b} values can"),
        ),
        (false, true) => (Some(false), format!("may be chance: {by_chance}")),
        (false, false) => (Some(false), format!("below {threshold} %")),
    }
}

fn too_few((a, b): (usize, usize)) -> String {
    let enough = (1..).find(|count| least_p(*count, *count) <= ALPHA);
    format!(
        "{a} and {b} values differ by chance too often; {} of each could do",
        enough.unwrap_or_default()
    )
}

fn direction(row: &Row) -> Verdict {
    let less = row.b < row.a;
    match (row.better, less) {
        (Better::Neither, _) => Verdict::Changed,
        (Better::Less, true) | (Better::More, false) => Verdict::Better,
        (Better::Less, false) | (Better::More, true) => Verdict::Worse,
    }
}

/// A probability, as far as it is worth saying.
fn probability(p: f64) -> String {
    if p < 0.0001 {
        "below 0.0001".to_owned()
    } else {
        let digits = match p {
            p if p < 0.01 => 4,
            p if p < 0.1 => 3,
            _ => 2,
        };
        format!("{p:.digits$}")
    }
}
