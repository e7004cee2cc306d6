//! Devices that the VMM plugs: a spare virtio-mmio window becomes a disk or a
//! network interface when its platform device is bound to the driver, and stops
//! being one when it is unbound.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Doing, Error};
use crate::uevents::{self, Changes, DeviceEvents};

/// How long a bound device may take until what the driver makes of it is there.
const LIMIT: Duration = Duration::from_secs(5);
/// The first window's guest-physical address, and the distance of the next.
const WINDOWS_BASE: u64 = 0xd000_0000;
const WINDOW_BYTES: u64 = 0x1000;
/// ACPI id of a virtio-mmio window, as platform devices are named after it.
const NAME: &str = "LNRO0005:";
const DRIVER: &str = "bus/platform/drivers/virtio-mmio";
const VIRTIO_DRIVERS: &str = "bus/virtio/drivers";

/// Where the kernel shows devices.
#[derive(Clone)]
pub struct Tree {
    /// What is mounted on /sys.
    sys: PathBuf,
    /// The map of memory, /proc/iomem.
    iomem: PathBuf,
}

impl Tree {
    /// The guest's own.
    pub fn of_guest() -> Tree {
        Tree {
            sys: "/sys".into(),
            iomem: "/proc/iomem".into(),
        }
    }
}

/// What a device becomes.
struct Kind {
    /// In words.
    what: String,
    /// The driver of the virtio device, by sysfs's name.
    driver: &'static str,
}

/// Makes the disk in a window usable, with so many partitions, and answers with its path below /dev.
///
/// # Errors
/// `NotFound` for a window that the machine does not have; `FailedPrecondition` if the kernel has no driver of disks;
/// `Internal` if the driver refuses it (a window without a device answers ENODEV), if it is no disk, or if the disk does
/// not come within 5 s.
pub async fn bind_disk(window: u32, partitions: u32) -> Result<PathBuf, Error> {
    let mut events = listen()?;
    let kind = Kind {
        what: match partitions {
            0 => "disk".to_owned(),
            number => format!("disk with {number} partitions"),
        },
        driver: "virtio_blk",
    };
    let look = |device: &Path| {
        let node = Path::new("/dev").join(child_of(device, "block")?);
        let last = match partitions {
            0 => node.clone(),
            number => partition(&node, number),
        };
        last.exists().then_some(node)
    };
    bind(&Tree::of_guest(), &mut events, window, &kind, look).await
}

/// Makes the network device in a window a network interface, and answers with its name.
///
/// # Errors
/// As [`bind_disk`].
pub async fn bind_network(
    tree: &Tree,
    events: &mut impl Changes,
    window: u32,
) -> Result<String, Error> {
    let kind = Kind {
        what: "network interface".to_owned(),
        driver: "virtio_net",
    };
    bind(tree, events, window, &kind, |device| {
        child_of(device, "net")
    })
    .await
}

/// Device events from now on. To be called before a device is bound, so that nothing that happens after it is missed.
///
/// # Errors
/// What the kernel said to the socket.
pub fn listen() -> Result<DeviceEvents, Error> {
    DeviceEvents::listen().doing(|| "listening for device events".into())
}

/// Binds the device in a window, unless it is, and waits until `look` finds what has become of it.
async fn bind<T>(
    tree: &Tree,
    events: &mut impl Changes,
    window: u32,
    kind: &Kind,
    look: impl Fn(&Path) -> Option<T>,
) -> Result<T, Error> {
    let Kind { what, driver } = kind;
    let device = find(tree, window)?;
    if !device.join("driver").exists() {
        // Bound all the same, the device would be silent.
        if !tree.sys.join(VIRTIO_DRIVERS).join(driver).exists() {
            return Err(Error::FailedPrecondition(format!(
                "no {what} can come from window {window}: the guest's kernel has no driver {driver}, neither built in \
                 nor among the image's modules"
            )));
        }
        let name = name_of(&device)?;
        fs::write(tree.sys.join(DRIVER).join("bind"), &name)
            .doing(|| format!("binding {name}, window {window}, to virtio-mmio"))?;
    }
    uevents::appear(events, LIMIT, || look(&device))
        .await
        .doing(|| format!("waiting for the {what} in window {window}"))?
        .ok_or_else(|| {
            let seconds = LIMIT.as_secs();
            Error::Internal(format!(
                "no {what} came from window {window} within {seconds} s"
            ))
        })
}

