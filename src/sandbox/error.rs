//! What can go wrong with a sandbox. Cloneable, since one cause (the VM's end)
//! fails everything that waits for it.

use std::time::Duration;

use nacre_vmm::ExitReason;

/// Lines of the console that an error's message shows; the whole tail is in the error.
const SHOWN_LINES: usize = 15;

/// Why a call into a sandbox failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The VM could not be made or one of its devices refused.
    #[error("Cannot {doing}: {cause}")]
    Machine {
        /// What was being done to which thing.
        doing: String,
        /// The VMM's error, with its chain.
        cause: String,
    },
    /// Something of the host cannot be shared with the guest.
    #[error("Cannot share {} with the guest: {cause}", path.display())]
    Share {
        /// On the host.
        path: std::path::PathBuf,
        /// Why.
        cause: String,
    },
    /// The agent did not answer in time; the VM still runs.
    #[error("The guest's agent did not answer {call} within {after:?}")]
    Timeout {
        /// The call, with the container it was for.
        call: String,
        /// The deadline.
        after: Duration,
    },
    /// The agent did not become ready in time; the VM still runs.
    #[error(
        "The guest's agent was not ready within {after:?}{}",
        console_part(console)
    )]
    BootTimeout {
        /// The deadline.
        after: Duration,
        /// The last 64 KiB of the console, printable.
        console: String,
    },
    /// The VM has ended.
    #[error("The VM is gone: {reason}{}", console_part(console))]
    Gone {
        /// How it ended.
        reason: ExitReason,
        /// The last 64 KiB of the console, printable.
        console: String,
    },
    /// The agent answered with an error; its words say what it was doing to which thing.
    #[error("The guest failed: {message}")]
    Refused {
        /// The call, with the container it was for.
        call: String,
        /// The agent's code; see the protocol crate for their meanings.
        code: ttrpc::Code,
        /// The agent's words, at most 4 KiB, printable.
        message: String,
    },
    /// The agent closed the connection or broke the protocol while the VM runs.
    #[error("The guest's agent broke off during {call}: {cause}")]
    Disconnected {
        /// What was being done.
        call: String,
        /// What the connection said.
        cause: String,
    },
    /// The VM could not be resized. Which of it came about, and what is left undone, is in the words.
    #[error("Cannot {doing}: {cause}")]
    Resize {
        /// What was being done, with both sizes.
        doing: String,
        /// Why not, and what was undone.
        cause: String,
    },
    /// Agent and host were built from different protocols.
    #[error(
        "The guest's agent speaks protocol {agent_version} (build {agent_build}), this program speaks {host_version} (build {host_build}): make the image anew"
    )]
    Mismatch {
        /// The agent's protocol version.
        agent_version: u32,
        /// The agent's build.
        agent_build: String,
        /// Our protocol version.
        host_version: u32,
        /// Our build.
        host_build: String,
    },
}

impl Error {
    /// The VM's end, if that is what failed the call.
    pub fn exit_reason(&self) -> Option<&ExitReason> {
        match self {
            Self::Gone { reason, .. } => Some(reason),
            _ => None,
        }
    }

    /// The agent's code, if the agent answered.
    pub fn code(&self) -> Option<ttrpc::Code> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    pub(crate) fn machine(doing: impl Into<String>, cause: &dyn std::error::Error) -> Self {
        Self::Machine {
            doing: doing.into(),
            cause: chain(cause),
        }
    }
}

/// An error and its sources, joined as "a: b: c"; a source that its parent already quotes is left out.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let words = inner.to_string();
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = inner.source();
    }
    text
}

fn console_part(console: &str) -> String {
    let lines: Vec<&str> = console
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    if lines.is_empty() {
        return "; its console was silent".to_owned();
    }
    let shown = &lines[lines.len().saturating_sub(SHOWN_LINES)..];
    format!("; the last lines of its console:\n  {}", shown.join("\n  "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gone_shows_reason_and_last_lines_only() {
        let console: String = (0..40).map(|n| format!("line {n}\n")).collect();
        let text = Error::Gone {
            reason: ExitReason::Panic,
            console,
        }
        .to_string();
        assert!(text.contains("panicked"), "{text}");
        assert!(
            text.contains("line 39") && text.contains("line 25"),
            "{text}"
        );
        assert!(!text.contains("line 24\n"), "{text}");
    }

    #[test]
    fn gone_with_a_silent_console_says_so() {
        let text = Error::Gone {
            reason: ExitReason::Stopped,
            console: "\n \n".to_owned(),
        }
        .to_string();
        assert!(text.ends_with("its console was silent"), "{text}");
    }

    #[test]
    fn chain_joins_sources_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(chain(&error), "outer: inner");
    }
}
