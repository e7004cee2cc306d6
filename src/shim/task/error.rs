//! What the task service answers when it does not do what was asked. The codes
//! are those by which containerd tells the cases apart.

use ttrpc::Code;

use crate::shim::lifecycle::Refused;

/// An error of a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such container or process, or it has ended.
    #[error("{0}")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The request cannot be meant.
    #[error("{0}")]
    Invalid(String),
    /// Not in the state that it is in.
    #[error("{0}")]
    Precondition(String),
    /// The call is not served.
    #[error("{0} is not implemented")]
    Unimplemented(&'static str),
    /// It failed.
    #[error("{0}")]
    Failed(String),
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        Self::Precondition(refused.to_string())
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Error::Invalid(_) => Code::INVALID_ARGUMENT,
            Error::Precondition(_) => Code::FAILED_PRECONDITION,
            Error::Unimplemented(_) => Code::UNIMPLEMENTED,
            Error::Failed(_) => Code::INTERNAL,
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_containerds() {
        for (error, code) in [
            (Error::NotFound("x".into()), Code::NOT_FOUND),
            (Error::AlreadyExists("x".into()), Code::ALREADY_EXISTS),
            (Error::Invalid("x".into()), Code::INVALID_ARGUMENT),
            (Error::Precondition("x".into()), Code::FAILED_PRECONDITION),
            (Error::Unimplemented("Exec"), Code::UNIMPLEMENTED),
            (Error::Failed("x".into()), Code::INTERNAL),
        ] {
            let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error.clone()) else {
                panic!("{error:?} is no status");
            };
            assert_eq!(status.code.enum_value(), Ok(code));
            assert_eq!(status.message, error.to_string());
        }
    }
}
