//! The streams between the container and ours: copies that end with their
//! source, and what to make of it when ours cannot be written.

use std::io::{self, IsTerminal};

use anyhow::Context;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::vmctl::RUN_FAILED;

/// What a shell makes of SIGPIPE, which ends a command whose output nobody reads.
const BROKEN_PIPE: u8 = 128 + libc::SIGPIPE as u8;

/// The running copies of the container's output.
#[derive(Default)]
pub(super) struct Copies {
    running: JoinSet<(&'static str, io::Result<()>)>,
    loss: Option<u8>,
}

impl Copies {
    /// Starts to copy one stream of the guest to one of ours.
    pub(super) fn output(
        &mut self,
        name: &'static str,
        from: impl AsyncRead + Unpin + Send + 'static,
        to: impl AsyncWrite + Unpin + Send + 'static,
    ) {
        self.running
            .spawn(async move { (name, copy_out(from, to).await) });
    }

    /// Completes when output has been lost that was not told of before. Cancel-safe.
    pub(super) async fn lost(&mut self) {
        while let Some(ended) = self.running.join_next().await {
            if self.judge(ended) {
                return;
            }
        }
        std::future::pending::<()>().await;
    }

    /// Waits for all copies to end.
    pub(super) async fn drain(&mut self) {
        while let Some(ended) = self.running.join_next().await {
            self.judge(ended);
        }
    }

    /// The exit code for lost output.
    pub(super) fn loss(&self) -> Option<u8> {
        self.loss
    }

    fn judge(
        &mut self,
        ended: Result<(&'static str, io::Result<()>), tokio::task::JoinError>,
    ) -> bool {
        let (name, error) = match ended {
            Ok((_, Ok(()))) => return false,
            Ok((name, Err(error))) => (name, error),
            Err(error) => ("output", error.into()),
        };
        if error.kind() == io::ErrorKind::BrokenPipe {
            self.loss.get_or_insert(BROKEN_PIPE);
        } else {
            eprintln!("vmctl: cannot copy the container's standard {name}: {error}\r");
            self.loss = Some(RUN_FAILED);
        }
        true
    }
}

/// Copies a stream of the guest to one of ours until it ends.
async fn copy_out(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.flush().await;
        }
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
    }
}

/// Copies our standard input to the guest's; its end half-closes the stream.
pub(super) async fn copy_in(
    mut from: mpsc::Receiver<Vec<u8>>,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    while let Some(data) = from.recv().await {
        to.write_all(&data).await?;
        to.flush().await?;
    }
    to.shutdown().await?;
    // The other direction stays open: dropping the stream would reset it before the data is read.
    std::future::pending().await
}

/// Reads standard input in a thread that ends with the process or the input; the channel ends with it.
pub(super) fn read_stdin() -> anyhow::Result<mpsc::Receiver<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel(4);
    let in_background = io::stdin().is_terminal()
        && nix::unistd::tcgetpgrp(io::stdin()).is_ok_and(|group| group != nix::unistd::getpgrp());
    if in_background {
        // A read of the terminal would stop this process.
        return Ok(receiver);
    }
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || {
            let mut stdin = io::stdin().lock();
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(count @ 1..) = io::Read::read(&mut stdin, &mut buffer) {
                if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        })
        .context("Cannot start a thread for standard input")?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_is_copied_whole() {
        let mut to = Vec::new();
        copy_out(&[7u8; 200_000][..], &mut to).await.unwrap();
        assert_eq!(to.len(), 200_000);
    }

    #[tokio::test]
    async fn a_reader_that_goes_is_sigpipe_and_a_full_disk_a_failure() {
        let (reader, to) = tokio::io::duplex(16);
        drop(reader);
        let mut copies = Copies::default();
        copies.output("output", &[1u8; 100][..], to);
        copies.lost().await;
        assert_eq!(copies.loss(), Some(141));
        let full = tokio::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .await
            .unwrap();
        copies.output("output", &[1u8; 100][..], full);
        copies.drain().await;
        assert_eq!(copies.loss(), Some(RUN_FAILED));
    }

    #[tokio::test]
    async fn output_that_ends_is_no_loss() {
        let mut copies = Copies::default();
        copies.output("output", &b"x"[..], tokio::io::sink());
        copies.drain().await;
        assert_eq!(copies.loss(), None);
    }

    #[tokio::test]
    async fn the_end_of_input_half_closes() {
        let (sender, receiver) = mpsc::channel(1);
        let (mut guest, ours) = tokio::io::duplex(16);
        let copy = tokio::spawn(copy_in(receiver, ours));
        sender.send(b"ab".to_vec()).await.unwrap();
        drop(sender);
        let mut got = Vec::new();
        guest.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"ab");
        assert!(!copy.is_finished());
        copy.abort();
    }
}
