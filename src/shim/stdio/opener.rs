//! Waiting for a FIFO to get a reader. The kernel tells that to nobody but a
//! blocked open, so a thread of its own makes one.

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::sync::oneshot;

/// What the thread and its owner share.
struct Shared {
    /// The FIFO itself, whatever becomes of its path.
    fifo: File,
    /// The reader by which the owner ends the wait; it stays open until the thread is done.
    reader: Mutex<Option<File>>,
}

impl Shared {
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fifo.as_raw_fd()))
    }
}

/// A future of the FIFO's write end, ready when somebody opens it for reading. Dropping it ends the wait.
pub struct Opener {
    shared: Arc<Shared>,
    opened: oneshot::Receiver<io::Result<File>>,
}

impl Opener {
    /// Starts to wait.
    ///
    /// # Errors
    /// The FIFO is gone, or there can be no thread.
    pub fn start(path: &Path) -> io::Result<Self> {
        let fifo = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)?;
        let shared = Arc::new(Shared {
            fifo,
            reader: Mutex::default(),
        });
        let (sender, opened) = oneshot::channel();
        let waiter = shared.clone();
        std::thread::Builder::new()
            .name("stdio-open".to_owned())
            .spawn(move || {
                let file = OpenOptions::new().write(true).open(waiter.path());
                // Nobody waits for it any more: it closes here.
                let _ = sender.send(file);
            })?;
        Ok(Self { shared, opened })
    }
}

impl Future for Opener {
    type Output = io::Result<File>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.opened)
            .poll(context)
            .map(|opened| opened.unwrap_or_else(|_| Err(io::Error::other("the thread is gone"))))
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        // Closed: no file comes after this, and one that came is dropped with the receiver.
        self.opened.close();
        if self.opened.try_recv().is_ok() {
            return;
        }
        let reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(self.shared.path());
        *self
            .shared
            .reader
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = reader.ok();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_reader_that_comes_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let opener = Opener::start(&path).unwrap();
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text
        });
        let mut file = opener.await.unwrap();
        file.write_all(b"hello").unwrap();
        drop(file);
        assert_eq!(reader.join().unwrap(), "hello");
    }

    #[tokio::test]
    async fn dropping_ends_the_thread_even_when_the_path_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let opener = Opener::start(&path).unwrap();
        let shared = Arc::downgrade(&opener.shared);
        std::fs::remove_file(&path).unwrap();
        drop(opener);
        tokio::time::timeout(Duration::from_secs(10), async {
            while shared.strong_count() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("the thread ends and lets go of all it holds");
    }
}
