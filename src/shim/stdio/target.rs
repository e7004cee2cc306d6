//! What a stdout or stderr of a Create request names.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Why a process cannot have the stdio that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A URI of a kind that is not served.
    #[error(
        "Stdio {uri:?} is of kind {scheme}, which is not served: use a FIFO, file:///PATH or binary:///PATH"
    )]
    Scheme {
        /// The URI.
        uri: String,
        /// Its scheme.
        scheme: String,
    },
    /// A path that is not absolute.
    #[error("Stdio {0:?} is not an absolute path")]
    Relative(String),
    /// A logging program that does not come up.
    #[error("The logging program {} {cause}", program.display())]
    Logger {
        /// The program.
        program: PathBuf,
        /// What became of it.
        cause: String,
    },
    /// stdin must be a FIFO.
    #[error("Stdin {} is not a FIFO", .0.display())]
    NotFifo(PathBuf),
    /// The system refused to open it.
    #[error("Cannot open stdio {}: {source}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The sandbox has no port for it.
    #[error("Cannot make a stdio stream: {cause}")]
    Sandbox {
        /// Why.
        cause: String,
    },
}

/// Where output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A FIFO with a reader, or with none for now.
    Fifo(PathBuf),
    /// A file that is appended to.
    File(PathBuf),
    /// A program that is started for it, see [`super::logger`].
    Binary {
        /// The program.
        program: PathBuf,
        /// Its arguments.
        arguments: Vec<String>,
    },
}

impl Target {
    /// Reads what containerd gave: a path, `fifo://PATH`, `file://PATH`, or `binary://PROGRAM?NAME=VALUE&…`.
    ///
    /// # Errors
    /// Another kind of URI, a relative path, or a path that is not there.
    pub fn parse(uri: &str) -> Result<Self, Error> {
        let (scheme, path) = uri.split_once("://").unwrap_or(("", uri));
        if !matches!(scheme, "" | "fifo" | "file" | "binary") {
            return Err(Error::Scheme {
                uri: uri.to_owned(),
                scheme: scheme.to_owned(),
            });
        }
        // A plain path may contain a question mark.
        let (path, query) = match path.split_once('?') {
            Some(parts) if !scheme.is_empty() => parts,
            _ => (path, ""),
        };
        let path = match scheme {
            "" => PathBuf::from(path),
            _ => PathBuf::from(decoded(path, false)),
        };
        if !path.is_absolute() {
            return Err(Error::Relative(uri.to_owned()));
        }
        if scheme == "file" {
            return Ok(Self::File(path));
        }
        if scheme == "binary" {
            return Ok(Self::Binary {
                program: path,
                arguments: arguments(query),
            });
        }
        let kind = fs::metadata(&path)
            .map_err(|source| Error::Open {
                path: path.clone(),
                source,
            })?
            .file_type();
        Ok(if kind.is_fifo() {
            Self::Fifo(path)
        } else {
            Self::File(path)
        })
    }

    /// The path.
    pub fn path(&self) -> &Path {
        match self {
            Self::Fifo(path) | Self::File(path) | Self::Binary { program: path, .. } => path,
        }
    }
}

/// A logging program's arguments: each name of the query, followed by its value unless that is empty. A name's second
/// value is left out, as containerd does.
fn arguments(query: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, value) = (decoded(name, true), decoded(value, true));
        if names.contains(&name) {
            continue;
        }
        names.push(name.clone());
        arguments.push(name);
        if !value.is_empty() {
            arguments.push(value);
        }
    }
    arguments
}

/// Undoes a URI's escapes; in a query `+` is a space.
fn decoded(text: &str, query: bool) -> String {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match tail {
            [high, low, ..] if *first == b'%' => {
                let digit = |byte: &u8| char::from(*byte).to_digit(16);
                digit(high)
                    .zip(digit(low))
                    .and_then(|(high, low)| u8::try_from(high * 16 + low).ok())
            }
            _ => None,
        };
        match escaped {
            Some(byte) => {
                plain.push(byte);
                rest = &tail[2..];
            }
            None => {
                plain.push(if query && *first == b'+' {
                    b' '
                } else {
                    *first
                });
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        for (uri, target) in [
            (text(&fifo), Target::Fifo(fifo.clone())),
            (
                format!("fifo://{}", text(&fifo)),
                Target::Fifo(fifo.clone()),
            ),
            (text(&file), Target::File(file.clone())),
            (
                "file:///not/there/yet".into(),
                Target::File("/not/there/yet".into()),
            ),
        ] {
            assert_eq!(Target::parse(&uri).unwrap(), target, "{uri}");
        }
    }

    #[test]
    fn a_logging_program_has_its_arguments_from_the_query() {
        let target =
            Target::parse("binary:///usr/bin/my%20logger?--tag=a%2Fb&-v&x=1+2&x=3&bad=%zz");
        let arguments = ["--tag", "a/b", "-v", "x", "1 2", "bad", "%zz"];
        assert_eq!(
            target.unwrap(),
            Target::Binary {
                program: "/usr/bin/my logger".into(),
                arguments: arguments.map(str::to_owned).to_vec(),
            }
        );
        assert!(matches!(
            Target::parse("binary://logger?a"),
            Err(Error::Relative(_))
        ));
    }

    #[test]
    fn what_is_not_served_is_named() {
        let error = Target::parse("https://example.test/log")
            .unwrap_err()
            .to_string();
        assert!(error.contains("kind https"), "{error}");
        assert!(matches!(Target::parse("relative"), Err(Error::Relative(_))));
        assert!(matches!(
            Target::parse("/not/there"),
            Err(Error::Open { .. })
        ));
    }
}