/// Releases the device in a window. One that is not bound is fine.
///
/// # Errors
/// `NotFound` for a window that the machine does not have; what the kernel said otherwise.
pub fn unbind(tree: &Tree, window: u32) -> Result<(), Error> {
    let device = find(tree, window)?;
    if !device.join("driver").exists() {
        return Ok(());
    }
    let name = name_of(&device)?;
    fs::write(tree.sys.join(DRIVER).join("unbind"), &name)
        .doing(|| format!("unbinding {name}, window {window}, from virtio-mmio"))
}

/// The platform device of a window: by the `_UID` of its ACPI node, else by its address.
fn find(tree: &Tree, window: u32) -> Result<PathBuf, Error> {
    let directory = tree.sys.join("bus/platform/devices");
    let entries = fs::read_dir(&directory).doing(|| format!("listing {}", directory.display()))?;
    let mut windows = Vec::new();
    for entry in entries.flatten() {
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(NAME.as_bytes())
        {
            windows.push(entry.path());
        }
    }
    for device in &windows {
        let uid = fs::read_to_string(device.join("firmware_node/uid")).unwrap_or_default();
        if uid.trim().parse() == Ok(window) {
            return Ok(device.clone());
        }
    }
    let map = fs::read_to_string(&tree.iomem).unwrap_or_default();
    if let Some(name) = name_at(&map, WINDOWS_BASE + WINDOW_BYTES * u64::from(window)) {
        let device = directory.join(name);
        if windows.contains(&device) {
            return Ok(device);
        }
    }
    Err(Error::NotFound(format!(
        "window {window}: no such virtio-mmio device among {} in {}",
        windows.len(),
        directory.display()
    )))
}

/// The platform device at an address, by the kernel's map of memory.
fn name_at(iomem: &str, address: u64) -> Option<&str> {
    iomem.lines().find_map(|line| {
        let (range, name) = line.trim().split_once(" : ")?;
        let (start, _) = range.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        (start == address && name.starts_with(NAME)).then_some(name)
    })
}

/// What a driver has made of the virtio device below a platform device, by its class: `vda` of `block`, `eth0` of `net`.
fn child_of(device: &Path, class: &str) -> Option<String> {
    for child in fs::read_dir(device).ok()?.flatten() {
        if !child.file_name().as_encoded_bytes().starts_with(b"virtio") {
            continue;
        }
        let Ok(mut made) = fs::read_dir(child.path().join(class)) else {
            continue;
        };
        if let Some(Ok(made)) = made.next() {
            return made.file_name().into_string().ok();
        }
    }
    None
}

/// The device of a disk's partition, e.g. /dev/vda3.
fn partition(disk: &Path, number: u32) -> PathBuf {
    let mut name = disk.as_os_str().to_owned();
    name.push(number.to_string());
    name.into()
}

