//! One output stream: from the guest to a FIFO or a file. While a reader is
//! there it sets the pace and nothing is lost. While there is none the last
//! 256 KiB wait for one and the guest is not held up. After the process's end a
//! reader that takes nothing is given up in time, and so is a guest that does not
//! end its stream, however it delays: an exit is never late for ever.

use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::opener::Opener;
use super::ring::Ring;
use super::{Limits, Target};

/// Bytes read from the guest ahead of a reader that is there.
const AHEAD: usize = 64 << 10;
/// Bytes that a guest may still bring after the process's end; pipes and buffers on the way hold far fewer.
const LATE_BYTES: usize = 16 << 20;
/// Of how many silences the guest may make up its whole delay after the process's end.
const SILENCES: u32 = 6;

/// A running output stream; dropping it closes both sides.
pub struct Output {
    drained: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Drop for Output {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Output {
    /// Moves bytes from the stream that `stream` comes to, until it ends. `exited` turns true
    /// when the process has ended.
    pub fn start<S: AsyncRead + Unpin + Send + 'static>(
        name: &'static str,
        target: Target,
        stream: impl Future<Output = Option<S>> + Send + 'static,
        exited: watch::Receiver<bool>,
        moved: Arc<AtomicU64>,
        limits: Limits,
    ) -> Self {
        // The sender goes with the task: its end, of whatever kind, is a drain too.
        let (done, drained) = watch::channel(false);
        let task = tokio::spawn(async move {
            let path = target.path().to_owned();
            let result = match target {
                Target::Fifo(path) => {
                    // Opened before the guest dials, so that a reader that waits is let in at once.
                    let sink = Sink::open(&path);
                    match (sink, stream.await) {
                        (Ok(sink), Some(source)) => {
                            let pump = Pump {
                                name,
                                source,
                                sink,
                                exited,
                                moved,
                                patience: Patience::new(limits.quiet_guest),
                                limits,
                                done,
                                ring: Ring::default(),
                                open: true,
                                taken: Instant::now(),
                            };
                            pump.run(&path).await
                        }
                        (Err(error), _) => Err(error),
                        (Ok(_), None) => Ok(()),
                    }
                }
                // It has a process of its own, and its pipes come by `start_piped`.
                Target::Binary { .. } => {
                    Err(io::Error::other("the logging program was not started"))
                }
                Target::File(path) => match stream.await {
                    Some(source) => {
                        let patience = Patience::new(limits.quiet_guest);
                        append(&path, source, exited, patience, &moved).await
                    }
                    None => Ok(()),
                },
            };
            if let Err(error) = result {
                tracing::warn!(stream = name, path = %path.display(), %error, "an output stream ended early");
            }
        });
        Self { drained, task }
    }

    /// The same into a pipe whose reader is there already; one that leaves is not waited for.
    pub fn start_piped<S: AsyncRead + Unpin + Send + 'static>(
        name: &'static str,
        pipe: pipe::Sender,
        stream: impl Future<Output = Option<S>> + Send + 'static,
        exited: watch::Receiver<bool>,
        moved: Arc<AtomicU64>,
        limits: Limits,
    ) -> Self {
        let (done, drained) = watch::channel(false);
        let task = tokio::spawn(async move {
            let Some(source) = stream.await else { return };
            let pump = Pump {
                name,
                source,
                sink: Sink::Reader(pipe),
                exited,
                moved,
                patience: Patience::new(limits.quiet_guest),
                limits,
                done,
                ring: Ring::default(),
                open: true,
                taken: Instant::now(),
            };
            // No path, so that nobody can come to read it after this reader.
            if let Err(error) = pump.run(Path::new("")).await {
                tracing::warn!(stream = name, %error, "an output stream ended early");
            }
        });
        Self { drained, task }
    }

    /// Completes when all output is delivered, given up, or waits for a reader that is not there.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut drained = self.drained.clone();
        async move {
            // An error means that the task is gone, and there is nothing more to come.
            let _ = drained.wait_for(|drained| *drained).await;
        }
    }
}

/// How long a guest is waited for that has told of a process's end and not ended its stream.
struct Patience {
    quiet: Duration,
    /// When it brought something last, was let go on, or the process ended.
    last: Instant,
    waited: Duration,
    brought: usize,
}

