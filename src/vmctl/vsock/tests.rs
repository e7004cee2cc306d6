//! The Unix sockets, with a guest that is the test.

use clap::Parser;
use tokio::io::DuplexStream;

use super::*;
use crate::sandbox::fake;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    vsock: Vsock,
}

fn options(words: &str) -> Result<Vsock, clap::Error> {
    let words = std::iter::once("vmctl").chain(words.split_whitespace());
    Line::try_parse_from(words).map(|line| line.vsock)
}

fn on(socket: PathBuf, ports: &[u32]) -> Vsock {
    Vsock {
        vsock: Some(socket),
        vsock_ports: ports.to_vec(),
    }
}

fn record(folder: &Path) -> Arc<Record> {
    let owner = record::Owner::default();
    Arc::new(Record::create(&folder.join("state"), owner).unwrap())
}

/// Names in a folder, without the record's.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "state")
        .collect()
}

fn error<T>(outcome: Result<T>) -> String {
    format!("{:#}", outcome.err().expect("an error"))
}

struct Around {
    folder: tempfile::TempDir,
    fake: Arc<fake::Fake>,
    _sandbox: Sandbox,
    sockets: Sockets,
    record: Arc<Record>,
}

impl Around {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (sandbox, fake, _) = fake::boot();
        let record = record(folder.path());
        let bound = on(folder.path().join("v"), &[5000]).bind(&record).unwrap();
        let sockets = bound.serve(&sandbox).unwrap();
        Self {
            folder,
            fake,
            _sandbox: sandbox,
            sockets,
            record,
        }
    }

    /// A client, and what has accepted it in the guest.
    async fn pair(&self) -> (UnixStream, DuplexStream) {
        let mut listener = self.fake.guest_listens(52);
        let mut client = self.client("CONNECT 52\n").await;
        let guest = listener.recv().await.unwrap();
        let mut answer = [0; 9];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"OK 40000\n");
        (client, guest)
    }

    async fn client(&self, line: &str) -> UnixStream {
        let socket = self.folder.path().join("v");
        let mut client = UnixStream::connect(socket).await.unwrap();
        client.write_all(line.as_bytes()).await.unwrap();
        client
    }
}

/// What comes until the end.
async fn all(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[test]
fn options_have_their_bounds() {
    assert!(options("").unwrap().vsock.is_none());
    let some = options("--vsock /v --vsock-port 1 --vsock-port 65535").unwrap();
    assert_eq!(some.vsock_ports, [1, 65535]);
    for words in [
        "--vsock-port 1",
        "--vsock /v --vsock-port 0",
        "--vsock /v --vsock-port 65536",
    ] {
        assert!(options(words).is_err(), "{words}");
    }
}

#[test]
fn a_line_names_a_port() {
    assert_eq!(port("CONNECT 52").unwrap(), 52);
    assert_eq!(port("CONNECT 4294967294\r").unwrap(), u32::MAX - 1);
    for line in [
        "",
        "CONNECT",
        "CONNECT ",
        "CONNECT x",
        "CONNECT +5",
        "connect 5",
        "CONNECT 4294967296",
        "OK 5",
    ] {
        assert!(port(line).is_err(), "{line:?}");
    }
}

#[tokio::test]
async fn a_client_is_one_with_the_guest_and_each_way_ends_by_itself() {
    let around = Around::new();
    let mut listener = around.fake.guest_listens(52);
    // What follows the line at once is the guest's.
    let mut client = around.client("CONNECT 52\nhello").await;
    let mut guest: DuplexStream = listener.recv().await.unwrap();
    let mut answer = [0; 9];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"OK 40000\n");
    client.shutdown().await.unwrap();
    assert_eq!(all(&mut guest).await, "hello");
    guest.write_all(b"and good-bye").await.unwrap();
    drop(guest);
    assert_eq!(all(&mut client).await, "and good-bye");
}

#[tokio::test]
async fn a_port_that_nobody_listens_on_and_a_line_that_is_none_end_the_connection() {
    let around = Around::new();
    for line in ["CONNECT 53\n", "GET / HTTP/1.1\n", "\n"] {
        let mut client = around.client(line).await;
        assert_eq!(all(&mut client).await, "", "{line:?}");
    }
    let mut client = around.client(&"x".repeat(LINE + 1)).await;
    // Cut while some of it was unread: a reset is as good as an end.
    let mut text = String::new();
    let _ = client.read_to_string(&mut text).await;
    assert_eq!(text, "");
}

