//! The user's terminal: raw mode that is always undone, its size, and the
//! escape that ends a console session (Ctrl-a x).

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::sync::mpsc;

/// Ctrl-a, which begins an escape.
const ESCAPE: u8 = 0x01;

/// Whether a session with a terminal is possible: both ends are one.
pub(super) fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Columns and rows of the terminal on standard output, else on standard input.
pub(super) fn size() -> Option<(u16, u16)> {
    [io::stdout().as_raw_fd(), io::stdin().as_raw_fd()]
        .into_iter()
        .find_map(|fd| {
            let mut size = libc::winsize {
                ws_row: 0,
                ws_col: 0,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            // SAFETY: TIOCGWINSZ writes a winsize, which `size` is, and keeps no pointer to it.
            let answer = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &mut size) };
            (answer == 0 && size.ws_col > 0 && size.ws_row > 0)
                .then_some((size.ws_col, size.ws_row))
        })
}

/// The terminal's mode before, for the panic hook: a panic may not leave the terminal raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode of the terminal on standard input, as long as this value lives.
pub(super) struct RawMode(());

impl RawMode {
    /// Enters raw mode; None if standard input is not a terminal.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        *BEFORE
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(before);
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            hook(info);
        }));
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let before = BEFORE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .take();
    if let Some(before) = before
        && let Err(error) = tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &before)
    {
        tracing::warn!(%error, "cannot restore the terminal");
    }
}

/// How often a console that waits for its reader looks whether the session ends, in milliseconds.
const LOOK: u16 = 100;

/// Where the VM's console goes. A reader that takes nothing holds the guest up until the session ends: then it
/// fails, so that no thread of the VM waits for ever.
pub(super) struct ConsoleOutput {
    file: File,
    ending: Arc<AtomicBool>,
}

impl ConsoleOutput {
    /// Writes to a duplicate of `to` until `ending` turns true.
    pub(super) fn new(to: impl AsFd, ending: Arc<AtomicBool>) -> io::Result<Self> {
        let file = to.as_fd().try_clone_to_owned()?.into();
        Ok(Self { file, ending })
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
            match nix::poll::poll(&mut ready, PollTimeout::from(LOOK)) {
                Ok(0) if self.ending.load(Ordering::Relaxed) => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Ok(0) | Err(nix::Error::EINTR) => {}
                // As much as a pipe that is writable takes without waiting.
                Ok(_) => return self.file.write(&data[..data.len().min(libc::PIPE_BUF)]),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What became of a byte of input.
#[derive(Debug, PartialEq, Eq)]
enum Typed {
    Nothing,
    Byte(u8),
    Quit,
}

/// Finds Ctrl-a x in what is typed; Ctrl-a twice is one Ctrl-a.
#[derive(Debug, Default)]
struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    fn push(&mut self, byte: u8) -> Typed {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => {
                self.escaped = true;
                Typed::Nothing
            }
            (true, b'x' | b'X') => Typed::Quit,
            (true, ESCAPE) | (false, _) => Typed::Byte(byte),
            (true, _) => Typed::Nothing,
        }
    }
}

/// Copies standard input into a pipe whose other end the VM's console reads, in a thread that ends with
/// the process or the input. With `escapes`, Ctrl-a x is not copied but sent to `quit`.
pub(super) fn console_input(escapes: bool, quit: mpsc::Sender<()>) -> io::Result<std::fs::File> {
    let (read_end, write_end) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    std::thread::Builder::new()
        .name("console-input".to_owned())
        .spawn(move || copy_input(escapes, &quit, write_end))?;
    Ok(read_end.into())
}

fn copy_input(escapes: bool, quit: &mpsc::Sender<()>, write_end: OwnedFd) {
    let mut pipe = std::fs::File::from(write_end);
    let mut filter = EscapeFilter::default();
    let mut buffer = [0; 4096];
    let mut stdin = io::stdin().lock();
    while let Ok(count @ 1..) = stdin.read(&mut buffer) {
        let mut passed = Vec::with_capacity(count);
        for byte in &buffer[..count] {
            match if escapes {
                filter.push(*byte)
            } else {
                Typed::Byte(*byte)
            } {
                Typed::Nothing => {}
                Typed::Byte(byte) => passed.push(byte),
                Typed::Quit => {
                    // The session may be over already.
                    let _ = quit.blocking_send(());
                }
            }
        }
        if pipe.write_all(&passed).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(input: &[u8]) -> (Vec<u8>, bool) {
        let mut filter = EscapeFilter::default();
        let mut passed = Vec::new();
        let mut quit = false;
        for byte in input {
            match filter.push(*byte) {
                Typed::Nothing => {}
                Typed::Byte(byte) => passed.push(byte),
                Typed::Quit => quit = true,
            }
        }
        (passed, quit)
    }

    #[test]
    fn a_console_that_nobody_reads_gives_up_at_the_end() {
        let (reader, writer) = io::pipe().unwrap();
        let ending = Arc::new(AtomicBool::new(true));
        let mut console = ConsoleOutput::new(&writer, ending).unwrap();
        let refused = console.write_all(&vec![b'x'; 1 << 20]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        drop(reader);
        assert_eq!(
            console.write(b"x").unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn only_ctrl_a_x_quits_and_ctrl_a_twice_is_typed_once() {
        assert_eq!(typed(b"abx"), (b"abx".to_vec(), false));
        assert_eq!(typed(b"a\x01xb"), (b"ab".to_vec(), true));
        assert_eq!(typed(b"\x01\x01x"), (b"\x01x".to_vec(), false));
        assert_eq!(typed(b"\x01qx"), (b"x".to_vec(), false));
    }
}
