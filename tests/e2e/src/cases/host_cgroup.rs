//! The host holds the VM, whatever its guest does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::calls::One;
use crate::context::{Context, NAMESPACE};
use crate::ctr::{Ctr, Event, Events, expect_words};
use crate::poll;
use crate::shim::{Bundle, Dialect};
use crate::suite::{Case, Subject};
use crate::tasks::Stdio;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a guest that spins on every vCPU and allocates without end is held by the host's cgroup",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: held,
    },
    Case {
        name: "the cgroup of a shim that was killed goes with delete",
        subject: Subject::Alone,
        seconds: (60, 60),
        run: killed,
    },
    Case {
        name: "a cgroup that cannot be is refused by name and leaves nothing",
        subject: Subject::Alone,
        seconds: (60, 60),
        run: refused,
    },
    Case {
        name: "a VM without need of a cgroup runs where none can be made",
        subject: Subject::Alone,
        seconds: (90, 90),
        run: not_required,
    },
    Case {
        name: "a configured parent holds the VM in place of the specification's cgroup",
        subject: Subject::Alone,
        seconds: (90, 90),
        run: parent,
    },
    Case {
        name: "the quotas of containers in one VM add up in its cgroup",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: quotas,
    },
    Case {
        name: "a VM beyond its memory on the host is ended by the host's kernel and its exit is told",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: beyond,
    },
];

const CGROUPS: &str = "/sys/fs/cgroup";
/// 1.2 CPUs, so that the VM has two vCPUs and may not use both.
const QUOTA: u64 = 120_000;
const PERIOD: u64 = 100_000;

/// Has the guest's kernel run a program for it, which it does in the root cgroup: where a process that crashes leaves its
/// core. It uses two vCPUs, and doubles a string until there is no memory for more, again and again.
const ESCAPE: &str = r#"umount /proc/sys &&
echo '(while :; do :; done) & (while :; do :; done) & while :; do (x=abcdefgh; while :; do x=$x$x; done); done' >/run/spin &&
echo '|/proc/%P/root/bin/busybox sh /proc/%P/root/run/spin' >/proc/sys/kernel/core_pattern &&
sh -c 'kill -SEGV $$'
sleep 1000"#;

fn read(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(text.trim().to_owned())
}

fn number(path: &Path) -> Result<u64> {
    let text = read(path)?;
    text.parse()
        .with_context(|| format!("{}: {text:?}", path.display()))
}

