//! `nacre-bench vsock`: what a stream of the vsock carries where its host's end is in the VM's own process, as the shim has it, and where it
//! comes through the Unix socket of `vmctl`. In both the guest's end is the probe in a container, the server is here, and the port is the
//! same kind.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use nacre_probe::net::Address;
use nacre_probe::net::wire::Content;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixListener;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::guest::GuestKernel;
use super::net::{BIG, Size, Sizes, Vm, Work, answer, make_root};
use super::probed;
use super::report::Report;
use super::run::{Rounds, Run, turns};
use super::{Setting, as_root, interrupt};
use crate::config::{ByteSize, Config};

const TABLE: &str = "vsock, 64 KiB writes";
const IN_PROCESS: &str = "in-process";
const UNIX_SOCKET: &str = "unix-socket";
/// The host's port that the guest connects to by vmctl, and the host's CID.
const PORT: u32 = 5000;
const HOST: u32 = 2;
/// What runs in vmctl's container: a probe for each line, until there is none.
const LINES: &str = "while read -r words; do /nacre-probe $words || echo '{\"error\":\"it failed; its words are above\"}'; done";

/// Options of `nacre-bench vsock`.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Rounds; in each, everything is measured once
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: u64,
    /// Rounds before that, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_up: u64,
    /// MiB that a stream carries
    #[arg(long, value_name = "N", default_value_t = 256, overrides_with = "mib", value_parser = clap::value_parser!(u64).range(1..=512))]
    mib: u64,
    /// vCPUs of the VMs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=254))]
    vcpus: u8,
    /// Memory of the VMs
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: ByteSize,
    /// vmctl [default: beside this program, else in PATH]
    #[arg(long, value_name = "PROGRAM")]
    vmctl: Option<PathBuf>,
    /// The static program that measures [default: NACRE_PROBE, else nacre-probe beside this program or in PATH]
    #[arg(long, value_name = "PROGRAM")]
    probe: Option<PathBuf>,
}

impl Options {
    fn all_rounds(&self) -> Rounds {
        Rounds {
            warm_up: self.warm_up,
            count: self.rounds,
        }
    }

    fn settings(&self) -> Value {
        json!({
            "rounds": self.rounds,
            "warm_up": self.warm_up,
            "mib": self.mib,
            "vcpus": self.vcpus,
            "memory_mib": self.memory.mib(),
        })
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            mib: self.mib,
            requests: 1,
        }
    }
}

/// Measures until all rounds are done, something fails or a signal comes; what there is then is shown and written.
pub(super) fn run(options: &Options, setting: &Setting) -> Result<()> {
    as_root()?;
    let config = Config::load()?;
    let vmctl = Setting::ours(options.vmctl.as_deref(), "vmctl", "--vmctl")?;
    let folder = tempfile::Builder::new()
        .prefix("nacre-bench-vsock-")
        .tempdir()
        .context("making a folder for the containers' root")?;
    let root = folder.path().join("root");
    make_root(&root, &probed::program(options.probe.as_deref())?)?;
    add_shell(&root, &setting.busybox()?)?;
    let mut run = Run::new("vsock", options.settings(), setting);
    run.table(table());
    run.document.guest_kernel = Some(GuestKernel::of(&config.kernel, Some(&config.initrd)));
    run.document.program("vmctl", &vmctl);
    let patience = Duration::from_secs(setting.patience);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting a runtime")?;
    let outcome = runtime.block_on(async {
        let size = Size {
            vcpus: options.vcpus,
            memory_mib: options.memory.mib(),
        };
        let mut vm = tokio::select! {
            vm = Vm::boot(&config, size, &root, patience) => vm?,
            why = interrupt::come() => return Err(why),
        };
        let through = Through::boot(&vmctl, options, folder.path(), patience).await;
        let outcome = match through {
            Ok(mut through) => {
                let measured = tokio::select! {
                    measured = rounds(options, &mut vm, &mut through, &mut run) => measured,
                    why = interrupt::come() => Err(why),
                };
                let ended = through.end().await;
                measured.and(ended)
            }
            Err(error) => Err(error),
        };
        vm.end().await;
        outcome
    });
    run.end(outcome)
}

