//! Create, Delete, Kill and Shutdown of a real shim, each begun while each of
//! the others is under way. What they may answer is the table of docs/conformance.md.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::ttrpc::Code;

use super::calls::One;
use crate::context::{Context, Count};
use crate::leaks::{self, Snapshot};
use crate::lots::Lots;
use crate::poll;
use crate::shim::Bundle;
use crate::suite::{Case, Subject};
use crate::tasks::{Answer, Refusal, Stdio, Tasks};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "Create, Delete and Kill raced answer by the table and leave nothing",
        subject: Subject::Alone,
        seconds: (180, 3600),
        run: without_shutdown,
    },
    Case {
        name: "Shutdown raced with each call answers by the table and leaves nothing",
        subject: Subject::Alone,
        seconds: (240, 3 * 3600),
        run: with_shutdown,
    },
];

const TABLE: &str = include_str!("../../../../docs/conformance.md");
const KILL: i32 = libc::SIGKILL;
/// What Delete, Kill and Shutdown take, about.
const SHORT: Duration = Duration::from_millis(300);
/// How often each pair is raced.
const ROUNDS: (u32, u32) = (1, 50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Create,
    Delete,
    Kill,
    Shutdown,
}

impl Call {
    fn call(self, tasks: &Tasks, id: &str, bundle: &Path) -> Answer<()> {
        match self {
            Self::Create => tasks.create(id, bundle, &Stdio::default()).map(drop),
            Self::Delete => tasks.delete(id, "").map(drop),
            Self::Kill => tasks.kill(id, "", KILL, false).map(drop),
            Self::Shutdown => tasks.shutdown(id).map(drop),
        }
    }
}

/// The code's name as in the table; none when the connection ended instead of an answer.
fn code(answer: &Answer<()>) -> Option<&'static str> {
    Some(match answer {
        Ok(()) => "OK",
        Err(refusal) => match refusal.code? {
            Code::NOT_FOUND => "NOT_FOUND",
            Code::ALREADY_EXISTS => "ALREADY_EXISTS",
            Code::FAILED_PRECONDITION => "FAILED_PRECONDITION",
            Code::INTERNAL => "INTERNAL",
            _ => "a code that is in no row",
        },
    })
}

/// What the document permits the two calls to answer.
fn permitted(first: Call, second: Call) -> Result<[Vec<&'static str>; 2]> {
    let begin = format!("| {first:?} | {second:?} |");
    let row = TABLE
        .lines()
        .find_map(|line| line.strip_prefix(&begin))
        .with_context(|| format!("docs/conformance.md has no row {begin}"))?;
    let mut cells = row.split('|').map(|cell| {
        cell.split(',')
            .map(str::trim)
            .filter(|code| !code.is_empty())
            .collect()
    });
    match (cells.next(), cells.next()) {
        (Some(first), Some(second)) => Ok([first, second]),
        _ => bail!("the row {begin} has not four cells"),
    }
}

/// Calls the one, and the other after `pause`, over connections of their own.
fn race(
    address: &str,
    id: &str,
    bundle: &Path,
    calls: [Call; 2],
    pause: Duration,
) -> Result<[Answer<()>; 2]> {
    let tasks = [Tasks::dial(address)?, Tasks::dial(address)?];
    let answers = std::thread::scope(|scope| {
        let one = scope.spawn(|| calls[0].call(&tasks[0], id, bundle));
        std::thread::sleep(pause);
        let other = calls[1].call(&tasks[1], id, bundle);
        (one.join(), other)
    });
    match answers {
        (Ok(one), other) => Ok([one, other]),
        _ => bail!("a calling thread panicked"),
    }
}

fn judge(calls: [Call; 2], answers: &[Answer<()>; 2]) -> Result<()> {
    let shows = |answer: &Answer<()>| answer.as_ref().err().map(Refusal::to_string);
    let both = [shows(&answers[0]), shows(&answers[1])];
    eprintln!("  {calls:?}: {:?} {:?}", answers.each_ref().map(code), both);
    let ends = calls.contains(&Call::Shutdown);
    for (answer, permitted) in answers.iter().zip(permitted(calls[0], calls[1])?) {
        match code(answer) {
            Some(code) => ensure!(permitted.contains(&code), "{calls:?} answer {both:?}"),
            None => ensure!(ends, "{calls:?} answer {both:?}"),
        }
    }
    let fine = answers.iter().filter(|answer| answer.is_ok()).count();
    let once = calls[0] == calls[1] && matches!(calls[0], Call::Create | Call::Delete);
    ensure!(!once || fine <= 1, "{calls:?} both succeed");
    Ok(())
}

/// Brings the container into a state that the first call may meet: created, running or stopped.
fn prepare(tasks: &Tasks, id: &str, bundle: &Path, lot: usize) -> Result<()> {
    tasks.create(id, bundle, &Stdio::default())?;
    if lot > 0 {
        tasks.start(id, "")?;
    }
    if lot > 1 {
        tasks.kill(id, "", KILL, false)?;
        tasks.wait(id, "")?;
    }
    Ok(())
}

