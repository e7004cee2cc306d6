//! Containers that come and go: output, exit codes, environment, files.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::context::Context;
use crate::ctr::{self, Ctr, Output, expect_words};
use crate::image::USER;
use crate::suite::{Case, Subject};

const fn agreed(name: &'static str, seconds: u64, run: fn(&Context) -> Result<()>) -> Case {
    Case {
        name,
        subject: Subject::Agreed,
        seconds: (seconds, seconds),
        run,
    }
}

pub(crate) const CASES: &[Case] = &[
    agreed("echo's text comes back", 60, echo),
    agreed("exit codes pass through unchanged", 300, exit_codes),
    agreed(
        "a program killed inside is seen with 128 and the signal",
        60,
        signal_inside,
    ),
    agreed("stdout and stderr stay apart", 60, streams_apart),
    agreed(
        "1000 lines arrive whole after a fast exit",
        60,
        thousand_lines,
    ),
    agreed("8 MiB arrive whole after a fast exit", 120, eight_mebibytes),
    agreed("a slow reader gets every byte", 120, slow_reader),
    agreed("stdin reaches the program and its end too", 90, stdin),
    agreed("environment, cwd and user are as asked", 90, environment),
    agreed("files are written and read", 90, files),
    agreed("a missing program is a clear error", 60, missing_program),
    agreed("three containers at once", 150, three_at_once),
    Case {
        name: "the guest's kernel is not the host's",
        subject: Subject::Nacre,
        seconds: (60, 60),
        run: other_kernel,
    },
    Case {
        name: "annotations choose the size of the VM",
        subject: Subject::Nacre,
        seconds: (60, 60),
        run: sized,
    },
];

fn echo(context: &Context) -> Result<()> {
    let output =
        Ctr::new(context)?.run(&context.id("echo"), &[], &["echo", "hello from inside"])?;
    output.expect_code(0)?.expect_out("hello from inside\n")?;
    ensure!(output.stderr.is_empty(), "stderr has {:?}", output.err());
    Ok(())
}

fn exit_codes(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    // One VM for all of them, kept by a container that goes on; a VM for each is what most other cases have.
    let keeper = context.id("keeper");
    let group = format!("io.containerd.runc.v2.group={keeper}");
    let flags = ["--annotation", &group];
    ctr.detached(&keeper, &flags, &["sleep", "1000"])?;
    for code in [0, 1, 2, 42, 127, 255] {
        let id = context.id(&format!("code-{code}"));
        ctr.script(&id, &flags, &format!("exit {code}"))?
            .expect_code(code)?;
    }
    super::exec::end(&ctr, context, &keeper)
}

fn signal_inside(context: &Context) -> Result<()> {
    let script = "sh -c 'kill -TERM $$'; echo $?; sleep 100 & kill -KILL $!; wait $!; echo $?";
    let output = Ctr::new(context)?.script(&context.id("signal"), &[], script)?;
    output.expect_out("143\n137\n")?.expect_code(0)?;
    Ok(())
}

fn streams_apart(context: &Context) -> Result<()> {
    let script = "echo out 1; echo err 1 >&2; echo out 2; echo err 2 >&2";
    let output = Ctr::new(context)?.script(&context.id("streams"), &[], script)?;
    output.expect_code(0)?.expect_out("out 1\nout 2\n")?;
    ensure!(
        output.err() == "err 1\nerr 2\n",
        "stderr has {:?}",
        output.err()
    );
    Ok(())
}

fn thousand_lines(context: &Context) -> Result<()> {
    let script = "i=1; while [ $i -le 1000 ]; do echo \"line $i of a thousand\"; i=$((i+1)); done";
    let output = Ctr::new(context)?.script(&context.id("lines"), &[], script)?;
    output.expect_code(0)?;
    let out = output.out();
    for (line, number) in out.lines().zip(1..) {
        ensure!(
            line == format!("line {number} of a thousand"),
            "line {number} is {line:?}"
        );
    }
    ensure!(
        out.lines().count() == 1000,
        "{} lines instead of 1000",
        out.lines().count()
    );
    Ok(())
}

/// Random bytes, with their sum on stderr before them.
const BURST: &str = "head -c 8388608 /dev/urandom >/burst; sha256sum /burst >&2; exec cat /burst";

fn expect_burst(output: &Output) -> Result<()> {
    output.expect_code(0)?;
    ensure!(
        output.stdout.len() == 8 << 20,
        "{} bytes of 8 MiB",
        output.stdout.len()
    );
    let sum = format!("{:x}", Sha256::digest(&output.stdout));
    expect_words(&output.err(), &[&sum]).context("the checksum differs")
}

fn eight_mebibytes(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    expect_burst(&ctr.script(&context.id("burst"), &[], BURST)?)
}

fn slow_reader(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let mut command = ctr.run_command(&context.id("slow"), &[], &["sh", "-c", BURST]);
    // Everything on the way fills while nobody reads; then it is read in pieces with pauses.
    let output = ctr::run_with_slow_reader(&mut command, context.seconds(4))?;
    expect_burst(&output)
}

fn stdin(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let mut input = Vec::with_capacity(1 << 20);
    let mut hash = Sha256::digest(b"a beginning");
    while input.len() < 1 << 20 {
        input.extend_from_slice(&hash);
        hash = Sha256::digest(hash);
    }
    let mut command = ctr.run_command(&context.id("stdin"), &[], &["cat"]);
    let output = ctr::run_with_input(&mut command, &input)?;
    output.expect_code(0)?;
    ensure!(
        output.stdout == input,
        "{} bytes came back of {}",
        output.stdout.len(),
        input.len()
    );
    Ok(())
}

