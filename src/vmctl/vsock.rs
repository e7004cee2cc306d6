//! A VM's vsock ports as Unix sockets, in the form that other VMMs have too. Host to guest: a client connects to the one socket, writes
//! `CONNECT PORT` and a line feed, and reads `OK` with a number when the guest has accepted; from there on the stream is the guest's. A
//! refusal is the connection's end. Guest to host: what the guest connects to, of the ports that were named, comes to the socket of the
//! same name with `_PORT` behind it.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes,
};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use crate::sandbox::{GuestStream, PortListener, Sandbox};

/// Bytes of the longest line that a client may begin with, without its end.
const LINE: usize = 32;
/// How long a client may take over its line, and the guest over its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Before the next connection is awaited, after one could not be had.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes on their way between the two, each way.
const BUFFER: usize = 64 << 10;
/// Connections of one VM at a time, by its socket and by each of its ports.
const CONNECTIONS: usize = 256;

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

/// Serves until it is dropped, which ends its connections and removes the socket.
pub(super) struct Sockets {
    _tasks: JoinSet<()>,
    _file: Option<SocketFile>,
}

/// The socket's file; gone with this.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the vsock's socket was not removed");
        }
    }
}

impl Vsock {
    /// Serves what was asked for. Needs a tokio runtime.
    pub(super) fn serve(&self, sandbox: &Sandbox) -> Result<Sockets> {
        let mut tasks = JoinSet::new();
        let Some(socket) = &self.vsock else {
            return Ok(Sockets {
                _tasks: tasks,
                _file: None,
            });
        };
        // Ports first: what is refused then leaves no socket.
        for port in &self.vsock_ports {
            let listener = sandbox
                .listen(*port)
                .with_context(|| format!("--vsock-port {port}"))?;
            let mut path = socket.as_os_str().to_owned();
            path.push(format!("_{port}"));
            tasks.spawn(from_guest(listener, path.into()));
        }
        let (listener, file) = bind(socket)?;
        let sandbox = sandbox.downgrade();
        tasks.spawn(to_guest(listener, move |port| {
            let sandbox = sandbox.upgrade();
            async move {
                let sandbox = sandbox.context("The VM has ended")?;
                Ok(sandbox.connect(port).await?)
            }
        }));
        Ok(Sockets {
            _tasks: tasks,
            _file: Some(file),
        })
    }
}

/// A socket that only this user may connect to, where nothing is yet.
fn bind(path: &Path) -> Result<(UnixListener, SocketFile)> {
    let failed = || {
        format!(
            "Cannot listen on {}, as --vsock says: nothing may be there, and its folder must be",
            path.display()
        )
    };
    // Made under another name in a folder that nobody else enters, so that no one connects before the mode is set.
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let folder = tempfile::Builder::new()
        .prefix(".vsock-")
        .tempdir_in(parent)
        .with_context(failed)?;
    let made = folder.path().join("s");
    let listener = UnixListener::bind(&made).with_context(failed)?;
    std::fs::set_permissions(&made, std::fs::Permissions::from_mode(0o600)).with_context(failed)?;
    // A link, unlike a rename, does not replace what is there.
    std::fs::hard_link(&made, path).with_context(failed)?;
    Ok((listener, SocketFile(path.to_owned())))
}

/// Takes clients, each until its stream has ended.
async fn to_guest<F>(listener: UnixListener, connect: impl Fn(u32) -> F + Send + Sync + 'static)
where
    F: Future<Output = Result<(GuestStream, u32)>> + Send + 'static,
{
    let connect = Arc::new(connect);
    let mut connections = JoinSet::new();
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
            tracing::warn!(CONNECTIONS, "one connection too many to the vsock's socket");
            continue;
        }
        let connect = Arc::clone(&connect);
        let asked = async move {
            let (mut client, port) = wanted(client).await?;
            let asked = tokio::time::timeout(PATIENCE, connect(port));
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
            tracing::warn!(CONNECTIONS, "one connection too many of the guest");
            continue;
        }
        let socket = socket.clone();
        connections.spawn(async move {
            match UnixStream::connect(&socket).await {
                Ok(client) => splice(client, guest).await,
                // Dropped, the guest's end is reset.
                Err(error) => {
                    tracing::warn!(socket = %socket.display(), %error, "nobody takes the guest's connection");
                }
            }
        });
    }
}

/// Bytes each way, and each way's end by itself, until both have ended or one breaks.
async fn splice(mut client: UnixStream, mut guest: GuestStream) {
    if let Err(error) = copy_bidirectional_with_sizes(&mut client, &mut guest, BUFFER, BUFFER).await
    {
        tracing::debug!(%error, "a stream of the vsock broke");
    }
}

/// The port that a client asks for; nothing behind its line is read.
async fn wanted(mut client: UnixStream) -> Result<(UnixStream, u32)> {
    let line = tokio::time::timeout(PATIENCE, line(&mut client));
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
