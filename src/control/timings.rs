//! How long the phases of a container's life took, as the process that holds its
//! VM saw them. A few numbers a container, however long it lives.

use serde::{Serialize, Serializer};

/// A phase that happens once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Phase {
    /// Host CLOCK_MONOTONIC in nanoseconds, as that of the boot's phases.
    pub begin_ns: u64,
    /// How long it took. In JSON `ms`, milliseconds with a fraction.
    #[serde(rename = "ms", serialize_with = "in_ms")]
    pub took_ns: u64,
}

impl Phase {
    /// From one time of CLOCK_MONOTONIC to another, in nanoseconds.
    pub fn between(begin_ns: u64, end_ns: u64) -> Self {
        Self {
            begin_ns,
            took_ns: end_ns.saturating_sub(begin_ns),
        }
    }
}

/// Something that happens again and again. In JSON its times are `last_ms`, `min_ms` and `max_ms`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Series {
    /// How often it has happened.
    pub count: u64,
    /// The last one's time.
    #[serde(rename = "last_ms", serialize_with = "in_ms")]
    pub last_ns: u64,
    /// The shortest.
    #[serde(rename = "min_ms", serialize_with = "in_ms")]
    pub min_ns: u64,
    /// The longest.
    #[serde(rename = "max_ms", serialize_with = "in_ms")]
    pub max_ns: u64,
}

impl Series {
    /// Adds one that took so long.
    pub fn add(&mut self, took_ns: u64) {
        self.min_ns = match self.count {
            0 => took_ns,
            _ => self.min_ns.min(took_ns),
        };
        self.max_ns = self.max_ns.max(took_ns);
        self.last_ns = took_ns;
        self.count += 1;
    }
}

/// The phases of one container's life; `docs/timings.md` says where each begins and ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Timings {
    /// Its id.
    pub container: String,
    /// It is deleted: its last numbers.
    pub deleted: bool,
    /// The process `start` to the shim's readiness; of the container that the shim was started for.
    pub shim_start: Option<Phase>,
    /// The shim's readiness to the first call; of the same container.
    pub connect: Option<Phase>,
    /// The call Create.
    pub create: Option<Phase>,
    /// The call Start.
    pub start: Option<Phase>,
    /// From the call Start to the first byte of output.
    pub first_output: Option<Phase>,
    /// Exec and Start of a process in the container.
    pub exec: Series,
    /// The call Kill.
    pub kill: Series,
    /// The call Delete, of execs and of the container.
    pub delete: Series,
}

impl Timings {
    /// Of a container that is new.
    pub fn of(container: &str) -> Self {
        Self {
            container: container.to_owned(),
            ..Self::default()
        }
    }

    /// Phases that were reached, by name, in order.
    pub fn reached(&self) -> Vec<(&'static str, Phase)> {
        [
            ("shim-start", self.shim_start),
            ("connect", self.connect),
            ("create", self.create),
            ("start", self.start),
            ("first-output", self.first_output),
        ]
        .into_iter()
        .filter_map(|(name, phase)| Some((name, phase?)))
        .collect()
    }

    /// What has happened again and again, by name.
    pub fn repeated(&self) -> Vec<(&'static str, Series)> {
        [
            ("exec", self.exec),
            ("kill", self.kill),
            ("delete", self.delete),
        ]
        .into_iter()
        .filter(|(_, series)| series.count > 0)
        .collect()
    }

    /// All of it on one line, in milliseconds, for a log.
    pub fn line(&self) -> String {
        let phases = self.reached().into_iter();
        let phases = phases.map(|(name, phase)| (name, phase.took_ns));
        let repeated = self.repeated().into_iter();
        let repeated = repeated.map(|(name, series)| (name, series.last_ns));
        let words: Vec<String> = phases
            .chain(repeated)
            .map(|(name, ns)| format!("{name} {:.3}", ms(ns)))
            .collect();
        words.join(", ")
    }
}

/// Milliseconds with the microseconds as a fraction.
pub fn ms(ns: u64) -> f64 {
    (ns / 1000) as f64 / 1e3
}

// The signature is serde's.
fn in_ms<S: Serializer>(ns: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(ms(*ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_keeps_last_least_and_most() {
        let mut series = Series::default();
        for ns in [5, 2, 9, 3] {
            series.add(ns);
        }
        let Series {
            count,
            last_ns,
            min_ns,
            max_ns,
        } = series;
        assert_eq!((count, last_ns, min_ns, max_ns), (4, 3, 2, 9));
    }

    #[test]
    fn json_and_the_log_have_milliseconds() {
        let mut timings = Timings::of("c");
        timings.create = Some(Phase::between(7, 1_500_007));
        timings.start = Some(Phase::between(9, 3));
        timings.kill.add(2_000_999);
        let json = serde_json::to_value(&timings).unwrap();
        assert_eq!(
            json["create"],
            serde_json::json!({ "begin_ns": 7, "ms": 1.5 })
        );
        assert_eq!(json["kill"]["last_ms"], 2.0);
        assert!(json["connect"].is_null());
        assert_eq!(timings.line(), "create 1.500, start 0.000, kill 2.000");
    }
}