/// Files, threads and mounts of a shim, and what lies in its state directory.
fn holdings(pid: i32, directory: &Path) -> BTreeMap<String, usize> {
    let entries = |path: PathBuf| fs::read_dir(path).map_or(0, Iterator::count);
    let process = PathBuf::from(format!("/proc/{pid}"));
    let mounts = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
    let vcpus = fs::read_dir(process.join("task"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .filter(|name| !name.starts_with("shim"))
        .count();
    let children = fs::read_to_string(process.join(format!("task/{pid}/children")));
    BTreeMap::from([
        ("open files".to_owned(), entries(process.join("fd"))),
        ("mounts".to_owned(), mounts.lines().count()),
        ("threads of the VM".to_owned(), vcpus),
        (
            "files of its state".to_owned(),
            entries(directory.to_owned()),
        ),
        (
            "children".to_owned(),
            children.unwrap_or_default().split_whitespace().count(),
        ),
    ])
}

fn without_shutdown(context: &Context) -> Result<()> {
    // A container that stays keeps the VM, whatever becomes of the others.
    let one = One::running(context, "keeper", "sleep 1000", &Stdio::default())?;
    let tasks = &one.tasks;
    let pid = tasks.connect(one.id())?.shim_pid as i32;
    let directory = state_directory(one.id())?;
    let bundle = &one.bundle.folder;
    let began = Instant::now();
    prepare(tasks, "measure", bundle, 0)?;
    let creates = began.elapsed();
    let began = Instant::now();
    tasks.delete("measure", "")?;
    let deletes = began.elapsed();
    eprintln!("  Create takes {creates:?}, Delete {deletes:?}");
    let before = holdings(pid, &directory);

    let mut lots = Lots::beginning(17);
    let calls = [Call::Create, Call::Delete, Call::Kill];
    let mut number = 0;
    for round in 0..context.times(ROUNDS.0, ROUNDS.1) {
        for first in calls {
            for second in calls {
                number += 1;
                let id = format!("raced-{number}");
                let length = if first == Call::Create {
                    creates
                } else {
                    deletes
                };
                if first != Call::Create {
                    prepare(tasks, &id, bundle, lots.below(3))?;
                }
                let pause = length.mul_f64(1.2 * lots.part());
                let answers = race(&one.address, &id, bundle, [first, second], pause)?;
                judge([first, second], &answers)
                    .with_context(|| format!("round {round}, after {pause:?}"))?;
                if tasks.state(&id, "").is_ok() {
                    // It may have ended already.
                    let _ = tasks.kill(&id, "", KILL, true);
                    tasks.wait(&id, "")?;
                    tasks.delete(&id, "")?;
                }
            }
        }
    }
    let more = || {
        let mut now = holdings(pid, &directory);
        now.retain(|what, count| before.get(what).is_none_or(|before| *before < *count));
        now
    };
    let gone = poll::until(
        "the end of what the races made",
        context.seconds(10),
        || Ok(more().is_empty().then_some(())),
    );
    gone.with_context(|| format!("more than the {before:?} of before: {:?}", more()))?;
    one.end()
}

/// The state directory of a shim, found by its record.
pub(super) fn state_directory(id: &str) -> Result<PathBuf> {
    for entry in fs::read_dir("/run/nacre/vms")?.flatten() {
        let record = fs::read_to_string(entry.path().join("record.json")).unwrap_or_default();
        if record.contains(id) {
            return Ok(entry.path());
        }
    }
    bail!("no directory below /run/nacre/vms is about {id}")
}

fn with_shutdown(context: &Context) -> Result<()> {
    let mut lots = Lots::beginning(23);
    let settle = context.seconds(10);
    let before = Snapshot::take(&context.programs, None);
    // Those that need a container come first: they tell how long a boot and a Create take.
    let pairs = [Call::Shutdown, Call::Delete, Call::Kill, Call::Create]
        .into_iter()
        .flat_map(|other| [[other, Call::Shutdown], [Call::Shutdown, other]])
        .skip(1);
    let mut creates = Duration::ZERO;
    for round in 0..context.times(ROUNDS.0, ROUNDS.1) {
        for calls in pairs.clone() {
            let bundle = Bundle::script(context, "raced", "sleep 1000")?;
            let began = Instant::now();
            let one = One::of(context, bundle)?;
            let folder = one.bundle.folder.clone();
            let length = match calls {
                [Call::Create, _] => creates,
                [_, Call::Create] => {
                    // The guest is somewhere in its boot when the shim is told to end.
                    std::thread::sleep(creates.mul_f64(lots.part()));
                    SHORT
                }
                _ => {
                    prepare(&one.tasks, one.id(), &folder, lots.below(3))?;
                    creates = began.elapsed();
                    SHORT
                }
            };
            let pause = length.mul_f64(1.1 * lots.part());
            let answers = race(&one.address, one.id(), &folder, calls, pause)?;
            judge(calls, &answers).with_context(|| format!("round {round}, after {pause:?}"))?;
            one.has_ended()?;
            if context.count == Count::Soak {
                let left = leaks::left_after(&context.programs, None, &before, settle);
                ensure!(left.is_empty(), "{calls:?}: {}", left.join("; "));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_pair_and_no_other_code() {
        let all = [Call::Create, Call::Delete, Call::Kill, Call::Shutdown];
        for first in all {
            for second in all {
                for codes in permitted(first, second).unwrap() {
                    assert!(!codes.is_empty());
                    for code in codes {
                        assert!(
                            [
                                "OK",
                                "NOT_FOUND",
                                "ALREADY_EXISTS",
                                "FAILED_PRECONDITION",
                                "INTERNAL"
                            ]
                            .contains(&code),
                            "{code}"
                        );
                    }
                }
            }
        }
    }
}
