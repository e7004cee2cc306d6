//! The command line as containerd writes it: single-dash flags in the manner of
//! Go's `flag` package, then one action. Nothing here touches the system.

use std::path::PathBuf;

/// What the program was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// `start`: bring up a daemon and answer with its address.
    Start,
    /// `delete`: free what a dead daemon left.
    Delete,
    /// The daemon itself, as `start` spawns it.
    Daemon,
    /// `-v`: print the version.
    Version,
    /// `-info`: print what the runtime can do.
    Info,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flags {
    /// containerd's namespace.
    pub namespace: String,
    /// Container id.
    pub id: String,
    /// containerd's gRPC address.
    pub address: String,
    /// Path of a program that publishes events; containerd's ttrpc address serves for that.
    pub publish_binary: Option<String>,
    /// Bundle, where it is not the working directory.
    pub bundle: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
    /// Of the daemon: when its `start` began, CLOCK_MONOTONIC in nanoseconds.
    pub begun_ns: Option<u64>,
    /// What to do.
    pub action: Action,
}

/// What is wrong with a command line.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// An option that does not exist.
    #[error(
        "Unknown option {0}; known are -namespace, -id, -address, -publish-binary, -bundle, -debug, -info, -v"
    )]
    Unknown(String),
    /// An option without its value.
    #[error("Option -{0} needs a value")]
    NoValue(String),
    /// A value that a switch does not take.
    #[error("Option -{option} takes true or false, not {value:?}")]
    NotBoolean {
        /// The switch.
        option: String,
        /// What was given.
        value: String,
    },
    /// No or an unknown action.
    #[error("The action is {0:?}; it must be start or delete")]
    Action(String),
    /// A flag that the action cannot do without.
    #[error("Option -{0} must not be empty")]
    Empty(&'static str),
    /// A container id or namespace that could leave its directory.
    #[error("Option -{option} is {value:?}, which contains a path separator")]
    Separator {
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
    },
}

/// The hidden action by which `start` runs the daemon; the time at which `start` began follows it.
pub const DAEMON_ACTION: &str = "daemon";

/// Parses the arguments after the program's name.
///
/// # Errors
/// An unknown option, a missing or wrong value, or no action that is known.
pub fn parse(args: &[String]) -> Result<Flags, Error> {
    let mut flags = Flags {
        namespace: String::new(),
        id: String::new(),
        address: String::new(),
        publish_binary: None,
        bundle: None,
        debug: false,
        begun_ns: None,
        action: Action::Version,
    };
    let (mut version, mut info) = (false, false);
    let mut rest = args.iter();
    let mut action = "";
    while let Some(arg) = rest.next() {
        let Some(name) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
            action = arg;
            break;
        };
        if name.is_empty() {
            action = rest.next().map_or("", String::as_str);
            break;
        }
        let (name, inline) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (name, None),
        };
        match name {
            "debug" => flags.debug = switch(name, inline)?,
            "v" | "version" => version = switch(name, inline)?,
            "info" => info = switch(name, inline)?,
            "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket"
            | "debug-socket" => {
                let value = match inline {
                    Some(value) => value,
                    None => rest
                        .next()
                        .cloned()
                        .ok_or_else(|| Error::NoValue(name.to_owned()))?,
                };
                match name {
                    "namespace" => flags.namespace = value,
                    "id" => flags.id = value,
                    "address" => flags.address = value,
                    "publish-binary" => flags.publish_binary = Some(value),
                    "bundle" => flags.bundle = Some(PathBuf::from(value)),
                    // The address is ours to choose, and we answer with it.
                    _ => {}
                }
            }
            _ => return Err(Error::Unknown(arg.clone())),
        }
    }
    flags.action = match action {
        _ if version => Action::Version,
        _ if info => Action::Info,
        "start" => Action::Start,
        "delete" => Action::Delete,
        DAEMON_ACTION => {
            flags.begun_ns = rest.next().and_then(|ns| ns.parse().ok());
            Action::Daemon
        }
        other => return Err(Error::Action(other.to_owned())),
    };
    if matches!(
        flags.action,
        Action::Start | Action::Delete | Action::Daemon
    ) {
        named("namespace", &flags.namespace)?;
        named("id", &flags.id)?;
    }
    Ok(flags)
}

fn switch(name: &str, inline: Option<String>) -> Result<bool, Error> {
    match inline.as_deref() {
        None | Some("true" | "1" | "t" | "T" | "TRUE" | "True") => Ok(true),
        Some("false" | "0" | "f" | "F" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(Error::NotBoolean {
            option: name.to_owned(),
            value: value.to_owned(),
        }),
    }
}

fn named(option: &'static str, value: &str) -> Result<(), Error> {
    if value.is_empty() {
        return Err(Error::Empty(option));
    }
    if value.contains('/') || value == "." || value == ".." || value.contains('\0') {
        return Err(Error::Separator {
            option,
            value: value.to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Vec<String> {
        line.split(' ')
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn the_line_of_containerd_2_is_understood() {
        let flags = parse(&args(
            "-namespace default -address /run/c.sock -publish-binary /usr/bin/containerd -id c1 -debug start",
        ))
        .unwrap();
        assert_eq!(flags.namespace, "default");
        assert_eq!(flags.id, "c1");
        assert_eq!(flags.address, "/run/c.sock");
        assert!(flags.debug);
        assert_eq!(flags.action, Action::Start);
    }

    #[test]
    fn both_dashes_equals_signs_and_false_work_as_in_go() {
        let flags = parse(&args("--namespace=n -id=i -debug=false -bundle /b delete")).unwrap();
        assert_eq!(flags.bundle, Some(PathBuf::from("/b")));
        assert!(!flags.debug);
        assert_eq!(flags.action, Action::Delete);
        assert_eq!(flags.publish_binary, None);
    }

    #[test]
    fn the_daemon_is_told_when_its_start_began() {
        let flags = parse(&args("-namespace n -id i daemon 77")).unwrap();
        assert_eq!((flags.action, flags.begun_ns), (Action::Daemon, Some(77)));
        let flags = parse(&args("-namespace n -id i daemon")).unwrap();
        assert_eq!(flags.begun_ns, None);
    }

    #[test]
    fn version_and_info_need_nothing_else() {
        assert_eq!(parse(&args("-v")).unwrap().action, Action::Version);
        assert_eq!(parse(&args("-info")).unwrap().action, Action::Info);
    }

    #[test]
    fn mistakes_name_the_option() {
        for (line, error) in [
            ("-frob start", Error::Unknown("-frob".into())),
            ("-namespace n -id", Error::NoValue("id".into())),
            (
                "-debug=maybe start",
                Error::NotBoolean {
                    option: "debug".into(),
                    value: "maybe".into(),
                },
            ),
            ("-namespace n -id i stop", Error::Action("stop".into())),
            ("-namespace n -id i", Error::Action(String::new())),
            ("-id i start", Error::Empty("namespace")),
            ("-namespace n start", Error::Empty("id")),
            (
                "-namespace n -id a/b start",
                Error::Separator {
                    option: "id",
                    value: "a/b".into(),
                },
            ),
            (
                "-namespace .. -id a start",
                Error::Separator {
                    option: "namespace",
                    value: "..".into(),
                },
            ),
        ] {
            assert_eq!(parse(&args(line)), Err(error), "{line}");
        }
    }
}
