//! How far a run has come and how long it will still take, on standard error:
//! a bar on a terminal, else a line now and then.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Least time between two lines where there is no terminal.
const PAUSE: Duration = Duration::from_secs(30);

/// The bar, rounds of all, and what is going on.
const TEMPLATE: &str = "{bar:20} {pos}/{len} {wide_msg}";

/// The rounds of a run, whatever they are of.
pub(super) struct Progress {
    bar: ProgressBar,
    terminal: bool,
    done: u64,
    total: u64,
    began: Option<Instant>,
    last_line: Option<Instant>,
    head: String,
}

impl Progress {
    /// Nothing is done yet.
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template(TEMPLATE);
        // A test holds that the template is sound.
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self {
            bar,
            terminal,
            done: 0,
            total: 0,
            began: None,
            last_line: None,
            head: String::new(),
        }
    }

    /// So many rounds more are to come.
    pub fn expect(&mut self, rounds: u64) {
        self.total += rounds;
        self.bar.set_length(self.total);
    }

    /// A round begins; `head` says which.
    pub fn begin(&mut self, head: String) {
        self.began.get_or_insert_with(Instant::now);
        self.head = head;
        self.show(None);
    }

    /// What is being done in the round.
    pub fn now(&mut self, what: &str) {
        self.show(Some(what));
    }

    /// The round is over.
    pub fn done(&mut self) {
        self.done += 1;
        self.bar.set_position(self.done);
    }

    /// Tells something that is not progress.
    pub fn say(&self, text: &str) {
        self.bar.suspend(|| eprintln!("nacre-bench: {text}"));
    }

    /// Nothing more comes.
    pub fn end(&mut self) {
        self.bar.finish_and_clear();
        if let (false, Some(began)) = (self.terminal, self.began) {
            let (done, total) = (self.done, self.total);
            eprintln!(
                "{done} of {total} rounds in {}",
                HumanDuration(began.elapsed())
            );
        }
    }

    fn show(&mut self, what: Option<&str>) {
        let elapsed = self.began.map_or(Duration::ZERO, |began| began.elapsed());
        let text = line(&self.head, what, left(elapsed, self.done, self.total));
        if self.terminal {
            self.bar.set_message(text);
        } else if self.last_line.is_none_or(|last| last.elapsed() >= PAUSE) {
            self.last_line = Some(Instant::now());
            eprintln!("{text}");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // Whatever has failed: its error is not to stand behind a bar.
        self.bar.finish_and_clear();
    }
}

/// What the rounds that are left will take if they are as those before; None if there are none yet.
fn left(elapsed: Duration, done: u64, total: u64) -> Option<Duration> {
    let mean = elapsed.as_secs_f64() / (done > 0).then_some(done)? as f64;
    Some(Duration::from_secs_f64(
        mean * total.saturating_sub(done) as f64,
    ))
}

fn line(head: &str, what: Option<&str>, left: Option<Duration>) -> String {
    let mut text = head.to_owned();
    if let Some(what) = what {
        text.push_str(&format!(": {what} …"));
    }
    if let Some(left) = left {
        text.push_str(&format!("; about {} left", HumanDuration(left)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_from_the_rounds_so_far() {
        let seconds = Duration::from_secs;
        for (elapsed, done, total, expected) in [
            (0, 0, 10, None),
            (7, 0, 10, None),
            (20, 2, 10, Some(80)),
            (100, 10, 10, Some(0)),
            // More than were told of.
            (100, 11, 10, Some(0)),
        ] {
            let left = left(seconds(elapsed), done, total);
            assert_eq!(left, expected.map(seconds), "{done} of {total}");
        }
    }

    #[test]
    fn a_line_says_which_round_what_and_how_long() {
        let left = Some(Duration::from_secs(80));
        for (what, left, expected) in [
            (None, None, "exec: round 1 of 3"),
            (Some("runc"), None, "exec: round 1 of 3: runc …"),
            (
                Some("runc"),
                left,
                "exec: round 1 of 3: runc …; about 80 seconds left",
            ),
        ] {
            assert_eq!(line("exec: round 1 of 3", what, left), expected);
        }
    }

    #[test]
    fn the_bar_can_be_drawn() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }

    #[test]
    fn rounds_of_several_things_are_counted_together() {
        let mut progress = Progress::new();
        progress.expect(2);
        progress.expect(3);
        progress.begin("a: round 1".to_owned());
        progress.done();
        assert_eq!((progress.done, progress.total), (1, 5));
        assert!(progress.began.is_some());
    }
}
