//! One attachment of a container to a network: ADD, CHECK and DEL over all of the network's plugins.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::conflist::{is_name, plugin_type};
use super::process::{self, BeforeExec, End, Program, Run, Stop};
use super::request::{PortMapping, request};
use super::{AddResult, Conflist, Error, Kind, Version, classify};
use crate::netlink::Socket;
use crate::{Netns, NetnsId, link};

/// How long a plugin may run if nothing else is said.
pub const TIMEOUT: Duration = Duration::from_secs(30);
/// The longest name of an interface, bytes: IFNAMSIZ without its NUL.
const INTERFACE: usize = 15;

/// A container's interface in a network, with all that its plugins are told. Serialised, it is the record by which any
/// process can undo it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attachment {
    /// The network.
    pub network: Conflist,
    /// Where the plugins' programs are, absolute; the first that has one counts.
    pub plugin_dirs: Vec<PathBuf>,
    /// Begins with an ASCII letter or digit, and goes on with letters, digits, `_`, `.` and `-`.
    pub container_id: String,
    /// What the container's interface is to be called: 1 to 15 bytes without `/`, `:` and spaces, and not `.` or `..`.
    pub interface: String,
    /// The network namespace, absolute. Plugins open it by this path.
    pub netns: PathBuf,
    /// CNI_ARGS, in order. Neither names nor values may have `;` in them, names no `=`.
    pub args: Vec<(String, String)>,
    /// For plugins that have the capability `portMappings`. Whether there are any says [`Conflist::wants`].
    pub port_mappings: Vec<PortMapping>,
    /// How long each plugin may run, in each of ADD, CHECK and DEL, before its process group is killed.
    pub timeout: Duration,
    netns_id: Option<NetnsId>,
    /// The interface was there before ADD, so that it is another's unless ADD ends well.
    was_there: bool,
    result: Option<AddResult>,
    #[serde(skip)]
    before_exec: Option<BeforeExec>,
    #[serde(skip)]
    stop: Option<Stop>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Add,
    Check,
    Del,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
        })
    }
}

impl Attachment {
    /// Of a container to a network, without arguments and with [`TIMEOUT`]. Nothing is made or checked yet.
    pub fn new(
        network: Conflist,
        plugin_dirs: Vec<PathBuf>,
        container_id: impl Into<String>,
        interface: impl Into<String>,
        netns: impl Into<PathBuf>,
    ) -> Self {
        Self {
            network,
            plugin_dirs,
            container_id: container_id.into(),
            interface: interface.into(),
            netns: netns.into(),
            args: Vec::new(),
            port_mappings: Vec::new(),
            timeout: TIMEOUT,
            netns_id: None,
            was_there: false,
            result: None,
            before_exec: None,
            stop: None,
        }
    }

    /// Sets what a plugin's process does before it executes the program, such as to go back to the host's namespaces. It is
    /// not part of what is serialised. Programs are looked for, and the network namespace is looked at, where the calling
    /// thread is.
    ///
    /// # Safety
    ///
    /// It is called between fork and exec in what may be a process of several threads: as for
    /// [`CommandExt::pre_exec`](std::os::unix::process::CommandExt::pre_exec), it may make system calls, and neither
    /// allocate nor take locks.
    pub unsafe fn before_exec(&mut self, prepare: fn() -> io::Result<()>) {
        self.before_exec = Some(prepare);
    }

    /// Has ADD and CHECK end by [`Stop::stop`]. What an ADD that is stopped has made is undone as after any failure: DEL is not stopped.
    pub fn stop_by(&mut self, stop: Stop) {
        self.stop = Some(stop);
    }

    /// What ADD resulted in, if it has ended well.
    pub fn result(&self) -> Option<&AddResult> {
        self.result.as_ref()
    }

