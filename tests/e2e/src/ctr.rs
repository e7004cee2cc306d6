//! Drives `ctr`, and writes into the case's log what was run and what came of it.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::context::{Context, Daemon, IMAGE, NAMESPACE};
use crate::poll;

/// What a program said and how it ended.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    /// Exit code, or 128 + the signal.
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub took: Duration,
}

impl Output {
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Fails unless the exit code is this one.
    pub fn expect_code(&self, code: i32) -> Result<&Self> {
        ensure!(
            self.code == code,
            "exit code {} instead of {code}; it said {:?} and {:?}",
            self.code,
            cut(&self.out()),
            cut(&self.err())
        );
        Ok(self)
    }

    /// Fails unless this is all of standard output.
    pub fn expect_out(&self, text: &str) -> Result<&Self> {
        let (out, err) = (self.out(), self.err());
        ensure!(
            out == text,
            "it said {:?} instead of {text:?} (and {:?})",
            cut(&out),
            cut(&err)
        );
        Ok(self)
    }
}

fn cut(text: &str) -> &str {
    text.char_indices()
        .nth(600)
        .map_or(text, |(at, _)| &text[..at])
}

/// Runs a program to its end with this on its standard input.
pub(crate) fn run_with_input(command: &mut Command, input: &[u8]) -> Result<Output> {
    eprintln!("+ {}", show(command));
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", show(command)))?;
    let stdin = child.stdin.take().context("no stdin")?;
    let input = input.to_vec();
    // Ends by itself at the latest when the program's end of the pipe closes.
    let writer = std::thread::spawn(move || {
        let mut stdin = stdin;
        stdin.write_all(&input)
    });
    let output = collect(child, started)?;
    // A program that ends without reading all closes the pipe: no fault of the writer.
    let _ = writer.join();
    Ok(output)
}

/// Runs a program to its end.
pub(crate) fn run(command: &mut Command) -> Result<Output> {
    eprintln!("+ {}", show(command));
    let started = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", show(command)))?;
    collect(child, started)
}

/// Runs a program to its end, and reads its output only after `pause`, then slowly.
pub(crate) fn run_with_slow_reader(command: &mut Command, pause: Duration) -> Result<Output> {
    eprintln!("+ {} | a slow reader", show(command));
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", show(command)))?;
    let mut stdout = child.stdout.take().context("no stdout")?;
    let reader = std::thread::spawn(move || -> std::io::Result<Vec<u8>> {
        std::thread::sleep(pause);
        let mut all = Vec::new();
        while (&mut stdout).take(256 << 10).read_to_end(&mut all)? > 0 {
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(all)
    });
    let mut output = collect(child, started)?;
    match reader.join() {
        Ok(all) => output.stdout = all?,
        Err(_) => bail!("the reading thread panicked"),
    }
    Ok(output)
}

fn collect(child: Child, started: Instant) -> Result<Output> {
    use std::os::unix::process::ExitStatusExt;
    let output = child.wait_with_output()?;
    let code = output
        .status
        .code()
        .unwrap_or_else(|| 128 + output.status.signal().unwrap_or_default());
    let took = started.elapsed();
    eprintln!(
        "  exit code {code} after {:.2} s, {} bytes of stdout: {:?}",
        took.as_secs_f64(),
        output.stdout.len(),
        cut(&String::from_utf8_lossy(&output.stdout))
    );
    if !output.stderr.is_empty() {
        eprintln!(
            "  stderr: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(Output {
        code,
        stdout: output.stdout,
        stderr: output.stderr,
        took,
    })
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// `ctr` at the case's containerd.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ctr<'a> {
    context: &'a Context,
    pub daemon: &'a Daemon,
}

impl<'a> Ctr<'a> {
    pub fn new(context: &'a Context) -> Result<Self> {
        Ok(Ctr {
            context,
            daemon: context.daemon()?,
        })
    }

    /// `ctr` with these arguments, not yet started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.daemon.ctr);
        command.arg("--address").arg(&self.daemon.address);
        command.args(["--namespace", NAMESPACE]).args(arguments);
        command
    }

    /// `ctr` with these arguments, to its end.
    pub fn call(&self, arguments: &[&str]) -> Result<Output> {
        run(&mut self.command(arguments))
    }

    /// `ctr run --rm`, not yet started.
    pub fn run_command(&self, id: &str, flags: &[&str], command: &[&str]) -> Command {
        self.run_with_runtime(self.context.runtime.name(), id, flags, command)
    }

    /// The same with a runtime by name.
    pub fn run_with_runtime(
        &self,
        runtime: &str,
        id: &str,
        flags: &[&str],
        command: &[&str],
    ) -> Command {
        let mut arguments = vec!["run", "--rm", "--runtime", runtime];
        arguments.extend(flags);
        arguments.extend([IMAGE, id]);
        arguments.extend(command);
        self.command(&arguments)
    }

    /// A container from beginning to end.
    pub fn run(&self, id: &str, flags: &[&str], command: &[&str]) -> Result<Output> {
        run(&mut self.run_command(id, flags, command))
    }

    /// `ctr tasks exec`, not yet started.
    pub fn exec_command(
        &self,
        id: &str,
        exec_id: &str,
        flags: &[&str],
        command: &[&str],
    ) -> Command {
        let mut arguments = vec!["tasks", "exec", "--exec-id", exec_id];
        arguments.extend(flags);
        arguments.push(id);
        arguments.extend(command);
        self.command(&arguments)
    }

    /// A process in a container that runs, from beginning to end.
    pub fn exec(
        &self,
        id: &str,
        exec_id: &str,
        flags: &[&str],
        command: &[&str],
    ) -> Result<Output> {
        run(&mut self.exec_command(id, exec_id, flags, command))
    }

    /// A container whose program is a shell script.
    pub fn script(&self, id: &str, flags: &[&str], script: &str) -> Result<Output> {
        self.run(id, flags, &["sh", "-c", script])
    }

    /// A container that goes on; [`remove`](Self::remove) ends it.
    pub fn detached(&self, id: &str, flags: &[&str], command: &[&str]) -> Result<()> {
        let mut arguments = vec![
            "run",
            "--detach",
            "--null-io",
            "--runtime",
            self.context.runtime.name(),
        ];
        arguments.extend(flags);
        arguments.extend([IMAGE, id]);
        arguments.extend(command);
        self.call(&arguments)?.expect_code(0)?;
        Ok(())
    }

    /// The task's pid and status, as `ctr tasks list` shows them.
    pub fn task(&self, id: &str) -> Result<Option<(i32, String)>> {
        let output = self
            .command(&["tasks", "list"])
            .stdin(Stdio::null())
            .output()?;
        ensure!(
            output.status.success(),
            "ctr tasks list: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [task, pid, status, ..] = words[..]
                && task == id
            {
                return Ok(Some((pid.parse()?, status.to_owned())));
            }
        }
        Ok(None)
    }

    /// Waits until the task has this status.
    pub fn wait_for_status(&self, id: &str, status: &str, limit: Duration) -> Result<()> {
        let what = format!("the task {id} becoming {status}");
        poll::until(&what, limit, || {
            Ok(self.task(id)?.filter(|(_, now)| now == status))
        })
        .map(drop)
    }

    /// Deletes a task that has ended: the task's exit code, and how long it took. `ctr` says a code that is not zero only in words.
    pub fn delete_task(&self, id: &str) -> Result<(i32, Duration)> {
        const WORDS: &str = "exit with non-zero exit code ";
        let output = self.call(&["tasks", "delete", id])?;
        let err = output.err();
        let code = match err.split_once(WORDS) {
            Some((_, rest)) => rest
                .chars()
                .take_while(char::is_ascii_digit)
                .collect::<String>()
                .parse()?,
            None => {
                output.expect_code(0)?;
                0
            }
        };
        Ok((code, output.took))
    }

    /// Deletes a task that has ended, and its container.
    pub fn remove(&self, id: &str) -> Result<()> {
        if self.task(id)?.is_some() {
            self.call(&["tasks", "delete", id])?;
        }
        self.call(&["containers", "delete", id])?.expect_code(0)?;
        Ok(())
    }
}

