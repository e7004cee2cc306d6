//! The shim's log: `tracing` events as lines of logrus' text format on the FIFO
//! `log` in the bundle, which containerd copies into its own log. Nobody has to
//! read it: a full FIFO drops lines and counts them, and no write ever blocks.
//! What the guest says arrives here at a bounded rate already.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Longest line; a write of at most PIPE_BUF bytes to a pipe is whole or not at all.
const LINE_LIMIT: usize = 4096;
/// Where lines go.
struct Sink {
    file: Option<File>,
    dropped: u64,
}

impl Sink {
    fn line(&mut self, line: &str) {
        let Some(file) = &mut self.file else { return };
        if self.dropped > 0 {
            let note = render(
                SystemTime::now(),
                Level::WARN,
                "the log was full",
                &[("dropped", self.dropped.to_string())],
            );
            if file.write(note.as_bytes()).is_err() {
                self.dropped += 1;
                return;
            }
            self.dropped = 0;
        }
        // Whole or EAGAIN: the line is no longer than PIPE_BUF.
        if file.write(line.as_bytes()).is_err() {
            self.dropped += 1;
        }
    }
}

/// The layer that turns events into lines.
struct Logrus {
    sink: Mutex<Sink>,
    verbosity: Level,
    fields: Vec<(&'static str, String)>,
}

/// Makes the FIFO `log` in `bundle` the place of all `tracing` events of this
/// process, and of panics. Without the FIFO nothing is logged.
pub fn install(bundle: &Path, debug: bool, namespace: &str, id: &str) {
    // Read-write never waits for a reader and never raises EPIPE; non-blocking never waits for room.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(bundle.join("log"))
        .ok();
    let layer = Logrus {
        sink: Mutex::new(Sink { file, dropped: 0 }),
        verbosity: if debug { Level::DEBUG } else { Level::INFO },
        fields: vec![("id", id.to_owned()), ("namespace", namespace.to_owned())],
    };
    // A second installation in one process changes nothing.
    let _ = tracing_subscriber::registry().with(layer).try_init();
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let message = info
            .payload()
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| info.payload().downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without words".to_owned());
        let thread = std::thread::current()
            .name()
            .unwrap_or("unnamed")
            .to_owned();
        tracing::error!(component = "shim", %place, %thread, "panic: {message}");
    }));
}

impl<S: Subscriber> Layer<S> for Logrus {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        *metadata.level() <= self.verbosity
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Collector::default();
        event.record(&mut line);
        let level = *event.metadata().level();
        if !line.fields.iter().any(|(name, _)| *name == "component") {
            line.fields
                .push(("component", component(event.metadata().target()).to_owned()));
        }
        for field in &self.fields {
            if !line.fields.iter().any(|(name, _)| *name == field.0) {
                line.fields.push(field.clone());
            }
        }
        let text = render(SystemTime::now(), level, &line.message, &line.fields);
        self.sink
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .line(&text);
    }
}

/// `nacre::sandbox::agent` → `sandbox`, `nacre_vmm::boot` → `vmm`.
fn component(target: &str) -> &str {
    let target = target.strip_prefix("nacre::").unwrap_or(target);
    let first = target.split("::").next().unwrap_or(target);
    first.strip_prefix("nacre_").unwrap_or(first)
}

#[derive(Default)]
struct Collector {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Visit for Collector {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            self.fields.push((field.name(), value.to_owned()));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// One line in logrus' text format, ended by a newline and at most [`LINE_LIMIT`] bytes long.
fn render(
    time: SystemTime,
    level: Level,
    message: &str,
    fields: &[(&'static str, String)],
) -> String {
    let name = match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    let mut line = format!("time=\"{}\" level={name} msg=", timestamp(time));
    // What is left for the message once the fields, which are short, have their room.
    value(&mut line, message, LINE_LIMIT - 1024);
    for (name, text) in fields {
        if line.len() > LINE_LIMIT - 256 {
            break;
        }
        let _ = write!(line, " {name}=");
        let room = LINE_LIMIT - 64 - line.len();
        value(&mut line, text, room);
    }
    line.push('\n');
    line
}

/// Appends a value in at most `room` bytes, bare where logrus leaves it bare.
fn value(line: &mut String, text: &str, room: usize) {
    let bare = !text.is_empty()
        && text.len() <= room
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._/@^+".contains(&byte));
    if bare {
        line.push_str(text);
        return;
    }
    let end = line.len() + room.saturating_sub(8);
    line.push('"');
    for c in text.chars() {
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            c if c.is_control() => {
                let _ = write!(line, "\\x{:02x}", u32::from(c) & 0xff);
            }
            c => line.push(c),
        }
        if line.len() >= end {
            line.push('…');
            break;
        }
    }
    line.push('"');
}

/// RFC 3339 in UTC with nanoseconds, as logrus writes it.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    // Days counted from 0000-03-01, so that the leap day ends a year, in eras of 400 years.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn lines_are_logrus_text() {
        let time = UNIX_EPOCH + Duration::new(1_700_000_000, 5);
        let line = render(
            time,
            Level::WARN,
            "it said \"no\"\nand left",
            &[
                ("component", "agent".into()),
                ("path", "/a/b c".into()),
                ("empty", String::new()),
            ],
        );
        assert_eq!(
            line,
            "time=\"2023-11-14T22:13:20.000000005Z\" level=warning msg=\"it said \\\"no\\\"\\nand left\" component=agent path=\"/a/b c\" empty=\"\"\n"
        );
    }

    #[test]
    fn dates_hold_at_the_edges() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_454, (2026, 1, 1)),
            (20_453, (2025, 12, 31)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(civil(days), date, "{days}");
        }
    }

    #[test]
    fn the_longest_line_is_atomic_on_a_pipe() {
        for message in [
            "x".repeat(1 << 20),
            "\u{1}".repeat(1 << 20),
            "é\"".repeat(1 << 20),
        ] {
            let fields = vec![("component", message.clone()), ("more", message.clone())];
            let line = render(SystemTime::now(), Level::INFO, &message, &fields);
            assert!(line.len() <= LINE_LIMIT, "{}", line.len());
            assert!(line.ends_with('\n') && line.matches('\n').count() == 1);
        }
    }

    #[test]
    fn a_full_fifo_drops_counts_and_says_so_later() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path)
                .unwrap()
        };
        let mut reader = open();
        let mut sink = Sink {
            file: Some(open()),
            dropped: 0,
        };
        let line = format!("{}\n", "x".repeat(1023));
        for _ in 0..80 {
            sink.line(&line);
        }
        assert_eq!(sink.dropped, 16, "a pipe holds 64 KiB");
        let mut drained = vec![0; 64 << 10];
        std::io::Read::read_exact(&mut reader, &mut drained).unwrap();
        sink.line(&line);
        assert_eq!(sink.dropped, 0);
        let read = std::io::Read::read(&mut reader, &mut drained).unwrap();
        let text = String::from_utf8_lossy(&drained[..read]).into_owned();
        assert!(
            text.contains("the log was full") && text.contains("dropped=16"),
            "{text}"
        );
        assert!(text.ends_with(&line));
    }

    #[test]
    fn components_come_from_targets() {
        assert_eq!(component("nacre::sandbox::agent"), "sandbox");
        assert_eq!(component("nacre_vmm::boot"), "vmm");
        assert_eq!(component("ttrpc"), "ttrpc");
    }
}