fn name_of(device: &Path) -> Result<String, Error> {
    device
        .file_name()
        .and_then(|name| name.to_str())
        .map(str::to_owned)
        .ok_or_else(|| Error::Internal(format!("{} has no name", device.display())))
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::uevents::tests::Script;

    const IOMEM: &str = "00000000-00000fff : Reserved
d0000000-d0000fff : LNRO0005:00
  d0000000-d0000fff : LNRO0005:00 LNRO0005:00
d0003000-d0003fff : LNRO0005:03
fec00000-fec003ff : IOAPIC 0
";

    /// A kernel's tree in a folder, which is gone with it.
    pub struct Made {
        pub tree: Tree,
        folder: tempfile::TempDir,
    }

    impl Made {
        /// Three windows, of which the second's `_UID` is not its place in the list and the third has none; with these
        /// drivers of virtio devices.
        pub fn new(drivers: &[&str]) -> Made {
            let folder = tempfile::tempdir().unwrap();
            let made = Made {
                tree: Tree {
                    sys: folder.path().to_owned(),
                    iomem: folder.path().join("iomem"),
                },
                folder,
            };
            for (name, uid) in [("LNRO0005:00", "0"), ("LNRO0005:01", "7")] {
                let node = made.device(name).join("firmware_node");
                fs::create_dir_all(&node).unwrap();
                fs::write(node.join("uid"), format!("{uid}\n")).unwrap();
            }
            fs::create_dir_all(made.device("LNRO0005:03")).unwrap();
            fs::create_dir_all(made.device("PNP0501:00")).unwrap();
            fs::create_dir_all(made.folder.path().join(DRIVER)).unwrap();
            for driver in drivers {
                fs::create_dir_all(made.folder.path().join(VIRTIO_DRIVERS).join(driver)).unwrap();
            }
            fs::write(&made.tree.iomem, IOMEM).unwrap();
            made
        }

        fn device(&self, name: &str) -> PathBuf {
            self.folder.path().join("bus/platform/devices").join(name)
        }

        /// What was last written to `bind` or `unbind`.
        pub fn written(&self, file: &str) -> Option<String> {
            fs::read_to_string(self.folder.path().join(DRIVER).join(file)).ok()
        }

        /// What the kernel does when a device is bound.
        pub fn come(&self, name: &str, path: &str) -> impl FnOnce() + Send + 'static {
            let device = self.device(name);
            let made = device.join(path);
            move || {
                fs::create_dir_all(made).unwrap();
                fs::create_dir_all(device.join("driver")).unwrap();
            }
        }
    }

    fn found(made: &Made, window: u32) -> Result<String, Error> {
        name_of(&find(&made.tree, window)?)
    }

    #[test]
    fn a_window_is_found_by_uid_then_by_address() {
        let made = Made::new(&[]);
        assert_eq!(found(&made, 0).unwrap(), "LNRO0005:00");
        assert_eq!(found(&made, 7).unwrap(), "LNRO0005:01");
        assert_eq!(found(&made, 3).unwrap(), "LNRO0005:03");
    }

    #[test]
    fn a_window_that_is_not_there_is_named() {
        let missing = found(&Made::new(&[]), 5).unwrap_err();
        assert!(matches!(missing, Error::NotFound(_)), "{missing}");
        assert!(missing.to_string().contains("window 5"));
    }

    #[test]
    fn what_a_driver_made_is_found_by_its_class() {
        let made = Made::new(&[]);
        let device = made.device("LNRO0005:00");
        assert_eq!(child_of(&device, "block"), None);
        fs::create_dir_all(device.join("virtio2/block/vdb")).unwrap();
        assert_eq!(child_of(&device, "block").as_deref(), Some("vdb"));
        assert_eq!(child_of(&device, "net"), None);
        fs::create_dir_all(device.join("virtio2/net/eth0")).unwrap();
        assert_eq!(child_of(&device, "net").as_deref(), Some("eth0"));
    }

    #[tokio::test]
    async fn a_network_device_is_bound_once_and_waited_for() {
        let made = Made::new(&["virtio_net"]);
        let come = made.come("LNRO0005:01", "virtio3/net/eth0");
        let name = bind_network(&made.tree, &mut Script::of(come), 7).await;
        assert_eq!(name.unwrap(), "eth0");
        assert_eq!(made.written("bind").as_deref(), Some("LNRO0005:01"));
        // The second time it is there.
        fs::remove_file(made.tree.sys.join(DRIVER).join("bind")).unwrap();
        let name = bind_network(&made.tree, &mut Script::empty(), 7).await;
        assert_eq!(name.unwrap(), "eth0");
        assert_eq!(made.written("bind"), None);
        unbind(&made.tree, 0).unwrap();
        assert_eq!(made.written("unbind"), None, "it is not bound");
        unbind(&made.tree, 7).unwrap();
        assert_eq!(made.written("unbind").as_deref(), Some("LNRO0005:01"));
    }

    #[tokio::test]
    async fn a_kernel_without_the_driver_is_told_so_and_nothing_is_bound() {
        let made = Made::new(&["virtio_blk"]);
        let error = bind_network(&made.tree, &mut Script::empty(), 0)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error:?}");
        assert!(
            error.to_string().contains("no driver virtio_net"),
            "{error}"
        );
        assert_eq!(made.written("bind"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_device_of_another_kind_is_not_waited_for_without_end() {
        let made = Made::new(&["virtio_net"]);
        let come = made.come("LNRO0005:00", "virtio0/block/vda");
        let error = bind_network(&made.tree, &mut Script::of(come), 0)
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "no network interface came from window 0 within 5 s"
        );
    }
}