/// `ctr events` in the background, its lines in a file.
pub(crate) struct Events {
    child: Child,
    file: std::path::PathBuf,
}

/// One event: its topic and its content.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub topic: String,
    pub content: serde_json::Value,
}

impl Events {
    /// Returns once events arrive, so that none of what follows is missed.
    pub fn listen(context: &Context, ctr: &Ctr<'_>) -> Result<Self> {
        let file = context.path("events");
        let child = ctr
            .command(&["events"])
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&file)?)
            .stderr(Stdio::inherit())
            .spawn()
            .context("starting ctr events")?;
        let events = Events { child, file };
        let mut turn = 0;
        poll::until(
            "an event of a namespace's label",
            context.seconds(20),
            || {
                turn += 1;
                let label = format!("turn=number-{turn}");
                ctr.call(&["namespaces", "label", NAMESPACE, &label])?
                    .expect_code(0)?;
                std::thread::sleep(Duration::from_millis(100));
                Ok((std::fs::metadata(&events.file)?.len() > 0).then_some(()))
            },
        )?;
        ctr.call(&["namespaces", "label", NAMESPACE, "turn="])?;
        Ok(events)
    }

    /// The events of a container's task so far, in order.
    pub fn of_task(&self, id: &str) -> Result<Vec<Event>> {
        let mut text = String::new();
        std::fs::File::open(&self.file)?.read_to_string(&mut text)?;
        let mut found = Vec::new();
        for line in text.lines() {
            let Some(at) = line.find(" /tasks/") else {
                continue;
            };
            let Some((topic, content)) = line[at + 1..].split_once(' ') else {
                continue;
            };
            let Ok(content) = serde_json::from_str::<serde_json::Value>(content) else {
                continue;
            };
            if content["container_id"] == id {
                found.push(Event {
                    topic: topic.to_owned(),
                    content,
                });
            }
        }
        Ok(found)
    }

    /// Waits for an event of a container's task.
    pub fn wait_for(&self, id: &str, topic: &str, limit: Duration) -> Result<Event> {
        let found = poll::until(&format!("the event {topic} of {id}"), limit, || {
            Ok(self
                .of_task(id)?
                .into_iter()
                .find(|event| event.topic == topic))
        });
        if found.is_err() {
            let all = std::fs::read_to_string(&self.file)?;
            eprintln!("  the events so far:\n{all}");
        }
        found
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Fails unless the text contains every word, and shows the text.
pub(crate) fn expect_words(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        if !text.contains(word) {
            bail!("it does not say {word:?}: {}", cut(text.trim()));
        }
    }
    Ok(())
}