impl Patience {
    fn new(quiet: Duration) -> Self {
        Self {
            quiet,
            last: Instant::now(),
            waited: Duration::ZERO,
            brought: 0,
        }
    }

    /// The guest is not to blame for the time before.
    fn renew(&mut self) {
        self.last = Instant::now();
    }

    /// It has been waited for since `began`, and brought `count` bytes.
    fn count(&mut self, began: Instant, count: usize) {
        self.renew();
        self.waited += began.elapsed();
        self.brought += count;
    }

    fn ends(&self) -> Instant {
        let left = (self.quiet * SILENCES).saturating_sub(self.waited);
        (self.last + self.quiet).min(Instant::now() + left)
    }

    fn spent(&self) -> bool {
        self.brought > LATE_BYTES
    }
}

async fn append(
    path: &Path,
    mut source: impl AsyncRead + Unpin,
    mut exit: watch::Receiver<bool>,
    mut patience: Patience,
    moved: &AtomicU64,
) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        tokio::fs::create_dir_all(folder).await?;
    }
    let mut file = tokio::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .await?;
    let mut chunk = vec![0; AHEAD];
    let mut exited = false;
    loop {
        let began = Instant::now();
        let count = tokio::select! {
            biased;
            () = ended(&mut exit), if !exited => {
                exited = true;
                patience.renew();
                continue;
            }
            count = source.read(&mut chunk) => count?,
            () = sleep_until(patience.ends()), if exited => {
                tracing::warn!(path = %path.display(), "{NOT_ENDED}");
                0
            }
        };
        if count == 0 {
            return file.flush().await;
        }
        file.write_all(&chunk[..count]).await?;
        moved.fetch_add(count as u64, Ordering::Relaxed);
        if exited {
            patience.count(began, count);
            if patience.spent() {
                tracing::warn!(path = %path.display(), "{NOT_ENDED}");
                return file.flush().await;
            }
        }
    }
}

/// What is logged of a guest that is given up.
const NOT_ENDED: &str = "the guest does not end an output stream of a process that ended";

/// The FIFO's side.
enum Sink {
    /// Somebody reads.
    Reader(pipe::Sender),
    /// Nobody does; what a reader that left has not read is kept by the old write end.
    Nobody {
        opener: Opener,
        _kept: Option<pipe::Sender>,
    },
    /// Given up: the rest goes nowhere.
    Given,
}

impl Sink {
    fn open(path: &Path) -> io::Result<Self> {
        match pipe::OpenOptions::new().open_sender(path) {
            Ok(sender) => Ok(Self::Reader(sender)),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(Self::Nobody {
                opener: Opener::start(path)?,
                _kept: None,
            }),
            Err(error) => Err(error),
        }
    }
}

struct Pump<S> {
    name: &'static str,
    source: S,
    sink: Sink,
    exited: watch::Receiver<bool>,
    moved: Arc<AtomicU64>,
    limits: Limits,
    done: watch::Sender<bool>,
    ring: Ring,
    open: bool,
    /// When the reader took something last, began to have something to take, or the process ended.
    taken: Instant,
    patience: Patience,
}

/// What one turn of the pump waited for.
enum Turn {
    Read(io::Result<usize>),
    Writable(io::Result<()>),
    Opened(io::Result<std::fs::File>),
    Exited,
    Quiet,
    Stuck,
}

