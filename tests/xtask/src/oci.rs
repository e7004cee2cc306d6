//! A container image made on the spot: an OCI archive with one layer, a static busybox and what it needs around it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{daemons, paths, run};

/// The name under which `ctr image import` files the image.
pub const REFERENCE: &str = "docker.io/library/nacre-busybox:latest";

/// The archive, made unless it is there.
pub fn busybox_archive() -> Result<PathBuf> {
    let busybox = daemons::busybox()?;
    let data = fs::read(&busybox)?;
    let file = paths::cache(&format!("images/busybox-{}.tar", &digest(&data)[..16]));
    if file.exists() {
        return Ok(file);
    }
    let listing = run::output(Command::new(&busybox).arg("--list"))?;
    let layer = layer(&data, listing.lines())?;
    fs::create_dir_all(file.parent().context("archive without a folder")?)?;
    let partial = file.with_extension("partial");
    write_archive(&partial, &layer)?;
    fs::rename(&partial, &file)?;
    Ok(file)
}

/// The root file system as one uncompressed layer.
fn layer<'a>(busybox: &[u8], applets: impl Iterator<Item = &'a str>) -> Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    for (folder, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home/user", 0o755),
        ("mnt", 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("run", 0o755),
        ("sys", 0o555),
        ("tmp", 0o1777),
        ("usr/bin", 0o755),
        ("var", 0o755),
    ] {
        let mut header = header(tar::EntryType::Directory, mode, 0);
        if folder.starts_with("home/") {
            header.set_uid(1000);
            header.set_gid(1000);
        }
        layer.append_data(&mut header, format!("{folder}/"), &[][..])?;
    }
    for (name, mode, data) in [
        (
            "etc/passwd",
            0o644,
            &b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n"[..],
        ),
        ("etc/group", 0o644, b"root:x:0:\nuser:x:1000:\n"),
        ("bin/busybox", 0o755, busybox),
    ] {
        let mut header = header(tar::EntryType::Regular, mode, data.len() as u64);
        layer.append_data(&mut header, name, data)?;
    }
    for applet in applets.filter(|applet| !["", "busybox"].contains(applet)) {
        let mut header = header(tar::EntryType::Symlink, 0o777, 0);
        layer.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    Ok(layer.into_inner()?)
}

/// The layout of the OCI image specification, in a tar file.
fn write_archive(file: &Path, layer: &[u8]) -> Result<()> {
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/bin:/usr/bin"],
            "Cmd": ["/bin/sh"],
            "WorkingDir": "/",
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", digest(layer))] },
        "history": [{ "created_by": "cargo xtask" }],
    });
    let config = serde_json::to_vec(&config)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", layer)],
    });
    let manifest = serde_json::to_vec(&manifest)?;
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    entry["annotations"] = json!({ "io.containerd.image.name": REFERENCE, "org.opencontainers.image.ref.name": "latest" });
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": [entry] }))?;

    let mut archive = tar::Builder::new(File::create(file)?);
    let mut add = |name: String, data: &[u8]| {
        let mut header = header(tar::EntryType::Regular, 0o644, data.len() as u64);
        archive.append_data(&mut header, name, data)
    };
    add(
        "oci-layout".into(),
        &serde_json::to_vec(&json!({ "imageLayoutVersion": "1.0.0" }))?,
    )?;
    for blob in [&config[..], layer, &manifest] {
        add(format!("blobs/sha256/{}", digest(blob)), blob)?;
    }
    add("index.json".into(), &index)?;
    archive.finish()?;
    Ok(())
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": format!("sha256:{}", digest(blob)), "size": blob.len() })
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn digest(data: &[u8]) -> String {
    format!("{:x}", Sha256::digest(data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn every_descriptor_of_the_archive_names_a_blob_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("image.tar");
        let layer = layer(b"program", ["sh", "ls", "busybox"].into_iter()).unwrap();
        write_archive(&file, &layer).unwrap();
        let mut files = std::collections::HashMap::new();
        for entry in tar::Archive::new(File::open(&file).unwrap())
            .entries()
            .unwrap()
        {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_string_lossy().into_owned();
            let mut data = Vec::new();
            entry.read_to_end(&mut data).unwrap();
            files.insert(name, data);
        }
        let blob = |descriptor: &Value| {
            let hash = descriptor["digest"]
                .as_str()
                .unwrap()
                .strip_prefix("sha256:")
                .unwrap();
            let data = &files[&format!("blobs/sha256/{hash}")];
            assert_eq!(
                (digest(data), data.len() as u64),
                (hash.to_owned(), descriptor["size"].as_u64().unwrap())
            );
            data.clone()
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).unwrap();
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
        assert_eq!(blob(&manifest["layers"][0]), layer);
        assert_eq!(
            config["rootfs"]["diff_ids"][0],
            manifest["layers"][0]["digest"]
        );
    }
}
