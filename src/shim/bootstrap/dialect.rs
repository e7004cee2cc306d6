//! How containerd speaks to `start`, by release: what it puts on stdin, and in
//! which of three forms it takes the answer. Pure, but for the bounded read.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use protobuf::Message;

/// No caller writes more than this.
const STDIN_LIMIT: usize = 10 << 20;
/// How long a caller may leave stdin open without writing to it.
const STDIN_SILENCE: Duration = Duration::from_secs(2);
/// How long reading stdin may take in all.
const STDIN_TOTAL: Duration = Duration::from_secs(5);
/// `LOG_LEVEL_DEBUG` of the bootstrap protocol; smaller is more verbose.
const LOG_LEVEL_DEBUG: i32 = -4;

/// The form of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// 2.3 and later: a protobuf `BootstrapResult`, version 3.
    Protobuf,
    /// JSON of the same, version 3.
    Json,
    /// 1.7 to 2.2: JSON with version 2.
    Version2,
    /// 1.6: the bare address.
    Address,
}

/// What stdin and the environment said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The form of the answer.
    pub dialect: Dialect,
    /// Where sockets are wanted.
    pub socket_dir: Option<PathBuf>,
    /// Where events go, if it was said.
    pub ttrpc_address: Option<String>,
    /// Verbose logging was asked for.
    pub debug: bool,
}

/// Reads what the caller wrote, without ever waiting for one that writes
/// nothing: a terminal or /dev/null is not read at all, a pipe for two seconds of silence.
///
/// # Errors
/// The read failed, or there were more than 10 MiB.
pub fn read_stdin(stdin: impl AsFd + Read) -> io::Result<Vec<u8>> {
    read_bounded(stdin, STDIN_SILENCE, STDIN_TOTAL)
}

fn read_bounded(
    mut stdin: impl AsFd + Read,
    silence: Duration,
    total: Duration,
) -> io::Result<Vec<u8>> {
    let mode = nix::sys::stat::fstat(stdin.as_fd())?.st_mode;
    if mode & libc::S_IFMT == libc::S_IFCHR {
        return Ok(Vec::new());
    }
    let end = Instant::now() + total;
    let mut data = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        let wait = silence.min(end.saturating_duration_since(Instant::now()));
        let ready = {
            let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
            match nix::poll::poll(
                &mut fds,
                PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO),
            ) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            }
        };
        if ready == 0 {
            return Ok(data);
        }
        match stdin.read(&mut chunk) {
            Ok(0) => return Ok(data),
            Ok(n) => data.extend_from_slice(&chunk[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if data.len() > STDIN_LIMIT {
            return Err(io::Error::other(format!(
                "more than {STDIN_LIMIT} bytes on stdin"
            )));
        }
    }
}

/// Tells the release by what it wrote. Runtime options of older releases parse
/// as `BootstrapParams` too, so what names another container is not taken for them.
pub fn recognise(
    stdin: &[u8],
    max_shim_version: Option<&str>,
    namespace: &str,
    id: &str,
) -> Request {
    if let Some(request) = from_json(stdin, namespace, id) {
        return request;
    }
    if !stdin.is_empty()
        && let Ok(params) = BootstrapParams::parse_from_bytes(stdin)
        && params.instance_id == id
        && params.namespace == namespace
    {
        return Request {
            dialect: Dialect::Protobuf,
            socket_dir: params
                .socket_dir
                .filter(|dir| !dir.is_empty())
                .map(PathBuf::from),
            ttrpc_address: Some(params.containerd_ttrpc_address).filter(|text| !text.is_empty()),
            debug: params.log_level.value() <= LOG_LEVEL_DEBUG,
        };
    }
    let dialect = match max_shim_version.and_then(|text| text.trim().parse::<u32>().ok()) {
        None => Dialect::Address,
        Some(0..3) => Dialect::Version2,
        Some(_) => Dialect::Json,
    };
    Request {
        dialect,
        socket_dir: None,
        ttrpc_address: None,
        debug: false,
    }
}

fn from_json(stdin: &[u8], namespace: &str, id: &str) -> Option<Request> {
    if stdin.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return None;
    }
    let value: serde_json::Value = serde_json::from_slice(stdin).ok()?;
    // Go's JSON keeps the field names of the definition, protobuf's own JSON joins them in camel case.
    let text = |snake: &str, camel: &str| {
        value
            .get(snake)
            .or_else(|| value.get(camel))
            .and_then(serde_json::Value::as_str)
            .filter(|text| !text.is_empty())
            .map(str::to_owned)
    };
    if text("instance_id", "instanceId")? != id || text("namespace", "namespace")? != namespace {
        return None;
    }
    let level = value.get("log_level").or_else(|| value.get("logLevel"));
    let debug = level.is_some_and(|level| match level {
        serde_json::Value::Number(number) => number
            .as_i64()
            .is_some_and(|number| number <= i64::from(LOG_LEVEL_DEBUG)),
        serde_json::Value::String(name) => name.ends_with("DEBUG") || name.ends_with("TRACE"),
        _ => false,
    });
    Some(Request {
        dialect: Dialect::Json,
        socket_dir: text("socket_dir", "socketDir").map(PathBuf::from),
        ttrpc_address: text("containerd_ttrpc_address", "containerdTtrpcAddress"),
        debug,
    })
}

