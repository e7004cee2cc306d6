//! What cannot be done is refused by name, and leaves nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::context::Context;
use crate::ctr::{self, Ctr, expect_words};
use crate::processes;
use crate::suite::{Case, Subject};

const fn nacre(name: &'static str, seconds: u64, run: fn(&Context) -> Result<()>) -> Case {
    Case {
        name,
        subject: Subject::Nacre,
        seconds: (seconds, seconds),
        run,
    }
}

pub(crate) const CASES: &[Case] = &[
    nacre(
        "a missing kernel is named and leaves nothing",
        90,
        missing_kernel,
    ),
    nacre(
        "a kernel that is none is named and leaves nothing",
        90,
        broken_kernel,
    ),
    nacre(
        "a missing initrd is named and leaves nothing",
        90,
        missing_initrd,
    ),
    nacre(
        "a broken initrd is told with the console and leaves nothing",
        150,
        broken_initrd,
    ),
    nacre("no /dev/kvm is told and leaves nothing", 90, no_kvm),
    nacre(
        "annotations that cannot be are refused with what is allowed",
        60,
        annotations,
    ),
];

/// A runtime of this name whose shim is a script that ends in ours.
struct Variant<'a> {
    script: PathBuf,
    runtime: String,
    shim: String,
    context: &'a Context,
}

impl<'a> Variant<'a> {
    /// `setup` is shell text before, `prefix` what the shim's program is an argument of.
    fn new(context: &'a Context, name: &str, setup: &str, prefix: &str) -> Result<Self> {
        let shim = format!("containerd-shim-nacre{name}-v1");
        let script = context.daemon()?.shims.join(&shim);
        let program = context.programs.shim();
        fs::write(
            &script,
            format!("#!/bin/sh\n{setup}\nexec {prefix} {program:?} \"$@\"\n"),
        )?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        Ok(Variant {
            script,
            runtime: format!("io.containerd.nacre{name}.v1"),
            shim,
            context,
        })
    }

    /// A container with it must fail and say these words; then one with the real shim must work.
    fn must_fail_saying(&self, words: &[&str]) -> Result<()> {
        let ctr = Ctr::new(self.context)?;
        let id = self.context.id("refused");
        let output = ctr::run(&mut ctr.run_with_runtime(&self.runtime, &id, &[], &["true"]))?;
        ensure!(output.code != 0, "the container ran");
        expect_words(&output.err(), words)?;
        expect_nothing(self.context, &ctr, &id)?;
        ctr.run(&id, &[], &["echo", "now it works"])?
            .expect_code(0)?
            .expect_out("now it works\n")?;
        let left = processes::shims(&self.shim, &id);
        ensure!(left.is_empty(), "still there: {}", left[0].describe());
        Ok(())
    }
}

impl Drop for Variant<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.script);
    }
}

/// Neither a task nor a container of this id is known. (`ctr run --rm` deletes the container of a failed task.)
fn expect_nothing(context: &Context, ctr: &Ctr<'_>, id: &str) -> Result<()> {
    ensure!(ctr.task(id)?.is_none(), "the task {id} is still known");
    let shims = || processes::shims(context.runtime.shim(), id);
    crate::poll::until(
        "the end of the refused container's shim",
        context.seconds(10),
        || Ok(shims().is_empty().then_some(())),
    )?;
    let output = ctr.call(&["containers", "list", "-q"])?;
    if output.out().lines().any(|line| line == id) {
        ctr.call(&["containers", "delete", id])?.expect_code(0)?;
    }
    Ok(())
}

fn with_variable(
    context: &Context,
    name: &str,
    variable: &str,
    path: &Path,
    words: &[&str],
) -> Result<()> {
    let setup = format!("export {variable}={path:?}");
    let path = path.to_string_lossy();
    let mut all = vec![path.as_ref()];
    all.extend(words);
    Variant::new(context, name, &setup, "")?.must_fail_saying(&all)
}

fn missing_kernel(context: &Context) -> Result<()> {
    let path = context.path("no-kernel-here");
    with_variable(context, "lostkernel", "NACRE_KERNEL", &path, &["kernel"])
}

fn broken_kernel(context: &Context) -> Result<()> {
    let path = context.path("not-a-kernel");
    fs::write(&path, "this is a text and no kernel\n".repeat(1000))?;
    with_variable(context, "badkernel", "NACRE_KERNEL", &path, &["kernel"])
}

fn missing_initrd(context: &Context) -> Result<()> {
    let path = context.path("no-initrd-here");
    with_variable(context, "lostinitrd", "NACRE_INITRD", &path, &["initrd"])
}

fn broken_initrd(context: &Context) -> Result<()> {
    let path = context.path("not-an-initrd");
    fs::write(&path, "this is a text and no archive\n".repeat(1000))?;
    let setup = format!("export NACRE_INITRD={path:?}");
    // The kernel finds no root, and panics: its console says so.
    Variant::new(context, "badinitrd", &setup, "")?
        .must_fail_saying(&["panic", "VFS: Unable to mount root fs"])
}

fn no_kvm(context: &Context) -> Result<()> {
    let own = std::env::current_exe().context("this program's own path")?;
    let prefix = format!("{own:?} without-kvm");
    Variant::new(context, "nokvm", "", &prefix)?.must_fail_saying(&["/dev/kvm"])
}

fn annotations(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("annotated");
    for (annotation, words) in [
        (
            "io.nacre.kernel=/elsewhere",
            [
                "io.nacre.kernel",
                "/elsewhere",
                "not allowed",
                "io.nacre.vcpus",
            ],
        ),
        (
            "io.nacre.vcpu=2",
            ["io.nacre.vcpu ", "\"2\"", "not known", "io.nacre.vcpus"],
        ),
        (
            "io.nacre.vcpus=0",
            ["io.nacre.vcpus", "\"0\"", "cannot be", "1 to 254"],
        ),
    ] {
        let output = ctr.run(&id, &["--annotation", annotation], &["true"])?;
        ensure!(output.code != 0, "the container ran with {annotation}");
        expect_words(&output.err(), &words)?;
        expect_nothing(context, &ctr, &id)?;
    }
    Ok(())
}
