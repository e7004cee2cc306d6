//! Hooks of the specification, on the host and in the guest.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::calls::One;
use crate::context::{Context, NAMESPACE, Runtime};
use crate::ctr::{Ctr, Output, expect_words};
use crate::initrd::Initrd;
use crate::poll;
use crate::processes;
use crate::shim::Bundle;
use crate::suite::{Case, Subject};
use crate::tasks::Stdio;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "hooks run on the host in their order with the state on stdin",
        subject: Subject::Agreed,
        seconds: (120, 120),
        run: in_order,
    },
    Case {
        name: "a hook that fails in Create fails it and leaves nothing",
        subject: Subject::Agreed,
        seconds: (120, 120),
        run: fails,
    },
    Case {
        name: "a hook that hangs is killed at its timeout and fails Create",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: hangs,
    },
    Case {
        name: "a poststart hook that fails stops the container",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: poststart_fails,
    },
    Case {
        name: "poststop hooks run though the shim was killed",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: after_a_kill,
    },
    Case {
        name: "hooks of the container run in the guest, before its root is in place and after",
        subject: Subject::Alone,
        seconds: (90, 90),
        run: in_the_guest,
    },
    Case {
        name: "a container whose Create is given up goes as soon as the guest has made it",
        subject: Subject::Alone,
        seconds: (120, 120),
        run: given_up,
    },
];

/// Writes down its stage, the state, and the network namespaces of itself and of the state's pid.
const HOOK: &str = r#"#!/bin/sh
cat >"$OUT/$1.json"
pid=$(sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' "$OUT/$1.json")
echo "$1" >>"$OUT/order"
[ -z "$pid" ] || readlink "/proc/$pid/ns/net" >"$OUT/$1.net"
readlink /proc/self/ns/net >"$OUT/$1.own"
pwd >"$OUT/$1.pwd"
"#;

/// A container from a specification with hooks.
struct Hooked<'a> {
    context: &'a Context,
    ctr: Ctr<'a>,
    id: String,
    out: PathBuf,
    spec: PathBuf,
}

impl<'a> Hooked<'a> {
    /// `hooks` gets what makes the entry of a hook by its stage, from a script.
    fn new(
        context: &'a Context,
        name: &str,
        hooks: impl FnOnce(&dyn Fn(&str, &str) -> Result<Value>) -> Result<Value>,
    ) -> Result<Self> {
        let ctr = Ctr::new(context)?;
        let id = context.id(name);
        let out = context.path("out");
        let root = context.path("root");
        for folder in [&out, &root] {
            fs::create_dir_all(folder)?;
        }
        crate::image::unpack(&context.programs.busybox, &root)?;
        let entry = |stage: &str, script: &str| -> Result<Value> {
            let path = out.join(format!("{stage}.sh"));
            fs::write(&path, script)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            let environment = [
                format!("OUT={}", out.display()),
                "PATH=/usr/bin:/bin".into(),
            ];
            Ok(json!({"path": path, "args": ["hook", stage], "env": environment}))
        };
        let text = ctr.call(&["oci", "spec"])?;
        text.expect_code(0)?;
        let mut spec: Value = serde_json::from_slice(&text.stdout).context("ctr oci spec")?;
        spec["root"] = json!({"path": root});
        spec["process"]["args"] = json!(["sleep", "1000"]);
        spec["process"]["terminal"] = json!(false);
        spec["process"]["env"] = json!(["PATH=/bin"]);
        spec["linux"]["cgroupsPath"] = json!(format!("/{NAMESPACE}/{id}"));
        spec["annotations"] = json!({"nacre.test/hooks": "yes"});
        spec["hooks"] = hooks(&entry)?;
        let file = context.path("spec.json");
        fs::write(&file, serde_json::to_vec(&spec)?)?;
        Ok(Self {
            context,
            ctr,
            id,
            out,
            spec: file,
        })
    }

    fn run(&self) -> Result<Output> {
        let runtime = self.context.runtime.name();
        let spec = self.spec.to_string_lossy();
        let words = ["run", "--detach", "--null-io", "--runtime", runtime];
        let words = [&words[..], &["--config", spec.as_ref(), &self.id]].concat();
        self.ctr.call(&words)
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.out.join(name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.trim().to_owned())
    }

    fn state(&self, stage: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.read(&format!("{stage}.json"))?)?)
    }

    /// It must not run. What the client knows of it is removed; what else there is, the suite finds.
    fn must_fail_saying(&self, words: &[&str]) -> Result<()> {
        let output = self.run()?;
        ensure!(output.code != 0, "the container ran");
        expect_words(&output.err(), words)?;
        if self.ctr.task(&self.id)?.is_some() {
            self.ctr.call(&["tasks", "delete", "--force", &self.id])?;
        }
        ensure!(self.ctr.task(&self.id)?.is_none(), "there is a task");
        let list = self.ctr.call(&["containers", "list", "-q"])?;
        if list.out().lines().any(|line| line == self.id) {
            self.ctr.remove(&self.id)?;
        }
        let shims = || processes::shims(self.context.runtime.shim(), &self.id);
        poll::until("the end of the shim", self.context.seconds(10), || {
            Ok(shims().is_empty().then_some(()))
        })
    }
}

