//! `vmctl run`: one container in one VM, without containerd. Its root is a
//! directory that is shared read-only, with the guest's memory over it for what
//! is written; its stdio is ours; its exit code too.

use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use nacre_net::Netns;
use nacre_net::cni::PortMapping;
use tokio::sync::mpsc;

use super::RUN_FAILED;
use super::resize::Most;
use super::session::{NAMESPACE, Session, Signals, check_name, default_name};
use super::terminal::{self, RawMode};
use super::vsock::Vsock;
use crate::config::{ByteSize, Config};
use crate::network::{Cni, List, Names, Network, cni_id};
use crate::record::Resource;
use crate::sandbox::shares::Share;
use crate::sandbox::spec::{Bind, GuestSpec, for_guest};
use crate::sandbox::storage::make_file_system;
use crate::sandbox::{
    Access, AgentEvent, Caching, DiskConfig, Error, GuestDirectory, GuestLine, GuestMount,
    GuestStream, Sandbox, SandboxConfig, Source, Stdio, StdioListener, chain,
};

mod command_spec;
mod publish;
mod streams;

use command_spec::{Command, Volume};
use streams::{Copies, copy_in, read_stdin};

/// How long output may take to arrive after the process has ended.
const DRAIN: Duration = Duration::from_secs(30);
/// Signals of the user that end vmctl whatever the container does with them.
const INSISTENT: u32 = 3;

const HELP: &str = "\
Exit code: the command's own; 128+N if signal N ended it; 125 if the container could not be run or its output \
could not be written, 126 if its \
command cannot be executed, 127 if there is none. SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed \
to the command; the third SIGINT or SIGTERM ends the VM. When nobody reads the output any more the command is \
killed, and the exit code is 141.";

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Args {
    /// Directory with the container's root file system; it is never written: what the container writes is in the VM's
    /// memory or on a scratch disk, and gone with it
    #[arg(long, value_name = "DIR")]
    rootfs: PathBuf,
    /// Keep what the container writes to its root on a disk of this size, such as 4G, in place of the VM's memory: a sparse
    /// file in the state directory, which goes with the VM
    #[arg(long, value_name = "SIZE")]
    scratch: Option<ByteSize>,
    /// A directory or file of the host in the container, written through unless :ro is added. May be given several times
    #[arg(long = "volume", short = 'v', value_name = "SRC:DST[:ro]", value_parser = Volume::parse)]
    volumes: Vec<Volume>,
    /// Give the VM a network by CNI plugins: a network list's file, or the name of a network in the configured directory,
    /// else in /etc/cni/net.d. Without it there is loopback only
    #[arg(long, value_name = "CONFLIST|NAME")]
    net: Option<String>,
    /// Publish a port of the container on the host, if the network's plugins do that (portmap): HOST:CONTAINER, with an address
    /// of the host before it, or /udp or /sctp after it. May be given several times
    #[arg(
        long = "publish",
        short = 'p',
        value_name = "[IP:]HOST:CONTAINER[/PROTO]",
        value_parser = publish::parse,
        requires = "net"
    )]
    publish: Vec<PortMapping>,
    /// Memory of the VM, such as 512M or 2G [default: from the configuration]
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// vCPUs of the VM, 1 to 254 [default: from the configuration]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=254))]
    vcpus: Option<u8>,
    #[command(flatten)]
    most: Most,
    /// An environment variable; NAME alone takes vmctl's own value. May be given several times
    #[arg(long = "env", short = 'e', value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Working directory in the container
    #[arg(long, value_name = "PATH", default_value = "/")]
    cwd: PathBuf,
    /// User and group: UID, UID:GID, or names that the root's /etc/passwd and /etc/group have
    #[arg(long, short = 'u', value_name = "USER[:GROUP]", default_value = "0")]
    user: String,
    /// Whether the command has a terminal; auto: if standard input and output are one
    #[arg(
        long,
        short = 't',
        value_name = "WHEN",
        num_args = 0..=1,
        require_equals = true,
        default_value = "auto",
        default_missing_value = "always"
    )]
    tty: When,
    /// Make the root read-only
    #[arg(long)]
    read_only: bool,
    /// Guest kernel [default: from the configuration]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// initrd with the agent [default: from the configuration]
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Show the guest's console and the agent's log on standard error
    #[arg(long)]
    verbose: bool,
    #[command(flatten)]
    vsock: Vsock,
    /// Name of the VM in `vmctl list` [default: run-PID]
    #[arg(long, value_parser = check_name)]
    name: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(super) command: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum When {
    Auto,
    Always,
    Never,
}