impl<S: AsyncRead + Unpin> Pump<S> {
    async fn run(mut self, path: &Path) -> io::Result<()> {
        let mut chunk = vec![0; AHEAD];
        let mut exited = *self.exited.borrow();
        loop {
            let reader = matches!(self.sink, Sink::Reader(_));
            if !self.open && (self.ring.is_empty() || !reader) {
                self.done.send_replace(true);
            }
            if !self.open && (self.ring.is_empty() || matches!(self.sink, Sink::Given)) {
                return Ok(());
            }
            // What still waits for a reader is not the guest's delay.
            let waits = exited && self.open && (self.ring.is_empty() || !reader);
            let began = Instant::now();
            match self.turn(&mut chunk, exited).await {
                Turn::Read(Ok(0) | Err(_)) => self.open = false,
                Turn::Read(Ok(count)) => {
                    self.moved.fetch_add(count as u64, Ordering::Relaxed);
                    if exited {
                        let began = if waits { began } else { Instant::now() };
                        self.patience.count(began, count);
                        self.open = !self.patience.spent();
                        if !self.open {
                            tracing::warn!(stream = self.name, "{NOT_ENDED}");
                        }
                    }
                    if self.ring.is_empty() {
                        self.taken = Instant::now();
                    }
                    self.ring.push(&chunk[..count]);
                    match self.sink {
                        Sink::Reader(_) => {}
                        Sink::Nobody { .. } => self.ring.trim(self.limits.replay),
                        Sink::Given => self.ring.trim(0),
                    }
                }
                Turn::Writable(Ok(())) => self.write(path)?,
                Turn::Writable(Err(_)) => self.sink = Sink::Given,
                Turn::Opened(file) => {
                    let dropped = self.ring.take_dropped();
                    if dropped > 0 {
                        tracing::info!(
                            stream = self.name,
                            dropped,
                            "output was dropped while nobody read it"
                        );
                    }
                    self.sink = Sink::Reader(pipe::Sender::from_file(file?)?);
                    self.taken = Instant::now();
                }
                Turn::Exited => {
                    exited = true;
                    self.taken = Instant::now();
                    self.patience.renew();
                }
                Turn::Quiet => {
                    tracing::warn!(stream = self.name, "{NOT_ENDED}");
                    self.open = false;
                }
                Turn::Stuck => {
                    tracing::warn!(
                        stream = self.name, path = %path.display(), lost = self.ring.len(),
                        after = ?self.limits.stuck_reader, "a reader takes nothing and is given up"
                    );
                    self.sink = Sink::Given;
                    self.ring.trim(0);
                }
            }
        }
    }

    async fn turn(&mut self, chunk: &mut [u8], exited: bool) -> Turn {
        let Self {
            source,
            sink,
            exited: exit,
            ring,
            open,
            taken,
            patience,
            limits,
            ..
        } = self;
        let (sender, opener, room) = match sink {
            Sink::Reader(sender) => (Some(&*sender), None, ring.len() < AHEAD),
            Sink::Nobody { opener, .. } => (None, Some(opener), true),
            Sink::Given => (None, None, true),
        };
        let writing = sender.is_some() && !ring.is_empty();
        tokio::select! {
            ready = writable(sender), if writing => Turn::Writable(ready),
            count = source.read(chunk), if *open && room => Turn::Read(count),
            file = opened(opener) => Turn::Opened(file),
            () = ended(exit), if !exited => Turn::Exited,
            () = sleep_until(*taken + limits.stuck_reader), if exited && writing => Turn::Stuck,
            () = sleep_until(patience.ends()), if exited && *open && room => Turn::Quiet,
            else => std::future::pending().await,
        }
    }

