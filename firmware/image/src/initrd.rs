//! Writes the initrd: an uncompressed cpio archive in the "newc" format, the
//! same for the same content.

use std::io::Write;

use cpio::newc::{self, ModeFileType};
use thiserror::Error;

use crate::modules::PlannedModule;

/// Folders in the archive; the agent mounts what belongs into them.
const FOLDERS: [(&str, u32); 6] = [
    ("dev", 0o755),
    ("modules", 0o755),
    ("proc", 0o555),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
];

/// Character devices that init has from its first instruction on.
const DEVICES: [(&str, u32, u32, u32); 2] =
    [("dev/console", 0o600, 5, 1), ("dev/null", 0o666, 1, 3)];

/// Why the initrd could not be written.
#[derive(Debug, Error)]
pub enum InitrdError {
    /// A file is too large for the format.
    #[error("{name} has {size} bytes; a cpio archive takes files of at most 4 GiB")]
    TooLarge {
        /// The file's name in the archive.
        name: String,
        /// Its length.
        size: usize,
    },
    /// The writer refused something.
    #[error("writing {name} into the initrd")]
    Write {
        /// The file's name in the archive.
        name: String,
        /// What it says.
        #[source]
        source: std::io::Error,
    },
}

/// The initrd with `agent` as `/init`, and the modules and their order in `/modules`.
pub(crate) fn build(agent: &[u8], modules: &[PlannedModule]) -> Result<Vec<u8>, InitrdError> {
    let mut archive = Archive {
        bytes: Vec::new(),
        inode: 0,
    };
    for (name, mode) in FOLDERS {
        archive.entry(name, ModeFileType::Directory, mode, (0, 0), &[])?;
    }
    for (name, mode, major, minor) in DEVICES {
        archive.entry(name, ModeFileType::Char, mode, (major, minor), &[])?;
    }
    archive.entry("init", ModeFileType::Regular, 0o755, (0, 0), agent)?;
    let mut order = String::new();
    for module in modules {
        let file = module.file_name();
        archive.entry(
            &format!("modules/{file}"),
            ModeFileType::Regular,
            0o644,
            (0, 0),
            &module.content,
        )?;
        order.push_str(&format!("{} {file}\n", module.group.word()));
    }
    archive.entry(
        "modules/order",
        ModeFileType::Regular,
        0o644,
        (0, 0),
        order.as_bytes(),
    )?;
    archive.finish()
}

struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn entry(
        &mut self,
        name: &str,
        kind: ModeFileType,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> Result<(), InitrdError> {
        let size = u32::try_from(content.len()).map_err(|_| InitrdError::TooLarge {
            name: name.to_owned(),
            size: content.len(),
        })?;
        let links = if matches!(kind, ModeFileType::Directory) {
            2
        } else {
            1
        };
        self.inode += 1;
        let mut writer = newc::Builder::new(name)
            .ino(self.inode)
            .mode(mode)
            .set_mode_file_type(kind)
            .nlink(links)
            .mtime(0)
            .rdev_major(major)
            .rdev_minor(minor)
            .write(&mut self.bytes, size);
        writer
            .write_all(content)
            .and_then(|()| writer.finish().map(drop))
            .map_err(|source| InitrdError::Write {
                name: name.to_owned(),
                source,
            })
    }

    fn finish(mut self) -> Result<Vec<u8>, InitrdError> {
        newc::trailer(&mut self.bytes).map_err(|source| InitrdError::Write {
            name: "the trailer".into(),
            source,
        })?;
        // Linux reads archives in pieces of 512 bytes.
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::manifest::Group;
    use crate::modinfo::ModuleInfo;

    fn module(name: &str, group: Group) -> PlannedModule {
        PlannedModule {
            name: name.into(),
            group,
            info: ModuleInfo::default(),
            content: format!("content of {name}").into_bytes(),
        }
    }

    #[test]
    fn the_archive_has_what_the_agent_expects() {
        let modules = [module("virtio", Group::Boot), module("ext4", Group::Late)];
        let initrd = build(b"the agent", &modules).expect("an initrd");
        assert_eq!(initrd.len() % 512, 0);
        let mut found = Vec::new();
        let mut rest = &initrd[..];
        loop {
            let mut reader = newc::Reader::new(rest).expect("an entry");
            if reader.entry().is_trailer() {
                break;
            }
            assert_eq!(reader.entry().mtime(), 0);
            assert_eq!((reader.entry().uid(), reader.entry().gid()), (0, 0));
            let name = reader.entry().name().to_owned();
            let mode = reader.entry().mode();
            let device = (reader.entry().rdev_major(), reader.entry().rdev_minor());
            let mut content = String::new();
            reader.read_to_string(&mut content).expect("content");
            found.push((name, mode, device, content));
            rest = reader.finish().expect("the next");
        }
        let entry = |name: &str| {
            found
                .iter()
                .find(|entry| entry.0 == name)
                .unwrap_or_else(|| panic!("no {name}"))
        };
        assert_eq!(found.len(), 6 + 2 + 1 + 2 + 1);
        assert_eq!(entry("init").1, 0o100_755);
        assert_eq!(entry("init").3, "the agent");
        assert_eq!(entry("tmp").1, 0o041_777);
        assert_eq!(
            (entry("dev/console").1, entry("dev/console").2),
            (0o020_600, (5, 1))
        );
        assert_eq!(
            (entry("dev/null").1, entry("dev/null").2),
            (0o020_666, (1, 3))
        );
        assert_eq!(entry("modules/ext4.ko").3, "content of ext4");
        assert_eq!(entry("modules/order").3, "boot virtio.ko\nlate ext4.ko\n");
        assert!(
            initrd == build(b"the agent", &modules).expect("an initrd"),
            "not the same again"
        );
    }
}
