//! Limits and readings of containers that run.

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::{CheckpointTaskRequest, UpdateTaskRequest};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::context::{Context, NAMESPACE};
use crate::ctr::{Ctr, Events, expect_words};
use crate::shim::Connection;
use crate::suite::{Case, Subject};

const SERVICE: &str = "containerd.task.v2.Task";

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a container's readings are its cgroup's",
        subject: Subject::Agreed,
        seconds: (90, 90),
        run: readings,
    },
    Case {
        name: "a container that runs out of memory is killed and told of",
        subject: Subject::Agreed,
        seconds: (120, 120),
        run: out_of_memory,
    },
    Case {
        name: "new limits hold in the guest",
        subject: Subject::Nacre,
        seconds: (90, 90),
        run: updated,
    },
    Case {
        name: "a checkpoint is not pretended",
        subject: Subject::Nacre,
        seconds: (60, 60),
        run: checkpoint,
    },
];

/// A reading of `ctr tasks metrics` by its name.
pub(super) fn reading(ctr: &Ctr<'_>, id: &str, name: &str) -> Result<u64> {
    let output = ctr.call(&["tasks", "metrics", id])?;
    output.expect_code(0)?;
    let out = output.out();
    let line = out
        .lines()
        .find(|line| line.split_whitespace().next() == Some(name))
        .with_context(|| format!("there is no {name} in {out:?}"))?;
    let value = line.split_whitespace().nth(1).unwrap_or_default();
    value
        .parse()
        .with_context(|| format!("{name} is {value:?}"))
}

fn readings(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("stats");
    let limit = (128 << 20).to_string();
    // 32 MiB that stay, then work for the CPU.
    let script = "head -c 33554432 /dev/zero >/dev/shm/held; while :; do :; done";
    ctr.detached(&id, &["--memory-limit", &limit], &["sh", "-c", script])?;
    let filled = || Ok((reading(&ctr, &id, "memory.usage")? >= 32 << 20).then_some(()));
    crate::poll::until("32 MiB in use", context.seconds(30), filled)?;
    let first = reading(&ctr, &id, "cpu.usage_usec")?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    let second = reading(&ctr, &id, "cpu.usage_usec")?;
    ensure!(second > first, "the CPU time stays at {first}");
    let usage = reading(&ctr, &id, "memory.usage")?;
    ensure!(usage <= 128 << 20, "{usage} bytes are over the limit");
    let limit = reading(&ctr, &id, "memory.usage_limit")?;
    ensure!(limit == 128 << 20, "the limit is {limit}");
    let pids = reading(&ctr, &id, "pids.current")?;
    ensure!((1..=3).contains(&pids), "{pids} processes");
    super::exec::end(&ctr, context, &id)
}

fn out_of_memory(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let events = Events::listen(context, &ctr)?;
    let id = context.id("oom");
    let limit = (64 << 20).to_string();
    ctr.run(&id, &["--memory-limit", &limit], &["tail", "/dev/zero"])?
        .expect_code(137)?;
    events.wait_for(&id, "/tasks/oom", context.seconds(10))?;
    Ok(())
}

/// The shim of a task of this suite.
pub(super) fn shim_of(ctr: &Ctr<'_>, id: &str) -> Result<Connection> {
    let file = ctr
        .daemon
        .state
        .join("io.containerd.runtime.v2.task")
        .join(NAMESPACE)
        .join(id)
        .join("address");
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    Connection::dial(text.trim().trim_start_matches("unix://"))
}

pub(super) fn update(shim: &Connection, id: &str, resources: &str) -> Result<()> {
    let mut any = Any::new();
    any.type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned();
    any.value = resources.as_bytes().to_vec();
    let mut request = UpdateTaskRequest::new();
    request.id = id.to_owned();
    request.resources = MessageField::some(any);
    shim.call(SERVICE, "Update", request.write_to_bytes()?)?;
    Ok(())
}

fn updated(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("update");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let shim = shim_of(&ctr, &id)?;
    update(
        &shim,
        &id,
        r#"{"memory":{"limit":100663296},"pids":{"limit":20},"cpu":{"quota":50000,"period":100000}}"#,
    )?;
    let limit = reading(&ctr, &id, "memory.usage_limit")?;
    ensure!(limit == 96 << 20, "the memory limit is {limit}");
    let limit = reading(&ctr, &id, "pids.limit")?;
    ensure!(limit == 20, "the limit of processes is {limit}");
    // It is felt: a program that wants more is killed.
    let output = ctr.exec(&id, "e1", &[], &["tail", "/dev/zero"])?;
    ensure!(output.code == 137, "the exec ended with {}", output.code);
    let Err(error) = update(&shim, &id, r#"{"memory":{"limit":1099511627776}}"#) else {
        anyhow::bail!("a terabyte is taken");
    };
    expect_words(&format!("{error:#}"), &["1048576 MiB", "the VM can have"])?;
    let limit = reading(&ctr, &id, "memory.usage_limit")?;
    ensure!(limit == 96 << 20, "the memory limit has become {limit}");
    super::exec::end(&ctr, context, &id)
}

fn checkpoint(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("checkpoint");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let mut request = CheckpointTaskRequest::new();
    request.id.clone_from(&id);
    let answer = shim_of(&ctr, &id)?.call(SERVICE, "Checkpoint", request.write_to_bytes()?);
    let Err(error) = answer else {
        anyhow::bail!("a checkpoint is said to be made");
    };
    expect_words(&format!("{error:#}"), &["not implemented"])?;
    super::exec::end(&ctr, context, &id)
}
