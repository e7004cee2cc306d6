//! One thread that runs devices: an event manager with a remote endpoint.
//!
//! Subscribers are added and removed from any thread, the loop's own included.
//! A subscriber that panics is taken out of the loop and reported once; the
//! others go on until whoever was told stops the loop. What a subscriber does
//! with its events is not here.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberOps,
};
use thiserror::Error;

/// What runs in the loop. `init` adds the file descriptors to watch, `process` gets their events;
/// both run on the loop's thread with the mutex held, so whoever calls [`EventLoopHandle::add`]
/// does not hold it.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Names a subscriber of one loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubscriberId(u64);

/// Why the loop could not do as asked.
#[derive(Debug, Error)]
pub enum Error {
    /// epoll or an eventfd could not be made.
    #[error("Cannot make the event loop {name}: {why}")]
    Create {
        /// The loop's name.
        name: String,
        /// What the event manager says.
        why: String,
    },
    /// The thread could not be started.
    #[error("Cannot start the thread of the event loop {name}")]
    Spawn {
        /// The loop's name.
        name: String,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The loop runs no more.
    #[error("The event loop has stopped")]
    Stopped,
    /// The subscriber panicked while it was being added.
    #[error("The subscriber panicked in its init: {0}")]
    Init(String),
    /// There is no such subscriber: never added, or removed before.
    #[error("The event loop has no subscriber {0:?}")]
    Unknown(SubscriberId),
}

type OnPanic = Arc<dyn Fn(String) + Send + Sync>;

/// The loop's thread. It belongs to the VM; dropping it stops and joins the thread, unless the
/// drop is on the loop's own thread, where the thread ends after the event at hand.
#[derive(Debug)]
pub struct EventLoop {
    handle: EventLoopHandle,
    thread: Option<JoinHandle<()>>,
}

/// Adds to and removes from a loop; clones share it, and it may outlive the loop.
#[derive(Clone)]
pub struct EventLoopHandle {
    endpoint: RemoteEndpoint<Slot>,
    shared: Arc<Shared>,
    thread: ThreadId,
}

impl std::fmt::Debug for EventLoopHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoopHandle")
            .field("thread", &self.thread)
            .finish_non_exhaustive()
    }
}

struct Shared {
    stop: AtomicBool,
    /// Gone once the loop has ended, so that what it holds may hold a handle.
    on_panic: Mutex<Option<OnPanic>>,
    next: AtomicU64,
    /// Locked only to look something up: never while a subscriber or the event manager runs.
    entries: Mutex<HashMap<SubscriberId, Arc<Entry>>>,
}

/// A subscriber as its handle sees it.
struct Entry {
    /// Cleared first when it is removed or has panicked: from then on its code is not called.
    alive: AtomicBool,
    /// The event manager's name for it, once it is in.
    inner: Mutex<Option<event_manager::SubscriberId>>,
    /// What it said when it panicked.
    panic: Mutex<Option<String>>,
}

/// A subscriber as the event manager sees it.
struct Slot {
    entry: Arc<Entry>,
    subscriber: Subscriber,
    shared: Arc<Shared>,
}

impl Shared {
    fn report(&self, message: String) {
        tracing::error!(%message, "a device failed");
        // Not called with the lock held: it may well stop the VM.
        let on_panic = lock(&self.on_panic).clone();
        if let Some(on_panic) = on_panic {
            on_panic(message);
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The text of a panic's payload.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without text".to_owned()
    }
}

impl Slot {
    fn guarded(&mut self, call: impl FnOnce(&mut (dyn MutEventSubscriber + Send))) {
        let result = catch_unwind(AssertUnwindSafe(|| call(&mut *lock(&self.subscriber))));
        if let Err(payload) = result {
            let message = panic_message(&*payload);
            self.entry.alive.store(false, Ordering::SeqCst);
            *lock(&self.entry.panic) = Some(message.clone());
            self.shared.report(message);
        }
    }
}

impl MutEventSubscriber for Slot {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.entry.alive.load(Ordering::SeqCst) {
            self.guarded(|subscriber| subscriber.process(events, ops));
        }
        if !self.entry.alive.load(Ordering::SeqCst) {
            // Removal is on its way, or will never come; a level-triggered event would spin till then.
            let _ = ops.remove(Events::empty_raw(events.fd()));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.guarded(|subscriber| subscriber.init(ops));
    }
}

impl EventLoop {
    /// Starts the thread `name` (shortened to 15 bytes by Linux). `on_panic` is called with the
    /// text when a subscriber or the loop itself panics, on the loop's thread, and for what
    /// [`EventLoopHandle::report`] is told, on the caller's.
    ///
    /// # Errors
    ///
    /// [`Error::Create`] or [`Error::Spawn`] when the host is out of descriptors or threads.
    pub fn start(
        name: &str,
        on_panic: impl Fn(String) + Send + Sync + 'static,
    ) -> Result<(Self, EventLoopHandle), Error> {
        let mut manager = EventManager::<Slot>::new().map_err(|error| Error::Create {
            name: name.to_owned(),
            why: error.to_string(),
        })?;
        let endpoint = manager.remote_endpoint();
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            on_panic: Mutex::new(Some(Arc::new(on_panic))),
            next: AtomicU64::new(0),
            entries: Mutex::new(HashMap::new()),
        });

