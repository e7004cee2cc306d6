//! A scenario under way: its rounds one after another until a signal comes, with
//! what was measured written down as it goes on, and shown in the end.

use std::io::{ErrorKind, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::document::{Document, replace};
use super::peers::Peer;
use super::progress::Progress;
use super::report::{Report, Unit};
use super::{Setting, interrupt, page};

/// What was measured is not written more often: short rounds are not to measure that.
const PAUSE: Duration = Duration::from_secs(1);

/// Rounds to measure, after some that are not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rounds {
    pub warm_up: u64,
    pub count: u64,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Round {
    /// From 0, those to warm up included.
    pub number: u64,
    /// Whether its values count.
    pub counts: bool,
}

impl Rounds {
    /// All of them, in order.
    pub fn each(self) -> impl Iterator<Item = Round> {
        (0..self.all()).map(move |number| Round {
            number,
            counts: number >= self.warm_up,
        })
    }

    /// How many, with those to warm up.
    pub fn all(self) -> u64 {
        self.warm_up.saturating_add(self.count)
    }

    fn name(self, of: &str, round: Round) -> String {
        let note = if round.counts { "" } else { ", to warm up" };
        format!("{of}: round {} of {}{note}", round.number + 1, self.all())
    }
}

/// Which of `count` is whose turn: each is first every other round.
pub(super) fn turns(count: usize, round: u64) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| {
        if round.is_multiple_of(2) {
            turn
        } else {
            count - 1 - turn
        }
    })
}

/// A scenario under way.
pub(super) struct Run<'s> {
    /// What was measured so far.
    pub document: Document,
    setting: &'s Setting,
    progress: Progress,
    saved: Option<Instant>,
}

impl<'s> Run<'s> {
    /// Nothing is measured yet. `settings` is an object.
    pub fn new(scenario: &str, settings: Value, setting: &'s Setting) -> Self {
        Self {
            document: Document::new(scenario, settings),
            setting,
            progress: Progress::new(),
            saved: None,
        }
    }

    /// Names the shims' programs.
    pub fn peers(&mut self, peers: &[Peer]) {
        for peer in peers {
            self.document.program(peer.name, &peer.program);
        }
    }

    /// Adds a table.
    pub fn table(&mut self, table: Report) {
        self.document.tables.push(table);
    }

    /// Adds a value to a row of a side in a table.
    pub fn add(&mut self, table: &str, side: &str, row: &str, unit: Unit, value: f64) {
        self.document.add(table, side, row, unit, value);
    }

    /// So many rounds are to come: what is left is estimated by that.
    pub fn expect(&mut self, rounds: Rounds) {
        self.progress.expect(rounds.all());
    }

    /// Does all rounds that were told of, and keeps what each has measured. `of` is for people.
    ///
    /// # Errors
    /// The first of a round; a signal has come; the file cannot be written.
    pub fn rounds(
        &mut self,
        of: &str,
        rounds: Rounds,
        mut one: impl FnMut(&mut Self, Round) -> Result<()>,
    ) -> Result<()> {
        for round in rounds.each() {
            self.begin(of, rounds, round)?;
            one(self, round)?;
            self.done()?;
        }
        Ok(())
    }

    /// A round begins, unless a signal has come.
    ///
    /// # Errors
    /// It has.
    pub fn begin(&mut self, of: &str, rounds: Rounds, round: Round) -> Result<()> {
        interrupt::check()?;
        for table in &mut self.document.tables {
            table.round = round.number;
        }
        self.progress.begin(rounds.name(of, round));
        Ok(())
    }

    /// What the round is at, for people.
    pub fn now(&mut self, what: &str) {
        self.progress.now(what);
    }

