//! stdin: from a FIFO to the guest. Clients come and go; only CloseIO ends it,
//! after all that was written to the FIFO before.

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::target::Error;

/// Bytes moved at once.
const CHUNK: usize = 64 << 10;

/// An open stdin FIFO.
pub struct Source(File);

impl Source {
    /// Opens the FIFO for reading, and for writing too: so it has no end when a client closes it.
    ///
    /// # Errors
    /// It is not there, or not a FIFO.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(failed)?;
        if !file.metadata().map_err(failed)?.file_type().is_fifo() {
            return Err(Error::NotFifo(path.to_owned()));
        }
        Ok(Self(file))
    }
}

/// A running stdin; dropping it closes both sides.
pub struct Input {
    close: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Drop for Input {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Input {
    /// Moves bytes to the stream that `stream` comes to.
    pub fn start<W: AsyncWrite + Unpin + Send + 'static>(
        source: Source,
        stream: impl Future<Output = Option<W>> + Send + 'static,
    ) -> Self {
        let (close, closed) = oneshot::channel();
        let task = tokio::spawn(async move {
            let Some(stream) = stream.await else { return };
            if let Err(error) = run(source, stream, closed).await {
                // The usual end of a process that does not read to the end.
                tracing::debug!(%error, "stdin ended early");
            }
        });
        Self {
            close: Some(close),
            task,
        }
    }

    /// Ends stdin after what has been written to the FIFO so far. A second call does nothing.
    pub fn close(&mut self) {
        if let Some(close) = self.close.take() {
            // The task is gone if the guest closed its side.
            let _ = close.send(());
        }
    }
}

async fn run(
    source: Source,
    mut stream: impl AsyncWrite + Unpin,
    mut closed: oneshot::Receiver<()>,
) -> io::Result<()> {
    let fifo = pipe::Receiver::from_file(source.0)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        tokio::select! {
            ready = fifo.readable() => {
                ready?;
                match fifo.try_read(&mut chunk) {
                    Ok(count) => stream.write_all(&chunk[..count]).await?,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            // Without its sender there will be no CloseIO, and this task is about to end.
            Ok(()) = &mut closed => break,
        }
    }
    loop {
        // Asked of the kernel, not of the readiness that is known: what was written just before
        // CloseIO may not have been noticed yet.
        match nix::unistd::read(&fifo, &mut chunk) {
            Ok(0) | Err(Errno::EAGAIN) => return stream.shutdown().await,
            Ok(count) => stream.write_all(&chunk[..count]).await?,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::PathBuf;
    use std::time::Duration;

    use tokio::io::AsyncReadExt;

    use super::*;

    fn fifo() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stdin");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        (directory, path)
    }

    fn client(path: &Path) -> File {
        OpenOptions::new().write(true).open(path).unwrap()
    }

    #[tokio::test]
    async fn close_io_comes_after_all_that_was_written_before_it() {
        for round in 0..50 {
            let (_directory, path) = fifo();
            let (stream, mut guest) = tokio::io::duplex(1 << 20);
            let mut input = Input::start(
                Source::open(&path).unwrap(),
                std::future::ready(Some(stream)),
            );
            if round % 2 == 0 {
                tokio::task::yield_now().await;
            }
            let data = vec![round; 60 << 10];
            client(&path).write_all(&data).unwrap();
            input.close();
            let mut seen = Vec::new();
            guest.read_to_end(&mut seen).await.unwrap();
            assert!(seen == data, "round {round}: {} bytes", seen.len());
        }
    }

    #[tokio::test]
    async fn a_client_that_leaves_does_not_end_it_and_another_may_come() {
        let (_directory, path) = fifo();
        let (stream, mut guest) = tokio::io::duplex(1 << 10);
        let mut input = Input::start(
            Source::open(&path).unwrap(),
            std::future::ready(Some(stream)),
        );
        client(&path).write_all(b"one").unwrap();
        let mut three = [0; 3];
        guest.read_exact(&mut three).await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(100), guest.read(&mut three)).await;
        assert!(early.is_err(), "no end of file at the client's close");
        client(&path).write_all(b"two").unwrap();
        input.close();
        input.close();
        let mut rest = String::new();
        guest.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "two");
    }

    #[tokio::test]
    async fn close_io_before_the_guest_dials_is_kept() {
        let (_directory, path) = fifo();
        let source = Source::open(&path).unwrap();
        client(&path).write_all(b"early").unwrap();
        let (stream, mut guest) = tokio::io::duplex(1 << 10);
        let (dial, dialled) = oneshot::channel();
        let mut input = Input::start(source, async { dialled.await.ok() });
        input.close();
        assert!(dial.send(stream).is_ok());
        let mut seen = String::new();
        guest.read_to_string(&mut seen).await.unwrap();
        assert_eq!(seen, "early");
    }

    #[tokio::test]
    async fn what_is_not_a_fifo_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "").unwrap();
        assert!(matches!(Source::open(&path), Err(Error::NotFifo(_))));
        assert!(matches!(
            Source::open(&directory.path().join("none")),
            Err(Error::Open { .. })
        ));
    }
}
