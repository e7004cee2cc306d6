//! The streams of a process: connections to the host on one side, pipes or a
//! terminal on the other, and the pumps between them. A pump lives until its
//! source has ended, whoever else is gone: what a process printed before it
//! died arrives whole. A full side stops the pump, and thereby the other side.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nacre_protocol::agent::Stdio;
use nix::unistd::{Gid, Uid};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::unix::pipe;
use tracing::{debug, warn};

use crate::error::{Doing, Error};
use crate::vsock::{self, Stream};

/// Bytes that one pump holds, and a pipe too.
const BUFFER: usize = 64 * 1024;

/// The connections of a process, dialled before the process is made.
pub struct Connections {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

/// What a process gets as its descriptors 0, 1 and 2.
pub struct ProcessEnds {
    /// Its standard input.
    pub stdin: OwnedFd,
    /// Its standard output.
    pub stdout: OwnedFd,
    /// Its standard error.
    pub stderr: OwnedFd,
}

/// Pumps that have not begun; [`Pumps::start`] sets them going.
#[derive(Default)]
pub struct Pumps {
    inputs: Vec<(Stream, pipe::Sender)>,
    outputs: Vec<(pipe::Receiver, Stream)>,
}

/// What is left to do when the process is made.
pub enum Rest {
    /// The pumps only have to be started.
    Pumps(Pumps),
    /// They need the process's terminal.
    Connections(Connections),
}

impl Rest {
    /// The pumps of the process that was made.
    ///
    /// # Errors
    /// As [`Connections::terminal`].
    pub fn pumps(self, terminal: Option<&Terminal>) -> Result<Pumps, Error> {
        match (self, terminal) {
            (Rest::Pumps(pumps), _) => Ok(pumps),
            (Rest::Connections(connections), Some(terminal)) => connections.terminal(terminal),
            (Rest::Connections(_), None) => Ok(Pumps::default()),
        }
    }
}

impl Connections {
    /// What a process is made with: pipes, or nothing if it makes its own terminal.
    ///
    /// # Errors
    /// As [`Connections::pipes`].
    pub fn ends(self, terminal: bool, owner: (u32, u32)) -> Result<(ProcessEnds, Rest), Error> {
        if terminal {
            return Ok((ProcessEnds::nothing()?, Rest::Connections(self)));
        }
        let (ends, pumps) = self.pipes(owner)?;
        Ok((ends, Rest::Pumps(pumps)))
    }

    /// Dials the ports of the streams that are wanted.
    ///
    /// # Errors
    /// The first stream that the host does not take.
    pub async fn dial(stdio: &Stdio) -> Result<Connections, Error> {
        Ok(Connections {
            stdin: dial("stdin", stdio.stdin_port).await?,
            stdout: dial("stdout", stdio.stdout_port).await?,
            stderr: match stdio.terminal {
                true => None,
                false => dial("stderr", stdio.stderr_port).await?,
            },
        })
    }

    /// Pipes for a process without a terminal, owned by `owner` so that it can open /dev/stdout again.
    ///
    /// # Errors
    /// When the kernel has no pipe for us.
    fn pipes(self, owner: (u32, u32)) -> Result<(ProcessEnds, Pumps), Error> {
        let mut pumps = Pumps::default();
        let stdin = match self.stdin {
            Some(stream) => {
                let (near, far) = pipe::pipe().doing(|| "making a pipe for stdin".into())?;
                pumps.inputs.push((stream, near));
                far.into_blocking_fd()
                    .doing(|| "preparing the pipe for stdin".into())?
            }
            None => null()?,
        };
        let mut output = |name: &str, stream: Option<Stream>| {
            let Some(stream) = stream else {
                return null();
            };
            let (far, near) = pipe::pipe().doing(|| format!("making a pipe for {name}"))?;
            pumps.outputs.push((near, stream));
            far.into_blocking_fd()
                .doing(|| format!("preparing the pipe for {name}"))
        };
        let stdout = output("stdout", self.stdout)?;
        let stderr = output("stderr", self.stderr)?;
        let ends = ProcessEnds {
            stdin,
            stdout,
            stderr,
        };
        for end in [&ends.stdin, &ends.stdout, &ends.stderr] {
            own(end, owner);
        }
        Ok((ends, pumps))
    }

