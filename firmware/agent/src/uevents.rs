//! The kernel's device events, by a netlink socket. What they say is not read,
//! only that something happened: whoever waits looks at sysfs itself, so that a
//! lost or forged event does no harm.

use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;
use tracing::debug;

/// Events that are taken together as one, at most.
const TOGETHER: usize = 1024;

/// Where news of the kernel's devices comes from.
pub trait Changes: Send {
    /// Waits for news; may come without cause. Dropping the future loses nothing.
    fn next(&mut self) -> impl Future<Output = io::Result<()>> + Send;
}

/// Waits until `look` finds something, and looks anew at each change; nothing after `wait`. `changes` must have been
/// opened before anything that the caller did to make it appear.
///
/// # Errors
/// What the source of changes said.
pub async fn appear<T>(
    changes: &mut impl Changes,
    wait: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> io::Result<Option<T>> {
    let deadline = Instant::now() + wait;
    loop {
        let found = look();
        if found.is_some() || Instant::now() >= deadline {
            return Ok(found);
        }
        match tokio::time::timeout_at(deadline, changes.next()).await {
            Ok(changed) => changed?,
            // What came without an event is found by the last look.
            Err(_) => return Ok(look()),
        }
    }
}

/// The kernel's own events, from the moment of [`listen`](DeviceEvents::listen) on.
pub struct DeviceEvents(AsyncFd<OwnedFd>);

impl DeviceEvents {
    /// Begins to listen.
    ///
    /// # Errors
    /// What the kernel said to the socket.
    pub fn listen() -> io::Result<DeviceEvents> {
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: socket takes numbers only; the descriptor is owned right away.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_KOBJECT_UEVENT);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: an all-zero sockaddr_nl is a valid one: numbers only.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as u16;
        address.nl_groups = 1;
        // SAFETY: bind reads one sockaddr_nl of the length that is given.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if bound != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the socket stays open for as long as the registration; it is only borrowed from it.
        let watched = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(DeviceEvents(watched))
    }
}

impl Changes for DeviceEvents {
    /// Waits for an event, and takes those that came with it. Lost ones (ENOBUFS) count as one.
    async fn next(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut any = false;
            for _ in 0..TOGETHER {
                match ready.try_io(|socket| receive(socket.get_ref())) {
                    Ok(Ok(())) => any = true,
                    Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                        debug!("device events were lost");
                        any = true;
                    }
                    Ok(Err(error)) => return Err(error),
                    Err(_would_block) => break,
                }
            }
            if any {
                return Ok(());
            }
        }
    }
}

/// Takes one event from the socket.
fn receive(socket: &OwnedFd) -> io::Result<()> {
    let mut event = [0_u8; 4096];
    // SAFETY: recv writes at most as many bytes as the buffer has.
    let count = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            event.as_mut_ptr().cast(),
            event.len(),
            0,
        )
    };
    match count {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Changes by a script: each step does something, and is one event. After the last there are none.
    pub struct Script(pub Vec<Box<dyn FnOnce() + Send>>);

    impl Script {
        /// No event ever.
        pub fn empty() -> Script {
            Script(Vec::new())
        }

        /// One event, after `step`.
        pub fn of(step: impl FnOnce() + Send + 'static) -> Script {
            Script(vec![Box::new(step)])
        }
    }

    impl Changes for Script {
        async fn next(&mut self) -> io::Result<()> {
            if self.0.is_empty() {
                return std::future::pending().await;
            }
            self.0.remove(0)();
            Ok(())
        }
    }

    /// Events without end, none of which matters.
    struct Storm;

    impl Changes for Storm {
        async fn next(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn what_is_there_is_found_at_once_and_what_comes_after_its_event() {
        let at_once = appear(&mut Script::empty(), Duration::ZERO, || Some(1)).await;
        assert_eq!(at_once.unwrap(), Some(1));
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut changes = Script(vec![
            Box::new(|| {}),
            Box::new(move || sender.send(7).unwrap()),
        ]);
        let wait = Duration::from_secs(600);
        let found = appear(&mut changes, wait, || receiver.try_recv().ok()).await;
        assert_eq!(found.unwrap(), Some(7));
    }

    #[tokio::test]
    async fn the_wait_ends_in_silence_and_in_a_storm() {
        let wait = Duration::from_millis(20);
        let found = appear(&mut Script::empty(), wait, || None::<()>).await;
        assert_eq!(found.unwrap(), None);
        let found = appear(&mut Storm, wait, || None::<()>).await;
        assert_eq!(found.unwrap(), None);
        // Come without an event: found by the last look.
        let mut looks = 0;
        let mut silent = Script::empty();
        let found = appear(&mut silent, wait, || {
            looks += 1;
            (looks > 1).then_some(())
        });
        assert_eq!(found.await.unwrap(), Some(()));
    }
}
