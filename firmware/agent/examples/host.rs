//! Plays the host for an agent that was built with `unix-transport`, in a
//! virtual machine without vsock: it goes through a container's life and says
//! on the console what it saw, `PASS case` or `FAIL case: why`. It needs
//! /rootfs, a directory with busybox and its links, and ends the machine.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nacre_protocol::agent::{
    CreateContainerRequest, DeleteContainerRequest, Empty, EventRequest, GuestMount, PidsRequest,
    ReadyRequest, ReadyResponse, ResizePtyRequest, ShutdownRequest, SignalRequest, StartRequest,
    Stdio, event_request::Event,
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
    oom: Arc<Mutex<Vec<String>>>,
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
                if exits
                    .insert(exit.container_id.clone(), exit.status)
                    .is_some()
                {
                    println!("FAIL exits: a second one of {}", exit.container_id);
                }
            }
            Some(Event::Oom(oom)) => self.oom.lock().unwrap().push(oom.container_id),
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
    macro_rules! cases {
        ($($case:ident),*) => { $(
            let begun = Instant::now();
            match $case(&harness).await {
                Ok(()) => println!("PASS {} in {:?}", stringify!($case), begun.elapsed()),
                Err(why) => println!("FAIL {}: {why}", stringify!($case)),
            }
        )* };
    }
    cases!(
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
        many
    );
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
