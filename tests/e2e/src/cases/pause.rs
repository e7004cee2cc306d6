//! Containers that are frozen and thawed.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::context::Context;
use crate::ctr::{Ctr, Events};
use crate::suite::{Case, Subject};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a paused container stands still until it is resumed",
        subject: Subject::Agreed,
        seconds: (90, 90),
        run: stands_still,
    },
    Case {
        name: "a paused container can be killed",
        subject: Subject::Nacre,
        seconds: (90, 90),
        run: killed,
    },
];

fn stands_still(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let events = Events::listen(context, &ctr)?;
    let id = context.id("still");
    let log = context.path("log");
    let uri = format!("file://{}", log.display());
    let flags = ["--detach", "--log-uri", &uri];
    let script = "while :; do echo tick; sleep 0.1; done";
    crate::ctr::run(
        ctr.command(&["run", "--runtime", context.runtime.name()])
            .args(flags)
            .args([crate::context::IMAGE, &id, "sh", "-c", script]),
    )?
    .expect_code(0)?;
    let length = || fs::metadata(&log).map_or(0, |metadata| metadata.len());
    crate::poll::until("the first tick", context.seconds(20), || {
        Ok((length() > 0).then_some(()))
    })?;
    for _ in 0..2 {
        ctr.call(&["tasks", "pause", &id])?.expect_code(0)?;
        ctr.wait_for_status(&id, "PAUSED", context.seconds(5))?;
        // What was on its way has arrived.
        std::thread::sleep(Duration::from_millis(500));
        let before = length();
        // Ten ticks of one that goes on.
        std::thread::sleep(Duration::from_secs(1));
        ensure!(length() == before, "it goes on while it is paused");
        let refused = ctr.exec(&id, "e1", &[], &["true"])?;
        ensure!(refused.code != 0, "an exec works while it is paused");
        ctr.call(&["tasks", "resume", &id])?.expect_code(0)?;
        ctr.wait_for_status(&id, "RUNNING", context.seconds(5))?;
        crate::poll::until("a tick after the pause", context.seconds(10), || {
            Ok((length() > before).then_some(()))
        })?;
    }
    for topic in ["/tasks/paused", "/tasks/resumed"] {
        events.wait_for(&id, topic, context.seconds(10))?;
    }
    super::exec::end(&ctr, context, &id)
}

fn killed(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("killed");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    ctr.call(&["tasks", "pause", &id])?.expect_code(0)?;
    super::exec::end(&ctr, context, &id)
}