pub(super) async fn run(config: &Config, args: &Args, main_ns: u64) -> anyhow::Result<u8> {
    let id = args.name.clone().unwrap_or_else(|| default_name("run"));
    let tty = match args.tty {
        When::Auto => terminal::is_interactive(),
        When::Always => true,
        When::Never => false,
    };
    let command = Command {
        args: args.command.clone(),
        env: args.env.clone(),
        cwd: args.cwd.clone(),
        user: args.user.clone(),
        terminal: tty,
        read_only_root: args.read_only,
        volumes: args.volumes.clone(),
        hostname: id.clone(),
    };
    let mut spec = command.spec(&args.rootfs)?;
    let mut signals = Signals::new(&[
        libc::SIGINT,
        libc::SIGTERM,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGWINCH,
    ])?;
    let mut session = Session::begin(config, &id)?;
    let vsock = args.vsock.bind(&session.record)?;
    let network = match &args.net {
        Some(list) => {
            let list = List::of(list, config.network.directory());
            Some(network(config, &session, &id, list, &args.publish)?)
        }
        None => None,
    };
    if let Some(network) = &network {
        network.mount_names(&mut spec);
    }
    let spec = for_guest(&spec, &id, "1")?;
    let mut sandbox_config =
        SandboxConfig::new(config, NAMESPACE, &id, session.directory().to_owned());
    sandbox_config.main_ns = Some(main_ns);
    if let Some(kernel) = &args.kernel {
        sandbox_config.kernel = kernel.clone();
    }
    if let Some(initrd) = &args.initrd {
        sandbox_config.initrd = Some(initrd.clone());
    }
    if let Some(memory) = args.memory {
        sandbox_config.memory_mib = memory.mib();
    }
    if let Some(vcpus) = args.vcpus {
        sandbox_config.vcpus = vcpus;
    }
    args.most.apply(config, &mut sandbox_config)?;
    if args.verbose {
        sandbox_config.console.lines = Some(Arc::new(print_line));
    }
    let sandbox = Sandbox::boot(sandbox_config)?;
    let container = Container {
        id,
        sandbox: sandbox.clone(),
        tty,
        network: network.clone(),
    };
    let ran = async {
        session.serve(&sandbox).await?;
        let _sockets = vsock.serve(&sandbox)?;
        container
            .run(config, args, &session, spec, &mut signals)
            .await
    }
    .await;
    // In order, whatever became of the container; the session then frees the state.
    sandbox.shutdown().await;
    if let Some(network) = network
        && let Err(error) = network.take_down(None).await
    {
        eprintln!("vmctl: {}", chain(&error));
    }
    drop(session);
    ran
}

/// A network namespace of its own, which is gone with us, to be filled by a list's plugins.
fn network(
    config: &Config,
    session: &Session,
    id: &str,
    list: List,
    publish: &[PortMapping],
) -> anyhow::Result<Arc<Network>> {
    // What is wrong with it is better known before the boot.
    let known = list.load()?;
    if !publish.is_empty() && !known.wants("portMappings") {
        bail!(
            "--publish: no plugin of the network {:?} publishes ports; add portmap with the capability portMappings to {}",
            known.name(),
            known.path().display()
        );
    }
    let netns = Netns::create()?;
    // The plugins are other processes.
    let path = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        netns.as_fd().as_raw_fd()
    );
    let mut cni = Cni::new(list, &config.network, cni_id(NAMESPACE, id), path.into());
    cni.ports = publish.to_vec();
    let names = Names::make(session.directory(), id)?;
    let network = Network::of(Arc::clone(&session.record), netns);
    Ok(Arc::new(network.filled_by(cni, Some(names))))
}

fn print_line(line: &GuestLine) {
    let source = match line.source {
        Source::Console => "console",
        Source::Agent => "agent",
    };
    eprintln!(
        "[{source} {} {}] {}\r",
        line.level, line.component, line.message
    );
}

/// The one container of this VM.
struct Container {
    id: String,
    sandbox: Sandbox,
    tty: bool,
    network: Option<Arc<Network>>,
}