    fn write(&mut self, path: &Path) -> io::Result<()> {
        let Sink::Reader(sender) = &self.sink else {
            return Ok(());
        };
        match sender.try_write(self.ring.front()) {
            Ok(count) => {
                self.ring.consume(count);
                self.moved.fetch_add(count as u64, Ordering::Relaxed);
                self.taken = Instant::now();
                self.patience.renew();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                let opener = Opener::start(path);
                let old = std::mem::replace(&mut self.sink, Sink::Given);
                let kept = if let Sink::Reader(sender) = old {
                    Some(sender)
                } else {
                    None
                };
                match opener {
                    Ok(opener) => {
                        self.sink = Sink::Nobody {
                            opener,
                            _kept: kept,
                        };
                        self.ring.trim(self.limits.replay);
                    }
                    // The FIFO is gone, so nobody can come to read it.
                    Err(_) => self.ring.trim(0),
                }
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

async fn writable(sender: Option<&pipe::Sender>) -> io::Result<()> {
    match sender {
        Some(sender) => sender.writable().await,
        None => std::future::pending().await,
    }
}

/// The process has ended. The other end goes away with the process's stdio, and that ends the task too.
async fn ended(exited: &mut watch::Receiver<bool>) {
    if exited.wait_for(|exited| *exited).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn opened(opener: Option<&mut Opener>) -> io::Result<std::fs::File> {
    match opener {
        Some(opener) => opener.await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::PathBuf;
    use std::time::Duration;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use tokio::io::DuplexStream;

    use super::*;

    /// Time to see that something does not happen.
    const A_WHILE: Duration = Duration::from_millis(100);

    struct Bench {
        _directory: tempfile::TempDir,
        path: PathBuf,
        guest: DuplexStream,
        exited: watch::Sender<bool>,
        output: Output,
    }

    fn bench(limits: Limits, before: impl FnOnce(&Path)) -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        before(&path);
        let (guest, stream) = tokio::io::duplex(64 << 10);
        let (exited, exit) = watch::channel(false);
        let output = Output::start(
            "stdout",
            Target::Fifo(path.clone()),
            std::future::ready(Some(stream)),
            exit,
            Arc::default(),
            limits,
        );
        Bench {
            _directory: directory,
            path,
            guest,
            exited,
            output,
        }
    }

    fn limits() -> Limits {
        Limits {
            stuck_reader: Duration::from_secs(20),
            quiet_guest: Duration::from_secs(20),
            replay: 256 << 10,
        }
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|n| (n % 251) as u8).collect()
    }

    /// Has the FIFO open when it returns; then reads all that comes, from the first writer on.
    fn reader(path: &Path) -> std::thread::JoinHandle<Vec<u8>> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .unwrap();
        std::thread::spawn(move || {
            let mut waited = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
            poll(&mut waited, PollTimeout::NONE).unwrap();
            fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
            let mut all = Vec::new();
            file.read_to_end(&mut all).unwrap();
            all
        })
    }

    async fn joined(thread: std::thread::JoinHandle<Vec<u8>>) -> Vec<u8> {
        tokio::task::spawn_blocking(|| thread.join().unwrap())
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn a_burst_of_8_mib_then_exit_arrives_whole_and_ends() {
        let mut thread = None;
        let mut bench = bench(limits(), |path| thread = Some(reader(path)));
        let data = pattern(8 << 20);
        bench.guest.write_all(&data).await.unwrap();
        drop(bench.guest);
        bench.exited.send_replace(true);
        bench.output.drained().await;
        assert!(joined(thread.unwrap()).await == data);
    }

    #[tokio::test]
    async fn a_slow_reader_holds_the_guest_up_and_loses_nothing() {
        let mut file = None;
        let mut bench = bench(limits(), |path| {
            file = Some(
                OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)
                    .unwrap(),
            );
        });
        let data = pattern(1 << 20);
        let written = tokio::time::timeout(A_WHILE, bench.guest.write_all(&data)).await;
        assert!(written.is_err(), "back-pressure reaches the guest");
        assert!(
            tokio::time::timeout(A_WHILE, bench.output.drained())
                .await
                .is_err()
        );
        drop(file);
    }

    #[tokio::test]
    async fn without_a_reader_the_last_256_kib_wait_and_exit_does_not() {
        let mut bench = bench(limits(), |_| {});
        let data = pattern(1 << 20);
        bench.guest.write_all(&data).await.unwrap();
        drop(bench.guest);
        bench.exited.send_replace(true);
        bench.output.drained().await;
        let late = joined(reader(&bench.path)).await;
        assert_eq!(late.len(), 256 << 10);
        assert!(late == data[data.len() - late.len()..]);
    }

    #[tokio::test]
    async fn a_reader_that_leaves_makes_room_for_the_next() {
        let mut first = None;
        let mut bench = bench(limits(), |path| {
            first = Some(
                OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)
                    .unwrap(),
            );
        });
        bench.guest.write_all(b"one").await.unwrap();
        let mut first = first.unwrap();
        let mut seen = [0; 3];
        while first.read(&mut seen).unwrap_or(0) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(&seen, b"one");
        drop(first);
        bench.guest.write_all(b"two").await.unwrap();
        tokio::time::sleep(A_WHILE).await;
        let second = reader(&bench.path);
        tokio::time::sleep(A_WHILE).await;
        bench.guest.write_all(b"three").await.unwrap();
        drop(bench.guest);
        assert_eq!(joined(second).await, b"twothree");
    }

    #[tokio::test]
    async fn a_stuck_reader_is_given_up_after_exit_only() {
        let mut file = None;
        let mut bench = bench(
            Limits {
                stuck_reader: Duration::from_millis(200),
                ..limits()
            },
            |path| {
                file = Some(
                    OpenOptions::new()
                        .read(true)
                        .custom_flags(libc::O_NONBLOCK)
                        .open(path)
                        .unwrap(),
                );
            },
        );
        bench.guest.write_all(&pattern(100 << 10)).await.unwrap();
        drop(bench.guest);
        let early = tokio::time::timeout(Duration::from_millis(400), bench.output.drained()).await;
        assert!(early.is_err(), "a live process's reader may take its time");
        bench.exited.send_replace(true);
        tokio::time::timeout(Duration::from_secs(10), bench.output.drained())
            .await
            .unwrap();
        drop(file);
    }

    #[tokio::test]
    async fn a_guest_that_never_ends_its_stream_does_not_keep_the_exit() {
        let mut thread = None;
        let mut bench = bench(
            Limits {
                quiet_guest: Duration::from_millis(100),
                ..limits()
            },
            |path| thread = Some(reader(path)),
        );
        bench.guest.write_all(b"last words").await.unwrap();
        bench.exited.send_replace(true);
        tokio::time::timeout(Duration::from_secs(10), bench.output.drained())
            .await
            .unwrap();
        assert_eq!(joined(thread.unwrap()).await, b"last words");
    }

    /// Brings a byte now and then for ever, as a guest may that says a process has ended.
    async fn dribble(mut guest: DuplexStream) {
        while guest.write_all(b".").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn a_guest_that_dribbles_for_ever_does_not_keep_the_exit() {
        let limits = Limits {
            quiet_guest: Duration::from_millis(100),
            ..limits()
        };
        let mut thread = None;
        let bench = bench(limits, |path| thread = Some(reader(path)));
        tokio::spawn(dribble(bench.guest));
        bench.exited.send_replace(true);
        tokio::time::timeout(Duration::from_secs(10), bench.output.drained())
            .await
            .unwrap();
        assert!(!joined(thread.unwrap()).await.is_empty());
    }

    #[tokio::test]
    async fn a_guest_that_writes_for_ever_does_not_keep_the_exit() {
        // So long that only the count of its bytes can end it, however slow the machine is.
        let limits = Limits {
            quiet_guest: Duration::from_secs(600),
            ..limits()
        };
        let mut thread = None;
        let bench = bench(limits, |path| thread = Some(reader(path)));
        let mut guest = bench.guest;
        tokio::spawn(async move { while guest.write_all(&[7; 60_000]).await.is_ok() {} });
        bench.exited.send_replace(true);
        tokio::time::timeout(Duration::from_secs(120), bench.output.drained())
            .await
            .unwrap();
        assert!(joined(thread.unwrap()).await.len() >= LATE_BYTES);
    }

    #[tokio::test]
    async fn a_stuck_reader_is_given_up_though_the_guest_dribbles() {
        let limits = Limits {
            stuck_reader: Duration::from_millis(200),
            quiet_guest: Duration::from_millis(500),
            ..limits()
        };
        let mut file = None;
        let mut bench = bench(limits, |path| {
            file = Some(
                OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)
                    .unwrap(),
            );
        });
        // More than the FIFO holds, so that some of it waits for the reader.
        bench.guest.write_all(&[7; 100 << 10]).await.unwrap();
        tokio::spawn(dribble(bench.guest));
        bench.exited.send_replace(true);
        tokio::time::timeout(Duration::from_secs(20), bench.output.drained())
            .await
            .unwrap();
        drop(file);
    }

    #[tokio::test]
    async fn a_file_does_not_wait_for_a_guest_that_never_ends_its_stream() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let (mut guest, stream) = tokio::io::duplex(1024);
        let (exited, exit) = watch::channel(false);
        let output = Output::start(
            "stdout",
            Target::File(path.clone()),
            std::future::ready(Some(stream)),
            exit,
            Arc::default(),
            Limits {
                quiet_guest: Duration::from_millis(100),
                ..limits()
            },
        );
        guest.write_all(b"last words").await.unwrap();
        exited.send_replace(true);
        tokio::time::timeout(Duration::from_secs(10), output.drained())
            .await
            .unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"last words");
        drop(guest);
    }

    #[tokio::test]
    async fn a_file_is_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        std::fs::write(&path, "old ").unwrap();
        let (mut guest, stream) = tokio::io::duplex(1024);
        let (_exited, exit) = watch::channel(false);
        let output = Output::start(
            "stdout",
            Target::File(path.clone()),
            std::future::ready(Some(stream)),
            exit,
            Arc::default(),
            limits(),
        );
        guest.write_all(b"new").await.unwrap();
        drop(guest);
        output.drained().await;
        assert_eq!(std::fs::read(&path).unwrap(), b"old new");
    }
}
