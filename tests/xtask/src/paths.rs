//! Where things are: the workspace, its build output, and the folders under `target/nacre` that xtask keeps.

use std::path::PathBuf;

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

/// A path below xtask's own cache, `target/nacre`.
pub fn cache(below: &str) -> PathBuf {
    target().join("nacre").join(below)
}

/// The guest kernel and initrd that `cargo xtask image` made last.
pub fn image(file: &str) -> PathBuf {
    cache("image/current").join(file)
}

/// A path below the testbed's folder: its images, logs and lock. `NACRE_TESTBED_NAME` names another testbed, so that more
/// than one can run at a time.
pub fn testbed(below: &str) -> PathBuf {
    let folder = match std::env::var("NACRE_TESTBED_NAME") {
        Ok(name) if !name.is_empty() => format!("testbed-{}", name.replace('/', "-")),
        _ => "testbed".to_owned(),
    };
    cache(&folder).join(below)
}