/// A value of `cpu.stat`.
fn cpu(cgroup: &Path, name: &str) -> Result<u64> {
    let text = read(&cgroup.join("cpu.stat"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.with_context(|| format!("there is no {name} in {text:?}"))?;
    Ok(value.trim().parse()?)
}

/// All threads of a process are in this cgroup, given by its path below the root.
fn expect_threads_in(pid: i32, below: &str) -> Result<()> {
    let mut count = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let place = read(&thread?.path().join("cgroup"))?;
        let expected = format!("0::{below}");
        ensure!(place == expected, "a thread is in {place}");
        count += 1;
    }
    // Two vCPUs at least, and the one that began.
    ensure!(count > 2, "{count} threads");
    Ok(())
}

fn state(id: &str) -> PathBuf {
    let namespace = NAMESPACE.replace('-', "--");
    PathBuf::from(format!("/run/nacre/vms/{namespace}-{id}"))
}

fn held(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("held");
    let (quota, period) = (QUOTA.to_string(), PERIOD.to_string());
    let limit = (64 << 20).to_string();
    let flags = [
        "--cap-add",
        "CAP_SYS_ADMIN",
        "--memory-limit",
        &limit,
        "--cpu-quota",
        &quota,
        "--cpu-period",
        &period,
    ];
    ctr.detached(&id, &flags, &["sh", "-c", ESCAPE])?;
    let below = format!("/{NAMESPACE}/{id}");
    let cgroup = PathBuf::from(format!("{CGROUPS}{below}"));
    let (pid, _) = ctr.task(&id)?.context("there is no task")?;
    expect_threads_in(pid, &below)?;

    // The least VM, and what the shim needs.
    let stated = (256 << 20) + (128 << 20);
    let maximum = number(&cgroup.join("memory.max"))?;
    ensure!(maximum == stated, "memory.max is {maximum}, not {stated}");
    let written = read(&cgroup.join("cpu.max"))?;
    ensure!(
        written == format!("{quota} {period}"),
        "cpu.max is {written}"
    );

    // Its own memory limit does not hold it any more.
    poll::until("150 MiB in use", context.seconds(60), || {
        let used = number(&cgroup.join("memory.current"))?;
        Ok((used > 150 << 20).then_some(()))
    })?;
    let (before, began) = (cpu(&cgroup, "usage_usec")?, Instant::now());
    let throttled = cpu(&cgroup, "nr_throttled")?;
    std::thread::sleep(Duration::from_secs(3));
    let (after, took) = (cpu(&cgroup, "usage_usec")?, began.elapsed());
    let share = (after - before) as f64 / took.as_micros() as f64;
    eprintln!("  it used {share:.3} CPUs");
    let allowed = QUOTA as f64 / PERIOD as f64;
    // A period at either end, and what a tick is late.
    ensure!(
        share < allowed * 1.15,
        "it used {share:.3} CPUs of {allowed}"
    );
    let throttled = cpu(&cgroup, "nr_throttled")? - throttled;
    ensure!(throttled > 0, "it was never held back, at {share:.3} CPUs");
    let used = number(&cgroup.join("memory.current"))?;
    ensure!(used <= maximum, "{used} bytes are over the maximum");
    expect_threads_in(pid, &below)?;

    super::exec::end(&ctr, context, &id)?;
    poll::until("the end of the cgroup", context.seconds(10), || {
        Ok((!cgroup.exists()).then_some(()))
    })
}

/// A bundle whose spec has these values under `linux`.
fn bundle<'a>(context: &'a Context, name: &str, linux: &[(&str, Value)]) -> Result<Bundle<'a>> {
    with_limits(Bundle::plain(context, name)?, linux)
}

/// The bundle with these values under `linux` in its spec.
fn with_limits<'a>(bundle: Bundle<'a>, linux: &[(&str, Value)]) -> Result<Bundle<'a>> {
    let file = bundle.folder.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&file)?)?;
    for (key, value) in linux {
        spec["linux"][key] = value.clone();
    }
    fs::write(&file, serde_json::to_vec(&spec)?)?;
    Ok(bundle)
}

fn killed(context: &Context) -> Result<()> {
    // As a CRI plugin with systemd's names would say it; systemd itself is not asked.
    let unit = context.id("unit");
    let name = json!(format!("nacre-e2e.slice:nacre:{unit}"));
    let slice = Path::new(CGROUPS).join("nacre.slice/nacre-e2e.slice");
    let cgroup = slice.join(format!("nacre-{unit}.scope"));
    let bundle = bundle(context, "killed", &[("cgroupsPath", name)])?;
    bundle.started(Dialect::Params)?;
    let shim = bundle.processes().first().map(|process| process.pid);
    let members = read(&cgroup.join("cgroup.procs"))?;
    let shim = shim.context("there is no shim")?;
    ensure!(
        members.lines().any(|pid| pid == shim.to_string()),
        "{shim} is not among {members:?}"
    );
    bundle.kill()?;
    ensure!(cgroup.exists(), "it went by itself");
    bundle.delete()?;
    ensure!(!cgroup.exists(), "{} is still there", cgroup.display());
    // And what was made on the way to it.
    ensure!(!slice.exists(), "{} is still there", slice.display());
    Ok(())
}

/// A cgroup of somebody else, with a process in it.
struct Busy {
    path: PathBuf,
    child: Child,
}

