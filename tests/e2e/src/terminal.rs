//! A terminal for `ctr`: a pseudo-terminal of which the suite has the other end.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::pty::{OpenptyResult, Winsize, openpty};

use crate::poll;

/// A program that runs on a terminal of its own. It is killed when dropped.
pub(crate) struct Terminal {
    child: Child,
    master: File,
    screen: Arc<Mutex<Vec<u8>>>,
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Terminal {
    /// Starts a program on a terminal of this size.
    pub fn start(command: &mut Command, columns: u16, rows: u16) -> Result<Self> {
        eprintln!("+ on a terminal: {command:?}");
        let OpenptyResult { master, slave } =
            openpty(&size(columns, rows), None).context("making a terminal")?;
        let master = File::from(master);
        command
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave);
        let own_terminal = || {
            nix::unistd::setsid()?;
            // SAFETY: an ioctl on standard input, which is the terminal's slave, with a number for its argument.
            if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        };
        // SAFETY: the closure makes two system calls, which may be made between fork and exec.
        unsafe { command.pre_exec(own_terminal) };
        let child = command.spawn().context("starting on a terminal")?;
        // The slave's descriptors in it would keep the terminal open after the child's end.
        command
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let screen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, seen) = (master.try_clone()?, screen.clone());
        // Ends when the last process on the terminal is gone.
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut part) {
                if let Ok(mut seen) = seen.lock() {
                    seen.extend_from_slice(&part[..count]);
                }
            }
        });
        Ok(Terminal {
            child,
            master,
            screen,
        })
    }

    /// All that was shown so far.
    pub fn screen(&self) -> String {
        self.screen
            .lock()
            .map(|seen| String::from_utf8_lossy(&seen).into_owned())
            .unwrap_or_default()
    }

    /// Waits until this is shown.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        poll::until(&format!("{text:?} on the terminal"), limit, || {
            Ok(self.screen().contains(text).then_some(()))
        })
        .with_context(|| format!("it shows {:?}", self.screen()))
    }

    /// Types this.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        eprintln!("  typing {text:?}");
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Makes the window of another size; what runs on it is told by SIGWINCH.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = size(columns, rows);
        // SAFETY: an ioctl on a terminal with the structure that it reads.
        let done = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
        nix::errno::Errno::result(done).context("resizing a terminal")?;
        Ok(())
    }

    /// Waits for the program's end.
    pub fn end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let ended = poll::until("the end of a program on a terminal", limit, || {
            Ok(self.child.try_wait()?)
        });
        eprintln!("  the terminal shows {:?}", self.screen());
        ended
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
