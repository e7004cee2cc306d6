//! A VM's vsock ports as Unix sockets, in the form that other VMMs have too. Host to guest: a client connects to the one socket, writes
//! `CONNECT PORT` and a line feed, and reads `OK` with a number when the guest has accepted; from there on the stream is the guest's. A
//! refusal is the connection's end. Guest to host: what the guest connects to, of the ports that were named, comes to the socket of the
//! same name with `_PORT` behind it.

use std::future::Future;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nacre_protocol::{PORT_CALLS, PORT_EVENTS, PORT_LOG};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::record::{self, Record, Resource};
use crate::sandbox::{GuestStream, PortListener, Sandbox};

mod splice;

use splice::splice;

/// Bytes of the longest line that a client may begin with, without its end.
const LINE: usize = 32;
/// How long a client may take over its line, and the guest over its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Before the next connection is awaited, after one could not be had.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections of one VM at a time, by its socket and by each of its ports.
const CONNECTIONS: usize = 256;
/// Connections that could not be had of which each is a warning; a guest does not fill the output of vmctl.
const LOUD: u64 = 4;
/// Bytes of the path of a Unix socket, at most.
const LONGEST_PATH: usize = 107;

/// Options of what boots a VM.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct Vsock {
    /// Listen on this Unix socket for connections to the guest's vsock ports: a client writes CONNECT PORT and a line feed,
    /// and reads OK and a number when the guest has accepted
    #[arg(long, value_name = "SOCKET")]
    vsock: Option<PathBuf>,
    /// Hand the guest's connections to this vsock port of the host (CID 2), below 65536, to the Unix socket SOCKET_PORT.
    /// May be given several times
    #[arg(long = "vsock-port", value_name = "PORT", requires = "vsock", value_parser = clap::value_parser!(u32).range(1..65536))]
    vsock_ports: Vec<u32>,
}

/// The socket, bound, and who connects waits; nothing if it was not asked for.
pub(super) struct Bound {
    socket: Option<(UnixListener, SocketFile)>,
    /// Ports of the host, and the socket of each.
    ports: Vec<(u32, PathBuf)>,
}

/// Serves until it is dropped, which ends its connections and removes the socket.
pub(super) struct Sockets {
    _tasks: JoinSet<()>,
    _file: Option<SocketFile>,
}

/// The socket's file; gone with this. The record has it too, for when this process is killed.
struct SocketFile {
    path: PathBuf,
    record: Arc<Record>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the vsock's socket was not removed");
        }
        // Only forgets it: it is gone.
        if let Err(error) = self.record.free(&Resource::Socket(self.path.clone())) {
            tracing::warn!("the vsock's socket is still in the record: {error}");
        }
    }
}

impl Vsock {
    /// Takes the socket's name, if a socket was asked for. Needs a tokio runtime.
    pub(super) fn bind(&self, record: &Arc<Record>) -> Result<Bound> {
        let Some(socket) = &self.vsock else {
            return Ok(Bound {
                socket: None,
                ports: Vec::new(),
            });
        };
        let mut ports = Vec::new();
        for (index, port) in self.vsock_ports.iter().copied().enumerate() {
            ensure!(
                !self.vsock_ports[..index].contains(&port),
                "--vsock-port {port} is given twice"
            );
            ensure!(
                ![PORT_CALLS, PORT_EVENTS, PORT_LOG].contains(&port),
                "--vsock-port {port}: this port is the agent's; choose another"
            );
            let mut path = socket.as_os_str().to_owned();
            path.push(format!("_{port}"));
            ports.push((port, PathBuf::from(path)));
        }
        let paths = ports.iter().map(|(_, path)| path);
        for path in paths.chain([socket]) {
            let bytes = path.as_os_str().len();
            ensure!(
                bytes <= LONGEST_PATH,
                "--vsock: {} has {bytes} bytes, and the path of a Unix socket has {LONGEST_PATH} at most: choose a shorter one, or one from \
                 the directory where vmctl is started",
                path.display()
            );
        }
        Ok(Bound {
            socket: Some(bind(socket, record)?),
            ports,
        })
    }
}

impl Bound {
    /// Serves what was asked for.
    pub(super) fn serve(self, sandbox: &Sandbox) -> Result<Sockets> {
        let mut tasks = JoinSet::new();
        for (port, socket) in self.ports {
            let listener = sandbox
                .listen(port)
                .with_context(|| format!("--vsock-port {port}"))?;
            tasks.spawn(from_guest(listener, socket));
        }
        let file = self.socket.map(|(listener, file)| {
            let sandbox = sandbox.downgrade();
            tasks.spawn(to_guest(listener, move |port| {
                let sandbox = sandbox.upgrade();
                async move {
                    let sandbox = sandbox.context("The VM has ended")?;
                    Ok(sandbox.connect(port).await?)
                }
            }));
            file
        });
        Ok(Sockets {
            _tasks: tasks,
            _file: file,
        })
    }
}

/// A socket that only this user may connect to, where nothing is yet.
fn bind(path: &Path, record: &Arc<Record>) -> Result<(UnixListener, SocketFile)> {
    let failed = || format!("Cannot listen on {}, as --vsock says", path.display());
    // Another directory may be the current one when the record is read.
    let path = std::path::absolute(path).with_context(failed)?;
    let parent = path.parent().with_context(failed)?;
    let scratch = scratch(parent).with_context(failed)?;
    // By the folder's descriptor: its path is longer than the socket's own, which may be as long as it can be.
    let folder = std::fs::File::open(scratch.path()).with_context(failed)?;
    let made = scratch.path().join("s");
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/s", folder.as_raw_fd()))
        .with_context(failed)?;
    std::fs::set_permissions(&made, std::fs::Permissions::from_mode(0o600)).with_context(failed)?;
    // A link, unlike a rename, does not replace what is there.
    if let Err(error) = std::fs::hard_link(&made, &path) {
        let error = match error.kind() {
            std::io::ErrorKind::AlreadyExists => anyhow!(occupant(&path)),
            _ => error.into(),
        };
        return Err(error.context(failed()));
    }
    let file = SocketFile {
        path: path.clone(),
        record: Arc::clone(record),
    };
    // After it is there: before, what another has there would be in the record.
    record.add(Resource::Socket(path.clone()))?;
    Ok((listener, file))
}

