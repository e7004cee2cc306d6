//! What the guest sees as one disk: a file, or a partition table and the files that it names.

use std::sync::atomic::AtomicBool;
use std::{io, iter};

use super::engine::{Action, Operation};
use super::gpt::Layout;
use super::image::Image;
use super::{Error, SECTOR};
use crate::config::{DiskConfig, DiskFormat, DiskSource};

/// A disk's bytes: which are in which file, and which in none. Its size is taken once and stays.
#[derive(Debug)]
pub struct Disk {
    name: String,
    images: Vec<Image>,
    extents: Vec<Extent>,
    /// The bytes of the partition table, in order.
    table: Vec<u8>,
    read_only: bool,
    sectors: u64,
}

/// Bytes from `start` up to the next extent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    start: u64,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// The image's bytes from its first on.
    Image(usize),
    /// The table's bytes from this one on.
    Table(usize),
    Zeros,
}

/// Where the bytes at an offset are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place<'d> {
    /// In an image, at this offset.
    Image {
        /// Its index.
        image: usize,
        /// Offset in it.
        offset: u64,
    },
    /// In no file: these.
    Bytes(&'d [u8]),
    /// In no file: zeros.
    Zeros,
}

impl Disk {
    /// Opens and locks the files that `config` names. A single file's last part of a sector is left
    /// out.
    ///
    /// # Errors
    ///
    /// [`Error`], with the path.
    pub fn open(config: &DiskConfig) -> Result<Self, Error> {
        let DiskFormat::Raw = config.format;
        match &config.source {
            DiskSource::File(path) => {
                let image = Image::open(path, config.read_only, config.cache, SECTOR)?;
                let sectors = whole_sectors(&image);
                Ok(Self {
                    name: config.source.to_string(),
                    images: vec![image],
                    extents: vec![Extent {
                        start: 0,
                        what: What::Image(0),
                    }],
                    table: Vec::new(),
                    read_only: config.read_only,
                    sectors,
                })
            }
            DiskSource::Parts(parts) => {
                let least = if config.read_only { 1 } else { SECTOR };
                let images = parts
                    .iter()
                    .map(|part| Image::open(&part.path, config.read_only, config.cache, least))
                    .collect::<Result<Vec<_>, _>>()?;
                let names = parts.iter().map(|part| &part.name[..]);
                Self::joined(config, images, names)
            }
        }
    }

    fn joined<'a>(
        config: &DiskConfig,
        images: Vec<Image>,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<Self, Error> {
        let name = config.source.to_string();
        let sizes: Vec<u64> = images
            .iter()
            .map(|image| {
                if config.read_only {
                    image.bytes().div_ceil(SECTOR)
                } else {
                    whole_sectors(image)
                }
            })
            .collect();
        let layout = Layout::new(&config.id, names.zip(sizes.iter().copied()));
        let Some(layout) = layout else {
            return Err(Error::Large { disk: name });
        };
        let extent = |start, what| Extent { start, what };
        let mut extents = vec![
            extent(0, What::Table(0)),
            extent(layout.primary.len() as u64, What::Zeros),
        ];
        for (index, (start, sectors)) in iter::zip(&layout.starts, &sizes).enumerate() {
            let start = start * SECTOR;
            let bytes = images[index].bytes().min(sectors * SECTOR);
            extents.push(extent(start, What::Image(index)));
            extents.push(extent(start + bytes, What::Zeros));
        }
        let mut table = layout.primary;
        let backup = layout.sectors * SECTOR - layout.backup.len() as u64;
        extents.push(extent(backup, What::Table(table.len())));
        table.extend(layout.backup);
        Ok(Self {
            name,
            images,
            extents,
            table,
            read_only: config.read_only,
            sectors: layout.sectors,
        })
    }

    /// Names it in messages: its path, or the first of its paths.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether it was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The files behind it.
    pub(super) fn images(&self) -> &[Image] {
        &self.images
    }

    /// The byte offset of `len` bytes at `sector`, if they are whole sectors of this disk.
    pub(super) fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let end = sector.checked_add(len / SECTOR)?;
        (len.is_multiple_of(SECTOR) && end <= self.sectors).then(|| sector * SECTOR)
    }

    /// Where the byte at `offset`, which is within the disk, and those after it are, and how many
    /// are there: at least one.
    pub(super) fn place(&self, offset: u64) -> (Place<'_>, u64) {
        // An extent of no bytes begins where the next does and is passed over.
        let next = self
            .extents
            .partition_point(|extent| extent.start <= offset);
        let extent = self.extents[next - 1];
        let end = self.extents.get(next).map(|extent| extent.start);
        let left = end.unwrap_or(self.sectors * SECTOR) - offset;
        let within = offset - extent.start;
        let place = match extent.what {
            What::Image(image) => Place::Image {
                image,
                offset: within,
            },
            What::Table(first) => {
                let first = first + within as usize;
                Place::Bytes(&self.table[first..first + left as usize])
            }
            What::Zeros => Place::Zeros,
        };
        (place, left)
    }

    /// Carries out `operation` on this thread; see [`Image::perform`].
    ///
    /// # Safety
    ///
    /// As there.
    pub(super) unsafe fn perform(
        &self,
        operation: &Operation,
        cancelled: &AtomicBool,
    ) -> io::Result<u64> {
        let Operation {
            image,
            direct,
            action,
        } = operation;
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { self.images[*image].perform(action, *direct, cancelled) }
    }

    /// Tells the log what failed, if it is the file's first failure.
    pub(super) fn complain(&self, operation: &Operation, error: &io::Error) {
        let what = match operation.action {
            Action::Read { .. } => "reading",
            Action::Write { .. } => "writing",
            Action::Sync => "flushing",
            Action::Discard { .. } => "discarding",
            Action::Zero { .. } => "zeroing",
        };
        self.images[operation.image].complain(what, error);
    }
}