#[tokio::test]
async fn what_the_guest_connects_to_comes_to_the_socket_of_its_port() {
    let around = Around::new();
    // Nobody listens yet.
    let mut guest = around.fake.dial(5000).unwrap();
    assert_eq!(all(&mut guest).await, "");
    let listener = UnixListener::bind(around.folder.path().join("v_5000")).unwrap();
    let mut guest = around.fake.dial(5000).unwrap();
    let (mut client, _) = listener.accept().await.unwrap();
    guest.write_all(b"from the guest").await.unwrap();
    guest.shutdown().await.unwrap();
    assert_eq!(all(&mut client).await, "from the guest");
    client.write_all(b"back").await.unwrap();
    drop(client);
    assert_eq!(all(&mut guest).await, "back");
}

#[tokio::test]
async fn a_way_that_breaks_leaves_the_other() {
    let around = Around::new();
    // The client reads no more, and goes on to write.
    let (mut client, mut guest) = around.pair().await;
    nix::sys::socket::shutdown(client.as_raw_fd(), nix::sys::socket::Shutdown::Read).unwrap();
    guest.write_all(b"unread").await.unwrap();
    tokio::time::sleep(PAUSE).await;
    client.write_all(b"still here").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(all(&mut guest).await, "still here");
}

#[tokio::test]
async fn an_end_that_is_gone_frees_the_other_though_that_says_nothing() {
    let around = Around::new();
    let (client, mut guest) = around.pair().await;
    drop(client);
    assert_eq!(all(&mut guest).await, "");
    // The guest keeps its end. It is noticed that nobody takes what it might write.
    let noticed = async {
        while guest.write(b"x").await.is_ok() {
            tokio::time::sleep(PAUSE).await;
        }
    };
    timeout(PATIENCE, noticed).await.expect("it is kept");

    // A client that holds its end has its way to the guest closed.
    let (mut client, guest) = around.pair().await;
    drop(guest);
    assert_eq!(all(&mut client).await, "");
    let noticed = async {
        while client.write(b"x").await.is_ok() {
            tokio::time::sleep(PAUSE).await;
        }
    };
    timeout(PATIENCE, noticed).await.expect("it is kept");
}

#[tokio::test(start_paused = true)]
async fn what_a_gone_client_has_left_waits_for_the_guest_only_so_long() {
    let (client, host) = UnixStream::pair().unwrap();
    // Its other end is kept, and takes nothing.
    let (_guest, stream) = tokio::io::duplex(8);
    client.try_write(b"more than the guest takes").unwrap();
    drop(client);
    let began = Instant::now();
    splice(host, GuestStream::new(stream)).await;
    let waited = began.elapsed();
    assert!(
        waited >= splice::LEFT && waited < 3 * splice::LEFT,
        "{waited:?}"
    );
}

#[tokio::test]
async fn a_guest_that_connects_in_vain_warns_a_few_times_only() {
    let around = Around::new();
    let said: Arc<std::sync::Mutex<Vec<u8>>> = Arc::default();
    let writer = Arc::clone(&said);
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(move || Written(Arc::clone(&writer)))
        .finish();
    let _told = tracing::subscriber::set_default(subscriber);
    for _ in 0..3 * LOUD {
        let mut guest = around.fake.dial(5000).unwrap();
        assert_eq!(all(&mut guest).await, "");
    }
    let said = String::from_utf8(said.lock().unwrap().clone()).unwrap();
    let lines = said.lines().filter(|line| line.contains("v_5000")).count();
    assert_eq!(lines, usize::try_from(LOUD).unwrap(), "{said}");
    assert!(said.contains("at the level debug"), "{said}");
}