fn in_order(context: &Context) -> Result<()> {
    let hooked = Hooked::new(context, "hooked", |entry| {
        Ok(json!({
            "prestart": [entry("prestart", HOOK)?],
            "createRuntime": [entry("createRuntime", HOOK)?],
            "poststart": [entry("poststart", HOOK)?],
            "poststop": [entry("poststop", HOOK)?],
        }))
    })?;
    hooked.run()?.expect_code(0)?;
    let (pid, _) = hooked.ctr.task(&hooked.id)?.context("there is no task")?;
    let order = hooked.read("order")?;
    ensure!(order == "prestart\ncreateRuntime\npoststart", "{order:?}");
    let network = fs::read_link(format!("/proc/{pid}/ns/net"))?;
    let host = fs::read_link("/proc/self/ns/net")?;
    let bundle = hooked
        .ctr
        .daemon
        .state
        .join("io.containerd.runtime.v2.task")
        .join(NAMESPACE)
        .join(&hooked.id);
    for (stage, status) in [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("poststart", "running"),
    ] {
        let state = hooked.state(stage)?;
        ensure!(state["pid"] == pid, "{stage}: {state}, the task is {pid}");
        ensure!(state["id"] == hooked.id, "{stage}: {state}");
        ensure!(state["bundle"] == json!(bundle), "{stage}: {state}");
        ensure!(state["ociVersion"].is_string(), "{stage}: {state}");
        let annotation = &state["annotations"]["nacre.test/hooks"];
        ensure!(annotation == "yes", "{stage}: {state}");
        // runc before 1.4 runs poststart at the end of its create.
        let early = stage == "poststart" && context.runtime == Runtime::Runc;
        ensure!(early || state["status"] == status, "{stage}: {state}");
        let seen = hooked.read(&format!("{stage}.net"))?;
        ensure!(network == Path::new(&seen), "{stage}: {seen}");
        let own = hooked.read(&format!("{stage}.own"))?;
        ensure!(host == Path::new(&own), "{stage} ran in {own}");
        let folder = hooked.read(&format!("{stage}.pwd"))?;
        ensure!(bundle == Path::new(&folder), "{stage} ran in {folder}");
    }
    ensure!(network != host, "the container has the host's network");
    super::exec::end(&hooked.ctr, context, &hooked.id)?;
    let order = hooked.read("order")?;
    ensure!(order.ends_with("poststart\npoststop"), "{order:?}");
    let state = hooked.state("poststop")?;
    ensure!(state["status"] == "stopped", "{state}");
    Ok(())
}

fn fails(context: &Context) -> Result<()> {
    let hooked = Hooked::new(context, "fails", |entry| {
        let script = "#!/bin/sh\necho no such luck >&2\nexit 3\n";
        Ok(json!({
            "createRuntime": [entry("createRuntime", script)?],
            "poststop": [entry("poststop", HOOK)?],
        }))
    })?;
    // Which stage it was, not every release of runc says.
    let stage = match context.runtime {
        Runtime::Nacre => "createRuntime",
        Runtime::Runc => "hook",
    };
    hooked.must_fail_saying(&[stage, "exit status", "3", "no such luck"])?;
    // What it has begun, the other may undo.
    let order = hooked.read("order")?;
    ensure!(order == "poststop", "{order:?}");
    Ok(())
}

fn hangs(context: &Context) -> Result<()> {
    let hooked = Hooked::new(context, "hangs", |entry| {
        let mut entry = entry("createRuntime", "#!/bin/sh\nsleep 1000 &\nsleep 1000\n")?;
        entry["timeout"] = json!(1);
        Ok(json!({"createRuntime": [entry]}))
    })?;
    hooked.must_fail_saying(&["createRuntime", "within 1s", "killed"])
}

fn poststart_fails(context: &Context) -> Result<()> {
    let hooked = Hooked::new(context, "poststart", |entry| {
        let script = "#!/bin/sh\necho not today >&2\nexit 4\n";
        Ok(json!({
            "poststart": [entry("poststart", script)?],
            "poststop": [entry("poststop", HOOK)?],
        }))
    })?;
    hooked.must_fail_saying(&["poststart", "not today"])?;
    let order = hooked.read("order")?;
    ensure!(order == "poststop", "{order:?}");
    Ok(())
}

