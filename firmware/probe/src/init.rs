//! The first process of a guest that has no agent: loads the modules that the image brought, mounts a disk and a share or configures a
//! network, and does what the lines on its console say, an answer each.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io::BufRead;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, ensure};
use clap::Parser;
use nacre_probe::net;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::{Cli, Command};

/// What each line of ours begins with: the kernel writes to the console too.
const MARK: &str = "nacre-probe:";
/// Where the image has its modules, and the list of them.
const MODULES: &str = "/modules";
const DISK: (&str, &str) = ("/dev/vda", "/disk");
const SHARE: (&str, &str) = ("share", "/share");
/// How long a device may take to come.
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves until the console says `end`, and ends the machine.
pub fn run(network: Option<&Path>) -> Error {
    if std::process::id() != 1 {
        return anyhow::anyhow!("init is for the first process of a guest");
    }
    if let Err(error) = serve(network) {
        println!("{MARK} {}", failure(&error));
    }
    nix::unistd::sync();
    match reboot(RebootMode::RB_POWER_OFF) {
        Err(error) => Error::new(error).context("powering off"),
        Ok(never) => match never {},
    }
}

fn serve(network: Option<&Path>) -> Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        attach(kind, target, kind)?;
    }
    console()?;
    load_modules()?;
    match network {
        Some(description) => configure(description)?,
        None => attach_files()?,
    }
    println!("{MARK} ready");
    for line in std::io::stdin().lock().lines() {
        let line = line.context("reading the console")?;
        match line.trim() {
            "" => {}
            "end" => break,
            words => println!("{MARK} {}", answer(words)),
        }
    }
    if network.is_none() {
        for (_, target) in [DISK, SHARE] {
            umount(target).with_context(|| format!("unmounting {target}"))?;
        }
    }
    Ok(())
}

fn attach_files() -> Result<()> {
    awaited(&format!("disk {}", DISK.0), || Path::new(DISK.0).exists())?;
    attach(DISK.0, DISK.1, "ext4")?;
    attach(SHARE.0, SHARE.1, "virtiofs")
}

fn configure(description: &Path) -> Result<()> {
    let doing = || format!("configuring the network of {}", description.display());
    let text = fs::read_to_string(description).with_context(doing)?;
    let network: nacre_net::describe::Network = serde_json::from_str(&text).with_context(doing)?;
    let links = Path::new("/sys/class/net");
    // Loopback, and those that are described.
    let wanted = network.interfaces.len() + 1;
    awaited("network device", || {
        fs::read_dir(links).is_ok_and(|entries| entries.count() >= wanted)
    })?;
    nacre_net::apply(&network).with_context(doing)
}

/// Waits for a device.
fn awaited(device: &str, is_there: impl Fn() -> bool) -> Result<()> {
    let began = Instant::now();
    while !is_there() {
        ensure!(
            began.elapsed() < PATIENCE,
            "there is no {device}: does the initrd have the module of its bus (virtio_pci)?"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn attach(source: &str, target: &str, kind: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("making {target}"))?;
    let nothing = None::<&str>;
    mount(Some(source), target, Some(kind), MsFlags::empty(), nothing)
        .with_context(|| format!("mounting {source} ({kind}) on {target}"))
}

/// The standard streams, without echo and without changes of what passes.
fn console() -> Result<()> {
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/console")
        .context("opening /dev/console")?;
    let mut line = tcgetattr(&console).context("asking the console")?;
    cfmakeraw(&mut line);
    tcsetattr(&console, SetArg::TCSANOW, &line).context("setting the console")?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}

/// Loads all modules of the list; what a missing one would have brought is missed later.
fn load_modules() -> Result<()> {
    let list = Path::new(MODULES).join("order");
    let order = fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    for file in order.lines().filter_map(module) {
        let path = Path::new(MODULES).join(file);
        let module = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let no_words: &CStr = c"";
        if let Err(error) = finit_module(module, no_words, ModuleInitFlags::empty()) {
            println!("{MARK} loading {file}: {error}");
        }
    }
    Ok(())
}

/// The file in a line `boot FILE` or `late FILE`.
fn module(line: &str) -> Option<&str> {
    let (_, file) = line.trim().split_once(char::is_whitespace)?;
    Some(file.trim()).filter(|file| !line.starts_with('#') && !file.is_empty())
}

/// What a command gave, as one line of JSON.
fn answer(words: &str) -> String {
    let command = std::iter::once("nacre-probe").chain(words.split_whitespace());
    let outcome = Cli::try_parse_from(command)
        .map_err(|error| anyhow::anyhow!("{}", error.to_string().replace('\n', " ")))
        .and_then(|cli| match cli.command {
            Command::Init { .. }
            | Command::Hello
            | Command::Idle
            | Command::Net(net::Command::Serve { .. }) => {
                Err(anyhow::anyhow!("{words} is not for a console"))
            }
            command => command.run(),
        });
    outcome.unwrap_or_else(|error| failure(&error))
}

fn failure(error: &Error) -> String {
    serde_json::json!({ "error": format!("{error:#}") }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_answered_by_a_line_of_json() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().display();
        let made = answer(&format!("make {at} --mib 1 --files 3"));
        assert!(made.contains("\"count\":3"), "{made}");
        let read = answer(&format!("read {at}/file"));
        assert!(read.contains("\"bytes\":1048576"), "{read}");
        for words in ["read", "read /nowhere", "init", "jump"] {
            let said = answer(words);
            assert!(
                said.starts_with("{\"error\":") && !said.contains('\n'),
                "{said}"
            );
        }
    }

    #[test]
    fn a_description_that_is_none_is_an_error_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("network.json");
        for text in ["", "{}"] {
            fs::write(&file, text).unwrap();
            let error = format!("{:#}", configure(&file).unwrap_err());
            assert!(error.contains("network.json"), "{error}");
        }
    }

    #[test]
    fn modules_are_listed_by_group() {
        assert_eq!(module("late virtio_pci.ko"), Some("virtio_pci.ko"));
        assert_eq!(module("boot  a.ko "), Some("a.ko"));
        for line in ["", "# late a.ko", "late"] {
            assert_eq!(module(line), None, "{line}");
        }
    }
}
