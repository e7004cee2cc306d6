//! What goes wrong with a network's configuration or with its plugins, in the
//! words of who has to put it right. Which error a plugin's words mean is in `classify`.

use std::fmt;
use std::io;

/// What kind of thing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No address is free.
    Exhausted,
    /// An address, an interface or the container's ID is in use already.
    Conflict,
    /// A plugin, or a program that a plugin runs, is not installed.
    MissingPlugin,
    /// There is no configuration of a network, or none of that name.
    NoConfiguration,
    /// A configuration does not parse, or a plugin does not take it.
    Configuration,
    /// Configuration, plugin and this client have no version of CNI in common.
    Version,
    /// What the caller gave is not what CNI allows: an ID, a name, a path, or an order of calls.
    Argument,
    /// The network namespace or the container is gone, or is something else.
    Namespace,
    /// A plugin was killed at its deadline.
    Timeout,
    /// A plugin was killed since the caller wants no more of it.
    Stopped,
    /// It may go well later (codes 11, 50 and 51).
    TryAgain,
    /// A plugin failed for another reason: [`Error::answer`] has it.
    Plugin,
    /// What a plugin wrote is not what CNI says.
    Output,
    /// What was to be done or was done could not be written down.
    Note,
    /// A plugin could not be started, or a file not be read.
    Io,
}

/// What a plugin says when it fails: the specification's section 5, "Error".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// 0 to 99 are the specification's, from 100 on the plugin's own; 0 also if it gave none.
    pub code: u64,
    /// In short.
    pub msg: String,
    /// At length; may be empty.
    pub details: String,
}

/// Why a network's configuration cannot be used, or an attachment be made, checked or undone.
///
/// Shown, it says what was being done, why it failed and what to do; the system's word for it is its source.
#[derive(Debug)]
pub struct Error(Box<Parts>);

#[derive(Debug)]
struct Parts {
    kind: Kind,
    doing: String,
    why: String,
    help: Option<String>,
    answer: Option<Answer>,
    source: Option<io::Error>,
    also: Vec<String>,
}

impl Error {
    /// `doing` is a sentence without its end that says what failed; `why` follows it.
    pub(super) fn new(kind: Kind, doing: impl Into<String>, why: impl Into<String>) -> Self {
        Self(Box::new(Parts {
            kind,
            doing: doing.into(),
            why: why.into(),
            help: None,
            answer: None,
            source: None,
            also: Vec::new(),
        }))
    }

    /// Says what to do.
    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.0.help = Some(help.into());
        self
    }

    pub(super) fn answered(mut self, answer: Answer) -> Self {
        self.0.answer = Some(answer);
        self
    }

    pub(super) fn caused_by(mut self, source: io::Error) -> Self {
        self.0.source = Some(source);
        self
    }

    /// Adds what failed besides, in words.
    pub(super) fn and(mut self, other: &Self) -> Self {
        self.0.also.push(other.in_full());
        self
    }

    /// With the source, on one line.
    pub(super) fn in_full(&self) -> String {
        match &self.0.source {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }

    /// What kind of thing went wrong.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// What the plugin said, if it is one that failed and said something.
    pub fn answer(&self) -> Option<&Answer> {
        self.0.answer.as_ref()
    }

    /// What failed besides, in words: other plugins' DEL.
    pub fn also(&self) -> &[String] {
        &self.0.also
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = &self.0;
        write!(f, "{}: {}", parts.doing, parts.why)?;
        if let Some(help) = &parts.help {
            write!(f, "; {help}")?;
        }
        for also in &parts.also {
            write!(f, ". Also: {also}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = self.0.source.as_ref()?;
        Some(source)
    }
}
