//! What a plugin's words mean. The specification has few codes, and the plugins use them
//! rarely: most failures have code 100 or 999 and a text, so the texts of those in wide use are known here.

use std::time::Duration;

use serde_json::{Map, Value};

use super::error::{Answer, Kind};
use super::process::{End, Run, STDOUT, on_one_line};

/// What is shown of output that is not understood, bytes.
const SHOWN: usize = 200;

/// Parts of texts, in lower case, and what they mean; the first that is found counts. An address that is taken is looked
/// for before the want of any, and both before what went wrong around them.
const TEXTS: &[(&str, Kind)] = &[
    // host-local, for an address that was asked for, and for a container that has one.
    ("is not available in range set", Kind::Conflict),
    ("is subnet's gateway", Kind::Conflict),
    ("duplicate allocation is not allowed", Kind::Conflict),
    // host-local, for an address outside of its ranges.
    ("failed to allocate all requested ips", Kind::Argument),
    ("not in range set", Kind::Argument),
    // host-local, Calico, Whereabouts, the AWS VPC, Cilium and Azure.
    ("no ip addresses available in range set", Kind::Exhausted),
    ("no ips available in pools", Kind::Exhausted),
    ("assigned 0 out of", Kind::Exhausted),
    ("could not allocate ip in range", Kind::Exhausted),
    (
        "failed to assign an ip address to container",
        Kind::Exhausted,
    ),
    ("no more ips available", Kind::Exhausted),
    ("range is full", Kind::Exhausted),
    ("no available addresses", Kind::Exhausted),
    // libcni in a plugin that runs another.
    ("failed to find plugin", Kind::MissingPlugin),
    // A program that a plugin runs, such as iptables.
    ("executable file not found in", Kind::MissingPlugin),
    ("failed to locate iptables", Kind::MissingPlugin),
    ("neither iptables nor ip6tables", Kind::MissingPlugin),
    // The namespace's helper of all plugins.
    ("failed to open netns", Kind::Namespace),
    ("failed to statfs", Kind::Namespace),
    ("unknown fs magic on", Kind::Namespace),
    // bridge, its helpers, and the kernel's EEXIST and EADDRINUSE.
    ("already has an ip address different from", Kind::Conflict),
    ("already exists", Kind::Conflict),
    ("file exists", Kind::Conflict),
    ("in dadfailed state", Kind::Conflict),
    ("address already in use", Kind::Conflict),
    ("is already in use", Kind::Conflict),
    ("incompatible cni version", Kind::Version),
    ("unsupported cni result version", Kind::Version),
    // How plugins begin what is wrong in their configuration.
    ("failed to load netconf", Kind::Configuration),
    ("failed to parse config", Kind::Configuration),
    ("failed to parse network config", Kind::Configuration),
    ("must be called as chained plugin", Kind::Configuration),
    ("ipam config missing", Kind::Configuration),
    ("no ip ranges specified", Kind::Configuration),
    ("invalid range set", Kind::Configuration),
    ("too small to allocate from", Kind::Configuration),
    ("network has host bits set", Kind::Configuration),
    ("invalid vlan id", Kind::Configuration),
    ("unrecognized backend", Kind::Configuration),
    ("unknown ipmasq backend", Kind::Configuration),
    (
        "ipam plugin returned missing ip config",
        Kind::Configuration,
    ),
    ("failed to lookup master", Kind::Configuration),
];

/// By its code where the specification gives it a meaning of its own, then by its text.
fn classify(answer: &Answer) -> Kind {
    match answer.code {
        1 => return Kind::Version,
        3 | 8 => return Kind::Namespace,
        11 | 50 | 51 => return Kind::TryAgain,
        _ => {}
    }
    let text = format!("{} {}", answer.msg, answer.details).to_lowercase();
    let known = TEXTS.iter().find(|(part, _)| text.contains(part));
    match (known, answer.code) {
        (Some((_, kind)), _) => *kind,
        (None, 2 | 6 | 7) => Kind::Configuration,
        (None, 4) => Kind::Argument,
        (None, _) => Kind::Plugin,
    }
}

/// What it means that a plugin's run did not end well.
pub(super) struct Meaning {
    pub kind: Kind,
    pub why: String,
    pub answer: Option<Answer>,
}

/// Of a run that did not end with success; `timeout` is what it had.
pub(super) fn meaning(run: &Run, timeout: Duration) -> Meaning {
    let mut meaning = match run.end {
        End::Late => Meaning {
            kind: Kind::Timeout,
            why: format!("it did not end within {timeout:?} and was killed"),
            answer: None,
        },
        End::Loud => Meaning {
            kind: Kind::Output,
            why: format!("it wrote more than {STDOUT} bytes on stdout and was killed"),
            answer: None,
        },
        End::Exited(status) => {
            match answer(&run.stdout).or_else(|| answer(run.stderr.as_bytes())) {
                Some(answer) => Meaning {
                    kind: classify(&answer),
                    why: in_words(&answer),
                    answer: Some(answer),
                },
                None => no_answer(&status.to_string(), run),
            }
        }
    };
    if !run.stderr.is_empty() {
        meaning.why = format!("{} (on stderr: {})", meaning.why, run.stderr);
    }
    meaning
}

/// It failed without the object that CNI wants: what it wrote may still say why.
fn no_answer(status: &str, run: &Run) -> Meaning {
    let answer = Answer {
        code: 0,
        msg: run.stderr.clone(),
        details: on_one_line(&run.stdout),
    };
    let kind = match classify(&answer) {
        Kind::Plugin if !answer.details.is_empty() => Kind::Output,
        kind => kind,
    };
    let why = match run.stdout.as_slice() {
        [] => format!("it ended with {status} and no word on stdout"),
        stdout => format!("it ended with {status} and no JSON but {}", shown(stdout)),
    };
    Meaning {
        kind,
        why,
        answer: Some(answer),
    }
}

/// What a plugin that failed says, if that is what CNI wants it to be.
fn answer(output: &[u8]) -> Option<Answer> {
    let output: Map<String, Value> = serde_json::from_slice(output).ok()?;
    let text = |key| {
        let text = output.get(key).and_then(Value::as_str);
        on_one_line(text.unwrap_or_default().as_bytes())
    };
    let answer = Answer {
        code: output.get("code").and_then(Value::as_u64).unwrap_or(0),
        msg: text("msg"),
        details: text("details"),
    };
    (answer.code != 0 || !answer.msg.is_empty()).then_some(answer)
}

fn in_words(answer: &Answer) -> String {
    let Answer { code, msg, details } = answer;
    match (msg.is_empty(), details.is_empty()) {
        (true, true) => format!("it says no more than code {code}"),
        (false, true) => format!("it says: {msg} (code {code})"),
        (true, false) => format!("it says: {details} (code {code})"),
        (false, false) => format!("it says: {msg}: {details} (code {code})"),
    }
}

/// The first bytes of an output, quoted.
pub(super) fn shown(output: &[u8]) -> String {
    let first = &output[..output.len().min(SHOWN)];
    let more = if output.len() > SHOWN { "…" } else { "" };
    format!("{:?}{more}", String::from_utf8_lossy(first))
}
