//! What is seen of a VM from outside: the phases of its containers' lives, and
//! what it costs.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::context::{Context, IMAGE, NAMESPACE};
use crate::ctr::{self, Ctr, expect_words};
use crate::poll;
use crate::suite::{Case, Subject};

pub(crate) const CASES: &[Case] = &[Case {
    name: "vmctl shows the phases of a container's life in order, and what its VM costs",
    subject: Subject::Nacre,
    seconds: (120, 120),
    run: life_and_costs,
}];

/// One VM for both: most of the time is its boot.
fn life_and_costs(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("seen");
    let log = format!("file://{}", context.path("log").display());
    let runtime = context.runtime.name();
    let arguments = ["run", "--detach", "--log-uri", &log, "--runtime", runtime];
    let command = [IMAGE, &id, "sh", "-c", "echo hello; sleep 1000"];
    ctr.call(&[&arguments[..], &command].concat())?
        .expect_code(0)?;
    let name = format!("{NAMESPACE}/{id}");
    costs(context, &ctr, &id, &name)?;
    ctr.call(&["tasks", "kill", "-s", "SIGCONT", &id])?
        .expect_code(0)?;
    life(context, &id, &name)?;
    super::exec::end(&ctr, context, &id)
}

fn vmctl(context: &Context, arguments: &[&str]) -> Result<String> {
    let mut command = std::process::Command::new(context.programs.vmctl());
    let output = ctr::run(command.args(arguments))?;
    output.expect_code(0)?;
    Ok(output.out())
}

fn json(context: &Context, arguments: &[&str]) -> Result<Value> {
    let text = vmctl(context, arguments)?;
    serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))
}

fn life(context: &Context, id: &str, name: &str) -> Result<()> {
    let seen = || -> Result<Value> {
        let vm = json(context, &["inspect", name, "--json"])?;
        let all = vm["timings"].as_array().context("no timings")?;
        ensure!(all.len() == 1, "timings of {} containers", all.len());
        Ok(all[0].clone())
    };
    let of = poll::until("the first output", context.seconds(10), || {
        Ok(Some(seen()?).filter(|of| !of["first_output"].is_null()))
    })?;
    ensure!(of["container"] == id && of["deleted"] == false, "{of}");
    let mut before = 0.0;
    for phase in ["shim_start", "connect", "create", "start", "first_output"] {
        let number = |name: &str| {
            let number = of[phase][name].as_f64();
            number.with_context(|| format!("{phase} has no {name}: {of}"))
        };
        let (begin, took) = (number("begin_ns")? / 1e6, number("ms")?);
        ensure!(took > 0.0, "{phase} took no time: {of}");
        // The first output is counted from the beginning of Start, as Start is. Times are rounded to microseconds.
        ensure!(
            begin + 0.002 >= before || phase == "first_output",
            "{phase} begins before the phase before it has ended: {of}"
        );
        before = begin + took;
    }
    ensure!(
        of["first_output"]["begin_ns"] == of["start"]["begin_ns"],
        "{of}"
    );
    for series in ["exec", "kill", "delete"] {
        let number = |name: &str| of[series][name].as_f64().unwrap_or(-1.0);
        ensure!(number("count") == 1.0, "{series} did not happen once: {of}");
        let (least, last, most) = (number("min_ms"), number("last_ms"), number("max_ms"));
        ensure!(
            0.0 < least && least == last && last == most,
            "{series}: {of}"
        );
    }
    Ok(())
}

fn costs(context: &Context, ctr: &Ctr<'_>, id: &str, name: &str) -> Result<()> {
    let (pid, _) = ctr.task(id)?.context("the task is not listed")?;
    let read = || -> Result<Value> {
        let all = json(context, &["top", "--json", name])?;
        let all = all.as_array().context("no array")?;
        ensure!(all.len() == 1, "{} VMs", all.len());
        Ok(all[0].clone())
    };
    let first = read()?;
    let number = |of: &Value, name: &str| {
        let number = of[name].as_u64();
        number.with_context(|| format!("there is no {name} in {of}"))
    };
    ensure!(
        first["pid"] == pid
            && first["memory"]["boot_mib"] == 512
            && first["vcpus"].as_u64() >= Some(1),
        "not the VM of pid {pid}: {first}"
    );
    ensure!(
        first["containers"] == serde_json::json!([id]),
        "not the container {id}: {first}"
    );
    // A guest's kernel and initrd are there; more than the guest's memory and a little is not.
    let (rss, pss) = (number(&first, "rss_kib")?, number(&first, "pss_kib")?);
    ensure!((32 << 10..640 << 10).contains(&rss), "RSS: {first}");
    ensure!(0 < pss && pss <= rss, "PSS: {first}");
    ensure!(
        first["exits"]["mmio-write"].as_u64() > Some(0),
        "no exits: {first}"
    );
    for name in ["vcpu_cpu_ms", "other_cpu_ms", "uptime_ms"] {
        ensure!(number(&first, name)? > 0, "{name}: {first}");
    }
    let work = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done";
    ctr.exec(id, "works", &[], &["sh", "-c", work])?
        .expect_code(0)?;
    let second = read()?;
    for name in ["vcpu_cpu_ms", "uptime_ms"] {
        ensure!(
            number(&second, name)? > number(&first, name)?,
            "{name} stays: {first}, {second}"
        );
    }
    expect_words(
        &vmctl(context, &["top"])?,
        &["RSS", "UPTIME", id, &pid.to_string()],
    )
}
