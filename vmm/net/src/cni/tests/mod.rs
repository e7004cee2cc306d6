//! Plugins that are shell scripts and log what they are told, in a directory of each test's own.

mod conflists;
mod deadlines;
mod meanings;
mod order;
mod real;
mod results;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{AddResult, Attachment, Conflist, Error};

/// What is opened as the container's namespace where it does not matter which.
const NETNS: &str = "/proc/self/ns/net";
/// What no interface there is called.
const INTERFACE: &str = "nacre-test";

struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for directory in ["bin", "log", "net.d"] {
            std::fs::create_dir(host.path(directory)).unwrap();
        }
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Installs a plugin that logs its command, environment and stdin, and then runs `body`.
    fn plugin(&self, name: &str, body: &str) {
        let log = self.path("log");
        let log = log.display();
        self.silent_plugin(
            name,
            &format!(
                "echo \"$CNI_COMMAND {name}\" >>{log}/order\n\
                 env >{log}/{name}.$CNI_COMMAND.env\n\
                 cat >{log}/{name}.$CNI_COMMAND.stdin\n{body}"
            ),
        );
    }

    /// Installs one that runs `body` alone.
    fn silent_plugin(&self, name: &str, body: &str) {
        let path = self.path("bin").join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn write(&self, name: &str, config: &Value) -> PathBuf {
        let path = self.path("net.d").join(name);
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    /// Of a network with these plugins.
    fn attachment(&self, version: &str, plugins: Value) -> Attachment {
        let config = json!({"cniVersion": version, "name": "dbnet", "plugins": plugins});
        self.attachment_of(&config)
    }

    fn attachment_of(&self, config: &Value) -> Attachment {
        let network = Conflist::load(self.write("10-db.conflist", config)).unwrap();
        Attachment::new(network, vec![self.path("bin")], "c1", INTERFACE, NETNS)
    }

    /// Commands and plugins in the order in which they ran.
    fn order(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.path("log/order")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn forget(&self) {
        std::fs::remove_file(self.path("log/order")).unwrap();
    }

    fn stdin(&self, run: &str) -> Value {
        let text = std::fs::read(self.path(&format!("log/{run}.stdin"))).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    fn environment(&self, run: &str) -> Vec<(String, String)> {
        let text = std::fs::read_to_string(self.path(&format!("log/{run}.env"))).unwrap();
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    fn variable(&self, run: &str, name: &str) -> Option<String> {
        let all = self.environment(run);
        let found = all.into_iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value)
    }

    /// What a script wrote as a process's number, once it has.
    fn pid(&self, name: &str) -> u32 {
        let path = self.path(name);
        let read = || std::fs::read_to_string(&path).ok()?.trim().parse().ok();
        let mut pid = None;
        until(name, || {
            pid = read();
            pid.is_some()
        });
        pid.unwrap()
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "no {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process runs; one that only waits to be reaped by another does not.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

fn add(attachment: &mut Attachment) -> Result<AddResult, Error> {
    attachment.add(&mut |_| Ok(()))
}

fn text_of(error: &Error) -> String {
    error.in_full()
}

/// A script's line that writes JSON.
fn says(json: &Value) -> String {
    format!("echo '{json}'")
}

fn result() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "sandbox": NETNS}],
        "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 0}],
        "dns": {},
    })
}