    /// Runs ADD of all plugins in order. `note` is called with what is to be written down durably: once before the first
    /// plugin runs, and again with the result. If anything fails after the first call, DEL of all has been run on return,
    /// and what failed of that is in the error's words too: a record may go, unless [`Error::also`] has something.
    ///
    /// # Errors
    ///
    /// Of every [`Kind`]. [`Kind::Conflict`] also if it has been added already.
    pub fn add(
        &mut self,
        note: &mut dyn FnMut(&Self) -> io::Result<()>,
    ) -> Result<AddResult, Error> {
        self.check_arguments(Command::Add)?;
        if self.result.is_some() {
            let why = "it is attached already";
            return Err(self.failed(Command::Add, Kind::Conflict, why));
        }
        for plugin in self.network.plugins() {
            self.find(Command::Add, plugin)?;
        }
        let netns = self.open_netns(Command::Add)?;
        self.netns_id = Some(netns.id());
        self.was_there = has_interface(&netns, &self.interface);
        self.write_down(note)?;
        let added = self.add_all().and_then(|result| {
            self.result = Some(result.clone());
            self.write_down(note)?;
            Ok(result)
        });
        added.map_err(|error| {
            let undone = self.del();
            self.result = None;
            match undone {
                Err(other) if !is_same_refusal(&error, &other) => error.and(&other),
                _ => error,
            }
        })
    }

    /// Runs CHECK of all plugins in order, up to the first that fails. Nothing is run if the configuration disables it or has
    /// a version before 0.4.0, which has none.
    ///
    /// # Errors
    ///
    /// That of the plugin that found something wrong; [`Kind::Argument`] if it has not been added;
    /// [`Kind::Namespace`] if the namespace is gone.
    pub fn check(&self) -> Result<(), Error> {
        if self.network.version() < Version::V0_4_0 || self.network.disables_check() {
            return Ok(());
        }
        self.check_arguments(Command::Check)?;
        let Some(result) = &self.result else {
            return Err(self.failed(Command::Check, Kind::Argument, "it is not attached"));
        };
        self.open_netns(Command::Check)?;
        for plugin in self.network.plugins() {
            self.run(Command::Check, plugin, Some(result.raw()))?;
        }
        Ok(())
    }

    /// Runs DEL of all plugins in reverse, whichever of them fail. May be repeated, also when ADD has run in part or
    /// not at all. If the namespace is gone, or another one has its path, the plugins are told that there is none. So they are
    /// if ADD has not ended well and the interface was there before it, since that is another's.
    ///
    /// # Errors
    ///
    /// The first that failed, with the others in its words. A plugin that knows no such container has not failed.
    pub fn del(&self) -> Result<(), Error> {
        self.check_arguments(Command::Del)?;
        let previous = self
            .result
            .as_ref()
            .filter(|_| self.network.version() >= Version::V0_4_0)
            .map(AddResult::raw);
        let mut first: Option<Error> = None;
        for plugin in self.network.plugins().iter().rev() {
            let Err(error) = self.run(Command::Del, plugin, previous) else {
                continue;
            };
            if error.answer().is_some_and(|answer| answer.code == 3) {
                continue;
            }
            first = Some(match first {
                Some(first) => first.and(&error),
                None => error,
            });
        }
        first.map_or(Ok(()), Err)
    }

    fn add_all(&self) -> Result<AddResult, Error> {
        let mut last: Option<AddResult> = None;
        for plugin in self.network.plugins() {
            let previous = last.as_ref().map(AddResult::raw);
            let output = self.run(Command::Add, plugin, previous)?;
            last = Some(self.result_of(plugin, &output)?);
        }
        let none = || self.failed(Command::Add, Kind::Configuration, "it has no plugin");
        last.ok_or_else(none)
    }

    fn write_down(&self, note: &mut dyn FnMut(&Self) -> io::Result<()>) -> Result<(), Error> {
        note(self).map_err(|source| {
            let why = "the attachment cannot be written down";
            self.failed(Command::Add, Kind::Note, why).caused_by(source)
        })
    }

    /// Runs one plugin; its output if it ended well.
    fn run(
        &self,
        command: Command,
        plugin: &Map<String, Value>,
        previous: Option<&Value>,
    ) -> Result<Vec<u8>, Error> {
        let path = self.find(command, plugin)?;
        let stdin = request(&self.network, plugin, &self.port_mappings, previous);
        let program = Program {
            path: &path,
            environment: self.environment(command)?,
            stdin: &stdin,
            timeout: self.timeout,
            before_exec: self.before_exec,
            stop: self.stop.as_ref().filter(|_| command != Command::Del),
        };
        tracing::debug!(container_id = self.container_id, %command, plugin = %path.display(), "a plugin runs");
        let run = process::run(&program).map_err(|source| {
            let why = format!("{} cannot be run", path.display());
            self.failed_by(command, plugin, Kind::Io, why)
                .caused_by(source)
        })?;
        match run.end {
            End::Exited(status) if status.success() => Ok(run.stdout),
            _ => Err(self.failure(command, plugin, &run)),
        }
    }