/// A folder that no other user enters, whatever the umask: in it a socket gets its mode before anybody can connect to it.
fn scratch(parent: &Path) -> std::io::Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix(".vsock-")
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir_in(parent)
}

/// What is where the socket should be, and what to do about it.
fn occupant(path: &Path) -> &'static str {
    let kind = std::fs::symlink_metadata(path).map(|there| there.file_type());
    if !kind.is_ok_and(|kind| kind.is_socket()) {
        return "a file is there that is no socket, and is not replaced: choose another path";
    }
    match record::listened(path) {
        Ok(true) => "another program listens there: choose another path",
        Ok(false) => {
            "the socket there is one that nobody listens on, as a vmctl leaves that is killed: `vmctl list --prune` removes what \
             these have left; else remove it"
        }
        Err(_) => {
            "another socket is there: choose another path, or remove it if nobody listens on it"
        }
    }
}

/// Tells that a connection could not be had: the first few times as a warning.
fn complain(told: &AtomicU64, what: &str) {
    let count = told.fetch_add(1, Ordering::Relaxed) + 1;
    if count < LOUD {
        tracing::warn!("{what}");
    } else if count == LOUD {
        tracing::warn!("{what}; from here on this is told at the level debug");
    } else {
        tracing::debug!(count, "{what}");
    }
}

/// Takes clients, each until its stream has ended.
async fn to_guest<F>(listener: UnixListener, connect: impl Fn(u32) -> F + Send + Sync + 'static)
where
    F: Future<Output = Result<(GuestStream, u32)>> + Send + 'static,
{
    let connect = Arc::new(connect);
    let mut connections = JoinSet::new();
    let told = AtomicU64::new(0);
    loop {
        let client = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => client,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the vsock's socket");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
        };
        if connections.len() >= CONNECTIONS {
            complain(
                &told,
                &format!("the vsock's socket has {CONNECTIONS} connections, and takes no more"),
            );
            continue;
        }
        let connect = Arc::clone(&connect);
        let asked = async move {
            let (mut client, port) = wanted(client).await?;
            let asked = timeout(PATIENCE, connect(port));
            let (guest, from) = asked
                .await
                .with_context(|| format!("The guest did not answer on vsock port {port}"))??;
            client.write_all(format!("OK {from}\n").as_bytes()).await?;
            splice(client, guest).await;
            anyhow::Ok(())
        };
        connections.spawn(async move {
            if let Err(error) = asked.await {
                tracing::info!("a client of the vsock's socket: {error:#}");
            }
        });
    }
}

/// Hands the guest's connections to one port to whoever listens on a Unix socket.
async fn from_guest(mut listener: Box<dyn PortListener>, socket: PathBuf) {
    let mut connections = JoinSet::new();
    let (socket, told) = (Arc::new(socket), Arc::new(AtomicU64::new(0)));
    loop {
        let guest = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(guest) => guest,
                // The VM is gone.
                Err(_) => return,
            },
            Some(_) = connections.join_next() => continue,
        };
        if connections.len() >= CONNECTIONS {
            let what = format!(
                "the guest has {CONNECTIONS} connections to {}",
                socket.display()
            );
            complain(&told, &format!("{what}, and gets no more"));
            continue;
        }
        let (socket, told) = (Arc::clone(&socket), Arc::clone(&told));
        connections.spawn(async move {
            match dial(&socket).await {
                Ok(client) => splice(client, guest).await,
                // The guest's end is dropped: it reads an end at once.
                Err(error) => {
                    let socket = socket.display();
                    complain(
                        &told,
                        &format!("nobody takes the guest's connection at {socket}: {error}"),
                    );
                }
            }
        });
    }
}

/// Connects to a Unix socket; one that has no room for more is tried again for a while.
async fn dial(socket: &Path) -> std::io::Result<UnixStream> {
    let end = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket).await {
            Err(error)
                if error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < end =>
            {
                tokio::time::sleep(PAUSE).await;
            }
            dialled => return dialled,
        }
    }
}

/// The port that a client asks for; nothing behind its line is read.
async fn wanted(mut client: UnixStream) -> Result<(UnixStream, u32)> {
    let line = timeout(PATIENCE, line(&mut client));
    let line = line.await.context("It did not say which port")??;
    Ok((client, port(&line)?))
}

async fn line(client: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Result<String> {
    let mut line = Vec::new();
    loop {
        match client.read_u8().await.context("reading its line")? {
            b'\n' => break,
            _ if line.len() == LINE => bail!("Its line is longer than {LINE} bytes"),
            byte => line.push(byte),
        }
    }
    String::from_utf8(line).context("Its line is no text")
}

fn port(line: &str) -> Result<u32> {
    let port = line.strip_prefix("CONNECT ").map(str::trim);
    let digits = port.filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()));
    digits
        .and_then(|port| port.parse().ok())
        .with_context(|| format!("It said {line:?} instead of CONNECT PORT"))
}

#[cfg(test)]
mod tests;
