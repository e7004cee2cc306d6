//! Tells the host when containers want memory, as it happens. The cgroup that
//! holds all containers has a `memory.high`: from that use on they are slowed
//! down instead of being killed, which gives the host the time to plug more.
//! Signs of it are the kernel's count of that, and the time for which processes
//! stall (PSI).

use std::fs::{self, File};
use std::future::Future;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::cgroup::{self, EventFile};
use crate::error::Error;
use crate::events::{Delivered, Events};
use crate::hotplug::kernel_files::{KernelFiles, blocking, line, put, words};

/// From one event to the next, at least.
const PAUSE: Duration = Duration::from_millis(200);
/// Stalls of 50 ms within half a second, the shortest window that the kernel takes.
const TRIGGER: &[u8] = b"some 50000 500000\0";

/// Sets the watch. Clones share it.
#[derive(Clone)]
pub struct MemoryWatch {
    cgroups: PathBuf,
    /// Held for a whole change, so that the limit and what is watched belong together.
    arms: Arc<Mutex<mpsc::Sender<Option<Armed>>>>,
}

impl MemoryWatch {
    /// Begins with nothing to watch; needs a runtime. `cgroups` is the hierarchy's root.
    pub fn start(cgroups: &Path, events: Events) -> MemoryWatch {
        MemoryWatch::with_files(cgroups, KernelFiles::of_the_machine(), events)
    }

    fn with_files(cgroups: &Path, files: KernelFiles, events: Events) -> MemoryWatch {
        let (arms, armed) = mpsc::channel(1);
        tokio::spawn(Teller::new(files, events).run(armed));
        MemoryWatch {
            cgroups: cgroups.to_owned(),
            arms: Arc::new(Mutex::new(arms)),
        }
    }

    /// From `high_bytes` of all containers together on they are slowed down, and the host is told; with 0 never, and what
    /// was set before is taken back. Lowering the limit blocks while the kernel makes room under it.
    ///
    /// # Errors
    /// `FailedPrecondition` if the kernel does not account for memory; `Internal` with what it said. Nothing is watched
    /// then.
    pub async fn set(&self, high_bytes: u64) -> Result<(), Error> {
        let arms = self.arms.lock().await;
        let parent = cgroup::parent(&self.cgroups)?;
        let armed = match high_bytes {
            0 => None,
            // Before the limit holds, so that no sign is missed.
            _ => Some(Armed::open(&parent, high_bytes)?),
        };
        let what = match high_bytes {
            0 => "max".to_owned(),
            _ => high_bytes.to_string(),
        };
        // The old watch ends first: what it would say belongs to the old limit.
        let gone = |_| Error::Internal("the watch on memory has ended".into());
        arms.send(None).await.map_err(gone)?;
        let high = parent.join("memory.high");
        blocking(move || {
            put(&high, &what).map_err(|error| refused(&format!("writing {what} to"), &high, &error))
        })
        .await?;
        arms.send(armed).await.map_err(gone)
    }
}

/// Why a file of the cgroup that holds all containers cannot be used.
fn refused(doing: &str, file: &Path, error: &io::Error) -> Error {
    let text = format!("{doing} {}: {}", file.display(), words(error));
    match error.kind() {
        io::ErrorKind::NotFound => Error::FailedPrecondition(format!(
            "{text}: the kernel does not account for memory in cgroups"
        )),
        _ => Error::Internal(text),
    }
}

/// Where signs come from that containers want memory.
trait Signs: Send {
    /// Waits for one. Dropping the future loses nothing.
    fn sign(&mut self, files: &KernelFiles) -> impl Future<Output = io::Result<()>> + Send;
}

/// What is watched for one limit.
struct Armed {
    parent: PathBuf,
    high_bytes: u64,
    /// Counts what goes above the limit; its value when it was last looked at.
    counts: EventFile,
    count: u64,
    /// Nothing where the kernel has no PSI.
    stalls: Option<AsyncFd<File>>,
}

impl Armed {
    fn open(parent: &Path, high_bytes: u64) -> Result<Armed, Error> {
        // Of the limit itself; the other file counts containers' own limits too, and is all that kernels before 5.2 have.
        let mut counts = EventFile::open(&parent.join("memory.events.local"))
            .or_else(|_| EventFile::open(&parent.join("memory.events")))
            .map_err(|error| refused("watching", &parent.join("memory.events"), &error))?;
        let count = counts.value("high").unwrap_or(0);
        let stalls = match stalls(&parent.join("memory.pressure")) {
            Ok(stalls) => Some(stalls),
            Err(error) => {
                info_once(&error);
                None
            }
        };
        Ok(Armed {
            parent: parent.to_owned(),
            high_bytes,
            counts,
            count,
            stalls,
        })
    }