impl Container {
    async fn run(
        &self,
        config: &Config,
        args: &Args,
        session: &Session,
        spec: GuestSpec,
        signals: &mut Signals,
    ) -> anyhow::Result<u8> {
        let events = self
            .sandbox
            .events()
            .context("The sandbox's events are taken")?;
        let (created, _shares) = {
            let create = self.create(config, args, session, spec);
            tokio::pin!(create);
            loop {
                tokio::select! {
                    created = &mut create => break created?,
                    signal = signals.next() => if signal != libc::SIGWINCH {
                        // Nothing runs yet that could take it.
                        return Ok(128 + signal as u8);
                    },
                }
            }
        };
        let raw = if self.tty { RawMode::enter()? } else { None };
        let code = self.attend(created, events, signals).await;
        drop(raw);
        code
    }

    /// Root, container, process, and the streams that it has dialled.
    async fn create(
        &self,
        config: &Config,
        args: &Args,
        session: &Session,
        spec: GuestSpec,
    ) -> anyhow::Result<(Streams, Vec<Share>)> {
        let sharing = {
            let (sandbox, rootfs) = (self.sandbox.clone(), args.rootfs.clone());
            let (binds, cache) = (spec.binds.clone(), config.share.cache);
            tokio::task::spawn_blocking(move || share(&sandbox, &rootfs, &binds, cache))
        };
        let shares = sharing.await.context("Sharing the root failed")??;
        let scratch = match args.scratch {
            Some(size) => Some(self.scratch(session, size).await?),
            None => None,
        };
        let stdin = self.sandbox.stdio_listener()?;
        let stdout = self.sandbox.stdio_listener()?;
        let stderr = if self.tty {
            None
        } else {
            Some(self.sandbox.stdio_listener()?)
        };
        let mut stdio = Stdio::new();
        stdio.stdin_port = stdin.port();
        stdio.stdout_port = stdout.port();
        stdio.stderr_port = stderr.as_ref().map_or(0, StdioListener::port);
        stdio.terminal = self.tty;
        if let Some((columns, rows)) = self.tty.then(terminal::size).flatten() {
            stdio.columns = u32::from(columns);
            stdio.rows = u32::from(rows);
        }
        let binds = !spec.binds.is_empty();
        self.sandbox
            .create_container(&self.id, spec.json, root(&shares, scratch), binds, stdio)
            .await?;
        if let Some(network) = &self.network {
            network.bring_up(&self.sandbox, &self.id).await?;
        }
        let streams = async {
            Ok::<_, Error>(Streams {
                stdin: stdin.accept().await?,
                stdout: stdout.accept().await?,
                stderr: match stderr {
                    Some(stderr) => Some(stderr.accept().await?),
                    None => None,
                },
            })
        };
        Ok((streams.await?, shares))
    }

    /// A disk for what is written; its device in the guest.
    async fn scratch(&self, session: &Session, size: ByteSize) -> anyhow::Result<String> {
        let path = session.directory().join("scratch.img");
        session.record.add(Resource::File(path.clone()))?;
        let made = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || make_file_system(&path, "ext4", size.0, None))
        };
        made.await.context("Making the scratch disk failed")??;
        let disk = DiskConfig::file(path, false, "scratch");
        Ok(self.sandbox.attach_disk(disk, 0).await?.device)
    }

    /// Starts the process and serves it until it has ended and its output has arrived.
    async fn attend(
        &self,
        streams: Streams,
        mut events: mpsc::Receiver<AgentEvent>,
        signals: &mut Signals,
    ) -> anyhow::Result<u8> {
        let mut copies = Copies::default();
        copies.output("output", streams.stdout, tokio::io::stdout());
        if let Some(stderr) = streams.stderr {
            copies.output("error", stderr, tokio::io::stderr());
        }
        if let Err(error) = self.sandbox.start(&self.id, "").await {
            return not_started(error);
        }
        let stdin = tokio::spawn(copy_in(read_stdin()?, streams.stdin));
        let insisted = AtomicU32::new(0);
        let status = loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(AgentEvent::Exit { exec_id, status, .. }) if exec_id.is_empty() => break status,
                    Some(AgentEvent::Oom { .. }) => eprintln!("vmctl: the container ran out of memory\r"),
                    Some(AgentEvent::Exit { .. } | AgentEvent::Pressure { .. }) => {}
                    None => {
                        let reason = self.sandbox.ended().await;
                        let console = self.sandbox.console_tail();
                        return Err(Error::Gone { reason, console }.into());
                    }
                },
                signal = signals.next() => self.signal(signal, &insisted).await?,
                // The guest would go on and drop what it writes; a command that we ran here would not.
                () = copies.lost() => self.signal(libc::SIGKILL, &insisted).await?,
            }
        };
        stdin.abort();
        if tokio::time::timeout(DRAIN, copies.drain()).await.is_err() {
            eprintln!("vmctl: the container's output did not end within {DRAIN:?}\r");
        }
        if let Err(error) = self.sandbox.delete_container(&self.id).await {
            tracing::warn!(%error, "the container was not deleted in the guest");
        }
        Ok(copies.loss().unwrap_or(status))
    }

    async fn signal(&self, signal: i32, insisted: &AtomicU32) -> anyhow::Result<()> {
        if signal == libc::SIGWINCH {
            if let Some((columns, rows)) = self.tty.then(terminal::size).flatten()
                && let Err(error) = self
                    .sandbox
                    .resize_pty(&self.id, "", u32::from(columns), u32::from(rows))
                    .await
            {
                tracing::warn!(%error, "the terminal was not resized");
            }
            return Ok(());
        }
        if matches!(signal, libc::SIGINT | libc::SIGTERM)
            && insisted.fetch_add(1, Ordering::Relaxed) + 1 >= INSISTENT
        {
            bail!("Ended by signal {signal}, which the container was sent {INSISTENT} times");
        }
        let number = u32::try_from(signal).unwrap_or_default();
        match self.sandbox.signal(&self.id, "", number, false).await {
            Err(error) if error.code() == Some(ttrpc::Code::NOT_FOUND) => Ok(()),
            sent => Ok(sent?),
        }
    }
}