fn environment(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let output = ctr.script(
        &context.id("env"),
        &["--env", "GIVEN=a value, with blanks", "--cwd", "/var"],
        "echo \"$GIVEN|$FROM_IMAGE|$PWD|$(id -u):$(id -g)\"",
    )?;
    output
        .expect_code(0)?
        .expect_out("a value, with blanks|yes|/var|0:0\n")?;
    let (name, uid, gid) = USER;
    let script = "echo \"$(id -u):$(id -g)\"; touch /denied 2>/dev/null || echo refused; touch /tmp/mine && stat -c %u:%g /tmp/mine";
    let expected = format!("{uid}:{gid}\nrefused\n{uid}:{gid}\n");
    for (number, user) in [name.to_owned(), format!("{uid}:{gid}")].iter().enumerate() {
        let output = ctr.script(
            &context.id(&format!("user-{number}")),
            &["--user", user],
            script,
        )?;
        output.expect_code(0)?.expect_out(&expected)?;
    }
    Ok(())
}

fn files(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let script = "cat /etc/motto; mkdir -p /data/deep; echo written >/data/deep/file; ln -s file /data/deep/link; \
                  cat /data/deep/link; echo changed >/etc/motto; cat /etc/motto; chmod 600 /data/deep/file; \
                  stat -c %a:%s /data/deep/file; rm -r /data; ls /data 2>/dev/null || echo gone; head -c 4194304 /dev/zero >/big; stat -c %s /big";
    let expected = "made on the spot\nwritten\nchanged\n600:8\ngone\n4194304\n";
    ctr.script(&context.id("files-1"), &[], script)?
        .expect_code(0)?
        .expect_out(expected)?;
    // A second container has the image's files, not what the first wrote.
    let script = "cat /etc/motto; ls /big 2>/dev/null || echo none";
    ctr.script(&context.id("files-2"), &[], script)?
        .expect_code(0)?
        .expect_out("made on the spot\nnone\n")?;
    Ok(())
}

fn missing_program(context: &Context) -> Result<()> {
    let output = Ctr::new(context)?.run(&context.id("missing"), &[], &["/no/such/program"])?;
    ensure!(output.code != 0, "it succeeded");
    expect_words(&output.err(), &["/no/such/program"])?;
    let err = output.err();
    if !["no such file", "not found"]
        .iter()
        .any(|words| err.to_lowercase().contains(words))
    {
        bail!("it does not say that there is no such file: {err}");
    }
    Ok(())
}

fn three_at_once(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let run = |number: i32| -> Result<()> {
        let id = context.id(&format!("at-once-{number}"));
        let script = format!("echo begin {number}; sleep 3; echo end {number}; exit {number}");
        ctr.script(&id, &[], &script)?
            .expect_code(number)?
            .expect_out(&format!("begin {number}\nend {number}\n"))?;
        Ok(())
    };
    std::thread::scope(|scope| {
        let runs: Vec<_> = (1..=3)
            .map(|number| scope.spawn(move || run(number)))
            .collect();
        for run in runs {
            match run.join() {
                Ok(result) => result?,
                Err(_) => bail!("a thread panicked"),
            }
        }
        Ok(())
    })
}

fn other_kernel(context: &Context) -> Result<()> {
    let boot_id = |text: &str| text.trim().to_owned();
    let host = boot_id(&std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?);
    let script = "cat /proc/sys/kernel/random/boot_id; uname -r; cat /proc/version";
    let output = Ctr::new(context)?.script(&context.id("kernel"), &[], script)?;
    output.expect_code(0)?;
    let out = output.out();
    let mut lines = out.lines();
    let (guest, release, version) = (lines.next(), lines.next(), lines.next());
    let guest = boot_id(guest.context("no boot id")?);
    ensure!(guest.len() == 36, "the boot id {guest:?} is none");
    ensure!(
        guest != host,
        "the guest has the host's boot id: it is the same kernel"
    );
    // The kernel that runs is the one of the image, by its own banner.
    let banner = version.context("no version")?;
    ensure!(banner.starts_with(&format!(
        "Linux version {} ",
        release.context("no release")?
    )));
    ensure!(
        contains(&context.programs.kernel, banner.as_bytes())?,
        "the guest runs {banner:?}, which is not in {}",
        context.programs.kernel.display()
    );
    Ok(())
}

fn contains(file: &Path, bytes: &[u8]) -> Result<bool> {
    // The banner in the kernel's file is followed by a newline.
    let content = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let first = *bytes.first().context("nothing to look for")?;
    Ok(content
        .iter()
        .enumerate()
        .any(|(at, &byte)| byte == first && content[at..].starts_with(bytes)))
}

fn sized(context: &Context) -> Result<()> {
    let flags = [
        "--annotation",
        "io.nacre.vcpus=2",
        "--annotation",
        "io.nacre.memory=384M",
    ];
    let script = "grep -c ^processor /proc/cpuinfo; grep MemTotal /proc/meminfo";
    let output = Ctr::new(context)?.script(&context.id("sized"), &flags, script)?;
    output.expect_code(0)?;
    let out = output.out();
    let words: Vec<&str> = out.split_whitespace().collect();
    let ["2", "MemTotal:", kib, "kB"] = words[..] else {
        bail!("the guest has {out:?}");
    };
    // The kernel keeps some for itself; without the annotation it would have 512 MiB.
    let mib = kib.parse::<u64>()? / 1024;
    ensure!((300..=384).contains(&mib), "the guest has {mib} MiB");
    Ok(())
}
