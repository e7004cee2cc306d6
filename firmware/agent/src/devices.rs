//! Block devices that the VMM plugs: a spare virtio-mmio window becomes a disk
//! when its platform device is bound to the driver, and stops being one when
//! it is unbound.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Doing, Error};
use crate::uevents::{self, DeviceEvents};

/// How long a bound device may take until its block device is there.
const LIMIT: Duration = Duration::from_secs(5);
/// The first window's guest-physical address, and the distance of the next.
const WINDOWS_BASE: u64 = 0xd000_0000;
const WINDOW_BYTES: u64 = 0x1000;
/// ACPI id of a virtio-mmio window, as platform devices are named after it.
const NAME: &str = "LNRO0005:";
const DRIVER: &str = "bus/platform/drivers/virtio-mmio";

/// Makes the disk in a window usable, with so many partitions, and answers with its path below /dev.
///
/// # Errors
/// `NotFound` for a window that the machine does not have; `Internal` if the driver refuses it (a window
/// without a device answers ENODEV), if it is no disk, or if the disk does not come within 5 s.
pub async fn bind_disk(window: u32, partitions: u32) -> Result<PathBuf, Error> {
    let sys = Path::new("/sys");
    // Before the bind, so that nothing that happens after it is missed.
    let mut events = DeviceEvents::listen().doing(|| "listening for device events".into())?;
    let device = find(sys, Path::new("/proc/iomem"), window)?;
    if !device.join("driver").exists() {
        let name = name_of(&device)?;
        fs::write(sys.join(DRIVER).join("bind"), &name)
            .doing(|| format!("binding {name}, window {window}, to virtio-mmio"))?;
    }
    let look = || {
        let node = Path::new("/dev").join(disk_of(&device)?);
        let last = match partitions {
            0 => node.clone(),
            number => partition(&node, number),
        };
        last.exists().then_some(node)
    };
    uevents::appear(&mut events, LIMIT, look)
        .await
        .doing(|| format!("waiting for the disk in window {window}"))?
        .ok_or_else(|| {
            let what = match partitions {
                0 => "disk".to_owned(),
                number => format!("disk with {number} partitions"),
            };
            Error::Internal(format!(
                "no {what} came from window {window} within {} s",
                LIMIT.as_secs()
            ))
        })
}

/// Releases the disk in a window. One that is not bound is fine.
///
/// # Errors
/// `NotFound` for a window that the machine does not have; what the kernel said otherwise.
pub fn unbind_disk(window: u32) -> Result<(), Error> {
    let sys = Path::new("/sys");
    let device = find(sys, Path::new("/proc/iomem"), window)?;
    if !device.join("driver").exists() {
        return Ok(());
    }
    let name = name_of(&device)?;
    fs::write(sys.join(DRIVER).join("unbind"), &name)
        .doing(|| format!("unbinding {name}, window {window}, from virtio-mmio"))
}

/// The platform device of a window: by the `_UID` of its ACPI node, else by its address.
fn find(sys: &Path, iomem: &Path, window: u32) -> Result<PathBuf, Error> {
    let directory = sys.join("bus/platform/devices");
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
    let map = fs::read_to_string(iomem).unwrap_or_default();
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

/// The block device below a platform device, e.g. `vda`.
fn disk_of(device: &Path) -> Option<String> {
    for child in fs::read_dir(device).ok()?.flatten() {
        if !child.file_name().as_encoded_bytes().starts_with(b"virtio") {
            continue;
        }
        let Ok(mut disks) = fs::read_dir(child.path().join("block")) else {
            continue;
        };
        if let Some(Ok(disk)) = disks.next() {
            return disk.file_name().into_string().ok();
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
mod tests {
    use super::*;

    const IOMEM: &str = "00000000-00000fff : Reserved
d0000000-d0000fff : LNRO0005:00
  d0000000-d0000fff : LNRO0005:00 LNRO0005:00
d0003000-d0003fff : LNRO0005:03
fec00000-fec003ff : IOAPIC 0
";

    /// A sysfs of three windows; the second's `_UID` is not its place in the list, the third has none.
    fn tree() -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let devices = sys.path().join("bus/platform/devices");
        for (name, uid) in [("LNRO0005:00", "0"), ("LNRO0005:01", "7")] {
            let node = devices.join(name).join("firmware_node");
            fs::create_dir_all(&node).unwrap();
            fs::write(node.join("uid"), format!("{uid}\n")).unwrap();
        }
        fs::create_dir_all(devices.join("LNRO0005:03")).unwrap();
        fs::create_dir_all(devices.join("PNP0501:00")).unwrap();
        fs::write(sys.path().join("iomem"), IOMEM).unwrap();
        sys
    }

    fn found(sys: &Path, window: u32) -> Result<String, Error> {
        name_of(&find(sys, &sys.join("iomem"), window)?)
    }

    #[test]
    fn a_window_is_found_by_uid_then_by_address() {
        let sys = tree();
        assert_eq!(found(sys.path(), 0).unwrap(), "LNRO0005:00");
        assert_eq!(found(sys.path(), 7).unwrap(), "LNRO0005:01");
        assert_eq!(found(sys.path(), 3).unwrap(), "LNRO0005:03");
    }

    #[test]
    fn a_window_that_is_not_there_is_named() {
        let sys = tree();
        let missing = found(sys.path(), 5).unwrap_err();
        assert!(matches!(missing, Error::NotFound(_)), "{missing}");
        assert!(missing.to_string().contains("window 5"));
    }

    #[test]
    fn the_disk_is_what_the_virtio_device_made() {
        let sys = tree();
        let device = sys.path().join("bus/platform/devices/LNRO0005:00");
        assert_eq!(disk_of(&device), None);
        fs::create_dir_all(device.join("virtio2/block/vdb")).unwrap();
        assert_eq!(disk_of(&device).as_deref(), Some("vdb"));
    }
}
