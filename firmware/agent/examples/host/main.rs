//! Plays the host for an agent that was built with `unix-transport`, in a
//! virtual machine without vsock: it goes through a container's life and says
//! on the console what it saw, `PASS case` or `FAIL case: why`. It needs
//! /rootfs, a directory with busybox and its links, and ends the machine.

mod hotplug;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nacre_protocol::agent::{
    CreateContainerRequest, DeleteContainerRequest, DeleteExecRequest, Empty, EventRequest,
    ExecRequest, GuestMount, PauseRequest, PidsRequest, ReadyRequest, ReadyResponse,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, SignalRequest, StartRequest, StatsRequest,
    Stdio, UpdateRequest, event_request::Event,
};
use nacre_protocol::agent_ttrpc::{AgentClient, Host, create_host};
use nacre_protocol::{PORT_CALLS, PORT_EVENTS, PORT_LOG};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, Server, TtrpcContext};

type Outcome = Result<(), String>;

#[derive(Clone, Default)]
struct Seen {
    exits: Arc<Mutex<HashMap<String, u32>>>,
    order: Arc<Mutex<Vec<String>>>,
    oom: Arc<Mutex<Vec<String>>>,
    pressure: Arc<Mutex<Vec<Instant>>>,
    fresh: Arc<Notify>,
}

#[async_trait]
impl Host for Seen {
    async fn ready(&self, _: &TtrpcContext, ready: ReadyRequest) -> ttrpc::Result<ReadyResponse> {
        println!("ready: {ready:?}");
        Ok(ReadyResponse {
            realtime_ns: 1_900_000_000_000_000_000,
            hostname: "guest".into(),
            ..Default::default()
        })
    }

    async fn event(&self, _: &TtrpcContext, request: EventRequest) -> ttrpc::Result<Empty> {
        println!("event {}: {:?}", request.sequence, request.event);
        match request.event {
            Some(Event::Exit(exit)) => {
                let mut exits = self.exits.lock().unwrap();
                let key = key(&exit.container_id, &exit.exec_id);
                if exits.insert(key.clone(), exit.status).is_some() {
                    println!("FAIL exits: a second one of {key}");
                }
                self.order.lock().unwrap().push(key);
            }
            Some(Event::Oom(oom)) => self.oom.lock().unwrap().push(oom.container_id),
            Some(Event::Pressure(_)) => self.pressure.lock().unwrap().push(Instant::now()),
            _ => {}
        }
        self.fresh.notify_waiters();
        Ok(Empty::new())
    }
}

