//! QEMU's monitor protocol (QMP): one command at a time, and events, each with
//! the time at which it came in, kept until somebody asks for them.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::time::Instant;

/// Events that nobody has asked for; the oldest go first.
const EVENTS: usize = 256;

/// A connection in command mode.
pub(super) struct Qmp<S> {
    stream: BufReader<S>,
    events: VecDeque<Event>,
    patience: Duration,
}

/// Something that happened.
#[derive(Debug)]
pub(super) struct Event {
    /// Its name.
    pub name: String,
    /// Its `data`; null without.
    pub data: Value,
    /// When it was read.
    pub at: Instant,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Qmp<S> {
    /// Reads the greeting and leaves negotiation; QEMU's version as it says it. Every answer and event may take `patience`.
    pub async fn begin(stream: S, patience: Duration) -> Result<(Self, String)> {
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: VecDeque::new(),
            patience,
        };
        let greeting = qmp.message().await.context("waiting for QMP's greeting")?;
        let version = &greeting["QMP"]["version"]["qemu"];
        ensure!(version.is_object(), "this is no QMP greeting: {greeting}");
        let version = format!(
            "{}.{}.{}",
            version["major"], version["minor"], version["micro"]
        );
        qmp.execute("qmp_capabilities", Value::Null).await?;
        Ok((qmp, version))
    }

    /// Has a command done; what it returns.
    ///
    /// # Errors
    /// QEMU refuses it, with QEMU's words.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut message = json!({ "execute": command });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let doing = || format!("QMP command {message}");
        let line = format!("{message}\n");
        self.stream
            .write_all(line.as_bytes())
            .await
            .with_context(doing)?;
        self.stream.flush().await.with_context(doing)?;
        loop {
            let mut answer = self.message().await.with_context(doing)?;
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = answer.get("error") {
                let words = error["desc"].as_str().unwrap_or("it does not say why");
                bail!("{}: QEMU refuses: {words}", doing());
            }
            self.keep(answer);
        }
    }

    /// The first event that is `wanted`, from those that wait on; the others before it are forgotten.
    pub async fn event(&mut self, mut wanted: impl FnMut(&Event) -> bool) -> Result<Event> {
        let deadline = Instant::now() + self.patience;
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(event);
                }
            }
            ensure!(
                Instant::now() < deadline,
                "the event did not come within {:?}",
                self.patience
            );
            let message = self.message().await?;
            self.keep(message);
        }
    }

    fn keep(&mut self, mut message: Value) {
        let Some(name) = message["event"].as_str().map(str::to_owned) else {
            return;
        };
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Event {
            name,
            data: message["data"].take(),
            at: Instant::now(),
        });
    }

    async fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = tokio::time::timeout(self.patience, self.stream.read_line(&mut line)).await;
        let count =
            read.with_context(|| format!("QEMU said nothing for {:?}", self.patience))??;
        ensure!(count > 0, "QEMU closed the connection");
        serde_json::from_str(&line).with_context(|| format!("QEMU said {line:?}"))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    use tokio::io::DuplexStream;
    use tokio::task::JoinHandle;

    const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"major":10,"minor":0,"micro":2},"package":""},"capabilities":["oob"]}}"#;

    /// Plays QEMU: greets, and answers each command with the next lines of the script; returns the commands that came.
    pub fn fake(script: Vec<Vec<&'static str>>) -> (DuplexStream, JoinHandle<Vec<Value>>) {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let played = tokio::spawn(async move {
            let mut stream = BufReader::new(theirs);
            let mut came = Vec::new();
            let say = |line: &str| format!("{line}\r\n").into_bytes();
            stream.write_all(&say(GREETING)).await.unwrap();
            let hello = vec![r#"{"return": {}}"#];
            for lines in std::iter::once(hello).chain(script) {
                let mut command = String::new();
                if stream.read_line(&mut command).await.unwrap() == 0 {
                    break;
                }
                came.push(serde_json::from_str(&command).unwrap());
                for line in lines {
                    stream.write_all(&say(line)).await.unwrap();
                }
            }
            came
        });
        (ours, played)
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn events_before_an_answer_are_kept_in_order() {
        let (stream, played) = fake(vec![vec![
            r#"{"event":"A","timestamp":{"seconds":1,"microseconds":2}}"#,
            r#"{"event":"B","data":{"id":"cpu1"}}"#,
            r#"{"return":[7]}"#,
        ]]);
        let (mut qmp, version) = Qmp::begin(stream, SECOND).await.unwrap();
        assert_eq!(version, "10.0.2");
        let answer = qmp.execute("query-x", json!({"a": 1})).await.unwrap();
        assert_eq!(answer, json!([7]));
        let event = qmp.event(|event| event.name == "B").await.unwrap();
        assert_eq!(event.data["id"], "cpu1");
        let came = played.await.unwrap();
        assert_eq!(came[0], json!({"execute": "qmp_capabilities"}));
        assert_eq!(
            came[1],
            json!({"execute": "query-x", "arguments": {"a": 1}})
        );
        // A was before it, and is forgotten.
        let late = qmp.event(|event| event.name == "A").await.unwrap_err();
        assert!(late.to_string().contains("closed"), "{late}");
    }

    #[tokio::test]
    async fn a_refusal_has_qemus_words_and_the_command() {
        let (stream, _played) = fake(vec![vec![
            r#"{"error":{"class":"GenericError","desc":"no slot is free"}}"#,
        ]]);
        let (mut qmp, _) = Qmp::begin(stream, SECOND).await.unwrap();
        let error = qmp.execute("device_add", Value::Null).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("device_add") && text.contains("no slot is free"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_qemu_is_given_up() {
        let (stream, theirs) = tokio::io::duplex(64);
        let error = Qmp::begin(stream, SECOND).await.map(|_| ()).unwrap_err();
        assert!(format!("{error:#}").contains("said nothing for 1s"));
        drop(theirs);
    }

    #[tokio::test]
    async fn what_is_no_qmp_is_told() {
        let (stream, mut theirs) = tokio::io::duplex(64);
        theirs.write_all(b"{\"SSH\":2}\n").await.unwrap();
        let error = Qmp::begin(stream, SECOND).await.map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("no QMP greeting"), "{error}");
    }

    #[tokio::test]
    async fn events_that_nobody_asks_for_do_not_pile_up() {
        let (stream, _played) = fake(Vec::new());
        let (mut qmp, _) = Qmp::begin(stream, SECOND).await.unwrap();
        for _ in 0..3 * EVENTS {
            qmp.keep(json!({"event": "RTC_CHANGE"}));
        }
        assert_eq!(qmp.events.len(), EVENTS);
    }
}
