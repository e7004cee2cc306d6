//! What the kernel shall do by itself with memory that appears: bring it online
//! at once, and decide for its zone as the agent would. The driver of
//! virtio-mem needs that, and memory of ACPI devices comes the faster.

use std::path::Path;

use tracing::{debug, warn};

use crate::hotplug::kernel_files::{put, words};

/// Percent of movable memory to the kernel's: 3 : 1, and one for pages that a zone has but does not manage.
const RATIO: &str = "301";

/// Sets the policy of the kernel below `sys`. One that decides for zones in another way (before Linux 5.16) or has no
/// memory hotplug is left as it is: it would put all memory where it never comes out of again.
pub fn set(sys: &Path) {
    let parameters = sys.join("module/memory_hotplug/parameters");
    for (file, value) in [
        (parameters.join("auto_movable_ratio"), RATIO),
        (parameters.join("online_policy"), "auto-movable"),
        (
            sys.join("devices/system/memory/auto_online_blocks"),
            "online",
        ),
    ] {
        match put(&file, value) {
            Ok(()) => debug!("{} is {value}", file.display()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return debug!("the kernel has no {}", file.display());
            }
            Err(error) => return warn!("setting {} to {value}: {}", file.display(), words(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::hotplug::kernel_files::line;

    #[test]
    fn blocks_come_online_by_themselves_only_under_the_ratio() {
        let sys = tempfile::tempdir().unwrap();
        let file = |name: &str| sys.path().join(name);
        fs::create_dir_all(file("devices/system/memory")).unwrap();
        let auto = file("devices/system/memory/auto_online_blocks");
        fs::write(&auto, "offline\n").unwrap();
        set(sys.path());
        assert_eq!(line(&auto).as_deref(), Some("offline"), "no such policy");

        let parameters = file("module/memory_hotplug/parameters");
        fs::create_dir_all(&parameters).unwrap();
        fs::write(parameters.join("online_policy"), "").unwrap();
        fs::write(parameters.join("auto_movable_ratio"), "").unwrap();
        fs::write(&auto, "").unwrap();
        set(sys.path());
        let policy = line(&parameters.join("online_policy"));
        assert_eq!(policy.as_deref(), Some("auto-movable"));
        let ratio = line(&parameters.join("auto_movable_ratio"));
        assert_eq!(ratio.as_deref(), Some("301"));
        assert_eq!(line(&auto).as_deref(), Some("online"));
    }
}