/// The answer's bytes, all that may go to stdout. `address` is a `unix://` URL.
pub fn reply(dialect: Dialect, address: &str) -> Vec<u8> {
    let json = |version: u32| {
        serde_json::json!({"version": version, "address": address, "protocol": "ttrpc"})
            .to_string()
            .into_bytes()
    };
    match dialect {
        Dialect::Protobuf => {
            let mut result = BootstrapResult::new();
            result.version = containerd_shim_protos::TASK_API_VERSION;
            result.address = address.to_owned();
            result.protocol = "ttrpc".to_owned();
            // Writing to a Vec fails only for messages over 2 GiB.
            result.write_to_bytes().unwrap_or_default()
        }
        Dialect::Json => json(3),
        Dialect::Version2 => json(2),
        Dialect::Address => address.as_bytes().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use protobuf::well_known_types::any::Any;

    use super::*;

    fn params(id: &str) -> BootstrapParams {
        let mut params = BootstrapParams::new();
        params.instance_id = id.into();
        params.namespace = "ns".into();
        params.containerd_ttrpc_address = "/run/c.ttrpc".into();
        params.socket_dir = Some("/s".into());
        params.log_level = protobuf::EnumOrUnknown::from_i32(-8);
        params
    }

    #[test]
    fn bootstrap_params_get_version_3_even_with_max_version_2() {
        let bytes = params("c1").write_to_bytes().unwrap();
        let request = recognise(&bytes, Some("2"), "ns", "c1");
        assert_eq!(request.dialect, Dialect::Protobuf);
        assert_eq!(request.socket_dir, Some(PathBuf::from("/s")));
        assert_eq!(request.ttrpc_address.as_deref(), Some("/run/c.ttrpc"));
        assert!(request.debug);
        let answer = reply(request.dialect, "unix:///s/x");
        let result = BootstrapResult::parse_from_bytes(&answer).unwrap();
        assert_eq!(
            (result.version, &*result.address, &*result.protocol),
            (3, "unix:///s/x", "ttrpc")
        );
    }

    #[test]
    fn json_params_get_json() {
        for text in [
            r#"{"instance_id":"c1","namespace":"ns","socket_dir":"/s","log_level":-4}"#,
            r#" {"instanceId":"c1","namespace":"ns","socketDir":"/s","logLevel":"LOG_LEVEL_DEBUG"}"#,
        ] {
            let request = recognise(text.as_bytes(), None, "ns", "c1");
            assert_eq!(request.dialect, Dialect::Json, "{text}");
            assert_eq!(request.socket_dir, Some(PathBuf::from("/s")));
            assert!(request.debug);
        }
        assert_eq!(
            reply(Dialect::Json, "unix:///x"),
            br#"{"address":"unix:///x","protocol":"ttrpc","version":3}"#
        );
    }

    #[test]
    fn runtime_options_of_older_releases_are_not_taken_for_params() {
        let mut options = Any::new();
        options.type_url = "containerd.runc.v1.Options".into();
        options.value = b"\x48\x01".to_vec();
        let bytes = options.write_to_bytes().unwrap();
        for (stdin, max, dialect) in [
            (&bytes[..], Some("2"), Dialect::Version2),
            (&bytes, None, Dialect::Address),
            (b"", Some("2"), Dialect::Version2),
            (b"", Some("3"), Dialect::Json),
            (b"", Some("junk"), Dialect::Address),
            (b"", None, Dialect::Address),
            (b"\xff\xff", None, Dialect::Address),
            (
                &params("other").write_to_bytes().unwrap(),
                Some("2"),
                Dialect::Version2,
            ),
        ] {
            assert_eq!(
                recognise(stdin, max, "ns", "c1").dialect,
                dialect,
                "{stdin:?} {max:?}"
            );
        }
        assert_eq!(reply(Dialect::Address, "unix:///x"), b"unix:///x");
    }

    #[test]
    fn stdin_left_open_is_given_up() {
        let (read, mut write) = std::io::pipe().unwrap();
        write.write_all(b"abc").unwrap();
        let begin = Instant::now();
        let data = read_bounded(read, Duration::from_millis(30), Duration::from_secs(1)).unwrap();
        assert_eq!(data, b"abc");
        assert!(begin.elapsed() < Duration::from_secs(1));
        drop(write);
    }

    #[test]
    fn stdin_is_read_to_its_end_and_dev_null_not_at_all() {
        let (read, mut write) = std::io::pipe().unwrap();
        write.write_all(&[7; 20_000]).unwrap();
        drop(write);
        assert_eq!(read_stdin(read).unwrap(), vec![7; 20_000]);
        assert!(
            read_stdin(File::open("/dev/null").unwrap())
                .unwrap()
                .is_empty()
        );
        assert!(
            read_stdin(File::open("/dev/zero").unwrap())
                .unwrap()
                .is_empty()
        );
    }
}