fn table() -> Report {
    Report::new(TABLE, [IN_PROCESS, UNIX_SOCKET])
}

/// A shell beside the probe.
fn add_shell(root: &Path, busybox: &Path) -> Result<()> {
    let bin = root.join("bin");
    std::fs::create_dir_all(&bin)
        .and_then(|()| std::fs::copy(busybox, bin.join("sh")))
        .with_context(|| format!("copying {}: --busybox names another", busybox.display()))?;
    Ok(())
}

async fn rounds(
    options: &Options,
    vm: &mut Vm,
    through: &mut Through,
    run: &mut Run<'_>,
) -> Result<()> {
    let sizes = options.sizes();
    let rounds = options.all_rounds();
    run.expect(rounds);
    for round in rounds.each() {
        run.begin("vsock", rounds, round)?;
        for work in BIG {
            for turn in turns(2, round.number) {
                let name = [IN_PROCESS, UNIX_SOCKET][turn];
                run.now(&format!("{name}, {}", work.name));
                let line = match name {
                    IN_PROCESS => vm.ask(work, sizes).await,
                    _ => through.ask(work, sizes).await,
                };
                let (unit, values) = line
                    .and_then(|line| work.values(&line, sizes))
                    .with_context(|| {
                        format!("{name} failed in round {}, {}", round.number + 1, work.name)
                    })?;
                for value in values.into_iter().filter(|_| round.counts) {
                    run.add(TABLE, name, work.name, unit, value);
                }
            }
        }
        run.done()?;
    }
    Ok(())
}

/// A container by vmctl, whose connections to one port come to a Unix socket here; vmctl is killed when this is dropped.
struct Through {
    child: Child,
    keys: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    listener: UnixListener,
    content: Content,
    patience: Duration,
}

impl Through {
    /// Starts it. What it says goes on to our standard error.
    async fn boot(
        vmctl: &Path,
        options: &Options,
        folder: &Path,
        patience: Duration,
    ) -> Result<Self> {
        let socket = folder.join("vsock");
        let listener = UnixListener::bind(folder.join(format!("vsock_{PORT}")))
            .context("listening for what the guest connects to")?;
        let mut child = Command::new(vmctl)
            .args(arguments(options, folder, &socket))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", vmctl.display()))?;
        let keys = child.stdin.take().context("vmctl has no stdin")?;
        let stdout = child.stdout.take().context("vmctl has no stdout")?;
        Ok(Self {
            child,
            keys,
            lines: BufReader::new(stdout).lines(),
            listener,
            content: Content::new(),
            patience,
        })
    }

    /// Measures something; the probe's line.
    async fn ask(&mut self, work: Work, sizes: Sizes) -> Result<String> {
        let patience = self.patience;
        let measured = tokio::time::timeout(patience, self.measure(work, sizes));
        measured
            .await
            .with_context(|| format!("it took more than {patience:?}"))?
    }

    async fn measure(&mut self, work: Work, sizes: Sizes) -> Result<String> {
        let to = Address::Vsock {
            cid: HOST,
            port: PORT,
        };
        let mut words = work.words(&to, sizes).join(" ");
        words.push('\n');
        self.keys.write_all(words.as_bytes()).await?;
        self.keys.flush().await?;
        let served = async {
            let (stream, _) = self.listener.accept().await?;
            answer(stream, &self.content).await
        };
        let said = self.lines.next_line();
        tokio::pin!(served, said);
        // The probe has its answer before the stream has ended here.
        let line = tokio::select! {
            served = &mut served => {
                served?;
                said.await?
            }
            said = &mut said => said?,
        };
        match line {
            Some(line) => Ok(line),
            None => bail!("vmctl has ended; its words are above"),
        }
    }

