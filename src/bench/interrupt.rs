//! SIGINT and SIGTERM: what is under way ends, cleans up, and shows what it
//! has. Nobody is torn out of a call: between two of them it is looked for.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How a program ends that was told twice: as a shell has it for SIGINT.
const AT_ONCE: i32 = 130;
/// A terminal's signal goes to all of its processes, one after another: how long ours may come after another's.
const GRACE: Duration = Duration::from_millis(200);
const LOOK: Duration = Duration::from_millis(10);

/// Why to end, once there is a reason.
#[derive(Debug, Clone)]
struct Ending(watch::Receiver<Option<&'static str>>);

/// The process's own.
static ENDING: OnceLock<Ending> = OnceLock::new();

impl Ending {
    fn check(&self) -> Result<()> {
        let why = *self.0.borrow();
        why.map_or(Ok(()), |why| Err(anyhow!("{why}")))
    }

    fn check_within(&self, grace: Duration) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < grace {
            self.check()?;
            std::thread::sleep(LOOK);
        }
        self.check()
    }

    async fn come(mut self) -> Error {
        match self.0.wait_for(Option::is_some).await.map(|why| *why) {
            Ok(why) => anyhow!("{}", why.unwrap_or_default()),
            // Nobody will say so any more.
            Err(_) => std::future::pending().await,
        }
    }
}

/// From here on signals do not end the process but what asks here. A second signal ends it at once, and leaves what it has made.
///
/// # Errors
/// No thread can be started, or the signals cannot be taken.
pub(super) fn listen() -> Result<()> {
    if ENDING.get().is_some() {
        return Ok(());
    }
    let (sender, receiver) = watch::channel(None);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting a runtime for signals")?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (
            signal(SignalKind::interrupt()).context("taking SIGINT")?,
            signal(SignalKind::terminate()).context("taking SIGTERM")?,
        )
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                let mut next = async || {
                    tokio::select! {
                        _ = interrupt.recv() => "interrupted",
                        _ = terminate.recv() => "terminated",
                    }
                };
                let why = next().await;
                eprintln!("\nnacre-bench: {why}: ending what is under way (once more: at once, without cleaning up)");
                sender.send_replace(Some(why));
                next().await;
                std::process::exit(AT_ONCE);
            });
        })
        .context("starting a thread for signals")?;
    let _ = ENDING.set(Ending(receiver));
    Ok(())
}

/// Fails once a signal has come.
///
/// # Errors
/// Says which.
pub(super) fn check() -> Result<()> {
    ENDING.get().map_or(Ok(()), Ending::check)
}

/// The same where something has failed that a signal may have ended as well, which may come here a little later.
///
/// # Errors
/// Says which.
pub(super) fn check_after_failure() -> Result<()> {
    let ending = ENDING.get();
    ending.map_or(Ok(()), |ending| ending.check_within(GRACE))
}

/// Waits until a signal comes, and says which.
pub(super) async fn come() -> Error {
    match ENDING.get() {
        Some(ending) => ending.clone().come().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_asks_is_told_when_it_has_come_and_why() {
        let (sender, receiver) = watch::channel(None);
        let ending = Ending(receiver);
        assert!(ending.check().is_ok());
        let waiting = tokio::spawn(ending.clone().come());
        tokio::task::yield_now().await;
        sender.send_replace(Some("interrupted"));
        let why = tokio::time::timeout(Duration::from_secs(10), waiting);
        assert_eq!(why.await.unwrap().unwrap().to_string(), "interrupted");
        assert_eq!(ending.check().unwrap_err().to_string(), "interrupted");
    }

    #[test]
    fn a_signal_that_comes_a_little_after_what_it_has_ended_is_found() {
        let (sender, receiver) = watch::channel(None);
        let ending = Ending(receiver);
        assert!(ending.check_within(LOOK).is_ok());
        let later = std::thread::spawn(move || {
            std::thread::sleep(LOOK * 3);
            sender.send_replace(Some("interrupted"));
        });
        assert!(ending.check().is_ok());
        let why = ending.check_within(Duration::from_secs(10)).unwrap_err();
        assert_eq!(why.to_string(), "interrupted");
        later.join().unwrap();
    }

    #[test]
    fn without_a_signal_nothing_ends() {
        assert!(check().is_ok());
    }
}