    /// A round is over: what there is now is kept.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn done(&mut self) -> Result<()> {
        self.progress.done();
        let Some(file) = &self.setting.json else {
            return Ok(());
        };
        if self.saved.is_none_or(|saved| saved.elapsed() >= PAUSE) {
            self.document.save(file)?;
            self.saved = Some(Instant::now());
        }
        Ok(())
    }

    /// Tells, and notes, why something is left out from here on.
    pub fn failed(&mut self, why: &str) {
        self.progress.say(why);
        self.document.note(why);
    }

    /// Shows and writes what there is, whether all of it was measured or not.
    ///
    /// # Errors
    /// That of the outcome; or a file cannot be written.
    pub fn end(mut self, outcome: Result<()>) -> Result<()> {
        self.progress.end();
        // What fails because a signal has come did not fail.
        let outcome =
            outcome.map_err(|error| interrupt::check_after_failure().err().unwrap_or(error));
        self.document.end(outcome.as_ref().err());
        let json = self.setting.json.as_ref();
        let saved = json.map_or(Ok(()), |file| self.document.save(file));
        let shown = self.setting.html.as_ref().map_or(Ok(()), |file| {
            let page = page::page(std::slice::from_ref(&self.document));
            page.and_then(|text| replace(file, text.as_bytes()))
                .context("making the page")
        });
        // What is written is there whoever reads what is shown.
        let told = tell(&mut std::io::stdout(), self.document.text().trim_end());
        outcome.and(saved).and(shown).and(told)
    }
}

/// Shows it, and a line's end. Nobody need read it to the end.
///
/// # Errors
/// It cannot be written, and not because the reader has closed it.
pub(super) fn tell(to: &mut impl Write, text: &str) -> Result<()> {
    match writeln!(to, "{text}").and_then(|()| to.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("writing to standard output")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;
    use serde_json::json;

    use super::*;

    const ROUNDS: Rounds = Rounds {
        warm_up: 2,
        count: 3,
    };

    #[test]
    fn each_shim_is_first_every_other_round() {
        assert_eq!(turns(2, 0).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(turns(2, 1).collect::<Vec<_>>(), [1, 0]);
    }

    #[test]
    fn rounds_to_warm_up_do_not_count() {
        let counts: Vec<_> = ROUNDS.each().map(|round| round.counts).collect();
        assert_eq!(counts, [false, false, true, true, true]);
        let last = ROUNDS.each().last().unwrap();
        assert_eq!(ROUNDS.name("exec", last), "exec: round 5 of 5");
    }

    #[test]
    fn who_has_closed_what_is_shown_is_no_error_and_a_full_disk_is_one() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        drop(reader);
        tell(&mut writer, "text").unwrap();
        let mut full = std::fs::OpenOptions::new();
        let mut full = full.write(true).open("/dev/full").unwrap();
        let error = tell(&mut full, "text").unwrap_err();
        assert!(error.to_string().contains("standard output"), "{error}");
    }

    /// Runs rounds of which that one fails; what was written when the last one was over, and in the end.
    fn run(failing: u64) -> (bool, Vec<Document>, String) {
        let folder = tempfile::tempdir().unwrap();
        let setting = Setting {
            json: Some(folder.path().join("a.json")),
            html: Some(folder.path().join("a.html")),
            ..Setting::default()
        };
        let load = || Document::load(setting.json.as_ref().unwrap()).unwrap();
        let mut run = Run::new("exec", json!({ "rounds": 3 }), &setting);
        run.table(Report::new("exec", ["nacre"]));
        run.expect(ROUNDS);
        let outcome = run.rounds("exec", ROUNDS, |run, round| {
            ensure!(round.number != failing, "round {failing} failed");
            if round.counts {
                run.add("exec", "nacre", "cycle", Unit::Ms, round.number as f64);
            }
            // Not in place of the pause: of the file of the round before.
            run.saved = None;
            Ok(())
        });
        let before = load();
        let failed = run.end(outcome).is_err();
        let page = std::fs::read_to_string(setting.html.as_ref().unwrap()).unwrap();
        (failed, vec![before, load()], page)
    }

    #[test]
    fn what_was_measured_is_kept_after_each_round_and_when_one_fails() {
        for (failing, values, ended_by) in [
            (9, &[2.0, 3.0, 4.0][..], None),
            (4, &[2.0, 3.0], Some("round 4 failed")),
        ] {
            let (failed, documents, page) = run(failing);
            assert_eq!(failed, ended_by.is_some());
            for document in &documents {
                assert_eq!(document.tables[0].values("nacre", "cycle"), values);
                let series = &document.tables[0].sides[0].series[0];
                let rounds: Vec<f64> = series.rounds.iter().map(|at| *at as f64).collect();
                assert_eq!(rounds, values);
            }
            assert!(!documents[0].complete);
            assert_eq!(documents[1].complete, !failed);
            assert_eq!(documents[1].ended_by.as_deref(), ended_by);
            assert!(page.contains("cycle"));
        }
    }
}