    /// /dev/null for a process that makes its own terminal, and the pumps of that terminal.
    ///
    /// # Errors
    /// When the terminal's descriptor cannot be duplicated.
    fn terminal(self, terminal: &Terminal) -> Result<Pumps, Error> {
        let mut pumps = Pumps::default();
        if let Some(stream) = self.stdin {
            let end = pipe::Sender::from_owned_fd_unchecked(terminal.duplicate()?)
                .doing(|| "registering the terminal for input".into())?;
            pumps.inputs.push((stream, end));
        }
        if let Some(stream) = self.stdout {
            let end = pipe::Receiver::from_owned_fd_unchecked(terminal.duplicate()?)
                .doing(|| "registering the terminal for output".into())?;
            pumps.outputs.push((end, stream));
        }
        Ok(pumps)
    }
}

impl ProcessEnds {
    /// Nothing but /dev/null.
    ///
    /// # Errors
    /// When there is no /dev/null.
    fn nothing() -> Result<ProcessEnds, Error> {
        Ok(ProcessEnds {
            stdin: null()?,
            stdout: null()?,
            stderr: null()?,
        })
    }
}

impl Pumps {
    /// Sets all pumps going, each in a task that ends with its source.
    pub fn start(self, of: &str) {
        for (stream, end) in self.inputs {
            tokio::spawn(pump_in(of.to_owned(), stream, end));
        }
        for (end, stream) in self.outputs {
            tokio::spawn(pump_out(of.to_owned(), end, stream));
        }
    }
}

/// The agent's side of a process's terminal.
pub struct Terminal(OwnedFd);

impl Terminal {
    /// Takes the master of a pseudo-terminal, sets its size, and gives its slave to `owner`.
    ///
    /// # Errors
    /// When the descriptor is not a terminal's.
    pub fn new(master: OwnedFd, columns: u32, rows: u32, owner: u32) -> Result<Terminal, Error> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        fcntl(
            &master,
            FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK),
        )
        .doing(|| "preparing the terminal".into())?;
        let terminal = Terminal(master);
        if columns > 0 && rows > 0 {
            terminal.resize(columns, rows)?;
        }
        terminal.give_to(owner);
        Ok(terminal)
    }

    /// Sets the size, in characters.
    ///
    /// # Errors
    /// `InvalidArgument` beyond 65535; what the kernel said otherwise.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<(), Error> {
        let (Ok(ws_col), Ok(ws_row)) = (u16::try_from(columns), u16::try_from(rows)) else {
            return Err(Error::InvalidArgument(format!(
                "a terminal of {columns} columns and {rows} rows: each is 65535 at most"
            )));
        };
        let size = libc::winsize {
            ws_row,
            ws_col,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one winsize, which lives until the call returns.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCSWINSZ, &size) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error())
                .doing(|| format!("resizing the terminal to {columns}×{rows}")),
        }
    }

    fn give_to(&self, owner: u32) {
        // SAFETY: TIOCGPTPEER takes open flags as its argument and answers with a new descriptor.
        let peer = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::TIOCGPTPEER,
                libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
            )
        };
        if peer < 0 {
            return debug!(
                "opening the terminal's slave: {}",
                io::Error::last_os_error()
            );
        }
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
        let peer = unsafe { OwnedFd::from_raw_fd(peer) };
        if let Err(error) = nix::unistd::fchown(&peer, Some(Uid::from_raw(owner)), None) {
            debug!("giving the terminal to user {owner}: {error}");
        }
    }

    fn duplicate(&self) -> Result<OwnedFd, Error> {
        self.0
            .try_clone()
            .doing(|| "duplicating the terminal's descriptor".into())
    }
}

async fn dial(name: &str, port: u32) -> Result<Option<Stream>, Error> {
    match port {
        0 => Ok(None),
        port => vsock::dial(port)
            .await
            .map(Some)
            .map_err(|error| Error::Internal(format!("connecting {name}: {error}"))),
    }
}

fn null() -> Result<OwnedFd, Error> {
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .doing(|| "opening /dev/null".into())?;
    Ok(file.into())
}

fn own(end: &OwnedFd, (user, group): (u32, u32)) {
    let is_pipe =
        nix::sys::stat::fstat(end).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFIFO);
    if is_pipe
        && let Err(error) =
            nix::unistd::fchown(end, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))
    {
        debug!("giving a pipe to user {user}: {error}");
    }
}

/// From the host to the process. The host's end-of-file closes the pipe. When nobody can read from the
/// pipe any more, the connection is closed, so that the host does not write into nothing.
async fn pump_in(of: String, mut stream: Stream, mut end: pipe::Sender) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let received = tokio::select! {
            received = stream.read(&mut buffer) => received,
            _ = end.ready(Interest::ERROR) => return debug!("stdin of {of}: nobody reads"),
        };
        match received {
            Ok(0) => return,
            Ok(count) => {
                if let Err(error) = end.write_all(&buffer[..count]).await {
                    return debug!("stdin of {of}: {error}");
                }
            }
            Err(error) => return debug!("stdin of {of}, from the host: {error}"),
        }
    }
}

/// From the process to the host. A host that takes no more does not stop the process: the rest is read
/// and dropped, since a broken pipe would kill it.
async fn pump_out(of: String, mut end: pipe::Receiver, mut stream: Stream) {
    let mut buffer = vec![0; BUFFER];
    let mut host_listens = true;
    loop {
        let count = match end.read(&mut buffer).await {
            Ok(0) => break,
            Ok(count) => count,
            // A terminal's master says so when the last process has closed the slave.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
            Err(error) => {
                warn!("output of {of}: {error}");
                break;
            }
        };
        if host_listens && let Err(error) = stream.write_all(&buffer[..count]).await {
            debug!("output of {of}, to the host: {error}; the rest is dropped");
            host_listens = false;
        }
    }
    drop(buffer);
    drop(end);
    if host_listens && AsyncWriteExt::shutdown(&mut stream).await.is_ok() {
        // The host reads at its own pace, and closes when it is done.
        let _ = stream.read(&mut [0]).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_beyond_16_bits_is_refused() {
        let terminal = Terminal(null().unwrap());
        let refused = terminal.resize(65536, 25).unwrap_err();
        assert!(matches!(refused, Error::InvalidArgument(_)), "{refused}");
    }

    #[test]
    fn resizing_what_is_no_terminal_says_so() {
        let refused = Terminal(null().unwrap()).resize(80, 25).unwrap_err();
        assert!(refused.to_string().contains("80×25"), "{refused}");
    }
}