/// A log in memory.
struct Written(Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Written {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_host_that_has_no_room_yet_is_dialled_again() {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
    let around = Around::new();
    let path = around.folder.path().join("v_5000");
    let (kind, flags) = (SockType::Stream, SockFlag::SOCK_CLOEXEC);
    let socket = nix::sys::socket::socket(AddressFamily::Unix, kind, flags, None).unwrap();
    nix::sys::socket::bind(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    nix::sys::socket::listen(&socket, Backlog::new(0).unwrap()).unwrap();
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener.set_nonblocking(true).unwrap();
    let _other = UnixStream::connect(&path).await.unwrap();
    let full = UnixStream::connect(&path).await.unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::WouldBlock);
    let mut guest = around.fake.dial(5000).unwrap();
    tokio::time::sleep(2 * PAUSE).await;
    let listener = UnixListener::from_std(listener).unwrap();
    listener.accept().await.unwrap();
    let (mut client, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    client.write_all(b"hello").await.unwrap();
    drop(client);
    assert_eq!(all(&mut guest).await, "hello");
}

#[tokio::test]
async fn a_socket_is_this_users_replaces_nothing_and_goes() {
    let around = Around::new();
    let socket = around.folder.path().join("v");
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(
        around.record.resources(),
        [Resource::Socket(socket.clone())]
    );
    let again = error(bind(&socket, &around.record));
    assert!(again.contains("another program listens there"), "{again}");
    assert!(socket.exists());
    drop(around.sockets);
    // Not even what it was made under is left.
    assert_eq!(names(around.folder.path()), [""; 0]);
    assert_eq!(around.record.resources(), []);
}

#[test]
fn the_folder_in_which_a_socket_is_made_is_this_users() {
    let folder = tempfile::tempdir().unwrap();
    let scratch = scratch(folder.path()).unwrap();
    let mode = std::fs::metadata(scratch.path())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[tokio::test]
async fn what_a_killed_process_has_left_is_told_and_freed_by_the_record() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("v");
    let record = record(folder.path());
    let (listener, file) = bind(&socket, &record).unwrap();
    // As a SIGKILL leaves it.
    drop(listener);
    std::mem::forget(file);
    let stale = error(bind(&socket, &record));
    assert!(stale.contains("`vmctl list --prune`"), "{stale}");
    record::cleanup(record.directory()).unwrap();
    assert!(!socket.exists());
    std::fs::write(&socket, "").unwrap();
    let other = error(bind(&socket, &record));
    assert!(other.contains("no socket"), "{other}");
}

#[tokio::test]
async fn a_path_may_be_as_long_as_a_client_can_name() {
    let folder = tempfile::tempdir().unwrap();
    let record = record(folder.path());
    let rest = LONGEST_PATH - folder.path().as_os_str().len() - "/".len();
    // A folder that leaves no room for the one in which the socket is made.
    let longest = folder.path().join("x".repeat(rest - 2)).join("v");
    std::fs::create_dir(longest.parent().unwrap()).unwrap();
    let bound = on(longest.clone(), &[]).bind(&record).unwrap();
    UnixStream::connect(&longest).await.unwrap();
    drop(bound);
    for (longer, ports) in [("x".repeat(rest + 1), &[][..]), ("x".repeat(rest), &[1])] {
        let refused = error(on(folder.path().join(longer), ports).bind(&record));
        assert!(refused.contains("107 at most"), "{refused}");
    }
    assert_eq!(names(longest.parent().unwrap()), [""; 0]);
}

#[tokio::test]
async fn a_port_that_is_taken_is_refused_and_leaves_no_socket() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, _fake, _) = fake::boot();
    let socket = folder.path().join("v");
    let record = record(folder.path());
    for (ports, words) in [(&[5000, 5000][..], "twice"), (&[PORT_LOG], "the agent's")] {
        let refused = error(on(socket.clone(), ports).bind(&record));
        assert!(refused.contains(words), "{refused}");
    }
    let _taken = sandbox.listen(5000).unwrap();
    let bound = on(socket.clone(), &[5000]).bind(&record).unwrap();
    assert!(socket.exists());
    let refused = error(bound.serve(&sandbox));
    assert!(refused.contains("--vsock-port 5000"), "{refused}");
    let nowhere = error(on(folder.path().join("none/v"), &[]).bind(&record));
    assert!(nowhere.contains("none/v"), "{nowhere}");
    assert_eq!(names(folder.path()), [""; 0]);
}
