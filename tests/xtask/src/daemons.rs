//! The daemons that end-to-end cases drive, from packages of several Debian releases: where they are, in the testbed and
//! on a machine where cases run directly.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::apt::{self, Release};
use crate::oci;
use crate::stage::Stage;

/// A containerd, the release that packages it, and the environment variable that names its folder.
const CONTAINERDS: [(&str, Release, &str); 2] = [
    (
        "/opt/containerd-2.1",
        Release::Forky,
        "NACRE_CONTAINERD_2_1",
    ),
    (
        "/opt/containerd-1.7",
        Release::Trixie,
        "NACRE_CONTAINERD_1_7",
    ),
];
const IMAGE_IN_GUEST: &str = "/usr/share/nacre-test/busybox.tar";
/// CNI plugins, and where they are in the testbed.
const CNI: (&str, &str) = ("containernetworking-plugins", "/opt/cni/bin");
const PLUGINS: [&str; 5] = ["bridge", "host-local", "portmap", "loopback", "ptp"];
const PROGRAMS: [&str; 3] = ["containerd", "ctr", "containerd-shim-runc-v2"];

/// A static busybox.
pub fn busybox() -> Result<PathBuf> {
    let root = apt::unpacked(Release::Bookworm, "busybox-static")?;
    let merged = root.join("usr/bin/busybox");
    Ok(if merged.exists() {
        merged
    } else {
        root.join("bin/busybox")
    })
}

/// Puts the daemons on the tools disk.
pub fn stage(stage: &mut Stage) -> Result<()> {
    for (folder, release, _) in CONTAINERDS {
        let root = apt::unpacked(release, "containerd")?;
        for program in PROGRAMS {
            stage.program(
                &root.join("usr/bin").join(program),
                Path::new(folder).join(program),
                &[],
            )?;
        }
    }
    let runc = apt::unpacked(Release::Bookworm, "runc")?;
    let seccomp = apt::unpacked(Release::Bookworm, "libseccomp2")?.join("usr/lib/x86_64-linux-gnu");
    stage.program(&runc.join("usr/sbin/runc"), "/usr/sbin/runc", &[seccomp])?;
    let cni = apt::unpacked(Release::Bookworm, CNI.0)?.join("usr/lib/cni");
    for plugin in PLUGINS {
        stage.program(&cni.join(plugin), Path::new(CNI.1).join(plugin), &[])?;
    }
    stage.file(&oci::busybox_archive()?, IMAGE_IN_GUEST)
}

/// How commands in the testbed find the daemons and the test image.
pub fn environment_in_guest() -> Vec<(String, String)> {
    let mut all: Vec<(&str, &str)> = CONTAINERDS
        .iter()
        .map(|(folder, _, variable)| (*variable, *folder))
        .collect();
    all.extend([
        ("NACRE_RUNC", "/usr/sbin/runc"),
        ("NACRE_BUSYBOX", "/usr/bin/busybox"),
        ("NACRE_TEST_IMAGE", IMAGE_IN_GUEST),
        ("NACRE_TEST_IMAGE_REF", oci::REFERENCE),
        ("NACRE_CNI_BIN", CNI.1),
    ]);
    all.into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// The same for commands that run directly on this machine.
pub fn environment_on_host() -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for (_, release, variable) in CONTAINERDS {
        all.push((
            variable,
            apt::unpacked(release, "containerd")?.join("usr/bin"),
        ));
    }
    all.push((
        "NACRE_RUNC",
        apt::unpacked(Release::Bookworm, "runc")?.join("usr/sbin/runc"),
    ));
    all.push(("NACRE_BUSYBOX", busybox()?));
    all.push(("NACRE_TEST_IMAGE", oci::busybox_archive()?));
    all.push(("NACRE_TEST_IMAGE_REF", oci::REFERENCE.into()));
    all.push((
        "NACRE_CNI_BIN",
        apt::unpacked(Release::Bookworm, CNI.0)?.join("usr/lib/cni"),
    ));
    Ok(all
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.display().to_string()))
        .collect())
}