fn whole_sectors(image: &Image) -> u64 {
    let bytes = image.bytes();
    if !bytes.is_multiple_of(SECTOR) {
        tracing::warn!(
            path = %image.path().display(),
            bytes,
            "the disk image ends within a sector; the guest does not see that part"
        );
    }
    bytes / SECTOR
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(bytes: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("an image");
        file.write_all(&vec![7; bytes]).expect("written");
        file
    }

    #[test]
    fn ranges_are_whole_sectors_within_the_disk() {
        let file = image(4 * 512 + 100);
        let disk = Disk::open(&DiskConfig::file(file.path(), true, "")).expect("a disk");
        assert_eq!(disk.sectors(), 4);
        for (sector, len, offset) in [
            (0, 512, Some(0)),
            (3, 512, Some(3 * 512)),
            (0, 2048, Some(0)),
            (4, 0, Some(2048)),
            (5, 0, None),
            (4, 512, None),
            (3, 1024, None),
            (0, 2560, None),
            (0, 511, None),
            (0, 513, None),
            (u64::MAX, 512, None),
            (u64::MAX, 0, None),
            (u64::MAX / 512 + 1, 512, None),
        ] {
            assert_eq!(disk.offset(sector, len), offset, "{len} at {sector}");
        }
    }

    #[test]
    fn a_single_file_is_all_of_its_disk() {
        let file = image(4 * 512);
        let disk = Disk::open(&DiskConfig::file(file.path(), true, "")).expect("a disk");
        let place = Place::Image {
            image: 0,
            offset: 512,
        };
        assert_eq!(disk.place(512), (place, 3 * 512));
    }

    #[test]
    fn extents_of_a_joined_disk_have_no_holes_and_end_with_their_files() {
        const MIB: u64 = 1 << 20;
        let files = [image(1 << 20), image(100), image(1024)];
        let paths = files.each_ref().map(|file| file.path());
        let disk = Disk::open(&DiskConfig::parts(paths, true, "layers")).expect("a disk");
        let image = |image, offset| Place::Image { image, offset };
        assert!(matches!(disk.place(0), (Place::Bytes(_), 17_408)));
        assert_eq!(disk.place(MIB - 1), (Place::Zeros, 1));
        assert_eq!(disk.place(MIB), (image(0, 0), MIB));
        assert_eq!(disk.place(2 * MIB - 1), (image(0, MIB - 1), 1));
        assert_eq!(disk.place(2 * MIB), (image(1, 0), 100));
        assert_eq!(disk.place(2 * MIB + 100), (Place::Zeros, MIB - 100));
        assert_eq!(disk.place(3 * MIB + 1000), (image(2, 1000), 24));
        assert_eq!(disk.sectors(), 4 * MIB / SECTOR);
        let (place, left) = disk.place(4 * MIB - 33 * SECTOR);
        assert!(matches!(place, Place::Bytes(bytes) if bytes.len() == 33 * 512));
        assert_eq!(left, 33 * SECTOR);
    }

    #[test]
    fn a_writable_part_ends_with_its_last_whole_sector() {
        let (whole, broken) = (image(1024), image(1024 + 100));
        let config = DiskConfig::parts([whole.path(), broken.path()], false, "");
        let disk = Disk::open(&config).expect("a disk");
        let image = Place::Image {
            image: 1,
            offset: 0,
        };
        assert_eq!(disk.place(2 << 20), (image, 1024));
        let empty = self::image(100);
        let error = Disk::open(&DiskConfig::parts([empty.path()], false, ""));
        assert!(matches!(error, Err(Error::Empty { least: 512, .. })));
        let error = Disk::open(&DiskConfig::parts([self::image(0).path()], true, ""));
        assert!(matches!(error, Err(Error::Empty { least: 1, .. })));
        let twice = DiskConfig::parts([empty.path(), empty.path()], true, "");
        Disk::open(&twice).expect("read-only files may be there twice");
        let locked = Disk::open(&DiskConfig::parts([whole.path()], true, ""));
        assert!(matches!(locked, Err(Error::Locked { .. })), "{locked:?}");
    }
}