/// Shares the root, which is the first, and what the spec binds.
fn share(
    sandbox: &Sandbox,
    rootfs: &Path,
    binds: &[Bind],
    cache: Duration,
) -> Result<Vec<Share>, Error> {
    // Nobody changes it but, perhaps, the user beside us.
    let caching = Caching::For(cache);
    let mut shares = vec![sandbox.share("1.root", rootfs, Access::ReadOnly, caching, true)?];
    for bind in binds {
        // Volumes are absolute; see `Volume::parse`.
        shares.push(sandbox.share_bind(bind, Path::new("/"), caching)?);
    }
    Ok(shares)
}

/// The shared root with a file system over it: on the device of a disk, or in memory.
fn root(shares: &[Share], scratch: Option<String>) -> Vec<GuestMount> {
    let mut mounts: Vec<GuestMount> = shares
        .first()
        .map(|root| root.mount("lower"))
        .into_iter()
        .collect();
    let mut over = GuestMount::new();
    over.target = "over".to_owned();
    match scratch {
        Some(device) => {
            over.fstype = "ext4".to_owned();
            over.source = device;
        }
        None => {
            over.fstype = "tmpfs".to_owned();
            over.source = "tmpfs".to_owned();
            over.options = vec!["mode=0700".to_owned()];
        }
    }
    let mut root = GuestMount::new();
    root.fstype = "overlay".to_owned();
    root.source = "overlay".to_owned();
    root.target = "rootfs".to_owned();
    root.options = ["lowerdir=lower", "upperdir=over/upper", "workdir=over/work"]
        .map(str::to_owned)
        .to_vec();
    for path in ["over/upper", "over/work"] {
        let mut directory = GuestDirectory::new();
        directory.path = path.to_owned();
        directory.mode = 0o755;
        root.directories.push(directory);
    }
    mounts.extend([over, root]);
    mounts
}

/// The codes that shells have taught everyone for a command that cannot be run.
fn not_started(error: Error) -> anyhow::Result<u8> {
    let code = match &error {
        Error::Refused { message, .. } if message.contains("ermission denied") => 126,
        Error::Refused { code, message, .. }
            if *code == ttrpc::Code::NOT_FOUND
                || message.contains("No such file")
                || message.contains("not found") =>
        {
            127
        }
        _ => return Err(anyhow!(error)),
    };
    eprintln!("vmctl: {error}");
    debug_assert_ne!(code, RUN_FAILED);
    Ok(code)
}

/// The process's streams.
struct Streams {
    stdin: GuestStream,
    stdout: GuestStream,
    stderr: Option<GuestStream>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_is_not_there_is_127_and_one_that_cannot_run_126() {
        let refused = |code, message: &str| Error::Refused {
            call: "starting".to_owned(),
            code,
            message: message.to_owned(),
        };
        let internal = ttrpc::Code::INTERNAL;
        assert_eq!(
            not_started(refused(internal, "/nope: No such file or directory")).unwrap(),
            127
        );
        assert_eq!(
            not_started(refused(internal, "/etc: Permission denied")).unwrap(),
            126
        );
        not_started(refused(internal, "something else")).unwrap_err();
    }
}
