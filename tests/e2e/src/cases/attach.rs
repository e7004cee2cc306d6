//! Who listens: clients that leave and come, output that waits for one, files
//! and programs that take it instead.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::context::{Context, Runtime};
use crate::ctr::{Ctr, expect_words};
use crate::poll;
use crate::suite::{Case, Subject};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a client leaves and another attaches",
        subject: Subject::Agreed,
        seconds: (120, 120),
        run: reattach,
    },
    Case {
        name: "the last 256 KiB wait for whoever attaches",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: replay,
    },
    Case {
        name: "a log file is appended to",
        subject: Subject::Agreed,
        seconds: (90, 90),
        run: log_file,
    },
    Case {
        name: "a logging program gets both streams and their names",
        subject: Subject::Agreed,
        seconds: (90, 90),
        run: log_program,
    },
    Case {
        name: "a logging program that is missing is a clear error",
        subject: Subject::Agreed,
        seconds: (90, 90),
        run: missing_log_program,
    },
];

/// A client whose two sides are ours. It is killed when dropped, as if its machine had gone.
pub(super) struct Client {
    child: Child,
    stdin: ChildStdin,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Client {
    pub fn start(command: &mut Command) -> Result<Self> {
        eprintln!("+ {command:?} &");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a client")?;
        let stdin = child.stdin.take().context("no stdin")?;
        let mut stdout = child.stdout.take().context("no stdout")?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let all = seen.clone();
        std::thread::spawn(move || {
            let mut part = vec![0; 64 << 10];
            while let Ok(count @ 1..) = stdout.read(&mut part) {
                if let Ok(mut all) = all.lock() {
                    all.extend_from_slice(&part[..count]);
                }
            }
        });
        Ok(Client { child, stdin, seen })
    }

    pub fn say(&mut self, text: &str) -> Result<()> {
        self.stdin.write_all(text.as_bytes())?;
        Ok(self.stdin.flush()?)
    }

    pub fn seen(&self) -> Vec<u8> {
        self.seen.lock().map(|all| all.clone()).unwrap_or_default()
    }

    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        poll::until(&format!("{text:?} from a client"), limit, || {
            let seen = self.seen();
            let found = seen
                .windows(text.len())
                .any(|window| window == text.as_bytes());
            Ok(found.then_some(()))
        })
    }

    pub fn end(&mut self, limit: Duration) -> Result<Option<i32>> {
        let status = poll::until("a client's end", limit, || Ok(self.child.try_wait()?))?;
        Ok(status.code())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(ctr: &Ctr<'_>, context: &Context, id: &str, script: &str) -> Result<Client> {
    let runtime = context.runtime.name();
    let image = crate::context::IMAGE;
    Client::start(&mut ctr.command(&["run", "--runtime", runtime, image, id, "sh", "-c", script]))
}

fn reattach(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("again");
    let script = "while read line; do [ $line = stop ] && exit 6; echo \"got $line\"; done";
    let mut first = run(&ctr, context, &id, script)?;
    first.say("one\n")?;
    first.wait_for("got one\n", context.seconds(30))?;
    drop(first);
    let status = ctr.task(&id)?.context("the task is gone")?.1;
    ensure!(status == "RUNNING", "without a client it is {status}");
    let mut second = Client::start(&mut ctr.command(&["tasks", "attach", &id]))?;
    second.say("two\n")?;
    second.wait_for("got two\n", context.seconds(20))?;
    second.say("stop\n")?;
    let code = second.end(context.seconds(20))?;
    ensure!(code == Some(6), "attach ended with {code:?}");
    ctr.remove(&id)
}

fn replay(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("replay");
    // The client is gone before the numbers come. They are more than anything on the way holds.
    let script =
        "echo up; read go; sleep 3; seq 1 200000; echo all told; : > /tmp/told; read stop; exit 4";
    let mut first = run(&ctr, context, &id, script)?;
    first.wait_for("up\n", context.seconds(30))?;
    first.say("go\n")?;
    std::thread::sleep(Duration::from_millis(500));
    drop(first);
    // Nothing holds the program up meanwhile: it is through before somebody listens again.
    poll::until("the last number", context.seconds(40), || {
        let told = ctr.exec(&id, "looks", &[], &["test", "-e", "/tmp/told"])?;
        Ok((told.code == 0).then_some(()))
    })?;
    let mut second = Client::start(&mut ctr.command(&["tasks", "attach", &id]))?;
    second.wait_for("all told\n", context.seconds(20))?;
    let seen = String::from_utf8_lossy(&second.seen()).into_owned();
    // The ring, and what lay in the FIFO when the first one went.
    let waited = (256 << 10)..=(256 << 10) + (64 << 10);
    ensure!(waited.contains(&seen.len()), "{} bytes waited", seen.len());
    expect_words(&seen, &["\n199999\n200000\nall told\n"])?;
    ensure!(!seen.contains("\n1000\n"), "the oldest were not dropped");
    second.say("stop\n")?;
    let code = second.end(context.seconds(20))?;
    ensure!(code == Some(4), "attach ended with {code:?}");
    ctr.remove(&id)
}

fn log_file(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let log = context.path("log");
    fs::write(&log, "before\n")?;
    let uri = format!("file://{}", log.display());
    // runc's shim has been seen to lose what a program writes just before it ends. Ours has no such grace.
    let grace = match context.runtime {
        Runtime::Nacre => "",
        Runtime::Runc => "sleep 1;",
    };
    for turn in ["one", "two"] {
        let script = format!("echo {turn}; echo {turn} too >&2; {grace} exit 2");
        ctr.script(&context.id(turn), &["--log-uri", &uri], &script)?
            .expect_code(2)?;
    }
    let text = fs::read_to_string(&log)?;
    ensure!(
        text.starts_with("before\n"),
        "the file was not appended to: {text:?}"
    );
    expect_words(&text, &["one\n", "one too\n", "two\n", "two too\n"])
}

fn log_program(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let (program, log) = (context.path("logger"), context.path("logged"));
    // It is told to terminate as soon as the container is deleted, and has not written all by then.
    fs::write(
        &program,
        "#!/bin/sh\ntrap '' TERM\nexec 5>&-\ncat <&4 >\"$1.err\" &\ncat <&3 >\"$1.out\"\nwait\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID $2\" >\"$1.new\"\nmv \"$1.new\" \"$1\"\n",
    )?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let id = context.id("logged");
    let uri = format!("binary://{}?{}=second", program.display(), log.display());
    ctr.script(
        &id,
        &["--log-uri", &uri],
        "seq 1 20000; echo to stderr >&2; exit 8",
    )?
    .expect_code(8)?;
    let named = poll::until("the logging program's end", context.seconds(20), || {
        Ok(fs::read_to_string(&log).ok())
    })?;
    let expected = format!("{} {id} second\n", crate::context::NAMESPACE);
    ensure!(named == expected, "it was told {named:?}");
    let out = fs::read_to_string(format!("{}.out", log.display()))?;
    ensure!(
        out.lines().count() == 20_000 && out.ends_with("\n20000\n"),
        "{} lines arrived",
        out.lines().count()
    );
    let err = fs::read_to_string(format!("{}.err", log.display()))?;
    ensure!(err == "to stderr\n", "stderr has {err:?}");
    Ok(())
}

fn missing_log_program(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("none");
    let output = ctr.script(&id, &["--log-uri", "binary:///bin/no-such-logger"], "true")?;
    ensure!(output.code != 0, "it works");
    expect_words(&output.err(), &["no-such-logger"])
}
