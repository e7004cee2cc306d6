//! `-info` and `-v`: what the program is, without doing anything.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField};

/// The runtime's name in containerd.
pub const RUNTIME: &str = "io.containerd.nacre.v1";
/// Annotation that names the mount types which the shim mounts by itself.
const ALLOW_MOUNTS: &str = "containerd.io/runtime-allow-mounts";
/// Those mount types. What is not here containerd activates before Create, and hands over as what is.
const MOUNT_TYPES: &str = "bind,overlay,erofs,ext4,format/*,mkdir/*,mkfs/*";

/// The text of `-v`.
pub fn version_text() -> String {
    format!(
        "containerd-shim-nacre-v1:\n  Version:  {}\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// The protobuf `RuntimeInfo` of `-info`.
pub fn runtime_info() -> Vec<u8> {
    let mut version = RuntimeVersion::new();
    version.version = env!("CARGO_PKG_VERSION").to_owned();
    let mut info = RuntimeInfo::new();
    info.name = RUNTIME.to_owned();
    info.version = MessageField::some(version);
    info.annotations
        .insert(ALLOW_MOUNTS.to_owned(), MOUNT_TYPES.to_owned());
    // Writing to a Vec fails only for messages over 2 GiB.
    info.write_to_bytes().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_parses_back_and_names_mount_types() {
        let info = RuntimeInfo::parse_from_bytes(&runtime_info()).unwrap();
        assert_eq!(info.name, RUNTIME);
        assert_eq!(info.annotations[ALLOW_MOUNTS], MOUNT_TYPES);
        assert!(version_text().contains(env!("CARGO_PKG_VERSION")));
    }
}
