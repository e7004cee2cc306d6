//! A process's stdin, stdout and stderr: containerd's FIFOs on one side, streams
//! of the guest on the other. What bytes mean is nobody's business here; when
//! they are all delivered is.

mod first;
mod input;
mod logger;
mod opener;
mod output;
mod ring;
mod target;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use crate::sandbox::{GuestStream, Sandbox, Stdio, StdioListener};

use first::First;

pub use input::Input;
pub use logger::Logger;
pub use output::Output;
pub use target::{Error, Target};

/// How long an exit waits for the end of a logging program that has been given everything.
const LOGGER_ENDS: Duration = Duration::from_secs(1);

/// When a reader, or a stream of the guest, is given up.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A reader that takes nothing for so long after the process ended gets no more.
    pub stuck_reader: Duration,
    /// A stream that neither ends nor brings a byte for so long after the process ended is taken for ended.
    pub quiet_guest: Duration,
    /// Bytes that wait for a reader while there is none.
    pub replay: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            stuck_reader: Duration::from_secs(30),
            quiet_guest: Duration::from_secs(5),
            replay: 256 << 10,
        }
    }
}

/// Where containerd wants a process's stdio, as Create and Exec carry it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// FIFO to read from; empty: none.
    pub stdin: String,
    /// FIFO or URI to write to; empty: none.
    pub stdout: String,
    /// FIFO or URI to write to; empty: none. Unused with a terminal.
    pub stderr: String,
    /// The process has a terminal; stdout carries it.
    pub terminal: bool,
}

/// The running stdio of one process. Dropping it ends the streams and closes the FIFOs.
pub struct ProcessIo {
    stdin: Option<Input>,
    outputs: Vec<Output>,
    logger: Option<Logger>,
    moved: Arc<AtomicU64>,
    first_output: First,
    exited: watch::Sender<bool>,
}

/// A process's stdio whose FIFOs are open, before the guest has dialled.
pub struct Prepared {
    stdin: Option<(input::Source, StdioListener)>,
    outputs: Vec<(&'static str, Target, StdioListener)>,
    logger: Option<(Logger, logger::Pipes)>,
    terminal: bool,
}

impl Prepared {
    /// Opens the FIFOs and makes a port of the sandbox for each stream.
    ///
    /// # Errors
    /// A path that is not a FIFO, or a URI of a kind that is not served, by name; or the sandbox has no port.
    pub fn new(sandbox: &Sandbox, paths: &Paths) -> Result<Self, Error> {
        let listen = || {
            sandbox.stdio_listener().map_err(|error| Error::Sandbox {
                cause: error.to_string(),
            })
        };
        let stdin = match paths.stdin.as_str() {
            "" => None,
            path => Some((input::Source::open(Path::new(path))?, listen()?)),
        };
        let mut outputs = Vec::new();
        for (name, uri) in [("stdout", &paths.stdout), ("stderr", &paths.stderr)] {
            if uri.is_empty() || (paths.terminal && name == "stderr") {
                continue;
            }
            outputs.push((name, Target::parse(uri)?, listen()?));
        }
        Ok(Self {
            stdin,
            outputs,
            logger: None,
            terminal: paths.terminal,
        })
    }

    /// Starts the logging program if the paths name one, and waits until it is ready. It gets both stdout and stderr.
    ///
    /// # Errors
    /// It cannot be started, ends at once, or is not ready in time.
    pub async fn start_logger(mut self, namespace: &str, id: &str) -> Result<Self, Error> {
        let named = self.outputs.iter().find_map(|(_, target, _)| match target {
            Target::Binary { program, arguments } => Some((program.clone(), arguments.clone())),
            Target::Fifo(_) | Target::File(_) => None,
        });
        if let Some((program, arguments)) = named {
            self.logger = Some(Logger::start(&program, &arguments, namespace, id).await?);
        }
        Ok(self)
    }

    /// The ports, as the guest is told them, and the columns and rows of its terminal if they are known.
    pub fn ports(&self, size: Option<(u32, u32)>) -> Stdio {
        let port = |wanted: &str| {
            self.outputs
                .iter()
                .find(|(name, ..)| *name == wanted)
                .map_or(0, |(_, _, listener)| listener.port())
        };
        let mut stdio = Stdio::new();
        stdio.stdin_port = self
            .stdin
            .as_ref()
            .map_or(0, |(_, listener)| listener.port());
        stdio.stdout_port = port("stdout");
        stdio.stderr_port = port("stderr");
        stdio.terminal = self.terminal;
        if self.terminal {
            (stdio.columns, stdio.rows) = size.unwrap_or_default();
        }
        stdio
    }

    /// Waits for the guest's connections in the background and moves bytes from then on.
    pub fn run(self, limits: Limits) -> ProcessIo {
        let moved = Arc::new(AtomicU64::new(0));
        let first_output = First::default();
        let (exited, exit) = watch::channel(false);
        let stdin = self
            .stdin
            .map(|(source, listener)| Input::start(source, accept("stdin", listener)));
        let (logger, mut pipes) = match self.logger {
            Some((logger, pipes)) => (Some(logger), pipes),
            None => (None, logger::Pipes::default()),
        };
        let outputs = self
            .outputs
            .into_iter()
            .map(|(name, target, listener)| {
                let stream = first_output.note(accept(name, listener));
                let pipe = match &target {
                    Target::Binary { .. } => pipes.take(name),
                    Target::Fifo(_) | Target::File(_) => None,
                };
                let (exit, moved) = (exit.clone(), moved.clone());
                match pipe {
                    Some(pipe) => Output::start_piped(name, pipe, stream, exit, moved, limits),
                    None => Output::start(name, target, stream, exit, moved, limits),
                }
            })
            .collect();
        ProcessIo {
            stdin,
            outputs,
            logger,
            moved,
            first_output,
            exited,
        }
    }
}

async fn accept(name: &'static str, listener: StdioListener) -> Option<GuestStream> {
    match listener.accept().await {
        Ok(stream) => Some(stream),
        Err(error) => {
            tracing::warn!(stream = name, %error, "the guest did not dial a stdio stream");
            None
        }
    }
}

impl ProcessIo {
    /// Bytes moved so far, in both directions.
    pub fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// When the guest brought the first byte of output, CLOCK_MONOTONIC in nanoseconds, if it has.
    pub fn first_output_ns(&self) -> Option<u64> {
        self.first_output.ns()
    }

    /// CloseIO: stdin ends after what has been written to its FIFO so far.
    pub fn close_stdin(&mut self) {
        if let Some(stdin) = &mut self.stdin {
            stdin.close();
        }
    }

    /// The process has ended: from now on a stuck reader is given up after its time. Completes when its output is
    /// delivered, given up, or waits for a reader that is not there.
    pub fn drain(&mut self) -> impl Future<Output = ()> + Send + 'static {
        // Nobody reads it any more.
        self.stdin = None;
        self.exited.send_replace(true);
        let drained: Vec<_> = self.outputs.iter().map(Output::drained).collect();
        let logged = self.logger.as_ref().map(Logger::ended);
        async move {
            for one in drained {
                one.await;
            }
            if let Some(logged) = logged {
                // It has all of it; what it makes of that should be on the disk when the exit is known.
                let _ = tokio::time::timeout(LOGGER_ENDS, logged).await;
            }
        }
    }
}