fn after_a_kill(context: &Context) -> Result<()> {
    let hooked = Hooked::new(context, "killed", |entry| {
        Ok(json!({"poststop": [entry("poststop", HOOK)?]}))
    })?;
    hooked.run()?.expect_code(0)?;
    for shim in processes::shims(context.runtime.shim(), &hooked.id) {
        processes::signal(shim.pid, Signal::SIGKILL);
    }
    poll::until("the task's end", context.seconds(20), || {
        Ok(hooked.ctr.task(&hooked.id)?.is_none().then_some(()))
    })?;
    // containerd 1.7 forgets the task while `delete` still runs.
    poll::until("the poststop hook", context.seconds(20), || {
        Ok(hooked
            .read("order")
            .ok()
            .filter(|order| order == "poststop"))
    })?;
    hooked.ctr.remove(&hooked.id)
}

/// Writes into the container's root, from outside and from inside, what each hook sees. The first one's program is in the
/// guest's initramfs alone.
fn in_the_guest(context: &Context) -> Result<()> {
    const BEFORE: &str = "state=$(/busybox cat); bundle=${state#*\\\"bundle\\\":}; bundle=${bundle#*\\\"}; bundle=${bundle%%\\\"*}
        { echo $state; /busybox hostname; /busybox cat /proc/sys/kernel/random/boot_id; } >$bundle/rootfs/before";
    const AFTER: &str = "{ cat; echo; hostname; cat /proc/sys/kernel/random/boot_id; } >/after";
    const SHOW: &str = "cat /proc/sys/kernel/random/boot_id; cat /before; echo --; cat /after";
    let mut bundle = Bundle::script(context, "guest", SHOW)?;
    let file = bundle.folder.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&file)?)?;
    spec["hooks"] = json!({
        "createContainer": [{"path": "/busybox", "args": ["busybox", "sh", "-c", BEFORE]}],
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", AFTER], "env": ["PATH=/bin"]}],
    });
    fs::write(&file, serde_json::to_vec(&spec)?)?;
    Initrd::write(context, None)?.boots(&mut bundle);
    let one = One::of(context, bundle)?;
    let out = context.path("shown");
    let stdio = Stdio {
        stdout: format!("file://{}", out.display()),
        ..Stdio::default()
    };
    one.tasks.create(one.id(), &one.bundle.folder, &stdio)?;
    one.tasks.start(one.id(), "")?;
    let exit = one.tasks.wait(one.id(), "")?.exit_status;
    let shown = fs::read_to_string(&out)?;
    eprintln!("{shown}");
    ensure!(exit == 0, "the exit status is {exit}");
    let (boot, rest) = shown.split_once('\n').context("nothing was shown")?;
    let own = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure!(boot != own.trim(), "the container is on the host");
    let (before, after) = rest.split_once("--\n").context("no mark")?;
    for (hook, seen) in [("createContainer", before), ("startContainer", after)] {
        // The same kernel, and the container's name: it is in the namespaces already.
        expect_words(seen, &[boot, "\nbundle\n", one.id()]).context(hook)?;
    }
    one.tasks.delete(one.id(), "")?;
    one.shut_down()
}

/// A hook in the guest takes longer than Create may. Other containers of the VM do not notice, and its id is free once the hook is over.
fn given_up(context: &Context) -> Result<()> {
    let mut first = Bundle::script(context, "first", "sleep 1000")?;
    Initrd::write(context, None)?.boots(&mut first);
    fs::write(context.path("config.toml"), "create_timeout = \"8s\"\n")?;
    let one = One::of(context, first)?;
    one.tasks
        .create(one.id(), &one.bundle.folder, &Stdio::default())?;
    one.tasks.start(one.id(), "")?;
    let second = Bundle::script(context, "second", "exit 7")?;
    let file = second.folder.join("config.json");
    let plain = fs::read(&file)?;
    let mut spec: Value = serde_json::from_slice(&plain)?;
    let slow = json!({"path": "/busybox", "args": ["busybox", "sleep", "16"]});
    spec["hooks"] = json!({"createContainer": [slow]});
    fs::write(&file, serde_json::to_vec(&spec)?)?;
    let create = || {
        one.tasks
            .create(&second.id, &second.folder, &Stdio::default())
    };
    let refused = create().err().context("the slow Create is done")?;
    expect_words(&refused.message, &["did not answer", "within 8s"])?;
    fs::write(&file, plain)?;
    let early = create().err().context("there are two of one name")?;
    expect_words(&early.message, &["exists"])?;
    poll::until("the name to be free", context.seconds(40), || {
        Ok(create().ok())
    })?;
    one.tasks.start(&second.id, "")?;
    let exit = one.tasks.wait(&second.id, "")?.exit_status;
    ensure!(exit == 7, "the exit status is {exit}");
    one.tasks.delete(&second.id, "")?;
    one.end()
}
