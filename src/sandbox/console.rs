//! What the guest says: the serial console's bytes and the agent's log lines.
//! The last 64 KiB of the console are kept for errors; lines of both go to a
//! callback, bounded in length and in rate, with control characters replaced,
//! since every byte is the guest's own choice.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt};
use tracing::Level;

/// Bytes of the console that are kept.
pub const TAIL_BYTES: usize = 64 * 1024;
/// Longest line passed on, in bytes; the rest of a longer one is dropped and marked.
pub const LINE_BYTES: usize = 4096;
/// Lines a second that each source may say for long.
const LINES_PER_SECOND: f64 = 200.0;
/// Lines that it may say at once after a silence.
const LINES_BURST: f64 = 2000.0;

/// Who said a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The serial console, thus mostly the guest's kernel.
    Console,
    /// The agent's log.
    Agent,
}

/// A line of the guest, printable and at most [`LINE_BYTES`] long (in bytes of the guest).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestLine {
    /// Who said it.
    pub source: Source,
    /// The agent's level; INFO for the console.
    pub level: Level,
    /// The agent's component; "kernel" for the console.
    pub component: String,
    /// The text.
    pub message: String,
}

/// Receives lines. It is called from a vCPU thread too and must not block.
pub type LineSink = Arc<dyn Fn(&GuestLine) + Send + Sync>;

/// What to do with the console besides keeping its tail.
#[derive(Default)]
pub struct ConsoleSink {
    /// Receives the console's and the agent's lines.
    pub lines: Option<LineSink>,
    /// Receives the console's bytes as they are. Must not block for long.
    pub raw: Option<Box<dyn Write + Send>>,
    /// A pollable file whose bytes the guest's console receives.
    pub input: Option<std::fs::File>,
}

impl fmt::Debug for ConsoleSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleSink")
            .field("lines", &self.lines.is_some())
            .field("raw", &self.raw.is_some())
            .field("input", &self.input.is_some())
            .finish()
    }
}

/// The kept tail of the console; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        let excess = (kept.len() + bytes.len()).saturating_sub(TAIL_BYTES);
        kept.drain(..excess);
        kept.extend(bytes);
    }

    /// What is kept, printable: line ends are kept, other control characters replaced.
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = {
            let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            kept.iter().copied().filter(|byte| *byte != b'\r').collect()
        };
        String::from_utf8_lossy(&bytes)
            .lines()
            .map(printable)
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// Control characters replaced, so that a guest cannot write to the terminal that shows its log.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() && c != '\t' {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect()
}

/// Takes the console's bytes in the VMM's threads: raw copy, tail, lines.
pub(crate) struct ConsoleWriter {
    raw: Option<Box<dyn Write + Send>>,
    tail: Tail,
    splitter: LineSplitter,
    lines: Option<RatedSink>,
}

impl ConsoleWriter {
    pub(crate) fn new(
        raw: Option<Box<dyn Write + Send>>,
        tail: Tail,
        lines: Option<LineSink>,
    ) -> Self {
        Self {
            raw,
            tail,
            splitter: LineSplitter::default(),
            lines: lines.map(|sink| RatedSink::new(sink, Source::Console)),
        }
    }
}

impl Write for ConsoleWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if let Some(raw) = &mut self.raw {
            // A closed terminal must not stop the guest: it is dropped, the tail goes on.
            if raw.write_all(data).and_then(|()| raw.flush()).is_err() {
                self.raw = None;
            }
        }
        self.tail.push(data);
        if let Some(lines) = &mut self.lines {
            self.splitter.push(data, |line| {
                lines.line(Level::INFO, "kernel", line);
            });
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Cuts bytes into lines of at most [`LINE_BYTES`]; what is beyond is dropped.
#[derive(Debug, Default)]
struct LineSplitter {
    line: Vec<u8>,
    cut: bool,
}

impl LineSplitter {
    fn push(&mut self, data: &[u8], mut each: impl FnMut(&str)) {
        for byte in data {
            match byte {
                b'\n' => self.end(&mut each),
                b'\r' => {}
                _ if self.line.len() == LINE_BYTES => self.cut = true,
                _ => self.line.push(*byte),
            }
        }
    }

    fn end(&mut self, each: &mut impl FnMut(&str)) {
        if !self.line.is_empty() {
            let mut text = printable(&String::from_utf8_lossy(&self.line));
            if self.cut {
                text.push_str(" […]");
            }
            each(&text);
        }
        self.line.clear();
        self.cut = false;
    }
}

/// A callback behind a token bucket.
struct RatedSink {
    sink: LineSink,
    source: Source,
    tokens: f64,
    refilled: Instant,
    dropped: u64,
}

impl RatedSink {
    fn new(sink: LineSink, source: Source) -> Self {
        Self {
            sink,
            source,
            tokens: LINES_BURST,
            refilled: Instant::now(),
            dropped: 0,
        }
    }

    fn line(&mut self, level: Level, component: &str, message: &str) {
        self.line_at(Instant::now(), level, component, message);
    }

    fn line_at(&mut self, now: Instant, level: Level, component: &str, message: &str) {
        let passed = now.saturating_duration_since(self.refilled).as_secs_f64();
        self.refilled = now;
        self.tokens = (self.tokens + passed * LINES_PER_SECOND).min(LINES_BURST);
        if self.tokens < 1.0 {
            self.dropped += 1;
            return;
        }
        self.tokens -= 1.0;
        if self.dropped > 0 {
            let message = format!("{} lines dropped: too many at once", self.dropped);
            self.dropped = 0;
            self.pass(Level::WARN, "nacre", &message);
        }
        self.pass(level, component, message);
    }

    fn pass(&self, level: Level, component: &str, message: &str) {
        (self.sink)(&GuestLine {
            source: self.source,
            level,
            component: component.to_owned(),
            message: message.to_owned(),
        });
    }
}

/// Reads the agent's log until it ends; `LEVEL component message` lines, others are passed whole.
pub(crate) async fn read_log(mut stream: impl AsyncRead + Unpin, sink: LineSink) {
    let mut sink = RatedSink::new(sink, Source::Agent);
    let mut splitter = LineSplitter::default();
    let mut buffer = vec![0; 8192];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => splitter.push(&buffer[..count], |line| {
                let (level, component, message) = agent_line(line);
                sink.line(level, component, message);
            }),
        }
    }
}