impl Busy {
    fn new(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path)?;
        let child = Command::new("sleep").arg("1000").spawn()?;
        fs::write(path.join("cgroup.procs"), child.id().to_string())?;
        Ok(Self { path, child })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir(&self.path);
    }
}

fn refused(context: &Context) -> Result<()> {
    let name = context.id("busy");
    let busy = Busy::new(Path::new(CGROUPS).join(&name))?;
    let pid = busy.child.id().to_string();
    for (name, path, words) in [
        ("root", "/".to_owned(), ["\"/\"", "cannot be limited"]),
        ("taken", format!("/{name}"), [pid.as_str(), "cgroupsPath"]),
        ("nodes", format!("/{name}-nodes"), ["cpuset.cpus", "4000"]),
    ] {
        let mut linux = vec![("cgroupsPath", json!(path))];
        if name == "nodes" {
            linux.push(("resources", json!({"cpu": {"cpus": "4000"}})));
        }
        let bundle = bundle(context, name, &linux)?;
        let output = bundle.start(Dialect::Params)?;
        ensure!(output.code != 0, "{path:?}: the shim came up");
        expect_words(&output.err(), &words)?;
        ensure!(bundle.processes().is_empty(), "{path:?}: a shim lives");
    }
    // It is not ours, and stays as it is.
    let members = read(&busy.path.join("cgroup.procs"))?;
    ensure!(members == pid, "it has {members:?}");
    Ok(())
}

/// A shim with this configuration, whose container sleeps and wants this cgroup.
fn configured<'a>(context: &'a Context, config: &str, cgroup: &str) -> Result<One<'a>> {
    let file = context.path("config.toml");
    fs::write(&file, config)?;
    let linux = [("cgroupsPath", json!(cgroup))];
    let mut bundle = with_limits(Bundle::script(context, "held", "sleep 1000")?, &linux)?;
    let config = ("NACRE_CONFIG", file.display().to_string());
    bundle.environment.push(config);
    let one = One::of(context, bundle)?;
    one.tasks
        .create(one.id(), &one.bundle.folder, &Stdio::default())?;
    one.tasks.start(one.id(), "")?;
    Ok(one)
}

fn not_required(context: &Context) -> Result<()> {
    let name = context.id("busy");
    let busy = Busy::new(Path::new(CGROUPS).join(&name))?;
    let one = configured(context, "cgroup_required = false\n", &format!("/{name}"))?;
    let shim = one.bundle.processes().first().map(|process| process.pid);
    // It is where it was started, which is here.
    let here = read(Path::new("/proc/self/cgroup"))?;
    let here = here.strip_prefix("0::").context("a place on cgroup v2")?;
    expect_threads_in(shim.context("there is no shim")?, here)?;
    one.end()?;
    let members = read(&busy.path.join("cgroup.procs"))?;
    ensure!(
        members == busy.child.id().to_string(),
        "the cgroup of somebody else has {members:?}"
    );
    Ok(())
}

fn parent(context: &Context) -> Result<()> {
    let (parent, named) = (context.id("parent"), context.id("named"));
    let config = format!("cgroup_parent = \"/{parent}/below\"\n");
    let one = configured(context, &config, &format!("/{named}"))?;
    let key = state(one.id());
    let key = key.file_name().context("no name")?.to_string_lossy();
    let below = format!("/{parent}/below/{key}");
    let cgroup = PathBuf::from(format!("{CGROUPS}{below}"));
    let shim = one.bundle.processes().first().map(|process| process.pid);
    expect_threads_in(shim.context("there is no shim")?, &below)?;
    let maximum = number(&cgroup.join("memory.max"))?;
    ensure!(maximum >= 256 << 20, "memory.max is {maximum}");
    let other = Path::new(CGROUPS).join(&named);
    ensure!(!other.exists(), "{} was made too", other.display());
    one.end()?;
    let top = Path::new(CGROUPS).join(&parent);
    ensure!(!top.exists(), "{} is still there", top.display());
    Ok(())
}

