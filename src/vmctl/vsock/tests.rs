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

struct Around {
    folder: tempfile::TempDir,
    fake: Arc<fake::Fake>,
    _sandbox: Sandbox,
    sockets: Sockets,
}

impl Around {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (sandbox, fake, _) = fake::boot();
        let socket = folder.path().join("v");
        let vsock = Vsock {
            vsock: Some(socket),
            vsock_ports: vec![5000],
        };
        let sockets = vsock.serve(&sandbox).unwrap();
        Self {
            folder,
            fake,
            _sandbox: sandbox,
            sockets,
        }
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
async fn a_socket_is_this_users_replaces_nothing_and_goes() {
    let around = Around::new();
    let socket = around.folder.path().join("v");
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = bind(&socket).err().unwrap();
    assert!(format!("{error:#}").contains("nothing may be there"));
    drop(around.sockets);
    assert!(!socket.exists());
    // Not even what it was made under is left.
    assert_eq!(std::fs::read_dir(around.folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_port_that_is_taken_is_refused_and_leaves_no_socket() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, _fake, _) = fake::boot();
    let socket = folder.path().join("v");
    assert!(sandbox.listen(65_536).is_err());
    let nowhere = Vsock {
        vsock: Some(folder.path().join("none/v")),
        vsock_ports: Vec::new(),
    };
    let error = nowhere.serve(&sandbox).err().unwrap();
    assert!(format!("{error:#}").contains("none/v"), "{error:#}");
    assert!(!socket.exists());
}
