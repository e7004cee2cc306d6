//! What a stdout or stderr of a Create request names.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Why a process cannot have the stdio that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A URI of a kind that is not served.
    #[error("Stdio {uri:?} is of kind {scheme}, which is not served: use a FIFO or file:///PATH")]
    Scheme {
        /// The URI.
        uri: String,
        /// Its scheme.
        scheme: String,
    },
    /// A path that is not absolute.
    #[error("Stdio {0:?} is not an absolute path")]
    Relative(String),
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
}

impl Target {
    /// Reads what containerd gave: a path, `fifo://PATH` or `file://PATH`.
    ///
    /// # Errors
    /// Another kind of URI, a relative path, or a path that is not there.
    pub fn parse(uri: &str) -> Result<Self, Error> {
        let (scheme, path) = uri.split_once("://").unwrap_or(("", uri));
        if !matches!(scheme, "" | "fifo" | "file") {
            return Err(Error::Scheme {
                uri: uri.to_owned(),
                scheme: scheme.to_owned(),
            });
        }
        let path = PathBuf::from(path.split('?').next().unwrap_or(path));
        if !path.is_absolute() {
            return Err(Error::Relative(uri.to_owned()));
        }
        if scheme == "file" {
            return Ok(Self::File(path));
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
            Self::Fifo(path) | Self::File(path) => path,
        }
    }
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
    fn what_is_not_served_is_named() {
        let error = Target::parse("binary:///usr/bin/logger?a=b")
            .unwrap_err()
            .to_string();
        assert!(error.contains("kind binary"), "{error}");
        assert!(matches!(Target::parse("relative"), Err(Error::Relative(_))));
        assert!(matches!(
            Target::parse("/not/there"),
            Err(Error::Open { .. })
        ));
    }
}