fn quotas(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let ids = ["one", "two", "three"].map(|name| context.id(name));
    let cgroup = PathBuf::from(format!("{CGROUPS}/{NAMESPACE}/{}", ids[0]));
    let group = format!("io.containerd.runc.v2.group={}", ids[0]);
    let expect = |quota: &str| -> Result<()> {
        let written = read(&cgroup.join("cpu.max"))?;
        ensure!(written == quota, "cpu.max is {written}, not {quota}");
        Ok(())
    };
    let run = |id: &str, quota: &[&str]| {
        let flags = [&["--annotation", &group][..], quota].concat();
        ctr.detached(id, &flags, &["sleep", "1000"])
    };
    run(&ids[0], &["--cpu-quota", "50000", "--cpu-period", "100000"])?;
    expect("50000 100000")?;
    // 1.2 CPUs, in another period.
    run(&ids[1], &["--cpu-quota", "60000", "--cpu-period", "50000"])?;
    expect("170000 100000")?;
    let own = cgroup.with_file_name(&ids[1]);
    ensure!(!own.exists(), "{} was made", own.display());
    // One that has none is held by none.
    run(&ids[2], &[])?;
    expect("max 100000")?;
    super::exec::end(&ctr, context, &ids[2])?;
    expect("170000 100000")?;
    super::exec::end(&ctr, context, &ids[1])?;
    expect("50000 100000")?;
    super::exec::end(&ctr, context, &ids[0])
}

/// Kills for want of memory since the machine's boot, of whatever processes.
fn oom_kills() -> Result<u64> {
    let text = read(Path::new("/proc/vmstat"))?;
    let value = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    Ok(value.context("no oom_kill in /proc/vmstat")?.parse()?)
}

fn beyond(context: &Context) -> Result<()> {
    const FILL: &str = "until [ -e /go ]; do sleep 0.1; done; x=abcdefgh; while :; do x=$x$x; done";
    let ctr = Ctr::new(context)?;
    let events = Events::listen(context, &ctr)?;
    let id = context.id("beyond");
    ctr.detached(&id, &[], &["sh", "-c", FILL])?;
    let cgroup = PathBuf::from(format!("{CGROUPS}/{NAMESPACE}/{id}"));
    // Less than the guest may have by its own size: what is stated is never too little for it.
    let used = number(&cgroup.join("memory.current"))?;
    let maximum = used + (24 << 20);
    fs::write(cgroup.join("memory.max"), maximum.to_string())?;
    let kills = oom_kills()?;
    ctr.exec(&id, "go", &[], &["touch", "/go"])?
        .expect_code(0)?;
    // There is an exec's exit too.
    let exits = || -> Result<Vec<Event>> {
        let all = events.of_task(&id)?.into_iter();
        let of_init =
            |event: &Event| event.topic == "/tasks/exit" && event.content["id"] == id.as_str();
        Ok(all.filter(of_init).collect())
    };
    let exit = poll::until("the exit", context.seconds(40), || Ok(exits()?.pop()))?;
    let status = &exit.content["exit_status"];
    ensure!(status == 137, "the exit is {}", exit.content);
    ensure!(
        oom_kills()? > kills,
        "the host's kernel has killed nothing for want of memory"
    );
    poll::until(
        "containerd forgetting the task",
        context.seconds(20),
        || Ok(ctr.task(&id)?.is_none().then_some(())),
    )?;
    ensure!(exits()?.len() == 1, "the exit was told more than once");
    ensure!(
        !state(&id).exists(),
        "{} is still there",
        state(&id).display()
    );
    ctr.remove(&id)?;
    poll::until("the end of the cgroup", context.seconds(10), || {
        Ok((!cgroup.exists()).then_some(()))
    })
}
