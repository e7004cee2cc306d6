//! Links that go up and down, told as they do.

use std::sync::Arc;
use std::thread::JoinHandle;

use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket as Raw, SocketAddr};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use tracing::warn;

use crate::link::{self, Link};
use crate::netlink::{Answer, Socket, answers, failed};
use crate::{Error, MadePort, Netns};

/// include/uapi/linux/rtnetlink.h: RTNLGRP_LINK.
const GROUP_LINK: u32 = 1;

/// Whether frames can go through an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// It is up and has a carrier.
    Up,
    /// It is down, or its other end is.
    Down,
    /// It is not there any more.
    Gone,
}

/// What became of an interface's link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkChange {
    /// The interface's name when it was mirrored.
    pub interface: String,
    /// What it is now.
    pub state: LinkState,
}

/// Ends the telling when it is dropped, after what is being told. It keeps the namespace.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

struct Watcher<F> {
    events: Raw,
    /// For asking anew.
    socket: Socket,
    ports: Vec<(MadePort, Option<LinkState>)>,
    tell: F,
}

/// Tells the state of each interface once, and then each change of it, from a thread of its own. Changes that follow
/// each other at once may be told as one.
///
/// # Errors
///
/// [`Error::Namespace`] and [`Error::Netlink`].
pub fn watch(
    netns: &Netns,
    ports: &[MadePort],
    tell: impl FnMut(LinkChange) + Send + 'static,
) -> Result<Watch, Error> {
    let (events, socket) = netns.enter(|| {
        let open = || {
            let mut events = Raw::new(NETLINK_ROUTE)?;
            events.bind(&SocketAddr::new(0, 0))?;
            events.add_membership(GROUP_LINK)?;
            events.set_non_blocking(true)?;
            Ok(events)
        };
        let events = open().map_err(failed("subscribe to", "changes of interfaces"))?;
        Ok((events, Socket::open()?))
    })?;
    let mut watcher = Watcher {
        events,
        socket,
        ports: ports.iter().map(|port| (port.clone(), None)).collect(),
        tell,
    };
    let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| failed("make an eventfd for", "changes of interfaces")(errno.into()))?;
    let stop = Arc::new(stop);
    let thread = std::thread::Builder::new()
        .name("net-links".to_owned())
        .spawn({
            let stop = Arc::clone(&stop);
            move || {
                if let Err(error) = watcher.run(&stop) {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "links are not watched any more"
                    );
                }
            }
        })
        .map_err(failed("start a thread for", "changes of interfaces"))?;
    Ok(Watch {
        stop,
        thread: Some(thread),
    })
}

impl Link {
    pub(crate) fn state(&self) -> LinkState {
        if self.has_carrier() {
            LinkState::Up
        } else {
            LinkState::Down
        }
    }
}

impl<F: FnMut(LinkChange)> Watcher<F> {
    fn run(&mut self, stop: &OwnedFd) -> Result<(), Error> {
        self.ask()?;
        loop {
            let mut ready = [
                PollFd::new(&self.events, PollFlags::IN),
                PollFd::new(stop, PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result
                    .map_err(|errno| failed("wait for", "changes of interfaces")(errno.into()))?,
            };
            if !ready[1].revents().is_empty() {
                return Ok(());
            }
            match self.events.recv_from_full() {
                Ok((bytes, from)) if from.port_number() == 0 => self.take(&bytes),
                // Not the kernel's.
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.ask()?,
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(failed("read", "changes of interfaces")(error)),
            }
        }
    }

    /// All of them, at first and where changes were lost.
    fn ask(&mut self) -> Result<(), Error> {
        let links = link::list(&mut self.socket)?;
        for at in 0..self.ports.len() {
            let index = self.ports[at].0.index;
            let link = links.iter().find(|link| link.index == index);
            self.set(at, link.map_or(LinkState::Gone, Link::state));
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) {
        for answer in answers(bytes) {
            let Ok((_, Answer::Message(message))) = answer else {
                continue;
            };
            // A bridge tells of its ports by the same messages, of a family of its own.
            let at = |message: &LinkMessage| {
                self.ports.iter().position(|(port, _)| {
                    message.header.interface_family == AddressFamily::Unspec
                        && port.index == message.header.index
                })
            };
            match message {
                RouteNetlinkMessage::NewLink(message) => {
                    if let Some(at) = at(&message) {
                        self.set(at, Link::of(&message).state());
                    }
                }
                RouteNetlinkMessage::DelLink(message) => {
                    if let Some(at) = at(&message) {
                        self.set(at, LinkState::Gone);
                    }
                }
                _ => {}
            }
        }
    }

    fn set(&mut self, at: usize, state: LinkState) {
        let (port, known) = &mut self.ports[at];
        if known.replace(state) != Some(state) {
            (self.tell)(LinkChange {
                interface: port.interface.clone(),
                state,
            });
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // An eventfd takes one always.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        // Who is told may drop it, on that thread.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}