    fn environment(&self, command: Command) -> Result<Vec<(&'static str, OsString)>, Error> {
        let dirs = std::env::join_paths(&self.plugin_dirs).map_err(|_| {
            let why = format!("a plugin directory has `:` in it: {}", self.dirs());
            self.failed(command, Kind::Argument, why)
        })?;
        let pairs = self
            .args
            .iter()
            .map(|(name, value)| format!("{name}={value}"));
        let netns = match command {
            Command::Del if self.netns_is_anothers() => OsString::new(),
            _ => self.netns.clone().into_os_string(),
        };
        Ok(vec![
            ("CNI_COMMAND", command.to_string().into()),
            ("CNI_CONTAINERID", self.container_id.clone().into()),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", self.interface.clone().into()),
            ("CNI_ARGS", pairs.collect::<Vec<_>>().join(";").into()),
            ("CNI_PATH", dirs),
            ("PATH", process::search_path()),
        ])
    }

    /// The plugin's program.
    fn find(&self, command: Command, plugin: &Map<String, Value>) -> Result<PathBuf, Error> {
        let name = plugin_type(plugin);
        let mut paths = self
            .plugin_dirs
            .iter()
            .map(|directory| directory.join(name));
        paths.find(|path| path.is_file()).ok_or_else(|| {
            let why = format!("the program {name:?} is not in {}", self.dirs());
            self.failed_by(command, plugin, Kind::MissingPlugin, why)
                .help("install it there, or name the directory that has it")
        })
    }

    fn open_netns(&self, command: Command) -> Result<Netns, Error> {
        Netns::open(&self.netns).map_err(|error| {
            let failed = self.failed(command, Kind::Namespace, error.to_string());
            match error {
                crate::Error::Namespace { source, .. } => failed.caused_by(source),
                _ => failed,
            }
        })
    }

    /// Whether DEL has nothing to do in the namespace that is at the path: it is another one than that of ADD, or none, or what
    /// has the interface's name there is not of this attachment. What cannot be found out is for the plugins to say.
    fn netns_is_anothers(&self) -> bool {
        if self.was_there && self.result.is_none() {
            return true;
        }
        match Netns::open(&self.netns) {
            Ok(netns) => self.netns_id.is_some_and(|id| id != netns.id()),
            Err(crate::Error::NoNamespace { .. }) => true,
            // No such file; or one that is not opened at all, as a socket, which is no namespace either.
            Err(crate::Error::Namespace { source, .. }) => {
                let nothing = [libc::ENOENT, libc::ENOTDIR, libc::ENXIO];
                source
                    .raw_os_error()
                    .is_some_and(|errno| nothing.contains(&errno))
            }
            Err(_) => false,
        }
    }

    /// The specification's rules for what a plugin is told in its environment.
    fn check_arguments(&self, command: Command) -> Result<(), Error> {
        let wrong = |why: String| Err(self.failed(command, Kind::Argument, why));
        if !is_name(&self.container_id) {
            return wrong(
                "the container's ID must begin with an ASCII letter or digit and go on with letters, digits, `_`, `.` and `-`".to_owned(),
            );
        }
        if let Some(why) = wrong_interface(&self.interface) {
            return wrong(format!("the interface's name {:?} {why}", self.interface));
        }
        let pair = self.args.iter().find(|(name, value)| {
            name.is_empty() || name.contains(['=', ';', '\0']) || value.contains([';', '\0'])
        });
        if let Some((name, value)) = pair {
            return wrong(format!(
                "the argument {name:?} with the value {value:?} cannot be written as NAME=VALUE between semicolons"
            ));
        }
        let mut paths = self.plugin_dirs.iter().chain([&self.netns]);
        if let Some(path) = paths.find(|path| !is_plain(path)) {
            return wrong(format!("the path {path:?} is not absolute"));
        }
        Ok(())
    }

