//! Why a call to the agent failed, and how that travels to the host as a
//! ttrpc status (the codes are described in the protocol crate).

use std::io;

use ttrpc::Code;

/// A failed call. Every message says what was being done to which thing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself is wrong.
    #[error("{0}")]
    InvalidArgument(String),
    /// The thing named in the request does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The thing to be made exists already.
    #[error("{0}")]
    AlreadyExists(String),
    /// The thing is in another state than the call needs.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The guest could not do it.
    #[error("{0}")]
    Internal(String),
    /// The kernel refused something.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    /// The ttrpc code of this failure.
    pub fn code(&self) -> Code {
        match self {
            Error::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Error::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Error::Internal(_) | Error::Io { .. } => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error))
    }
}

/// Says what was being done when the kernel refused.
pub trait Doing<T> {
    /// Turns the error into [`Error::Io`] with `what` before the cause.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Io {
            doing: what(),
            source: source.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_has_its_code_and_keeps_its_words() {
        let table = [
            (Error::InvalidArgument("id".into()), Code::INVALID_ARGUMENT),
            (Error::NotFound("c1".into()), Code::NOT_FOUND),
            (Error::AlreadyExists("c1".into()), Code::ALREADY_EXISTS),
            (
                Error::FailedPrecondition("running".into()),
                Code::FAILED_PRECONDITION,
            ),
            (Error::Internal("no".into()), Code::INTERNAL),
        ];
        for (error, code) in table {
            let words = error.to_string();
            let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else {
                panic!("not a status");
            };
            assert_eq!(status.code(), code);
            assert_eq!(status.message(), words);
        }
    }

    #[test]
    fn a_refusal_of_the_kernel_names_the_deed_and_the_cause() {
        let refused: Result<(), nix::Error> = Err(nix::Error::EBUSY);
        let error = refused.doing(|| "unmounting /x".into()).unwrap_err();
        assert_eq!(error.code(), Code::INTERNAL);
        assert!(error.to_string().starts_with("unmounting /x: "));
        assert!(error.to_string().contains("busy"));
    }
}
