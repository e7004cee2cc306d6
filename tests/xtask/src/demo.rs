//! `cargo xtask demo`: from a machine with Rust to a container in a microVM under a private containerd, in one command.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::run::{self, step};
use crate::testbed::{self, Request, Terminal};
use crate::{apt, image, kvm, paths};

/// What the demo does once all is built, in plain shell.
const SCRIPT: &str = include_str!("../../testbed/demo.sh");

/// Builds all that is needed, and shows it.
pub fn run(force_nested: bool) -> Result<i32> {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        bail!("the demo installs packages, mounts and starts containerd: run it as root");
    }
    apt::ensure_installed(&[
        ("gcc", "cc"),
        ("libc6-dev", "/usr/include/stdio.h"),
        ("e2fsprogs", "mke2fs"),
    ])?;
    step("building the shim and vmctl");
    run::run(run::cargo().args(["build", "--package", "nacre", "--bins"]))?;
    step("making the guest's kernel and initrd");
    image::run(&image::ImageArgs::default())?;

    let script = paths::cache("demo/demo.sh");
    std::fs::create_dir_all(script.parent().unwrap_or(Path::new("/")))?;
    std::fs::write(&script, SCRIPT)?;
    let (place, _) = kvm::place(force_nested);
    let target = match place {
        kvm::Place::Host => script.clone(),
        kvm::Place::Testbed => PathBuf::from("/usr/share/nacre/demo.sh"),
    };
    let mut request = Request::new(vec!["sh".into(), target.display().to_string()]);
    request.copies.push((script, target));
    request.force_nested = force_nested;
    request.out = paths::cache("demo/logs");
    let outcome = testbed::execute(&request, &mut Terminal)?;
    if let Some(why) = outcome.retried {
        step(format!("the testbed was booted twice: {why}"));
    }
    if outcome.code == 0 {
        step("the demo ended well");
    } else {
        step(format!(
            "the demo failed with code {}; logs are in {}",
            outcome.code,
            request.out.display()
        ));
    }
    Ok(outcome.code)
}
