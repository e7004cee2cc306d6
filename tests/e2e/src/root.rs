//! A guest whose root is not the agent's friend: beside the agent, outside of all containers, runs a shell that does what the case
//! says, with all of `/sys`, `/proc` and `/dev`. The container's shell carries its words, by two pipes in the container's root.

use anyhow::{Context as _, Result, ensure};

use crate::context::Context;
use crate::initrd::Initrd;
use crate::shell::{Kernel, Shell};

/// Runs before the agent, and leaves behind what waits for the pipes and then serves them. What the agent covers with mounts of its own
/// stays open to it, since its root is the kernel's first one.
const SERVES: &str = "\
/busybox mkdir -p /own/bin /own/proc /own/sys /own/dev
/busybox --install -s /own/bin
export PATH=/own/bin
mount -t proc proc /own/proc
mount -t sysfs sys /own/sys
mount -t devtmpfs dev /own/dev
(
    cd /own
    until set -- proc/[0-9]*/root/root.said; [ -p \"$1\" ]; do usleep 200000; done
    pipes=${1%.said}
    while cat $pipes.ask > told; do sh told > $pipes.said 2>&1; done
) < /own/dev/null > /own/dev/null 2>&1 &
exec /init";

impl<'a> Shell<'a> {
    /// Starts one in a guest with such a root; whatever the guest does not do in `patience` seconds fails. The kernel gets
    /// these words beside.
    pub fn start_with_root(
        context: &'a Context,
        name: &str,
        options: &[&str],
        patience: u64,
        cmdline: &str,
    ) -> Result<Self> {
        let initrd = Initrd::write(context, Some(SERVES))?;
        let patience = context.seconds(patience).as_secs();
        let settings =
            format!("cmdline = \"rdinit=/first {cmdline}\"\nresize_timeout = \"{patience}s\"\n");
        let options = [&["--initrd", initrd.path()], options].concat();
        let mut shell = Self::launch(context, name, Kernel::Usual, &options, &settings)?;
        shell
            .tell("mkfifo /root.ask /root.said")
            .context("the shell's beginning")?;
        let (_, user) = shell.as_root("id -u; test -e sys/devices/system/cpu/cpu0")?;
        ensure!(user == "0", "the guest's root is {user:?}");
        Ok(shell)
    }

    /// Has the guest's root run a command in a folder with `sys`, `proc` and `dev`; its code and what it printed. What it leaves running
    /// must keep none of its output open.
    pub fn as_root(&mut self, command: &str) -> Result<(i32, String)> {
        let out = self.tell(&format!(
            "cat > /root.ask <<'END'\n({command})\necho \"=$?\"\nEND\ncat /root.said"
        ))?;
        let (said, code) = out
            .rsplit_once('=')
            .with_context(|| format!("the guest's root said {out:?} to `{command}`"))?;
        Ok((code.trim().parse()?, said.trim_end().to_owned()))
    }

    /// Has the guest's root do something that must succeed.
    pub fn root(&mut self, command: &str) -> Result<String> {
        let (code, said) = self.as_root(command)?;
        ensure!(
            code == 0,
            "for the guest's root, `{command}` ended with {code}: {said}"
        );
        Ok(said)
    }

    /// Has the guest's root do something again and again, some milliseconds apart, until [`Shell::root_stops`].
    pub fn root_keeps(&mut self, what: &str, ms: u32) -> Result<()> {
        self.root(&format!(
            "rm -f stop; (until [ -e stop ]; do {what}; usleep {ms}000; done) < dev/null > dev/null 2>&1 & echo $! > keeps"
        ))?;
        Ok(())
    }

    /// Ends what it keeps doing, and waits for that.
    pub fn root_stops(&mut self) -> Result<()> {
        self.root("touch stop; while [ -d proc/$(cat keeps) ]; do usleep 20000; done")?;
        Ok(())
    }
}