        let running = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name(name.replace('\0', ""))
            .spawn(move || {
                let result = catch_unwind(AssertUnwindSafe(|| {
                    while !running.stop.load(Ordering::SeqCst) {
                        if let Err(error) = manager.run() {
                            return Err(error.to_string());
                        }
                    }
                    Ok(())
                }));
                let failure = match result {
                    Ok(Ok(())) => None,
                    Ok(Err(error)) => Some(format!("the event loop failed: {error}")),
                    Err(payload) => Some(panic_message(&*payload)),
                };
                running.stop.store(true, Ordering::SeqCst);
                if let Some(message) = failure {
                    running.report(message);
                }
                // Subscribers go here, and with them every call that still waits for an answer.
                drop(manager);
                let on_panic = lock(&running.on_panic).take();
                drop(on_panic);
            })
            .map_err(|source| Error::Spawn {
                name: name.to_owned(),
                source,
            })?;

        let handle = EventLoopHandle {
            endpoint,
            shared,
            thread: thread.thread().id(),
        };
        let event_loop = Self {
            handle: handle.clone(),
            thread: Some(thread),
        };
        Ok((event_loop, handle))
    }

    /// Another handle.
    pub fn handle(&self) -> EventLoopHandle {
        self.handle.clone()
    }

    /// Ends the loop after the events at hand and joins its thread; subscribers are dropped there.
    /// Idempotent. On the loop's own thread it returns at once.
    pub fn stop(&mut self) {
        self.handle.shared.stop.store(true, Ordering::SeqCst);
        let _ = self.handle.endpoint.kick();
        if self.handle.on_loop_thread() {
            return;
        }
        if let Some(thread) = self.thread.take() {
            // The thread catches its own panics.
            let _ = thread.join();
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stop();
    }
}

impl EventLoopHandle {
    /// Whether the caller is on the loop's thread.
    pub fn on_loop_thread(&self) -> bool {
        thread::current().id() == self.thread
    }

    /// Reports the failure of a thread that works beside the loop for a device, as if it were one
    /// of its subscribers. After the loop's end it is only logged.
    pub fn report(&self, message: String) {
        self.shared.report(message);
    }

    /// Adds a subscriber. When it returns on another thread, the subscriber's `init` has run; on
    /// the loop's own thread it runs after the events at hand. The caller does not hold the
    /// subscriber's mutex, nor any lock that a subscriber of this loop takes.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`], or [`Error::Init`] where `init` panicked.
    pub fn add(&self, subscriber: Subscriber) -> Result<SubscriberId, Error> {
        if self.shared.stop.load(Ordering::SeqCst) {
            return Err(Error::Stopped);
        }
        let id = SubscriberId(self.shared.next.fetch_add(1, Ordering::SeqCst));
        let entry = Arc::new(Entry {
            alive: AtomicBool::new(true),
            inner: Mutex::new(None),
            panic: Mutex::new(None),
        });
        lock(&self.shared.entries).insert(id, Arc::clone(&entry));

        let added = Arc::clone(&entry);
        let shared = Arc::clone(&self.shared);
        let insert = move |ops: &mut dyn SubscriberOps<Subscriber = Slot>| {
            if !added.alive.load(Ordering::SeqCst) {
                return;
            }
            let inner = ops.add_subscriber(Slot {
                entry: Arc::clone(&added),
                subscriber,
                shared,
            });
            if added.alive.load(Ordering::SeqCst) {
                *lock(&added.inner) = Some(inner);
            } else {
                let _ = ops.remove_subscriber(inner);
            }
        };
        let sent = if self.on_loop_thread() {
            self.endpoint.fire(insert)
        } else {
            self.endpoint
                .call_blocking::<_, (), event_manager::Error>(move |ops| {
                    insert(ops);
                    Ok(())
                })
        };
        let failure = match sent {
            Err(_) => Some(Error::Stopped),
            Ok(()) => lock(&entry.panic).take().map(Error::Init),
        };
        match failure {
            None => Ok(id),
            Some(error) => {
                lock(&self.shared.entries).remove(&id);
                Err(error)
            }
        }
    }

