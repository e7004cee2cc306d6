//! Where things are: the workspace, its build output, and the folders under `target/nacre` that xtask keeps.

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::Result;

use crate::run::{Lock, step};

/// The folder of the workspace's `Cargo.toml`.
pub fn workspace() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest
        .ancestors()
        .nth(2)
        .map_or(manifest.clone(), PathBuf::from)
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || workspace().join("target"),
        |folder| workspace().join(folder),
    )
}

/// A programme of the workspace's debug build.
pub fn debug(program: &str) -> PathBuf {
    target().join("debug").join(program)
}

/// The target of static programs for guests and containers.
pub const STATIC: &str = "x86_64-unknown-linux-gnu";
/// The program that measures files from within.
pub const PROBE: &str = "nacre-probe";

/// One of the static programs, small ones.
pub fn static_program(program: &str) -> PathBuf {
    target().join(STATIC).join("agent").join(program)
}

/// A path below xtask's own cache, `target/nacre`.
pub fn cache(below: &str) -> PathBuf {
    target().join("nacre").join(below)
}

/// The folder below xtask's cache with guest images.
pub const IMAGE: &str = "image";
/// The same for Linux 6.12, which some end-to-end cases run beside the usual kernel.
pub const NEWER_IMAGE: &str = "image-6.12";
/// The same for the lean kernel, which the soak runs some cases on.
pub const LEAN_IMAGE: &str = "image-lean";

/// The same with the driver of virtio over PCI in the initrd, for QEMU.
pub const PCI_IMAGE: &str = "image-pci";

/// The guest kernel and initrd that `cargo xtask image` made last.
pub fn image(file: &str) -> PathBuf {
    cache(IMAGE).join("current").join(file)
}

/// Those of Linux 6.12, which the end-to-end suite makes for itself.
pub fn newer_image(file: &str) -> PathBuf {
    cache(NEWER_IMAGE).join("current").join(file)
}

/// Those of the lean kernel, which the soak makes for itself.
pub fn lean_image(file: &str) -> PathBuf {
    cache(LEAN_IMAGE).join("current").join(file)
}

static TESTBED: OnceLock<String> = OnceLock::new();

thread_local! {
    /// What this thread's testbed is called beyond the name that all have.
    static BESIDE: Cell<&'static str> = const { Cell::new("") };
}

/// From here on this thread uses a testbed of its own, beside those of other threads.
pub fn use_testbed_beside(suffix: &'static str) {
    BESIDE.set(suffix);
}

/// Names of the testbeds that `use_free_testbed` chooses from; the first has no name.
const TESTBEDS: [&str; 3] = ["", "2", "3"];

/// A path below the testbed's folder: its images, logs and lock. `NACRE_TESTBED_NAME` names another testbed, so that more
/// than one can run at a time.
pub fn testbed(below: &str) -> PathBuf {
    let name = TESTBED.get_or_init(|| std::env::var("NACRE_TESTBED_NAME").unwrap_or_default());
    testbed_named(&format!("{name}{}", BESIDE.get())).join(below)
}

/// Takes the first testbed that nobody is using, if none is named; the first one if all are in use.
pub fn use_free_testbed() -> Result<()> {
    if std::env::var_os("NACRE_TESTBED_NAME").is_some() {
        return Ok(());
    }
    for name in TESTBEDS {
        if Lock::try_take(&testbed_named(name).join("lock"))?.is_some() {
            if !name.is_empty() {
                step(format!(
                    "the testbed is in use; taking another, {}",
                    testbed_named(name).display()
                ));
            }
            let _ = TESTBED.set(name.to_owned());
            break;
        }
    }
    Ok(())
}

fn testbed_named(name: &str) -> PathBuf {
    match name {
        "" => cache("testbed"),
        name => cache(&format!("testbed-{}", name.replace('/', "-"))),
    }
}
