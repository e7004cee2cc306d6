//! A container by `vmctl run` whose shell is told what to do line by line; the VM is resized meanwhile by `vmctl resize`. What its process holds
//! on the host is in [`crate::held`].

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::context::Context;
use crate::ctr::{self, Output, expect_words};
use crate::{image, poll, processes};

/// Which guest kernel a VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// The suite's usual one.
    Usual,
    /// Linux 6.12.
    Newer,
}

/// The running container. Dropping it ends the VM.
pub(crate) struct Shell<'a> {
    context: &'a Context,
    /// Its name as `vmctl` knows it.
    pub name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    said: Receiver<Vec<u8>>,
    /// What was said and not read yet.
    rest: Vec<u8>,
    commands: u32,
    errors: PathBuf,
}

/// Has the guest's kernel say which of its tasks hangs, and where: it is part of what a case that failed says.
const TELLS: &str = "sysctl.kernel.hung_task_timeout_secs=10 rcupdate.rcu_cpu_stall_timeout=10";

impl<'a> Shell<'a> {
    /// Starts one with these options of `vmctl run`, and waits for the shell's first answer.
    pub fn start(
        context: &'a Context,
        name: &str,
        kernel: Kernel,
        options: &[&str],
    ) -> Result<Self> {
        let mut shell = Self::start_unready(context, name, kernel, options)?;
        shell.tell("echo ready").context("the shell's beginning")?;
        Ok(shell)
    }

    /// Starts one and does not wait: the guest boots.
    pub fn start_unready(
        context: &'a Context,
        name: &str,
        kernel: Kernel,
        options: &[&str],
    ) -> Result<Self> {
        // Where the guest does not give back what it uses, the host waits for this long.
        let patience = context.seconds(15).as_secs();
        let settings = format!("cmdline = \"{TELLS}\"\nresize_timeout = \"{patience}s\"\n");
        Self::launch(context, name, kernel, options, &settings)
    }

    /// Starts one with this configuration, and does not wait.
    pub(super) fn launch(
        context: &'a Context,
        name: &str,
        kernel: Kernel,
        options: &[&str],
        settings: &str,
    ) -> Result<Self> {
        let root = context.path("rootfs");
        if !root.exists() {
            std::fs::create_dir_all(&root)?;
            image::unpack(&context.programs.busybox, &root)?;
        }
        let config = context.path("nacre.toml");
        std::fs::write(&config, settings)?;
        let errors = context.path(format!("{name}.err"));
        let name = context.id(name);
        let mut command = vmctl(context);
        command.env("NACRE_CONFIG", config);
        command.args(["run", "--verbose", "--name", &name, "--rootfs"]);
        command.arg(root);
        if kernel == Kernel::Newer {
            for (option, file) in [("--kernel", "vmlinux"), ("--initrd", "initrd")] {
                let file = context.programs.newer.join(file);
                ensure!(
                    file.exists(),
                    "there is no {}: `cargo xtask test` makes it, NACRE_IMAGE_6_12 names its folder",
                    file.display()
                );
                command.arg(option).arg(file);
            }
        }
        command.args(options).args(["--", "sh"]);
        eprintln!("+ {command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors)?)
            .spawn()
            .context("starting vmctl run")?;
        let stdin = child.stdin.take();
        let mut stdout = child.stdout.take().context("no stdout")?;
        let (sender, said) = std::sync::mpsc::channel();
        // Ends with the program's end of the pipe.
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(read @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Shell {
            context,
            name,
            child,
            stdin,
            said,
            rest: Vec::new(),
            commands: 0,
            errors,
        })
    }

    /// The process that holds the VM.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said on standard error.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.errors).unwrap_or_default()).into_owned()
    }

    /// Has the shell run a command, and gives what it printed; fails unless it succeeds.
    pub fn tell(&mut self, command: &str) -> Result<String> {
        let (code, out) = self.ask(command)?;
        ensure!(
            code == 0,
            "in the guest, `{command}` ended with {code}: {out}"
        );
        Ok(out)
    }

    /// Has the shell run a command; its code and what it printed.
    pub fn ask(&mut self, command: &str) -> Result<(i32, String)> {
        let began = Instant::now();
        self.commands += 1;
        let end = format!("<{}:", self.commands);
        self.write(format!("{{ {command}\n}} 2>&1; echo \"{end}$?>\"\n").as_bytes())?;
        let limit = self.context.seconds(120);
        let said = self.read_until(end.as_bytes(), limit)?;
        let code = self.read_until(b">\n", limit)?;
        let out = String::from_utf8_lossy(&said).trim_end().to_owned();
        let code = String::from_utf8_lossy(&code).parse()?;
        eprintln!(
            "  guest: {command}\n    {code} after {:.2} s: {out}",
            began.elapsed().as_secs_f64()
        );
        Ok((code, out))
    }

    /// The number that a command prints.
    pub fn number(&mut self, command: &str) -> Result<u64> {
        let out = self.tell(command)?;
        out.parse()
            .with_context(|| format!("`{command}` printed {out:?}, no number"))
    }