    /// Removes a subscriber: when it returns, its code runs no more (on the loop's own thread: is
    /// not called again; a call that removes itself runs to its end). It is dropped there. The caller holds no
    /// lock that the subscriber takes. With the loop stopped it is Ok, since then nothing runs.
    ///
    /// # Errors
    ///
    /// [`Error::Unknown`] for one that was removed before.
    pub fn remove(&self, id: SubscriberId) -> Result<(), Error> {
        let entry = lock(&self.shared.entries)
            .remove(&id)
            .ok_or(Error::Unknown(id))?;
        entry.alive.store(false, Ordering::SeqCst);
        let take_out = move |ops: &mut dyn SubscriberOps<Subscriber = Slot>| {
            if let Some(inner) = lock(&entry.inner).take() {
                let _ = ops.remove_subscriber(inner);
            }
        };
        // An error means that the manager, and all subscribers with it, are gone or going on
        // their way out of the thread's last lines, where none is called any more.
        let _ = if self.on_loop_thread() {
            self.endpoint.fire(take_out)
        } else {
            self.endpoint
                .call_blocking::<_, (), event_manager::Error>(move |ops| {
                    take_out(ops);
                    Ok(())
                })
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use vmm_sys_util::epoll::EventSet;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    type Action = Box<dyn FnMut(&Sender<&'static str>) + Send>;

    /// Drains its eventfd, then does what it is told.
    struct Bell {
        fd: Arc<EventFd>,
        told: Sender<&'static str>,
        action: Action,
        drain: bool,
        init_panics: bool,
    }

    impl MutEventSubscriber for Bell {
        fn init(&mut self, ops: &mut EventOps<'_>) {
            assert!(!self.init_panics, "no init today");
            ops.add(Events::new(&*self.fd, EventSet::IN))
                .expect("to watch the eventfd");
        }

        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
            if self.drain {
                let _ = self.fd.read();
            }
            (self.action)(&self.told);
        }
    }

    fn bell(
        action: impl FnMut(&Sender<&'static str>) + Send + 'static,
    ) -> (Arc<Mutex<Bell>>, Arc<EventFd>, Receiver<&'static str>) {
        let fd = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let (told, heard) = channel();
        let bell = Bell {
            fd: Arc::clone(&fd),
            told,
            action: Box::new(action),
            drain: true,
            init_panics: false,
        };
        (Arc::new(Mutex::new(bell)), fd, heard)
    }

    fn quiet_loop() -> (EventLoop, EventLoopHandle) {
        EventLoop::start("test-loop", |message| panic!("unexpected: {message}"))
            .expect("an event loop")
    }

    fn say(told: &Sender<&'static str>) {
        let _ = told.send("rung");
    }

    #[test]
    fn a_subscriber_hears_until_it_is_removed() {
        let (mut event_loop, handle) = quiet_loop();
        let (subscriber, fd, heard) = bell(say);
        let id = handle.add(subscriber).expect("added");
        fd.write(1).expect("a kick");
        assert_eq!(heard.recv_timeout(SOON), Ok("rung"));
        handle.remove(id).expect("removed");
        fd.write(1).expect("a kick");
        // The sender went with the subscriber, without a further word.
        assert!(heard.recv_timeout(SOON).is_err());
        assert!(matches!(handle.remove(id), Err(Error::Unknown(_))));
        event_loop.stop();
    }

    #[test]
    fn adding_and_removing_works_on_the_loops_own_thread() {
        let (_event_loop, handle) = quiet_loop();
        let (inner, inner_fd, inner_heard) = bell(say);
        let mut inner: Option<Subscriber> = Some(inner);
        let on_loop = handle.clone();
        let mut added = None;
        let (outer, fd, heard) = bell(move |told| {
            assert!(on_loop.on_loop_thread());
            if let Some(subscriber) = inner.take() {
                added = Some(on_loop.add(subscriber).expect("added from within"));
            } else if let Some(id) = added.take() {
                on_loop.remove(id).expect("removed from within");
            }
            say(told);
        });
        handle.add(outer).expect("added");
        assert!(!handle.on_loop_thread());
        fd.write(1).expect("a kick");
        assert_eq!(heard.recv_timeout(SOON), Ok("rung"));
        inner_fd.write(1).expect("a kick");
        assert_eq!(inner_heard.recv_timeout(SOON), Ok("rung"));
        fd.write(1).expect("a kick");
        assert_eq!(heard.recv_timeout(SOON), Ok("rung"));
        inner_fd.write(1).expect("a kick");
        assert!(inner_heard.recv_timeout(SOON).is_err());
    }

    #[test]
    fn one_added_and_removed_in_the_same_event_never_runs() {
        let (_event_loop, handle) = quiet_loop();
        let (inner, inner_fd, inner_heard) = bell(say);
        inner_fd.write(1).expect("a kick before it is in");
        let mut inner: Option<Subscriber> = Some(inner);
        let on_loop = handle.clone();
        let (outer, fd, heard) = bell(move |told| {
            if let Some(subscriber) = inner.take() {
                let id = on_loop.add(subscriber).expect("added");
                on_loop.remove(id).expect("removed");
            }
            say(told);
        });
        handle.add(outer).expect("added");
        fd.write(1).expect("a kick");
        assert_eq!(heard.recv_timeout(SOON), Ok("rung"));
        assert!(inner_heard.recv_timeout(SOON).is_err());
    }

    #[test]
    fn a_panic_is_reported_once_and_the_others_go_on() {
        let (report, reports) = channel();
        let (mut event_loop, handle) = EventLoop::start("test-loop", move |message| {
            let _ = report.send(message);
        })
        .expect("an event loop");
        let (good, good_fd, heard) = bell(say);
        let (bad, bad_fd, _bad_heard) = bell(|_| panic!("out of tune"));
        bad.lock().expect("the bell").drain = false;
        handle.add(good).expect("added");
        let bad_id = handle.add(bad).expect("added");
        bad_fd.write(1).expect("a kick");
        assert_eq!(reports.recv_timeout(SOON).as_deref(), Ok("out of tune"));
        bad_fd.write(1).expect("a kick");
        good_fd.write(1).expect("a kick");
        assert_eq!(heard.recv_timeout(SOON), Ok("rung"));
        handle.remove(bad_id).expect("it can still be removed");
        event_loop.stop();
        assert!(reports.try_recv().is_err(), "reported once only");
    }

    #[test]
    fn a_panic_in_init_is_the_adders_error() {
        let (report, reports) = channel();
        let (_event_loop, handle) = EventLoop::start("test-loop", move |message| {
            let _ = report.send(message);
        })
        .expect("an event loop");
        let (bad, _fd, _heard) = bell(say);
        bad.lock().expect("the bell").init_panics = true;
        let error = handle.add(bad).expect_err("init panics");
        assert!(
            matches!(&error, Error::Init(text) if text.contains("no init today")),
            "{error}"
        );
        assert!(reports.recv_timeout(SOON).is_ok());
    }

    #[test]
    fn after_stop_nothing_is_added_and_removal_is_fine() {
        let (mut event_loop, handle) = quiet_loop();
        let (subscriber, _fd, heard) = bell(say);
        let id = handle.add(subscriber).expect("added");
        event_loop.stop();
        event_loop.stop();
        assert!(heard.recv_timeout(SOON).is_err(), "dropped by the loop");
        handle.remove(id).expect("nothing runs any more");
        let (subscriber, _fd, _heard) = bell(say);
        assert!(matches!(handle.add(subscriber), Err(Error::Stopped)));
    }

    #[test]
    fn dropping_the_loop_on_its_own_thread_does_not_hang() {
        let (event_loop, handle) = quiet_loop();
        let mut event_loop = Some(event_loop);
        let (subscriber, fd, heard) = bell(move |_| drop(event_loop.take()));
        handle.add(subscriber).expect("added");
        fd.write(1).expect("a kick");
        assert!(heard.recv_timeout(SOON).is_err(), "the loop has ended");
    }
}
