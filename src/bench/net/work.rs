//! What is measured, the words that the probe is told for it, and what its answer says.

use std::fmt::Display;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::bench::report::Unit;

const MIB: f64 = 1_048_576.0;
/// Writes of one measurement at most: where blocks are small, less is carried.
const WRITES: u64 = 8192;
/// Bytes of a write where nothing else is said.
const BLOCK: u32 = 65_536;
/// Bytes of a request over the network.
const REQUEST: u32 = 64;

/// How much there is of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) struct Sizes {
    /// MiB of all streams together.
    pub mib: u64,
    /// Requests.
    pub requests: u32,
}

/// Which way, as the one sees it in whose place the probe runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Send,
    Receive,
    Ask { udp: bool },
}

/// One thing that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) struct Work {
    /// Its row.
    pub name: &'static str,
    what: What,
    streams: u32,
    block: u32,
}

const fn work(name: &'static str, what: What, streams: u32, block: u32) -> Work {
    Work {
        name,
        what,
        streams,
        block,
    }
}

const ASK: What = What::Ask { udp: false };

/// Of the network, in this order.
pub(super) const NETWORK: [Work; 6] = [
    work("TCP out, 1 stream", What::Send, 1, BLOCK),
    work("TCP in, 1 stream", What::Receive, 1, BLOCK),
    work("TCP out, 8 streams", What::Send, 8, BLOCK),
    work("TCP in, 8 streams", What::Receive, 8, BLOCK),
    work("TCP request", ASK, 1, REQUEST),
    work("UDP request", What::Ask { udp: true }, 1, REQUEST),
];

/// Of the vsock with big writes, each way.
pub(in crate::bench) const BIG: [Work; 2] = [VSOCK[6], VSOCK[7]];

/// Of the vsock.
pub(super) const VSOCK: [Work; 9] = [
    work("out, 64 B", What::Send, 1, 64),
    work("in, 64 B", What::Receive, 1, 64),
    work("request, 64 B", ASK, 1, 64),
    work("out, 4 KiB", What::Send, 1, 4096),
    work("in, 4 KiB", What::Receive, 1, 4096),
    work("request, 4 KiB", ASK, 1, 4096),
    work("out, 64 KiB", What::Send, 1, 65_536),
    work("in, 64 KiB", What::Receive, 1, 65_536),
    work("request, 64 KiB", ASK, 1, 65_536),
];

/// The probe's answer.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Answer {
    bytes: u64,
    seconds: f64,
    microseconds: Vec<f64>,
    error: Option<String>,
}

impl Work {
    /// Whether it is requests, of which an answer has many values.
    pub fn asks(self) -> bool {
        matches!(self.what, What::Ask { .. })
    }

    /// Bytes of each stream.
    fn bytes(self, sizes: Sizes) -> u64 {
        let all = (sizes.mib << 20) / u64::from(self.streams);
        all.min(u64::from(self.block) * WRITES)
    }

    /// What the probe is told, with a server there.
    pub fn words(self, to: &dyn Display, sizes: Sizes) -> Vec<String> {
        let name = match self.what {
            What::Send => "send",
            What::Receive => "receive",
            What::Ask { .. } => "ask",
        };
        let mut words = vec!["net".to_owned(), name.to_owned()];
        let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
        add("--to", to.to_string());
        match self.what {
            What::Send | What::Receive => {
                add("--bytes", self.bytes(sizes).to_string());
                add("--streams", self.streams.to_string());
                add("--block", self.block.to_string());
            }
            What::Ask { udp } => {
                add("--count", sizes.requests.to_string());
                add("--size", self.block.to_string());
                if udp {
                    words.push("--udp".to_owned());
                }
            }
        }
        words
    }

    /// The values of an answer, if it is about what was asked for.
    ///
    /// # Errors
    /// It is not, or the probe says what went wrong.
    pub fn values(self, line: &str, sizes: Sizes) -> Result<(Unit, Vec<f64>)> {
        let answer: Answer = serde_json::from_str(line.trim())
            .with_context(|| format!("the probe answered {line:?}"))?;
        if let Some(error) = answer.error {
            bail!("the probe says: {error}");
        }
        match self.what {
            What::Send | What::Receive => {
                let wanted = self.bytes(sizes) * u64::from(self.streams);
                ensure!(
                    answer.bytes == wanted,
                    "the probe had {} bytes instead of {wanted}",
                    answer.bytes
                );
                ensure!(answer.seconds > 0.0, "the probe took no time");
                let rate = answer.bytes as f64 / MIB / answer.seconds;
                Ok((Unit::MibPerSecond, vec![rate]))
            }
            What::Ask { .. } => {
                let count = answer.microseconds.len();
                ensure!(
                    count as u64 == u64::from(sizes.requests),
                    "the probe had {count} answers instead of {}",
                    sizes.requests
                );
                Ok((Unit::Us, answer.microseconds))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes {
        mib: 2,
        requests: 3,
    };

    #[test]
    fn the_probe_is_told_where_and_how_much() {
        let all = NETWORK.iter().map(|work| work.words(&"1.2.3.4:5", SIZES));
        let all: Vec<String> = all.map(|words| words.join(" ")).collect();
        let block = "--block 65536";
        assert_eq!(
            all,
            [
                format!("net send --to 1.2.3.4:5 --bytes 2097152 --streams 1 {block}"),
                format!("net receive --to 1.2.3.4:5 --bytes 2097152 --streams 1 {block}"),
                format!("net send --to 1.2.3.4:5 --bytes 262144 --streams 8 {block}"),
                format!("net receive --to 1.2.3.4:5 --bytes 262144 --streams 8 {block}"),
                "net ask --to 1.2.3.4:5 --count 3 --size 64".to_owned(),
                "net ask --to 1.2.3.4:5 --count 3 --size 64 --udp".to_owned(),
            ]
        );
        // Small writes are not made without end.
        let words = VSOCK[0].words(&"vsock:2:9", SIZES).join(" ");
        assert!(words.contains("vsock:2:9 --bytes 524288 "), "{words}");
        for table in [&NETWORK[..], &VSOCK[..]] {
            let mut names: Vec<_> = table.iter().map(|work| work.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), table.len());
        }
    }

    #[test]
    fn an_answer_is_a_rate_or_times() {
        let rate = NETWORK[2].values(r#"{"bytes":2097152,"seconds":0.5}"#, SIZES);
        assert_eq!(rate.unwrap(), (Unit::MibPerSecond, vec![4.0]));
        let times = NETWORK[4].values(r#"{"microseconds":[1.5,2,3]}"#, SIZES);
        assert_eq!(times.unwrap(), (Unit::Us, vec![1.5, 2.0, 3.0]));
    }

    #[test]
    fn an_answer_about_something_else_is_refused() {
        for work in NETWORK.into_iter().chain(VSOCK) {
            for line in [
                r#"{"bytes":5,"seconds":1.0,"microseconds":[1.0]}"#,
                r#"{"error":"stream 1 of 1: no route"}"#,
                "ready",
            ] {
                assert!(work.values(line, SIZES).is_err(), "{work:?}: {line}");
            }
        }
        let error = NETWORK[0].values(r#"{"error":"no route"}"#, SIZES);
        assert!(error.unwrap_err().to_string().contains("no route"));
    }
}