    /// Bytes for its standard input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin.write_all(bytes).context("writing to the shell")
    }

    /// Becomes another program, which gets these two: its standard input and output.
    pub fn becomes(&mut self, program: &str) -> Result<(ChildStdin, Receiver<Vec<u8>>)> {
        // The shell reads ahead; what the program is to get is not to be sent before the shell is gone.
        self.write(format!("exec sh -c 'echo \"<begins>\"; exec {program}'\n").as_bytes())?;
        self.read_until(b"<begins>\n", self.context.seconds(30))?;
        let stdin = self.stdin.take().context("standard input is closed")?;
        let (_, nothing) = std::sync::mpsc::channel();
        Ok((stdin, std::mem::replace(&mut self.said, nothing)))
    }

    /// All that it prints before `end`, which goes too.
    fn read_until(&mut self, end: &[u8], limit: Duration) -> Result<Vec<u8>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.rest.windows(end.len()).position(|part| part == end) {
                let said = self.rest.drain(..at).collect();
                self.rest.drain(..end.len());
                return Ok(said);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(left) {
                Ok(more) => self.rest.extend(more),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!(
                        "the VM ended ({:?}): {}",
                        self.child.try_wait(),
                        self.errors()
                    )
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.show_where_it_stands();
                    bail!(
                        "the shell printed only {:?} within {limit:?}; standard error: {}",
                        String::from_utf8_lossy(&self.rest),
                        self.errors()
                    )
                }
            }
        }
    }

    /// For a guest that says nothing any more: whether its vCPUs run, and whether its agent answers.
    fn show_where_it_stands(&self) {
        for _ in 0..2 {
            eprintln!("  threads of process {}:", self.pid());
            for line in processes::threads(self.pid() as i32) {
                eprintln!("    {line}");
            }
            for command in ["inspect", "top"] {
                let mut vmctl = vmctl(self.context);
                let said = ctr::run(vmctl.args([command, &self.name, "--json"]));
                match said {
                    Ok(output) => eprintln!("  {command}: {} {}", output.out(), output.err()),
                    Err(error) => eprintln!("  {command}: {error:#}"),
                }
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    /// `vmctl resize` of this VM.
    pub fn try_resize(&self, options: &[&str]) -> Result<Output> {
        let mut command = vmctl(self.context);
        command.args(["resize", &self.name]).args(options);
        ctr::run(&mut command)
    }

    /// `vmctl resize` that must succeed; what it says as JSON.
    pub fn resize(&self, options: &[&str]) -> Result<Value> {
        let output = self.try_resize(&[options, &["--json"]].concat())?;
        output.expect_code(0)?;
        serde_json::from_slice(&output.stdout).context("vmctl resize --json printed no JSON")
    }

    /// `vmctl resize` that must fail with these words, and not by a time limit of vmctl's.
    pub fn refused(&self, options: &[&str], words: &[&str]) -> Result<Output> {
        let output = self.try_resize(options)?;
        ensure!(
            output.code == 1 || output.code == 2,
            "vmctl resize {options:?} gave {}: {}",
            output.code,
            output.out()
        );
        expect_words(&output.err(), words)?;
        Ok(output)
    }

    /// `vmctl inspect` of this VM.
    pub fn inspect(&self) -> Result<Value> {
        let mut command = vmctl(self.context);
        let output = ctr::run(command.args(["inspect", &self.name, "--json"]))?;
        output.expect_code(0)?;
        serde_json::from_slice(&output.stdout).context("vmctl inspect --json printed no JSON")
    }

    /// `vmctl top` of this VM.
    pub fn usage(&self) -> Result<Value> {
        let mut command = vmctl(self.context);
        let output = ctr::run(command.args(["top", &self.name, "--json"]))?;
        output.expect_code(0)?;
        let all: Value = serde_json::from_slice(&output.stdout)?;
        Ok(all[0].clone())
    }

    /// Fails unless the VM has so many vCPUs and MiB by what its process says.
    pub fn expect_size(&self, vcpus: u64, memory_mib: u64) -> Result<()> {
        let usage = self.usage()?;
        let size = (usage["vcpus"].as_u64(), usage["memory_mib"].as_u64());
        ensure!(
            size == (Some(vcpus), Some(memory_mib)),
            "it has {size:?} vCPUs and MiB instead of {vcpus} and {memory_mib}"
        );
        Ok(())
    }

    /// How `vmctl run` has ended, if it has.
    pub fn ended(&mut self) -> Result<Option<String>> {
        Ok(self.child.try_wait()?.map(|status| status.to_string()))
    }

    /// Ends the VM whatever its guest does: the third signal does it. Signals that come together are one.
    pub fn stop(mut self) -> Result<()> {
        let limit = self.context.seconds(30);
        poll::until("the end of vmctl run", limit, || {
            let ended = self.child.try_wait()?;
            if ended.is_none() {
                processes::signal(self.pid() as i32, Signal::SIGTERM);
                std::thread::sleep(Duration::from_millis(500));
            }
            Ok(ended)
        })?;
        Ok(())
    }

    /// Lets the shell end, and expects its VM to.
    pub fn end(mut self) -> Result<()> {
        self.stdin = None;
        let limit = self.context.seconds(30);
        let status = poll::until("the end of vmctl run", limit, || {
            Ok(self.child.try_wait()?)
        })?;
        ensure!(
            status.success(),
            "vmctl run ended with {status}: {}",
            self.errors()
        );
        Ok(())
    }
}

impl Drop for Shell<'_> {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        eprintln!("  standard error of {}: {}", self.name, self.errors());
        self.stdin = None;
        let ended = poll::until("the end of vmctl run", Duration::from_secs(10), || {
            Ok(self.child.try_wait()?)
        });
        if ended.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The program, with nothing said yet.
pub(crate) fn vmctl(context: &Context) -> Command {
    Command::new(context.programs.vmctl())
}
