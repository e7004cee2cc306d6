//! Several containers in one VM.

use anyhow::{Context as _, Result, ensure};

use crate::context::{Context, Runtime};
use crate::ctr::{Ctr, Output};
use crate::poll;
use crate::processes;
use crate::suite::{Case, Subject};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a group's containers share one VM and nothing else",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: shares,
    },
    Case {
        name: "a group's containers share users of their own, and the network then",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: shares_users,
    },
    Case {
        name: "a group's VM ends with the last container",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: ends_last,
    },
];

const BOOT: &str = "/proc/sys/kernel/random/boot_id";

fn annotation(group: &str) -> String {
    format!("io.containerd.runc.v2.group={group}")
}

/// The shims that serve the group; there may be `start`s under way for others.
fn shims(group: &str) -> usize {
    processes::shims(Runtime::Nacre.shim(), group).len()
}

fn shares(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let (one, two) = (context.id("one"), context.id("two"));
    let annotation = annotation(&one);
    let flags = ["--annotation", &annotation];
    ctr.detached(&one, &flags, &["sh", "-c", "echo one >/mine; sleep 1000"])?;
    ctr.detached(&two, &flags, &["sh", "-c", "echo two >/mine; sleep 1000"])?;
    ensure!(shims(&one) == 1, "{} shims serve the group", shims(&one));
    let asked = |id: &str, words: &[&str]| -> Result<Output> { ctr.exec(id, "asks", &[], words) };
    let boot = asked(&one, &["cat", BOOT])?;
    asked(&two, &["cat", BOOT])?
        .expect_code(0)?
        .expect_out(&boot.out())?;
    poll::until("both files", context.seconds(10), || {
        let (first, second) = (
            asked(&one, &["cat", "/mine"])?,
            asked(&two, &["cat", "/mine"])?,
        );
        Ok((first.out() == "one\n" && second.out() == "two\n").then_some(()))
    })?;
    // Each sees its own processes only.
    for id in [&one, &two] {
        let list = asked(id, &["ps", "-o", "args"])?;
        let others = list
            .out()
            .lines()
            .filter(|line| line.contains("/mine"))
            .count();
        ensure!(others <= 1, "{id} sees {:?}", list.out());
    }
    joins(&ctr, context, &one, &flags)?;
    // A third comes and goes with an exit code of its own.
    let third = context.id("three");
    ctr.script(
        &third,
        &flags,
        "cat /proc/sys/kernel/random/boot_id; exit 11",
    )?
    .expect_code(11)?
    .expect_out(&boot.out())?;
    super::exec::end(&ctr, context, &one)?;
    let status = ctr.task(&two)?.map(|(_, status)| status);
    ensure!(
        status.as_deref() == Some("RUNNING"),
        "the other has become {status:?}"
    );
    asked(&two, &["echo", "here"])?
        .expect_code(0)?
        .expect_out("here\n")?;
    super::exec::end(&ctr, context, &two)
}

/// As CRI has it, a container of a pod names namespaces by the pid that was told for the first.
fn joins(ctr: &Ctr<'_>, context: &Context, first: &str, flags: &[&str]) -> Result<()> {
    let pid = ctr.task(first)?.map(|(pid, _)| pid).context("no task")?;
    let namespace = |kind: &str| format!("{kind}:/proc/{pid}/ns/{kind}");
    let (ipc, uts) = (namespace("ipc"), namespace("uts"));
    let mut all = flags.to_vec();
    all.extend(["--with-ns", &ipc, "--with-ns", &uts]);
    let link = |id: &str, kind: &str| -> Result<String> {
        let path = format!("/proc/self/ns/{kind}");
        let output = ctr.exec(id, &format!("link-{kind}"), &[], &["readlink", &path])?;
        output.expect_code(0)?;
        Ok(output.out())
    };
    let id = context.id("joined");
    ctr.detached(&id, &all, &["sleep", "1000"])?;
    for (kind, shared) in [("ipc", true), ("uts", true), ("net", true), ("pid", false)] {
        let same = link(&id, kind)? == link(first, kind)?;
        ensure!(same == shared, "the {kind} namespace is shared: {same}");
    }
    super::exec::end(ctr, context, &id)
}

/// As CRI has it for a pod with a user namespace.
fn shares_users(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let (one, two) = (context.id("one"), context.id("two"));
    let annotation = annotation(&one);
    let map = "0:100000:65536";
    let flags = [
        "--annotation",
        &annotation,
        "--uidmap",
        map,
        "--gidmap",
        map,
    ];
    ctr.detached(&one, &flags, &["sleep", "1000"])?;
    let pid = ctr.task(&one)?.map(|(pid, _)| pid).context("no task")?;
    let users = format!("user:/proc/{pid}/ns/user");
    let mut all = flags.to_vec();
    all.extend(["--with-ns", &users]);
    ctr.detached(&two, &all, &["sleep", "1000"])?;
    let seen = |id: &str| -> Result<String> {
        let script = "for n in self/ns/user 1/ns/user self/ns/net 1/ns/net; do readlink /proc/$n; done; \
                      id -u; stat -c %u:%g / /bin/busybox; cat /proc/self/uid_map; ip -o link | cut -d: -f2";
        let output = ctr.exec(id, "sees", &[], &["sh", "-c", script])?;
        output.expect_code(0)?;
        Ok(output.out())
    };
    let (first, second) = (seen(&one)?, seen(&two)?);
    ensure!(
        first == second,
        "the first sees {first:?}, the second {second:?}"
    );
    ensure!(first.contains("\n0\n0:0\n0:0\n"), "{first:?}");
    super::exec::end(&ctr, context, &two)?;
    super::exec::end(&ctr, context, &one)
}

fn ends_last(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let ids = ["a", "b", "c"].map(|name| context.id(name));
    let annotation = annotation(&ids[0]);
    for id in &ids {
        ctr.detached(id, &["--annotation", &annotation], &["sleep", "1000"])?;
    }
    // The first, whose id is the group's, goes first.
    for id in &ids {
        ensure!(shims(&ids[0]) == 1, "{} shims before {id}", shims(&ids[0]));
        super::exec::end(&ctr, context, id)?;
    }
    poll::until("the end of the shim", context.seconds(10), || {
        Ok((shims(&ids[0]) == 0).then_some(()))
    })
}
