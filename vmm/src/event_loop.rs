//! C2: one thread that runs the devices (event-manager with a remote endpoint).
// pub struct EventLoop; impl EventLoop { pub fn start(name: &str) -> Result<(EventLoop, EventLoopHandle), Error>; stop on drop/join }
// #[derive(Clone)] pub struct EventLoopHandle;
// impl EventLoopHandle {
//   pub fn add(&self, s: Arc<Mutex<dyn MutEventSubscriber + Send>>) -> Result<SubscriberId, Error>;   // callable from any thread, blocking until it is in
//   pub fn remove(&self, id: SubscriberId) -> Result<(), Error>;   // when it returns, the subscriber runs no more; also callable from the loop thread itself
// }
// A panic of a subscriber is caught and reported through a callback given to start(), so that the VM ends as ExitReason::Internal.