fn agent_line(line: &str) -> (Level, &str, &str) {
    let parsed = line.split_once(' ').and_then(|(level, rest)| {
        let level: Level = level.parse().ok()?;
        let (component, message) = rest.split_once(' ')?;
        Some((level, component, message))
    });
    parsed.unwrap_or((Level::INFO, "agent", line))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn collector() -> (LineSink, Arc<Mutex<Vec<GuestLine>>>) {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let into = lines.clone();
        (
            Arc::new(move |line: &GuestLine| into.lock().unwrap().push(line.clone())),
            lines,
        )
    }

    #[test]
    fn tail_keeps_the_last_64_kib() {
        let tail = Tail::default();
        tail.push(&vec![b'a'; TAIL_BYTES]);
        tail.push(b"end");
        let text = tail.text();
        assert_eq!(text.len(), TAIL_BYTES);
        assert!(text.ends_with("aend"));
        tail.push(&vec![b'b'; 3 * TAIL_BYTES]);
        assert_eq!(tail.text().len(), TAIL_BYTES);
        assert!(!tail.text().contains('a'));
    }

    #[test]
    fn escape_sequences_do_not_reach_the_reader() {
        let tail = Tail::default();
        tail.push(b"\x1b[31mred\r\nnext\n");
        assert_eq!(tail.text(), "\u{fffd}[31mred\nnext");
    }

    #[test]
    fn lines_come_whole_across_writes_and_long_ones_are_cut() {
        let (sink, lines) = collector();
        let mut writer = ConsoleWriter::new(None, Tail::default(), Some(sink));
        writer.write_all(b"first ha").unwrap();
        writer.write_all(b"lf\r\n\n").unwrap();
        writer.write_all(&vec![b'x'; 10 * LINE_BYTES]).unwrap();
        writer.write_all(b"\nlast\n").unwrap();
        let lines = lines.lock().unwrap();
        assert_eq!(lines[0].message, "first half");
        assert!(lines[1].message.len() < LINE_BYTES + 10 && lines[1].message.ends_with("[…]"));
        assert_eq!(lines[2].message, "last");
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn a_flood_is_capped_and_counted() {
        let (sink, lines) = collector();
        let mut rated = RatedSink::new(sink, Source::Agent);
        let now = Instant::now();
        for _ in 0..(LINES_BURST as usize + 500) {
            rated.line_at(now, Level::INFO, "x", "flood");
        }
        assert_eq!(lines.lock().unwrap().len(), LINES_BURST as usize);
        rated.line_at(now + Duration::from_secs(1), Level::INFO, "x", "after");
        let lines = lines.lock().unwrap();
        assert!(
            lines[lines.len() - 2]
                .message
                .starts_with("500 lines dropped")
        );
        assert_eq!(lines[lines.len() - 1].message, "after");
    }

    #[test]
    fn agent_lines_parse_and_others_pass_whole() {
        assert_eq!(
            agent_line("WARN init no clock"),
            (Level::WARN, "init", "no clock")
        );
        assert_eq!(agent_line("what ever"), (Level::INFO, "agent", "what ever"));
        assert_eq!(
            agent_line("ERROR alone"),
            (Level::INFO, "agent", "ERROR alone")
        );
    }

    #[tokio::test]
    async fn log_without_a_final_newline_ends_quietly() {
        let (sink, lines) = collector();
        read_log(&b"INFO a one\nINFO b tw"[..], sink).await;
        assert_eq!(lines.lock().unwrap().len(), 1);
    }
}
