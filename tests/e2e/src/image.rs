//! A small image made on the spot: busybox with its applets, in an OCI archive
//! that `ctr image import` takes.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::context::IMAGE;

/// A user of the image, beside root.
pub(crate) const USER: (&str, u32, u32) = ("diver", 1234, 4321);

/// Writes the archive.
pub(crate) fn write(busybox: &Path, archive: &Path) -> Result<()> {
    let layer = layer(busybox)?;
    let layer_digest = digest(&layer);
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/bin", "FROM_IMAGE=yes"],
            "Cmd": ["sh"],
        },
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] },
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    }))?;
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] = json!({ "io.containerd.image.name": IMAGE });
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": [entry] }))?;

    let file = fs::File::create(archive)
        .with_context(|| format!("making the image {}", archive.display()))?;
    let mut tar = tar::Builder::new(std::io::BufWriter::new(file));
    let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
    append(&mut tar, "oci-layout", 0o644, layout)?;
    append(&mut tar, "index.json", 0o644, &index)?;
    for blob in [&layer, &config, &manifest] {
        append(
            &mut tar,
            &format!("blobs/sha256/{}", &digest(blob)[7..]),
            0o644,
            blob,
        )?;
    }
    tar.into_inner()?.flush()?;
    Ok(())
}

/// Unpacks the image's files into a folder, for containers without containerd.
pub(crate) fn unpack(busybox: &Path, folder: &Path) -> Result<()> {
    let layer = layer(busybox)?;
    let mut archive = tar::Archive::new(&layer[..]);
    archive.set_preserve_permissions(true);
    archive
        .unpack(folder)
        .with_context(|| format!("unpacking the image to {}", folder.display()))
}

fn layer(busybox: &Path) -> Result<Vec<u8>> {
    let output = Command::new(busybox)
        .arg("--list")
        .output()
        .with_context(|| format!("running {}", busybox.display()))?;
    if !output.status.success() {
        bail!("{} --list failed: {}", busybox.display(), output.status);
    }
    let program = fs::read(busybox).with_context(|| format!("reading {}", busybox.display()))?;
    let mut tar = tar::Builder::new(Vec::new());
    for (folder, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("run", 0o755),
        ("sys", 0o555),
        ("tmp", 0o1777),
        ("var", 0o755),
    ] {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(mode);
        header.set_size(0);
        tar.append_data(&mut header, format!("{folder}/"), std::io::empty())?;
    }
    append(&mut tar, "bin/busybox", 0o755, &program)?;
    let applets = String::from_utf8(output.stdout).context("busybox --list")?;
    for applet in applets
        .lines()
        .filter(|applet| !["", "busybox"].contains(applet))
    {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_mode(0o777);
        header.set_size(0);
        tar.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    let (name, uid, gid) = USER;
    let passwd =
        format!("root:x:0:0:root:/root:/bin/sh\n{name}:x:{uid}:{gid}:{name}:/tmp:/bin/sh\n");
    append(&mut tar, "etc/passwd", 0o644, passwd.as_bytes())?;
    append(
        &mut tar,
        "etc/group",
        0o644,
        format!("root:x:0:\n{name}:x:{gid}:\n").as_bytes(),
    )?;
    append(&mut tar, "etc/motto", 0o644, b"made on the spot\n")?;
    Ok(tar.into_inner()?)
}

fn append<W: Write>(tar: &mut tar::Builder<W>, name: &str, mode: u32, data: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(data.len() as u64);
    Ok(tar.append_data(&mut header, name, data)?)
}

fn digest(data: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(data))
}

fn descriptor(kind: &str, data: &[u8]) -> serde_json::Value {
    json!({ "mediaType": kind, "digest": digest(data), "size": data.len() })
}
