//! SIGINT and SIGTERM: what is under way ends, cleans up, and shows what it
//! has. Nobody is torn out of a call: between two of them it is looked for.

use std::sync::OnceLock;

use anyhow::{Context, Error, Result, anyhow};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How a program ends that was told twice: as a shell has it for SIGINT.
const AT_ONCE: i32 = 130;

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

/// Waits until a signal comes, and says which.
pub(super) async fn come() -> Error {
    match ENDING.get() {
        Some(ending) => ending.clone().come().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
    fn without_a_signal_nothing_ends() {
        assert!(check().is_ok());
    }
}