    /// Ends it as it should end: its command has read all lines.
    async fn end(mut self) -> Result<()> {
        drop(self.keys);
        let ended = tokio::time::timeout(self.patience, self.child.wait());
        let status = ended.await.context("vmctl does not end")??;
        match status.success() {
            true => Ok(()),
            false => bail!("vmctl ended with {status}; its words are above"),
        }
    }
}

fn arguments(options: &Options, folder: &Path, socket: &Path) -> Vec<PathBuf> {
    let root = folder.join("root");
    let mut arguments: Vec<PathBuf> = vec!["run".into(), "--rootfs".into(), root];
    arguments.extend(["--vsock".into(), socket.to_owned()]);
    arguments.extend(
        [
            "--vsock-port",
            &PORT.to_string(),
            "--memory",
            &options.memory.to_string(),
            "--vcpus",
            &options.vcpus.to_string(),
            "--tty=never",
            "--",
            "/bin/sh",
            "-c",
            LINES,
        ]
        .map(PathBuf::from),
    );
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::probed::PROBE;
    use crate::bench::report::Unit;

    fn options(words: &str) -> Result<Options, clap::Error> {
        crate::bench::options(words)
    }

    #[test]
    fn options_have_their_defaults_and_their_bounds() {
        let all = options("").unwrap();
        assert_eq!((all.mib, all.rounds), (256, 5));
        // xtask has its own in front of the user's.
        assert_eq!(options("--mib 8 --mib 3").unwrap().mib, 3);
        for words in ["--mib 0", "--mib 513", "--vcpus 0"] {
            assert!(options(words).is_err(), "{words}");
        }
    }

    #[test]
    fn vmctl_is_told_the_port_and_the_probe_its_name() {
        let options = options("--memory 384M --vcpus 2").unwrap();
        let all = arguments(&options, Path::new("/f"), Path::new("/f/vsock"));
        let words: Vec<_> = all.iter().map(|word| word.display().to_string()).collect();
        let line = words.join(" ");
        let begin =
            "run --rootfs /f/root --vsock /f/vsock --vsock-port 5000 --memory 384M --vcpus 2 ";
        assert!(line.starts_with(begin), "{line}");
        assert!(LINES.contains(&format!("/{PROBE} ")));
        // What is measured is as big as asked for.
        let words = BIG[0].words(&"vsock:2:5000", options.sizes()).join(" ");
        assert!(
            words.contains("--bytes 268435456 ") && words.contains("--block 65536"),
            "{words}"
        );
        let mut report = table();
        report.add(IN_PROCESS, BIG[0].name, Unit::MibPerSecond, 3.0);
        report.add(UNIX_SOCKET, BIG[0].name, Unit::MibPerSecond, 2.0);
        assert!(report.table().contains("1.50"));
    }

    #[tokio::test]
    async fn a_line_is_served_and_answered_and_an_end_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let boot = |script: &str| {
            let mut child = Command::new("sh")
                .args(["-c", script])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .unwrap();
            let socket = folder.path().join(format!("s{}", script.len()));
            Through {
                keys: child.stdin.take().unwrap(),
                lines: BufReader::new(child.stdout.take().unwrap()).lines(),
                child,
                listener: UnixListener::bind(socket).unwrap(),
                content: Content::new(),
                patience: Duration::from_secs(20),
            }
        };
        let sizes = Sizes {
            mib: 1,
            requests: 1,
        };
        let mut through = boot("while read -r words; do echo \"$words\"; done");
        let line = through.ask(BIG[1], sizes).await.unwrap();
        assert!(line.starts_with("net receive --to vsock:2:5000 "), "{line}");
        through.end().await.unwrap();
        let mut through = boot("read -r words; exit 3");
        let error = through.ask(BIG[0], sizes).await.unwrap_err();
        assert!(error.to_string().contains("vmctl has ended"), "{error}");
        assert!(through.end().await.is_err());
    }
}
