//! The short-lived commands by which containerd brings up a shim and clears up
//! after one: `start`, `delete`, `-info`, `-v`. Nothing of a VM is here.

mod address;
mod delete;
pub(crate) mod dialect;
mod flags;
mod info;
mod start;

use std::path::Path;

use oci_spec::runtime::Spec;

pub use address::release;
pub use delete::delete;
pub use flags::{Action, Flags, parse};
pub use info::{runtime_info, version_text};
pub use start::start;

/// Annotations that put containers into one sandbox, the first that is there decides.
const GROUP_ANNOTATIONS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// Byte that the daemon writes on its stdout, a pipe from `start`, when it is up; anything else is why it is not.
pub const DAEMON_UP: u8 = b'+';

/// Name of the socket's address in the bundle.
const ADDRESS_FILE: &str = "address";
/// Name of the daemon's pid in the bundle.
const PID_FILE: &str = "shim.pid";

/// The sandbox that a container belongs to: its group's id, else its own.
pub fn sandbox_id(spec: &Spec, id: &str) -> String {
    let annotations = spec.annotations().as_ref();
    GROUP_ANNOTATIONS
        .iter()
        .find_map(|name| annotations.and_then(|annotations| annotations.get(*name)))
        .filter(|group| !group.is_empty())
        .map_or_else(|| id.to_owned(), Clone::clone)
}

/// Reads the bundle's `config.json`.
///
/// # Errors
/// A text that names the file and what is wrong with it.
pub fn load_spec(bundle: &Path) -> Result<Spec, String> {
    let path = bundle.join("config.json");
    let text =
        std::fs::read(&path).map_err(|error| format!("Cannot read {}: {error}", path.display()))?;
    serde_json::from_slice(&text)
        .map_err(|error| format!("Cannot parse {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_annotation_that_is_there_groups() {
        let spec = |annotations: &str| -> Spec {
            serde_json::from_str(&format!(
                r#"{{"ociVersion":"1.1.0","annotations":{annotations}}}"#
            ))
            .unwrap()
        };
        let both =
            r#"{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"group"}"#;
        assert_eq!(sandbox_id(&spec(both), "c"), "group");
        assert_eq!(
            sandbox_id(&spec(r#"{"io.kubernetes.cri.sandbox-id":"pod"}"#), "c"),
            "pod"
        );
        assert_eq!(sandbox_id(&spec("{}"), "c"), "c");
    }

    #[test]
    fn a_missing_or_broken_spec_is_named() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(
            load_spec(bundle.path())
                .unwrap_err()
                .contains("config.json")
        );
        std::fs::write(bundle.path().join("config.json"), "{").unwrap();
        assert!(
            load_spec(bundle.path())
                .unwrap_err()
                .contains("Cannot parse")
        );
    }
}