    fn is_scarce(&self, files: &KernelFiles) -> bool {
        let used = line(&self.parent.join("memory.current"))
            .and_then(|text| text.parse().ok())
            .unwrap_or(u64::MAX);
        let (total, available) = (files.meminfo("MemTotal"), files.meminfo("MemAvailable"));
        is_scarce(used, self.high_bytes, available, total)
    }
}

impl Signs for Armed {
    async fn sign(&mut self, files: &KernelFiles) -> io::Result<()> {
        loop {
            let count = self.counts.value("high").unwrap_or(self.count);
            if count > self.count {
                self.count = count;
                return Ok(());
            }
            tokio::select! {
                changed = self.counts.changed() => changed?,
                stalled = stalled(self.stalls.as_ref()) => {
                    stalled?;
                    if self.is_scarce(files) {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// Whether a stall is for want of the guest's memory. A container that stalls at its own limit has no use of more in the
/// guest: then all containers are well below theirs, and memory is to be had.
fn is_scarce(used: u64, high: u64, available: u64, total: u64) -> bool {
    used >= high - high / 8 || available < total / 8
}

fn stalls(path: &Path) -> io::Result<AsyncFd<File>> {
    let mut file = fs::OpenOptions::new().read(true).write(true).open(path)?;
    file.write_all(TRIGGER)?;
    // SAFETY: the file stays where it is, open, for as long as the registration; it is only borrowed from it.
    unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.map_err(io::Error::from)
}

async fn stalled(stalls: Option<&AsyncFd<File>>) -> io::Result<()> {
    match stalls {
        Some(stalls) => {
            stalls.ready(Interest::PRIORITY).await?.clear_ready();
            Ok(())
        }
        None => std::future::pending().await,
    }
}

fn info_once(error: &io::Error) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        info!(
            "stalls for want of memory are not watched: {}; what goes above the limit is",
            words(error)
        );
    });
}

/// Sends the events: one task, for as long as the agent lives.
struct Teller {
    files: KernelFiles,
    events: Events,
    undelivered: Option<Delivered>,
    last: Option<Instant>,
}

impl Teller {
    fn new(files: KernelFiles, events: Events) -> Teller {
        Teller {
            files,
            events,
            undelivered: None,
            last: None,
        }
    }

    async fn run<S: Signs>(mut self, mut arms: mpsc::Receiver<Option<S>>) {
        let mut armed: Option<S> = None;
        loop {
            let told = async {
                match armed.as_mut() {
                    Some(armed) => self.tell(armed).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                next = arms.recv() => match next {
                    Some(next) => armed = next,
                    None => return,
                },
                told = told => if let Err(error) = told {
                    warn!("watching the containers' memory has ended: {}", words(&error));
                    armed = None;
                },
            }
        }
    }

    /// Waits for a sign, and tells the host; not before the last event is delivered, and [`PAUSE`] over. Dropping the future
    /// loses nothing but the sign.
    async fn tell(&mut self, armed: &mut impl Signs) -> io::Result<()> {
        if let Some(delivered) = self.undelivered.as_mut() {
            let _ = delivered.await;
            self.undelivered = None;
        }
        if let Some(last) = self.last {
            tokio::time::sleep_until(last + PAUSE).await;
        }
        armed.sign(&self.files).await?;
        let (total, available) = (
            self.files.meminfo("MemTotal"),
            self.files.meminfo("MemAvailable"),
        );
        debug!("containers want memory: {available} of {total} bytes are available");
        self.undelivered = Some(self.events.memory_pressure(total, available));
        self.last = Some(Instant::now());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nacre_protocol::agent::event_request::Event;

    use super::*;
    use crate::events::Queued;

    const MIB: u64 = 1 << 20;

    /// A sign for each message.
    struct Fake(mpsc::UnboundedReceiver<()>);

    impl Signs for Fake {
        async fn sign(&mut self, _: &KernelFiles) -> io::Result<()> {
            self.0.recv().await.ok_or(io::ErrorKind::BrokenPipe.into())
        }
    }

    struct Told {
        _proc: tempfile::TempDir,
        arms: mpsc::Sender<Option<Fake>>,
        queue: mpsc::UnboundedReceiver<Queued>,
    }

    impl Told {
        fn new() -> Told {
            let proc = tempfile::tempdir().unwrap();
            let meminfo = "MemTotal: 8 kB\nMemAvailable: 2 kB\n";
            fs::write(proc.path().join("meminfo"), meminfo).unwrap();
            let files = KernelFiles {
                sys: proc.path().into(),
                proc: proc.path().into(),
            };
            let (events, queue) = Events::new();
            let (arms, armed) = mpsc::channel(1);
            tokio::spawn(Teller::new(files, events).run(armed));
            Told {
                _proc: proc,
                arms,
                queue,
            }
        }

        async fn arm(&self) -> mpsc::UnboundedSender<()> {
            let (sender, signs) = mpsc::unbounded_channel();
            self.arms.send(Some(Fake(signs))).await.unwrap();
            sender
        }

        /// The next event, if one comes soon.
        async fn next(&mut self) -> Option<Queued> {
            let soon = Duration::from_millis(600);
            tokio::time::timeout(soon, self.queue.recv()).await.ok()?
        }
    }

    #[tokio::test]
    async fn a_sign_is_told_with_what_there_is() {
        let mut told = Told::new();
        told.arm().await.send(()).unwrap();
        let queued = told.next().await.unwrap();
        let Event::Pressure(pressure) = queued.event() else {
            panic!("another event");
        };
        assert_eq!(pressure.memory_total_bytes, 8192);
        assert_eq!(pressure.memory_available_bytes, 2048);
    }

    #[tokio::test]
    async fn at_most_one_is_undelivered_even_when_armed_anew() {
        let mut told = Told::new();
        let signs = told.arm().await;
        for _ in 0..5 {
            signs.send(()).unwrap();
        }
        let first = told.next().await.unwrap();
        assert!(told.next().await.is_none(), "the first is not delivered");
        let signs = told.arm().await;
        signs.send(()).unwrap();
        assert!(told.next().await.is_none(), "the first is not delivered");
        drop(first);
        assert!(told.next().await.is_some());
    }

    #[tokio::test]
    async fn signs_in_a_row_are_told_with_a_pause() {
        let mut told = Told::new();
        let signs = told.arm().await;
        for _ in 0..3 {
            signs.send(()).unwrap();
        }
        let begun = Instant::now();
        for number in 0..3 {
            assert!(told.next().await.is_some());
            assert!(begun.elapsed() >= PAUSE * number, "event {number}");
        }
    }

    #[tokio::test]
    async fn nothing_is_told_when_disarmed_or_when_the_watch_breaks() {
        let mut told = Told::new();
        let signs = told.arm().await;
        told.arms.send(None).await.unwrap();
        // Taken by the task when the second can be sent.
        told.arms.send(None).await.unwrap();
        assert!(signs.send(()).is_err() || told.next().await.is_none());
        drop(told.arm().await);
        assert!(told.next().await.is_none());
        told.arm().await.send(()).unwrap();
        assert!(told.next().await.is_some(), "it can be armed again");
    }

    #[test]
    fn a_stall_counts_where_memory_is_scarce() {
        let (high, total) = (800 * MIB, 1000 * MIB);
        let table = [
            // Used by containers, available in the guest.
            (800, 150, true),
            (700, 200, true),
            (699, 200, false),
            (100, 900, false),
            // All is used up by something else.
            (100, 124, true),
            (100, 125, false),
            (900, 900, true),
        ];
        for (used, available, scarce) in table {
            let is = is_scarce(used * MIB, high, available * MIB, total);
            assert_eq!(is, scarce, "{used} used, {available} available");
        }
        assert!(is_scarce(u64::MAX, u64::MAX, u64::MAX, u64::MAX));
    }

    #[tokio::test]
    async fn a_kernel_that_does_not_account_for_memory_is_told() {
        let root = tempfile::tempdir().unwrap();
        let (events, _queue) = Events::new();
        let files = KernelFiles {
            sys: root.path().into(),
            proc: root.path().into(),
        };
        let watch = MemoryWatch::with_files(root.path(), files, events);
        for high in [MIB, 0] {
            let error = watch.set(high).await.unwrap_err();
            assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
            assert!(error.to_string().contains("nacre/memory."), "{error}");
        }
        // Without a watch the limit alone is taken back.
        fs::write(root.path().join("nacre/memory.high"), "").unwrap();
        watch.set(0).await.unwrap();
        let high = fs::read_to_string(root.path().join("nacre/memory.high"));
        assert_eq!(high.unwrap(), "max");
    }
}
