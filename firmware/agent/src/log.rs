//! The agent's log: a small `tracing` subscriber that makes a line of each
//! event, `LEVEL component message field=value`. Lines wait in a bounded queue
//! for the connection to the host; warnings and errors go to the console too.
//! The container helper sends its lines to the agent instead.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

/// Lines that may wait for the host; more are dropped, the oldest first, and counted.
const QUEUE_LINES: usize = 2048;
/// Bytes of one line; the rest is cut off.
const LINE_BYTES: usize = 4096;

static QUEUE: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());
static DROPPED: AtomicU64 = AtomicU64::new(0);
static FRESH: Notify = Notify::const_new();

/// Where the lines of this process go.
pub enum Sink {
    /// To the queue for the host, and to the console from `Level::WARN` up.
    Host,
    /// To a function of the container helper.
    Parent(fn(&Level, &str, &str)),
}

/// Makes `sink` the log of this process, with everything up to `level`. A second call changes nothing.
pub fn install(sink: Sink, level: Level) {
    let lines = Lines { sink, level };
    let _ = tracing::subscriber::set_global_default(lines);
}

/// Adds a line that was made elsewhere, by the container helper.
pub fn line(level: &str, component: &str, message: &str) {
    push(format(level, component, message));
}

/// Writes the queued lines to the host, for ever. Ends when the connection breaks.
///
/// # Errors
/// What the connection said.
pub async fn deliver(mut host: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    loop {
        let next = QUEUE.lock().expect("log queue").pop_front();
        let Some(mut line) = next else {
            FRESH.notified().await;
            continue;
        };
        let dropped = DROPPED.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let _ = write!(line, "\nWARN log {dropped} lines were dropped");
        }
        line.push('\n');
        host.write_all(line.as_bytes()).await?;
    }
}

fn push(line: String) {
    let mut queue = QUEUE.lock().expect("log queue");
    if queue.len() == QUEUE_LINES {
        queue.pop_front();
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
    queue.push_back(line);
    drop(queue);
    FRESH.notify_one();
}

fn format(level: &str, component: &str, message: &str) -> String {
    let mut line = String::with_capacity(message.len() + 32);
    let _ = write!(line, "{level} {component} ");
    for character in message.chars() {
        if line.len() >= LINE_BYTES {
            line.push('…');
            break;
        }
        match character {
            '\n' => line.push_str("\\n"),
            c if c.is_control() && c != '\t' => line.push('\u{fffd}'),
            c => line.push(c),
        }
    }
    line
}

struct Lines {
    sink: Sink,
    level: Level,
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The runtime's library tells its progress as warnings; its errors are what matters.
        if component(metadata.target()) == "runtime-library" {
            return *metadata.level() <= Level::ERROR;
        }
        *metadata.level() <= self.level
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let mut text = Text::default();
        event.record(&mut text);
        let message = text.message + &text.fields;
        let component = component(metadata.target());
        match self.sink {
            Sink::Host => {
                let line = format(metadata.level().as_str(), component, &message);
                if *metadata.level() <= Level::WARN {
                    let _ = writeln!(std::io::stderr(), "nacre-agent: {line}");
                }
                push(line);
            }
            Sink::Parent(send) => send(metadata.level(), component, &message),
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// The last part of a module path; one name for everything of the runtime's library.
fn component(target: &str) -> &str {
    if target.starts_with("libcontainer") || target.starts_with("libcgroups") {
        return "runtime-library";
    }
    match target.rsplit_once("::") {
        Some((_, module)) => module,
        None => "main",
    }
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            let _ = write!(self.fields, " {}={value}", field.name());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            let _ = write!(self.fields, " {}={value:?}", field.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stays_one_line_and_is_bounded() {
        assert_eq!(
            format("INFO", "main", "a\nb\u{7}"),
            "INFO main a\\nb\u{fffd}"
        );
        assert!(format("INFO", "main", &"x".repeat(10_000)).len() < LINE_BYTES + 8);
    }

    #[test]
    fn the_component_is_the_module() {
        assert_eq!(component("nacre_agent::container"), "container");
        assert_eq!(component("nacre_agent"), "main");
        assert_eq!(component("libcontainer::process::init"), "runtime-library");
    }
}