    fn result_of(&self, plugin: &Map<String, Value>, output: &[u8]) -> Result<AddResult, Error> {
        let wrong = |why: String| {
            let why = format!("{why}, in its output {}", classify::shown(output));
            self.failed_by(Command::Add, plugin, Kind::Output, why)
                .help("renew the plugin, or have its maintainers look at this")
        };
        let mut raw: Map<String, Value> = serde_json::from_slice(output)
            .map_err(|error| wrong(format!("it wrote no JSON object ({error})")))?;
        let version = raw.entry("cniVersion").or_insert(Value::Null);
        if matches!(version, Value::Null) || version == "" {
            *version = self.network.version().as_str().into();
        }
        if version.as_str().and_then(Version::parse).is_none() {
            let why = format!("its result has the version {version}, which is not supported");
            return Err(self
                .failed_by(Command::Add, plugin, Kind::Version, why)
                .help("renew the plugin"));
        }
        AddResult::try_from(Value::Object(raw)).map_err(wrong)
    }

    /// What it means that a plugin did not end well.
    fn failure(&self, command: Command, plugin: &Map<String, Value>, run: &Run) -> Error {
        let meaning = classify::meaning(run, self.timeout);
        let error = self.failed_by(command, plugin, meaning.kind, meaning.why);
        let error = match self.help(meaning.kind) {
            Some(help) => error.help(help),
            None => error,
        };
        match meaning.answer {
            Some(answer) => error.answered(answer),
            None => error,
        }
    }

    /// What to do about a plugin's failure.
    fn help(&self, kind: Kind) -> Option<String> {
        let config = self.network.path().display();
        Some(match kind {
            Kind::Exhausted => format!(
                "remove containers of the network that are not needed, or enlarge its range of addresses in {config}"
            ),
            Kind::Conflict => {
                "remove what has it, or choose another address, name or ID".to_owned()
            }
            Kind::MissingPlugin => format!(
                "install what it names; plugins are searched in {}, other programs in PATH",
                self.dirs()
            ),
            Kind::Configuration => format!("correct {config}"),
            Kind::Version => format!(
                "renew the plugin, or set the `cniVersion` of {config} to one that it supports"
            ),
            Kind::Namespace => format!(
                "the network namespace must be at {} as long as it is attached",
                self.netns.display()
            ),
            Kind::Timeout => {
                "see whether what it waits for answers, such as a daemon or a lock, or allow it more time".to_owned()
            }
            Kind::TryAgain => "try again in some seconds".to_owned(),
            Kind::Output => "renew the plugin, or have its maintainers look at this".to_owned(),
            _ => return None,
        })
    }

    fn failed(&self, command: Command, kind: Kind, why: impl Into<String>) -> Error {
        let doing = format!(
            "CNI {command} of the network {:?} for the container {:?} failed",
            self.network.name(),
            self.container_id
        );
        Error::new(kind, doing, why)
    }

    fn failed_by(
        &self,
        command: Command,
        plugin: &Map<String, Value>,
        kind: Kind,
        why: impl Into<String>,
    ) -> Error {
        let doing = format!(
            "CNI {command} of the network {:?} by the plugin {} for the container {:?} failed",
            self.network.name(),
            plugin_type(plugin),
            self.container_id
        );
        Error::new(kind, doing, why)
    }

    fn dirs(&self) -> String {
        match self.plugin_dirs.as_slice() {
            [] => "any directory, since none is given".to_owned(),
            dirs => {
                let dirs = dirs.iter().map(|path| path.display().to_string());
                dirs.collect::<Vec<_>>().join(" or ")
            }
        }
    }
}

/// Not, if it cannot be found out: the plugins will say why.
fn has_interface(netns: &Netns, name: &str) -> bool {
    let links = netns.enter(|| link::list(&mut Socket::open()?));
    links.is_ok_and(|links| links.iter().any(|link| link.name == name))
}

/// Whether a plugin has refused a version in ADD, so that it has made nothing, and again in DEL.
fn is_same_refusal(add: &Error, del: &Error) -> bool {
    add.kind() == Kind::Version && del.kind() == Kind::Version && del.also().is_empty()
}

fn is_plain(path: &Path) -> bool {
    path.is_absolute() && !path.as_os_str().as_encoded_bytes().contains(&0)
}

/// What is wrong with the name of an interface, as the end of a sentence.
fn wrong_interface(name: &str) -> Option<String> {
    let is_wrong =
        |letter: char| matches!(letter, '/' | ':') || letter.is_whitespace() || letter.is_control();
    if name.is_empty() || name.len() > INTERFACE {
        return Some(format!("must have 1 to {INTERFACE} bytes"));
    }
    if matches!(name, "." | "..") || name.contains(is_wrong) {
        return Some("must have no `/`, `:` or space, and not be `.` or `..`".to_owned());
    }
    None
}
