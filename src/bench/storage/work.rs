//! What is measured, the words that the probe is told for it, and what its answer says.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::Sizes;
use crate::bench::report::Unit;

const MIB: f64 = 1_048_576.0;

/// One thing that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// The file from end to end, from the disk; or once more, from the cache.
    Read { cold: bool },
    /// Blocks at random places, so many at once.
    Random { depth: u16 },
    /// The tree, from the disk; or once more, from the cache.
    Walk { cold: bool },
    /// The archive.
    Untar,
}

/// All of it, in this order.
pub(super) const ALL: [Work; 7] = [
    Work::Read { cold: true },
    Work::Read { cold: false },
    Work::Random { depth: 1 },
    Work::Random { depth: 32 },
    Work::Walk { cold: true },
    Work::Walk { cold: false },
    Work::Untar,
];

/// The probe's answer.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Answer {
    ns: u64,
    count: u64,
    bytes: u64,
    dropped: Option<String>,
    direct: Option<bool>,
    engine: Option<String>,
    error: Option<String>,
}

impl Work {
    /// Its row.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read { cold: true } => "read, cold",
            Self::Read { cold: false } => "read, warm",
            Self::Random { depth: 1 } => "random 4 KiB, depth 1",
            Self::Random { .. } => "random 4 KiB, depth 32",
            Self::Walk { cold: true } => "walk, cold",
            Self::Walk { cold: false } => "walk, warm",
            Self::Untar => "untar",
        }
    }

    /// Whether the host's caches are dropped before.
    pub fn is_cold(self) -> bool {
        matches!(self, Self::Read { cold: true } | Self::Walk { cold: true })
    }

    /// What the probe is told, of files in the folder `at`; `scratch` is a name that nobody else has there.
    pub fn words(self, at: &str, scratch: &str, reads: u32) -> Vec<String> {
        let path = |name: &str| format!("{}/{name}", at.trim_end_matches('/'));
        let (mut words, cold) = match self {
            Self::Read { cold } => (vec!["read".into(), path("file")], cold),
            Self::Walk { cold } => (vec!["walk".into(), path("tree")], cold),
            Self::Random { depth } => {
                let (depth, reads) = (depth.to_string(), reads.to_string());
                let mut words = vec!["random".into(), path("file")];
                words.extend(["--depth".into(), depth, "--reads".into(), reads]);
                (words, false)
            }
            Self::Untar => (vec!["untar".into(), path("tree.tar"), path(scratch)], false),
        };
        if cold {
            words.push("--cold".into());
        }
        words
    }

    /// The value of an answer, if it is about what was asked for.
    pub fn value(self, answer: &Answer, sizes: Sizes, reads: u32) -> Result<(Unit, f64)> {
        let (what, found, wanted) = match self {
            Self::Read { .. } => ("bytes", answer.bytes, sizes.mib << 20),
            Self::Random { .. } => ("reads", answer.count, reads.into()),
            Self::Walk { .. } | Self::Untar => ("files", answer.count, sizes.files),
        };
        ensure!(
            found == wanted,
            "the probe had {found} {what} instead of {wanted}"
        );
        ensure!(answer.ns > 0, "the probe took no time");
        let seconds = answer.ns as f64 / 1e9;
        Ok(match self {
            Self::Read { .. } => (Unit::MibPerSecond, answer.bytes as f64 / MIB / seconds),
            Self::Random { .. } => (Unit::PerSecond, answer.count as f64 / seconds),
            Self::Walk { .. } | Self::Untar => (Unit::Ms, seconds * 1e3),
        })
    }
}

impl Answer {
    /// Reads the probe's line.
    ///
    /// # Errors
    /// It is none, or says what went wrong.
    pub fn parse(line: &str) -> Result<Self> {
        let answer: Self = serde_json::from_str(line.trim())
            .with_context(|| format!("the probe answered {line:?}"))?;
        match &answer.error {
            Some(error) => bail!("the probe says: {error}"),
            None => Ok(answer),
        }
    }

    /// What people are to know of how it was done, if it was not done as it should be.
    pub fn remark(&self) -> Option<&'static str> {
        if self.direct == Some(false) {
            return Some("reads at random go through the page cache, since O_DIRECT is refused");
        }
        if self.engine.as_deref() == Some("threads") {
            return Some("reads at random are made by threads, since io_uring is refused");
        }
        if self.dropped.as_deref() == Some("file") {
            return Some("before cold reads only the file's own pages are dropped");
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes { mib: 2, files: 10 };

    #[test]
    fn the_probe_is_told_where_and_how() {
        let said: Vec<String> = ALL
            .iter()
            .map(|work| work.words("/share", "out", 9).join(" "))
            .collect();
        let expected = [
            "read /share/file --cold",
            "read /share/file",
            "random /share/file --depth 1 --reads 9",
            "random /share/file --depth 32 --reads 9",
            "walk /share/tree --cold",
            "walk /share/tree",
            "untar /share/tree.tar /share/out",
        ];
        assert_eq!(said, expected);
        assert_eq!(Work::Untar.words("/", "o", 1)[2], "/o");
        let mut names = ALL.map(Work::name).to_vec();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }

    #[test]
    fn an_answer_is_a_rate_or_a_time() {
        let answer = Answer::parse(r#"{"ns":500000000,"count":10,"bytes":2097152}"#).unwrap();
        for (work, expected) in [
            (Work::Read { cold: true }, 4.0),
            (Work::Random { depth: 32 }, 20.0),
            (Work::Walk { cold: false }, 500.0),
            (Work::Untar, 500.0),
        ] {
            let (_, value) = work.value(&answer, SIZES, 10).unwrap();
            assert_eq!(value, expected, "{work:?}");
        }
    }

    #[test]
    fn an_answer_about_something_else_is_refused() {
        let short = Answer::parse(r#"{"ns":5,"count":9,"bytes":4096}"#).unwrap();
        for work in ALL {
            assert!(work.value(&short, SIZES, 10).is_err(), "{work:?}");
        }
        let error = Answer::parse(r#"{"error":"no space"}"#).unwrap_err();
        assert!(error.to_string().contains("no space"));
        assert!(Answer::parse("ready").is_err());
    }

    #[test]
    fn what_was_done_in_another_way_is_remarked() {
        let of = |line| Answer::parse(line).unwrap().remark();
        assert_eq!(
            of(r#"{"direct":true,"engine":"io_uring","dropped":"all"}"#),
            None
        );
        assert!(of(r#"{"direct":false}"#).unwrap().contains("O_DIRECT"));
        assert!(of(r#"{"engine":"threads"}"#).unwrap().contains("threads"));
        assert!(of(r#"{"dropped":"file"}"#).is_some());
    }
}
