//! Roots whose owners are mapped, as containerd hands them over for a container with users of its own: `uidmap=` and `gidmap=`.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nacre_fs::{OwnerMap, Owners, attach};
use nix::mount::{MntFlags, MsFlags, umount2};

use super::{Directory, Plan, make_directory, mount_tmpfs};
use crate::shim::rootfs::Error;

/// Takes an option that maps owners; None if it is none, and none in it if it cannot be read.
pub(super) fn mapped(option: &str, owners: &mut Option<Owners>) -> Option<Option<()>> {
    let (key, value) = option.split_once('=')?;
    if !matches!(key, "uidmap" | "gidmap") {
        return None;
    }
    let ranges = Owners::ranges(value);
    let owners = owners.get_or_insert_default();
    let place = match key {
        "uidmap" => &mut owners.users,
        _ => &mut owners.groups,
    };
    Some(ranges.map(|ranges| *place = ranges))
}

/// Whether an option names layers in a way in which they cannot be mapped.
pub(super) fn names_other_layers(option: &str) -> bool {
    let odd =
        |directories: &str| directories.contains('\\') || directories.split(':').any(str::is_empty);
    ["lowerdir+=", "datadir+="]
        .iter()
        .any(|key| option.starts_with(key))
        || option.strip_prefix("lowerdir=").is_some_and(odd)
}

impl Plan {
    /// Mounts it, and has it show its owners. An overlay does so by its lower directories: what is written to its upper one belongs to
    /// whom it shall. Adds what is to be unmounted to `mounted`.
    pub(super) fn mount(&self, target: &Path, mounted: &mut Vec<PathBuf>) -> Result<(), Error> {
        self.directories.iter().try_for_each(Directory::make)?;
        let Some(owners) = &self.owners else {
            self.mount_plainly(target)?;
            mounted.push(target.to_owned());
            return Ok(());
        };
        let error = |source: std::io::Error| Error::System {
            doing: "mount with mapped owners on".to_owned(),
            path: target.to_owned(),
            source,
        };
        let map = owners.map().map_err(std::io::Error::other).map_err(error)?;
        if self.kind == "overlay" {
            // The layers' mounts are held until the overlay has its own clones of them.
            let (mapped, _layers) = self.over_mapped(&map, target, mounted)?;
            mapped.mount_plainly(target)?;
            mounted.push(target.to_owned());
            return Ok(());
        }
        self.mount_plainly(target)?;
        let recursive = self.flags.contains(MsFlags::MS_REC);
        let detached = map.mount(target, recursive);
        let unmounted = umount2(target, MntFlags::MNT_DETACH);
        let detached = detached.map_err(std::io::Error::other).map_err(error)?;
        unmounted.map_err(|errno| error(errno.into()))?;
        attach(detached, target).map_err(error)?;
        mounted.push(target.to_owned());
        Ok(())
    }

    /// The overlay over its lower directories as they show on mapped mounts, which are on a small tmpfs below the target: a layer must
    /// be on a mount of this namespace. They are named by descriptors.
    fn over_mapped(
        &self,
        map: &OwnerMap,
        target: &Path,
        mounted: &mut Vec<PathBuf>,
    ) -> Result<(Self, Vec<OwnedFd>), Error> {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount_tmpfs(target, flags, Some("mode=0700,size=4m"))?;
        mounted.push(target.to_owned());
        let mut layers: Vec<OwnedFd> = Vec::new();
        let mut mapped = |directory: &str| -> Result<String, Error> {
            let place = target.join(layers.len().to_string());
            make_directory(&place)?;
            let error = |source| Error::System {
                doing: "mount with mapped owners the layer".to_owned(),
                path: directory.into(),
                source,
            };
            let layer = map.mount(Path::new(directory), false);
            let layer = layer.map_err(std::io::Error::other).map_err(error)?;
            attach(&layer, &place).map_err(error)?;
            let name = format!("/proc/self/fd/{}", layer.as_raw_fd());
            layers.push(layer);
            Ok(name)
        };
        let mut data = Vec::new();
        for option in &self.data {
            data.push(match option.strip_prefix("lowerdir=") {
                None => option.clone(),
                Some(directories) => {
                    let names = directories.split(':').map(&mut mapped);
                    let names = names.collect::<Result<Vec<_>, _>>()?;
                    format!("lowerdir={}", names.join(":"))
                }
            });
        }
        let mapped = Self {
            data,
            ..self.clone()
        };
        Ok((mapped, layers))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::of;
    #[test]
    fn maps_of_owners_are_taken_out_and_both_are_needed() {
        let maps = ["uidmap=0:100000:65536", "gidmap=0:5:1,1:9:2"];
        for kind in ["overlay", "bind", "ext4"] {
            let plan = of(kind, "", &maps).unwrap();
            let owners = plan.owners.unwrap();
            assert_eq!((owners.users.len(), owners.groups.len()), (1, 2), "{kind}");
            assert!(plan.data.is_empty(), "{kind}");
        }
        for odd in ["lowerdir+=/a", "lowerdir=/a::/data", r"lowerdir=/a\:b"] {
            let error = of("overlay", "", &[maps[0], maps[1], odd]).unwrap_err();
            assert!(error.to_string().contains("lowerdir"), "{error}");
            of("overlay", "", &[odd]).expect("without maps it is the kernel's matter");
        }
        for wrong in [&maps[..1], &["uidmap=", maps[1]], &["gidmap=1:2", maps[0]]] {
            let error = of("bind", "", wrong).unwrap_err().to_string();
            assert!(error.contains("map"), "{error}");
        }
    }
}