impl Seen {
    async fn exit(&self, id: &str) -> Result<u32, String> {
        let wait = async {
            loop {
                let fresh = self.fresh.notified();
                if let Some(status) = self.exits.lock().unwrap().get(id) {
                    return *status;
                }
                fresh.await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
        waited.map_err(|_| "no exit within 20 s".into())
    }
}

struct Harness {
    agent: AgentClient,
    seen: Seen,
    next_port: Mutex<u32>,
}

#[derive(Default)]
struct Streams {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// How exits are known here: the container alone for its init.
fn key(id: &str, exec_id: &str) -> String {
    match exec_id {
        "" => id.into(),
        exec_id => format!("{id}/{exec_id}"),
    }
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(30))
}

fn spec(arguments: &[&str], more: &str) -> String {
    let arguments = serde_json::to_string(arguments).unwrap();
    let caps = r#"["CAP_CHOWN","CAP_SETUID","CAP_SETGID","CAP_KILL","CAP_MKNOD"]"#;
    format!(
        r#"{{"ociVersion":"1.1.0","hostname":"inside",
        "process":{{"user":{{"uid":0,"gid":0}},"args":{arguments},"cwd":"/",
          "env":["PATH=/bin:/usr/bin","WHO=me"],
          "capabilities":{{"bounding":{caps},"effective":{caps},"permitted":{caps}}},
          "noNewPrivileges":true}},
        "mounts":[
          {{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]}},
          {{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","mode=755","size=65536k"]}},
          {{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]}},
          {{"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","noexec","nodev","mode=1777","size=65536k"]}},
          {{"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]}},
          {{"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]}},
          {{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["ro","nosuid","noexec","nodev"]}},
          {{"destination":"/run","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]}}],
        "linux":{{"cgroupsPath":"/default/x",
          "resources":{{"devices":[{{"allow":false,"access":"rwm"}}]{more}}},
          "namespaces":[{{"type":"pid"}},{{"type":"ipc"}},{{"type":"uts"}},{{"type":"mount"}},{{"type":"network"}},{{"type":"cgroup"}}],
          "maskedPaths":["/proc/acpi","/proc/kcore","/proc/keys","/sys/firmware"],
          "readonlyPaths":["/proc/bus","/proc/fs","/proc/irq","/proc/sys"]}}}}"#
    )
}

impl Harness {
    fn port(&self) -> (u32, UnixListener) {
        let mut next = self.next_port.lock().unwrap();
        *next += 1;
        (
            *next,
            UnixListener::bind(format!("/run/host/{}", *next)).unwrap(),
        )
    }

    async fn create(
        &self,
        id: &str,
        spec: String,
        terminal: bool,
    ) -> Result<(Option<UnixStream>, UnixStream, Option<UnixStream>), String> {
        let (stdin_port, stdin) = self.port();
        let (stdout_port, stdout) = self.port();
        let (stderr_port, stderr) = self.port();
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec_json: spec.into_bytes(),
            rootfs: vec![GuestMount {
                fstype: "none".into(),
                source: "/run/rootfs".into(),
                target: "rootfs".into(),
                options: vec!["bind".into()],
                ..Default::default()
            }],
            stdio: Some(Stdio {
                stdin_port,
                stdout_port,
                stderr_port: if terminal { 0 } else { stderr_port },
                terminal,
                columns: 100,
                rows: 30,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let begun = Instant::now();
        self.agent
            .create_container(context(), &request)
            .await
            .map_err(|error| format!("create: {error}"))?;
        println!("  create of {id} took {:?}", begun.elapsed());
        let stdin = stdin.accept().await.unwrap().0;
        let stdout = stdout.accept().await.unwrap().0;
        let stderr = match terminal {
            true => None,
            false => Some(stderr.accept().await.unwrap().0),
        };
        Ok((Some(stdin), stdout, stderr))
    }

    async fn start(&self, id: &str) -> Result<u32, String> {
        let request = StartRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let answer = self.agent.start(context(), &request).await;
        answer
            .map(|answer| answer.pid)
            .map_err(|error| error.to_string())
    }

    /// Adds an exec: its streams, stderr only without a terminal.
    async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: String,
        terminal: bool,
    ) -> Result<(UnixStream, UnixStream, Option<UnixStream>), String> {
        let (stdin_port, stdin) = self.port();
        let (stdout_port, stdout) = self.port();
        let (stderr_port, stderr) = self.port();
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process_json: process.into_bytes(),
            stdio: Some(Stdio {
                stdin_port,
                stdout_port,
                stderr_port: if terminal { 0 } else { stderr_port },
                terminal,
                columns: 100,
                rows: 30,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let answer = self.agent.exec(context(), &request).await;
        answer.map_err(|error| error.to_string())?;
        let stdin = stdin.accept().await.unwrap().0;
        let stdout = stdout.accept().await.unwrap().0;
        let stderr = match terminal {
            true => None,
            false => Some(stderr.accept().await.unwrap().0),
        };
        Ok((stdin, stdout, stderr))
    }

    async fn start_exec(&self, id: &str, exec_id: &str) -> Result<u32, String> {
        let request = StartRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let answer = self.agent.start(context(), &request).await;
        answer
            .map(|answer| answer.pid)
            .map_err(|error| error.to_string())
    }

    async fn delete_exec(&self, id: &str, exec_id: &str) -> Outcome {
        let request = DeleteExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let answer = self.agent.delete_exec(context(), &request).await;
        answer.map(|_| ()).map_err(|error| error.to_string())
    }

    /// A whole exec: stdout, stderr and the exit status.
    async fn run_exec(
        &self,
        id: &str,
        exec_id: &str,
        process: String,
        input: &[u8],
    ) -> Result<(String, String, u32), String> {
        let (mut stdin, mut stdout, stderr) = self.exec(id, exec_id, process, false).await?;
        let begun = Instant::now();
        self.start_exec(id, exec_id).await?;
        println!("  start of {id}/{exec_id} took {:?}", begun.elapsed());
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut stderr = stderr.unwrap();
        let write = async {
            let _ = stdin.write_all(input).await;
            let _ = stdin.shutdown().await;
        };
        let exited = key(id, exec_id);
        let (_, read, read_err, status) = tokio::join!(
            write,
            stdout.read_to_end(&mut out),
            stderr.read_to_end(&mut err),
            self.seen.exit(&exited)
        );
        read.and(read_err)
            .map_err(|error| format!("reading: {error}"))?;
        self.delete_exec(id, exec_id).await?;
        self.seen.exits.lock().unwrap().remove(&exited);
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((text(out), text(err), status?))
    }

    /// A container whose init does nothing for long.
    async fn sleeper(&self, id: &str, more: &str) -> Outcome {
        let spec = spec(&["sleep", "1000"], more);
        self.create(id, spec, false).await?;
        self.start(id).await.map(|_| ())
    }

    async fn end(&self, id: &str) -> Outcome {
        self.signal(id, 9, false).await?;
        same(self.seen.exit(id).await?, 137)?;
        self.delete(id).await
    }

    async fn delete(&self, id: &str) -> Outcome {
        let request = DeleteContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let answer = self.agent.delete_container(context(), &request).await;
        answer.map(|_| ()).map_err(|error| error.to_string())
    }

    async fn signal(&self, id: &str, signal: u32, all: bool) -> Outcome {
        let request = SignalRequest {
            container_id: id.into(),
            signal,
            all,
            ..Default::default()
        };
        let answer = self.agent.signal(context(), &request).await;
        answer.map(|_| ()).map_err(|error| error.to_string())
    }

    /// A whole life: stdout, stderr and the exit status.
    async fn run(&self, id: &str, spec: String, input: &[u8]) -> Result<(Streams, u32), String> {
        let (stdin, mut stdout, stderr) = self.create(id, spec, false).await?;
        self.start(id).await?;
        let mut streams = Streams::default();
        let (mut stdin, mut stderr) = (stdin.unwrap(), stderr.unwrap());
        let write = async {
            let _ = stdin.write_all(input).await;
            let _ = stdin.shutdown().await;
        };
        let (_, out, err, status) = tokio::join!(
            write,
            stdout.read_to_end(&mut streams.stdout),
            stderr.read_to_end(&mut streams.stderr),
            self.seen.exit(id)
        );
        out.and(err).map_err(|error| format!("reading: {error}"))?;
        self.delete(id)
            .await
            .map_err(|error| format!("delete: {error}"))?;
        Ok((streams, status?))
    }

    async fn sh(&self, id: &str, script: &str) -> Result<(String, String, u32), String> {
        let (streams, status) = self.run(id, spec(&["sh", "-c", script], ""), b"").await?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((text(streams.stdout), text(streams.stderr), status))
    }
}

fn same<T: PartialEq + std::fmt::Debug>(got: T, expected: T) -> Outcome {
    match got == expected {
        true => Ok(()),
        false => Err(format!("got {got:?}, not {expected:?}")),
    }
}

async fn outputs(h: &Harness) -> Outcome {
    let (out, err, status) = h
        .sh("outputs", "echo hello; echo oops >&2; exit 42")
        .await?;
    same(
        (out.as_str(), err.as_str(), status),
        ("hello\n", "oops\n", 42),
    )
}

async fn inside(h: &Harness) -> Outcome {
    let script = "hostname; echo $WHO; id -u; pwd; echo $$; cat /proc/self/cgroup; ls /dev; \
        ifconfig lo | grep UP; touch /x && rm /x && echo rw; mount | head -20; \
        grep -i sigign /proc/self/status; ulimit -n; echo again >/dev/stderr";
    let (out, err, status) = h.sh("inside", script).await?;
    println!("{out}{err}");
    same(status, 0)?;
    let lines: Vec<&str> = out.lines().collect();
    same(&lines[..6], &["inside", "me", "0", "/", "1", "0::/"])?;
    same(err.as_str(), "again\n")
}

async fn working_directory(h: &Harness) -> Outcome {
    // As another user, in a directory that is not there, with /dev/stdout opened anew.
    let spec = spec(&["sh", "-c", "pwd; id -u; id -G; echo x >/dev/stdout"], "")
        .replace(r#""cwd":"/""#, r#""cwd":"/srv/new""#)
        .replace(
            r#""uid":0,"gid":0"#,
            r#""uid":1000,"gid":50,"additionalGids":[7]"#,
        );
    let (streams, status) = h.run("cwd", spec, b"").await?;
    let out = String::from_utf8_lossy(&streams.stdout).into_owned();
    let err = String::from_utf8_lossy(&streams.stderr).into_owned();
    same(
        (out.as_str(), err.as_str(), status),
        ("/srv/new\n1000\n50 7\nx\n", "", 0),
    )
}

async fn burst(h: &Harness) -> Outcome {
    let (streams, status) = h
        .run(
            "burst",
            spec(&["head", "-c", "8388608", "/dev/zero"], ""),
            b"",
        )
        .await?;
    same((streams.stdout.len(), status), (8 << 20, 0))
}

async fn echo_back(h: &Harness) -> Outcome {
    let input: Vec<u8> = (0..5_000_000_u32).map(|i| (i % 251) as u8).collect();
    let (streams, status) = h.run("cat", spec(&["cat"], ""), &input).await?;
    same(streams.stdout == input, true)?;
    same(status, 0)
}

async fn missing(h: &Harness) -> Outcome {
    h.create("missing", spec(&["no-such-program"], ""), false)
        .await?;
    match h.start("missing").await {
        Ok(_) => return Err("it started".into()),
        Err(words) if words.contains("no-such-program") => println!("  {words}"),
        Err(words) => return Err(words),
    }
    h.delete("missing").await?;
    same(h.seen.exit("missing").await?, 127)
}

async fn signals(h: &Harness) -> Outcome {
    h.create("signals", spec(&["sleep", "1000"], ""), false)
        .await?;
    same(h.delete("nobody").await.is_err(), true)?;
    h.start("signals").await?;
    let again = h.start("signals").await.unwrap_err();
    println!("  {again}");
    let running = h.delete("signals").await.unwrap_err();
    println!("  {running}");
    let request = PidsRequest {
        container_id: "signals".into(),
        ..Default::default()
    };
    let pids = h.agent.pids(context(), &request).await.unwrap();
    same(pids.processes.len(), 1)?;
    h.signal("signals", 9, true).await?;
    same(h.seen.exit("signals").await?, 137)?;
    let gone = h.signal("signals", 9, false).await.unwrap_err();
    println!("  {gone}");
    h.delete("signals").await
}

async fn created_only(h: &Harness) -> Outcome {
    h.create("created", spec(&["true"], ""), false).await?;
    let twice = h.create("created", spec(&["true"], ""), false).await;
    println!("  {}", twice.err().ok_or("made twice")?);
    h.delete("created").await?;
    same(h.seen.exit("created").await?, 137)
}

async fn bad_requests(h: &Harness) -> Outcome {
    for id in ["", "../x", "a/b"] {
        let words = h.create(id, spec(&["true"], ""), false).await.err();
        println!("  {}", words.ok_or("it was made")?);
    }
    let words = h
        .create("bad", "{}".into(), false)
        .await
        .err()
        .ok_or("it was made")?;
    println!("  {words}");
    let mut broken = spec(&["true"], "");
    broken = broken.replace(r#""type":"mqueue""#, r#""type":"nosuchfs""#);
    let words = h
        .create("bad", broken, false)
        .await
        .err()
        .ok_or("it was made")?;
    println!("  {words}");
    let left = std::path::Path::new("/run/nacre/containers/bad").exists()
        || std::path::Path::new("/sys/fs/cgroup/nacre/bad").exists();
    same(left, false)
}

async fn terminal(h: &Harness) -> Outcome {
    let script = "tty; stty size; read line; echo got $line; stty size";
    let (stdin, mut stdout, _) = h
        .create("tty", spec(&["sh", "-c", script], ""), true)
        .await?;
    h.start("tty").await?;
    let mut stdin = stdin.unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("30 100") {
        if stdout.read_buf(&mut seen).await.unwrap() == 0 {
            return Err(format!("ended: {}", String::from_utf8_lossy(&seen)));
        }
    }
    let request = ResizePtyRequest {
        container_id: "tty".into(),
        columns: 120,
        rows: 40,
        ..Default::default()
    };
    h.agent.resize_pty(context(), &request).await.unwrap();
    stdin.write_all(b"word\n").await.unwrap();
    stdout.read_to_end(&mut seen).await.unwrap();
    let seen = String::from_utf8_lossy(&seen);
    println!("  {seen:?}");
    same(seen.contains("got word") && seen.contains("40 120"), true)?;
    same(h.seen.exit("tty").await?, 0)?;
    h.delete("tty").await
}

async fn out_of_memory(h: &Harness) -> Outcome {
    let limited = r#","memory":{"limit":20971520,"swap":20971520},"pids":{"limit":50}"#;
    let script = "cat /sys/fs/cgroup/memory.max; x=$(head -c 60000000 /dev/zero | tr '\\0' x)";
    let (streams, status) = h
        .run("oom", spec(&["sh", "-c", script], limited), b"")
        .await?;
    println!("  {:?} {status}", String::from_utf8_lossy(&streams.stdout));
    same(
        h.seen.oom.lock().unwrap().contains(&"oom".to_string()),
        true,
    )
}

async fn grandchild(h: &Harness) -> Outcome {
    // Its background process ends with the pid namespace, whatever it holds.
    let begun = Instant::now();
    let (out, _, status) = h.sh("grandchild", "sleep 1000 & echo out").await?;
    same((out.as_str(), status), ("out\n", 0))?;
    same(begun.elapsed() < Duration::from_secs(15), true)
}

async fn many(h: &Harness) -> Outcome {
    let files = || std::fs::read_dir("/proc/1/fd").unwrap().count();
    let before = files();
    for number in 0..20 {
        let id = format!("many{number}");
        let (out, _, status) = h.sh(&id, "echo $WHO").await?;
        same((out.as_str(), status), ("me\n", 0))?;
    }
    for file in std::fs::read_dir("/proc/1/fd").unwrap().flatten() {
        print!(" {:?}", std::fs::read_link(file.path()).unwrap_or_default());
    }
    let mounts = std::fs::read_to_string("/proc/1/mountinfo")
        .unwrap()
        .lines()
        .count();
    println!("  descriptors {before} then {}, mounts {mounts}", files());
    same(files() <= before, true)?;
    let left = std::fs::read_dir("/run/nacre/containers").unwrap().count();
    same(left, 0)
}

/// The process of an exec.
fn process(arguments: &[&str]) -> String {
    let arguments = serde_json::to_string(arguments).unwrap();
    let caps = r#"["CAP_CHOWN"]"#;
    format!(
        r#"{{"user":{{"uid":0,"gid":0}},"args":{arguments},"cwd":"/tmp",
        "env":["PATH=/bin","WHO=exec"],"noNewPrivileges":true,
        "capabilities":{{"bounding":{caps},"effective":{caps},"permitted":{caps}}},
        "rlimits":[{{"type":"RLIMIT_NOFILE","hard":77,"soft":66}}]}}"#
    )
}

async fn exec(h: &Harness) -> Outcome {
    h.sleeper("ex", "").await?;
    let script = "echo $WHO; pwd; cat /proc/1/cmdline | tr '\\0' ' '; echo; ulimit -n; \
        grep CapEff /proc/self/status; cat /proc/self/cgroup; hostname; \
        ls /proc/self/fd | wc -l; echo bad >&2; exit 7";
    let (out, err, status) = h
        .run_exec("ex", "e1", process(&["sh", "-c", script]), b"")
        .await?;
    println!("  {out:?}");
    let lines: Vec<&str> = out.lines().collect();
    same(
        &lines[..7],
        &[
            "exec",
            "/tmp",
            "sleep 1000 ",
            "66",
            "CapEff:\t0000000000000001",
            "0::/",
            "inside",
        ],
    )?;
    same((err.as_str(), status), ("bad\n", 7))?;
    // By another user, which can open its own stdout again; the id is free again.
    let other = process(&["sh", "-c", "id -u; id -G; echo x >/dev/stdout"]).replace(
        r#""uid":0,"gid":0"#,
        r#""uid":1000,"gid":50,"additionalGids":[7]"#,
    );
    let (out, err, status) = h.run_exec("ex", "e1", other, b"").await?;
    same(
        (out.as_str(), err.as_str(), status),
        ("1000\n50 7\nx\n", "", 0),
    )?;
    let input: Vec<u8> = vec![b'y'; 3_000_000];
    let (out, _, status) = h.run_exec("ex", "cat", process(&["cat"]), &input).await?;
    same((out.len(), status), (3_000_000, 0))?;
    let left = std::fs::read_dir("/run/nacre/containers/ex/execs")
        .unwrap()
        .count();
    same(left, 0)?;
    h.end("ex").await
}

async fn execs_at_once(h: &Harness) -> Outcome {
    h.sleeper("five", "").await?;
    let stuck = h.exec("five", "stuck", process(&["sleep", "999"]), false);
    let _streams = stuck.await?;
    h.start_exec("five", "stuck").await?;
    let run = async |number: u32| {
        let script = format!("sleep 1; echo {number}; exit {number}");
        let process = process(&["sh", "-c", &script]);
        h.run_exec("five", &format!("x{number}"), process, b"")
            .await
    };
    let (a, b, c, d, e) = tokio::join!(run(1), run(2), run(3), run(4), run(255));
    for (ran, number) in [(a, 1), (b, 2), (c, 3), (d, 4), (e, 255)] {
        let (out, _, status) = ran?;
        same((out, status), (format!("{number}\n"), number))?;
    }
    let request = PidsRequest {
        container_id: "five".into(),
        ..Default::default()
    };
    let pids = h.agent.pids(context(), &request).await.unwrap().processes;
    let mut names: Vec<&str> = pids.iter().map(|one| one.exec_id.as_str()).collect();
    names.sort_unstable();
    same(&names[..], &["", "stuck"])?;
    // The container's end is told after that of its exec, and frees it.
    h.end("five").await?;
    let order = h.seen.order.lock().unwrap().clone();
    let place = |name: &str| order.iter().position(|one| one == name);
    same(place("five/stuck") < place("five"), true)?;
    same(h.seen.exit("five/stuck").await?, 137)
}

async fn exec_refusals(h: &Harness) -> Outcome {
    h.sleeper("refuse", "").await?;
    h.exec("refuse", "twice", process(&["true"]), false).await?;
    let says = |words: Option<String>, code: &str| match words {
        Some(words) if words.contains(code) => {
            println!("  {words}");
            Ok(())
        }
        other => Err(format!("{other:?} has no {code}")),
    };
    let again = h.exec("refuse", "twice", process(&["true"]), false).await;
    says(again.err(), "ALREADY_EXISTS")?;
    let request = SignalRequest {
        container_id: "refuse".into(),
        exec_id: "twice".into(),
        signal: 9,
        ..Default::default()
    };
    let early = h.agent.signal(context(), &request).await;
    says(
        early.err().map(|error| error.to_string()),
        "FAILED_PRECONDITION",
    )?;
    h.delete_exec("refuse", "twice").await?;
    says(h.delete_exec("refuse", "twice").await.err(), "NOT_FOUND")?;
    for bad in ["", "../x", "a/b"] {
        let refused = h.exec("refuse", bad, process(&["true"]), false).await;
        says(refused.err(), "INVALID_ARGUMENT")?;
    }
    let refused = h.exec("refuse", "bad", "{}".into(), false).await;
    says(refused.err(), "INVALID_ARGUMENT")?;
    let nobody = h.exec("nobody", "x", process(&["true"]), false).await;
    says(nobody.err(), "NOT_FOUND")?;
    // A program that is not there, and a directory that is not there.
    h.exec("refuse", "missing", process(&["no-such-program"]), false)
        .await?;
    says(
        h.start_exec("refuse", "missing").await.err(),
        "no-such-program",
    )?;
    same(h.seen.exit("refuse/missing").await?, 127)?;
    h.delete_exec("refuse", "missing").await?;
    let nowhere = process(&["true"]).replace("/tmp", "/no/where");
    h.exec("refuse", "nowhere", nowhere, false).await?;
    says(h.start_exec("refuse", "nowhere").await.err(), "chdir")?;
    println!("  status {}", h.seen.exit("refuse/nowhere").await?);
    h.delete_exec("refuse", "nowhere").await?;
    // One that runs cannot be deleted or started again; one that ended cannot be signalled.
    let _streams = h
        .exec("refuse", "runs", process(&["sleep", "999"]), false)
        .await?;
    h.start_exec("refuse", "runs").await?;
    says(
        h.delete_exec("refuse", "runs").await.err(),
        "FAILED_PRECONDITION",
    )?;
    says(
        h.start_exec("refuse", "runs").await.err(),
        "FAILED_PRECONDITION",
    )?;
    let request = SignalRequest {
        exec_id: "runs".into(),
        signal: 15,
        ..request
    };
    h.agent.signal(context(), &request).await.unwrap();
    same(h.seen.exit("refuse/runs").await?, 143)?;
    let gone = h.agent.signal(context(), &request).await;
    says(gone.err().map(|error| error.to_string()), "NOT_FOUND")?;
    // After the init's end nothing is added or started.
    h.exec("refuse", "late", process(&["true"]), false).await?;
    h.signal("refuse", 9, false).await?;
    h.seen.exit("refuse").await?;
    let late = h.exec("refuse", "later", process(&["true"]), false).await;
    says(late.err(), "FAILED_PRECONDITION")?;
    says(
        h.start_exec("refuse", "late").await.err(),
        "FAILED_PRECONDITION",
    )?;
    h.delete("refuse").await
}

async fn exec_terminal(h: &Harness) -> Outcome {
    h.sleeper("extty", "").await?;
    let script =
        "tty; stty size; id -u; echo x >$(tty); read line; echo got $line; stty size; exit 5";
    let other = process(&["sh", "-c", script]).replace(r#""uid":0"#, r#""uid":1000"#);
    let (mut stdin, mut stdout, _) = h.exec("extty", "t", other, true).await?;
    h.start_exec("extty", "t").await?;
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("x\r\n") {
        if stdout.read_buf(&mut seen).await.unwrap() == 0 {
            return Err(format!("ended: {}", String::from_utf8_lossy(&seen)));
        }
    }
    let request = ResizePtyRequest {
        container_id: "extty".into(),
        exec_id: "t".into(),
        columns: 120,
        rows: 40,
        ..Default::default()
    };
    h.agent.resize_pty(context(), &request).await.unwrap();
    stdin.write_all(b"word\n").await.unwrap();
    stdout.read_to_end(&mut seen).await.unwrap();
    let seen = String::from_utf8_lossy(&seen);
    println!("  {seen:?}");
    for part in ["/dev/pts/", "30 100", "1000", "got word", "40 120"] {
        same((part, seen.contains(part)), (part, true))?;
    }
    same(h.seen.exit("extty/t").await?, 5)?;
    h.delete_exec("extty", "t").await?;
    h.end("extty").await
}

async fn pause(h: &Harness) -> Outcome {
    let script = "while true; do echo tick; sleep 0.05; done";
    let (_stdin, mut stdout, _stderr) = h
        .create("pause", spec(&["sh", "-c", script], ""), false)
        .await?;
    h.start("pause").await?;
    let request = PauseRequest {
        container_id: "pause".into(),
        ..Default::default()
    };
    let mut buffer = [0; 4096];
    let count = stdout.read(&mut buffer).await.unwrap();
    same(count > 0, true)?;
    let begun = Instant::now();
    for _ in 0..2 {
        h.agent
            .pause(context(), &request)
            .await
            .map_err(|error| format!("pause: {error}"))?;
    }
    println!("  pausing took {:?}", begun.elapsed());
    let events = std::fs::read_to_string("/sys/fs/cgroup/nacre/pause/cgroup.events").unwrap();
    same(events.contains("frozen 1"), true)?;
    // What was on its way may still come; then there is silence.
    let quiet = async |stdout: &mut UnixStream, buffer: &mut [u8]| {
        let read = stdout.read(buffer);
        tokio::time::timeout(Duration::from_millis(400), read)
            .await
            .is_err()
    };
    let _ = quiet(&mut stdout, &mut buffer).await;
    same(quiet(&mut stdout, &mut buffer).await, true)?;
    let refused = h.exec("pause", "x", process(&["true"]), false).await;
    println!("  {}", refused.err().ok_or("an exec of what is paused")?);
    let resume = ResumeRequest {
        container_id: "pause".into(),
        ..Default::default()
    };
    h.agent.resume(context(), &resume).await.unwrap();
    same(quiet(&mut stdout, &mut buffer).await, false)?;
    // A paused container can be killed.
    h.agent.pause(context(), &request).await.unwrap();
    h.end("pause").await
}

async fn update_and_stats(h: &Harness) -> Outcome {
    let limits = r#","memory":{"limit":67108864,"swap":67108864,"reservation":8388608},
        "cpu":{"shares":512,"quota":50000,"period":100000,"cpus":"0"},"pids":{"limit":40}"#;
    h.sleeper("limits", limits).await?;
    let file = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/nacre/limits/{name}"));
        text.unwrap_or_default().trim().to_owned()
    };
    // What the specification says holds from the start.
    for (name, value) in [
        ("memory.max", "67108864"),
        ("memory.swap.max", "0"),
        ("memory.low", "8388608"),
        ("cpu.max", "50000 100000"),
        ("cpu.weight", "59"),
        ("cpuset.cpus", "0"),
        ("pids.max", "40"),
    ] {
        same((name, file(name).as_str()), (name, value))?;
    }
    let request = StatsRequest {
        container_id: "limits".into(),
        ..Default::default()
    };
    let stats = async || h.agent.stats(context(), &request).await.unwrap();
    let before = stats().await;
    println!("  {before:?}");
    same((before.memory_max, before.pids_max), (67_108_864, 40))?;
    same((before.swap_max, before.pids_current), (0, 1))?;
    h.run_exec(
        "limits",
        "load",
        process(&[
            "sh",
            "-c",
            "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done",
        ]),
        b"",
    )
    .await?;
    let after = stats().await;
    same(after.cpu["usage_usec"] > before.cpu["usage_usec"], true)?;
    same(
        after.memory.contains_key("anon") && after.memory_current > 0,
        true,
    )?;
    let update = async |json: &str| {
        let request = UpdateRequest {
            container_id: "limits".into(),
            resources_json: json.as_bytes().to_vec(),
            ..Default::default()
        };
        h.agent.update(context(), &request).await
    };
    update(
        r#"{"memory":{"limit":134217728,"swap":134217728},"cpu":{"quota":20000,"shares":1024,"cpus":"0-1"},
        "pids":{"limit":30},"unified":{"memory.high":"120000000"}}"#,
    )
    .await
    .map_err(|error| format!("update: {error}"))?;
    let now = || {
        [
            "memory.max",
            "memory.swap.max",
            "cpu.max",
            "cpu.weight",
            "cpuset.cpus",
            "pids.max",
        ]
        .map(file)
    };
    same(
        now(),
        ["134217728", "0", "20000 100000", "100", "0-1", "30"].map(String::from),
    )?;
    // The kernel refuses the last of these: none of them holds.
    let refused =
        update(r#"{"memory":{"limit":268435456},"cpu":{"quota":1},"pids":{"limit":9}}"#).await;
    println!("  {}", refused.err().ok_or("a quota of 1 µs was taken")?);
    let refused = update(r#"{"pids":{"limit":9},"unified":{"no.such":"1"}}"#).await;
    println!("  {}", refused.err().ok_or("no.such was taken")?);
    same(
        now(),
        ["134217728", "0", "20000 100000", "100", "0-1", "30"].map(String::from),
    )?;
    h.end("limits").await
}

/// What the specification says of a process holds: capabilities, limits, masks.
async fn confinement(h: &Harness) -> Outcome {
    let limited = r#","pids":{"limit":10}"#;
    let script = "grep -E 'Cap(Eff|Bnd|Prm)|NoNewPrivs' /proc/self/status; ulimit -n; ulimit -Hn; \
        cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
        wc -c < /proc/keys; ls /sys/firmware | wc -l; \
        echo 1 > /proc/sys/vm/overcommit_memory || echo refused; \
        mount -t tmpfs x /mnt 2>/dev/null || echo no mount; cat /proc/self/oom_score_adj; \
        for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 3 & done 2>/dev/null || true; echo end";
    let spec = spec(&["sh", "-c", script], limited)
        .replace(
            r#""noNewPrivileges":true"#,
            r#""noNewPrivileges":true,"oomScoreAdj":500,
            "rlimits":[{"type":"RLIMIT_NOFILE","hard":88,"soft":55}]"#,
        )
        .replace(
            r#""cgroupsPath""#,
            r#""sysctl":{"net.ipv4.ip_unprivileged_port_start":"77"},"cgroupsPath""#,
        );
    let (streams, _) = h.run("confined", spec, b"").await?;
    let out = String::from_utf8_lossy(&streams.stdout).into_owned();
    println!("  {out:?} {:?}", String::from_utf8_lossy(&streams.stderr));
    let lines: Vec<&str> = out.lines().collect();
    let caps = "00000000080000e1";
    same(
        &lines[..13.min(lines.len())],
        &[
            &format!("CapPrm:\t{caps}"),
            &format!("CapEff:\t{caps}"),
            &format!("CapBnd:\t{caps}"),
            "NoNewPrivs:\t1",
            "55",
            "88",
            "77",
            "0",
            "0",
            "refused",
            "no mount",
            "500",
        ],
    )
}

/// A seccomp profile holds for the init and for execs, with and without no_new_privs, and leaves the
/// capabilities as they were asked for.
async fn seccomp(h: &Harness) -> Outcome {
    let profile = r#""seccomp":{"defaultAction":"SCMP_ACT_ALLOW",
        "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
        "syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":13},
          {"names":["kill"],"action":"SCMP_ACT_KILL_PROCESS","args":[{"index":1,"value":12,"op":"SCMP_CMP_EQ"}]}]},
        "cgroupsPath""#;
    let script = "grep -E 'Cap(Prm|Eff|Bnd)|Seccomp:|NoNewPrivs' /proc/self/status; mkdir /tmp/x; \
        sh -c 'kill -10 $$'; echo $?; sh -c 'kill -12 $$'; echo $?";
    // The other way round: what is not named is refused, and what a shell needs is enough.
    let names = r#"["execve","exit","exit_group","read","write","readv","writev","open","openat","close","fstat",
        "stat","lstat","newfstatat","mmap","mprotect","munmap","brk","rt_sigaction","rt_sigprocmask","rt_sigreturn",
        "ioctl","access","getpid","getppid","getuid","geteuid","getgid","getegid","fcntl","dup","dup2","fork","vfork",
        "clone","wait4","arch_prctl","prctl","capset","capget","set_tid_address","set_robust_list","rseq","prlimit64",
        "getrandom","readlink","uname","getcwd","gettid","statx","lseek","sysinfo"]"#;
    let list = format!(
        r#""seccomp":{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":{names},"action":"SCMP_ACT_ALLOW"}}]}},
        "cgroupsPath""#
    );
    let listed = spec(&["sh", "-c", "id -u; mkdir /tmp/x || echo no"], "")
        .replace(r#""noNewPrivileges":true"#, r#""noNewPrivileges":false"#)
        .replace(r#""cgroupsPath""#, &list);
    let (streams, status) = h.run("listed", listed, b"").await?;
    let out = String::from_utf8_lossy(&streams.stdout).into_owned();
    same((out.as_str(), status), ("0\nno\n", 0))?;
    for (id, kept, caps) in [
        ("nnp", "1", "00000000080000e1"),
        ("priv", "0", "00000000080000e1"),
    ] {
        let own = |text: String| match kept {
            "0" => text.replace(r#""noNewPrivileges":true"#, r#""noNewPrivileges":false"#),
            _ => text,
        };
        let with = own(spec(&["sh", "-c", &format!("{script}; sleep 1000")], ""))
            .replace(r#""cgroupsPath""#, profile);
        let (_stdin, mut stdout, mut stderr) = h.create(id, with, false).await?;
        h.start(id).await?;
        let mut seen = Vec::new();
        while seen.iter().filter(|byte| **byte == b'\n').count() < 7 {
            if stdout.read_buf(&mut seen).await.unwrap() == 0 {
                let mut words = String::new();
                let _ = stderr.as_mut().unwrap().read_to_string(&mut words).await;
                return Err(format!("ended: {} {words}", String::from_utf8_lossy(&seen)));
            }
        }
        let seen = String::from_utf8_lossy(&seen).into_owned();
        let of_exec = own(process(&["sh", "-c", script]));
        let (out, err, _) = h.run_exec(id, "x", of_exec, b"").await?;
        for (text, caps) in [(&seen, caps), (&out, "0000000000000001")] {
            let expected = format!(
                "CapPrm:\t{caps}\nCapEff:\t{caps}\nCapBnd:\t{caps}\nNoNewPrivs:\t{kept}\nSeccomp:\t2\n138\n159\n"
            );
            same(text.as_str(), expected.as_str())?;
        }
        same(err.contains("Permission denied"), true)?;
        h.end(id).await?;
    }
    Ok(())
}

/// Nodes of any device may be made, but only those that the rules allow can be opened.
async fn device_rules(h: &Harness) -> Outcome {
    let script = "mknod /dev/kmsg c 1 11 && echo made; echo x 2>/dev/null >/dev/null; \
        head -c 3 /dev/urandom | wc -c; echo x >/dev/kmsg && echo wrote; rm /dev/kmsg";
    let allowed = spec(&["sh", "-c", script], "").replace(
        r#"[{"allow":false,"access":"rwm"}]"#,
        r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":11,"access":"w"}]"#,
    );
    for (id, spec, wrote) in [
        ("dev1", spec(&["sh", "-c", script], ""), ""),
        ("dev2", allowed, "wrote\n"),
    ] {
        let (streams, _) = h.run(id, spec, b"").await?;
        let out = String::from_utf8_lossy(&streams.stdout).into_owned();
        let err = String::from_utf8_lossy(&streams.stderr).into_owned();
        println!("  {out:?} {err:?}");
        same(out, format!("made\n3\n{wrote}"))?;
        same(err.contains("not permitted"), wrote.is_empty())?;
    }
    Ok(())
}

async fn three_at_once(h: &Harness) -> Outcome {
    let (a, b, c) = tokio::join!(
        h.sh("at1", "sleep 1; exit 1"),
        h.sh("at2", "sleep 1; exit 2"),
        h.sh("at3", "sleep 1; exit 3")
    );
    same([a?.2, b?.2, c?.2], [1, 2, 3])
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    // The initramfs is read-only by now; containers get a copy that they may write to.
    let copied = std::process::Command::new("/rootfs/bin/busybox")
        .args(["cp", "-a", "/rootfs", "/run/rootfs"])
        .status();
    println!("copying the root: {copied:?}");
    let listen = |port: u32| UnixListener::bind(format!("/run/host/{port}")).unwrap();
    let (calls, events, log) = (listen(PORT_CALLS), listen(PORT_EVENTS), listen(PORT_LOG));
    let calls = calls.accept().await.unwrap().0;
    let agent = AgentClient::new(Client::new(Socket::new(calls)));
    let events = events.accept().await.unwrap().0;
    let seen = Seen::default();
    use futures::StreamExt;
    let one = futures::stream::once(async { Ok(events) }).chain(futures::stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(one))
        .register_service(create_host(Arc::new(seen.clone())));
    server.start().await.unwrap();
    tokio::spawn(async move {
        let mut lines = BufReader::new(log.accept().await.unwrap().0).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            println!("log: {line}");
        }
    });
    let harness = Harness {
        agent,
        seen,
        next_port: Mutex::new(70000),
    };
    use hotplug::{
        cpu_off_and_on, cpu_plug, memory_busy, memory_plug, resources, virtio_mem, watch_memory,
    };
    // `host.only=CASE,CASE` on the kernel's command line.
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let only: Vec<&str> = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("host.only="))
        .map(|list| list.split(',').collect())
        .unwrap_or_default();
    macro_rules! cases {
        ($unasked:expr, $($case:ident),*) => { $(
            if $unasked && only.is_empty() || only.contains(&stringify!($case)) {
                let begun = Instant::now();
                match $case(&harness).await {
                    Ok(()) => println!("PASS {} in {:?}", stringify!($case), begun.elapsed()),
                    Err(why) => println!("FAIL {}: {why}", stringify!($case)),
                }
            }
        )* };
    }
    cases!(
        true,
        outputs,
        inside,
        working_directory,
        burst,
        echo_back,
        missing,
        signals,
        created_only,
        bad_requests,
        terminal,
        out_of_memory,
        grandchild,
        three_at_once,
        exec,
        execs_at_once,
        exec_refusals,
        exec_terminal,
        pause,
        update_and_stats,
        confinement,
        seccomp,
        device_rules,
        many,
        resources,
        cpu_off_and_on,
        watch_memory
    );
    // Somebody must plug when asked on the console: only when named.
    cases!(false, cpu_plug, memory_plug, memory_busy, virtio_mem);
    let request = ShutdownRequest {
        grace_ms: 500,
        ..Default::default()
    };
    let begun = Instant::now();
    let _ = harness
        .create("last", spec(&["sleep", "1000"], ""), false)
        .await;
    let _ = harness.start("last").await;
    match harness.agent.shutdown(context(), &request).await {
        Ok(_) => println!("PASS shutdown in {:?}", begun.elapsed()),
        Err(error) => println!("FAIL shutdown: {error}"),
    }
    println!("END");
}
