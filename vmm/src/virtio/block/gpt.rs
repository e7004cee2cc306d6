//! A GUID partition table (UEFI 2.10 section 5.3) made up in memory, for a disk that is several
//! files in a row. Only where things are and what the table's bytes are; no file is touched here.

use sha2::{Digest, Sha256};

use super::SECTOR;

/// Partitions begin at multiples of this many sectors: 1 MiB, as partitioning tools have it. It
/// costs address space only.
const ALIGNMENT: u64 = (1 << 20) / SECTOR;
/// Entries of the smallest table (UEFI 2.10 section 5.3.1: at least 16 KiB).
const LEAST_ENTRIES: u64 = 128;
const ENTRY_BYTES: u64 = 128;
const ENTRIES_PER_SECTOR: u64 = SECTOR / ENTRY_BYTES;
const HEADER_BYTES: usize = 92;
/// The type "Linux filesystem data", 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as it is on disk.
const LINUX_DATA: [u8; 16] = [
    0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4,
];

/// Where partitions are, and the bytes before and after them.
#[derive(Debug)]
pub(super) struct Layout {
    /// The first sector of each partition.
    pub starts: Vec<u64>,
    /// Sectors of the disk.
    pub sectors: u64,
    /// Protective MBR, header and entries: the disk's first sectors.
    pub primary: Vec<u8>,
    /// Entries and header again: the disk's last sectors.
    pub backup: Vec<u8>,
}

impl Layout {
    /// Lays out partitions of these names and sizes in sectors, of which none is empty and no name
    /// longer than [`PART_NAME_UNITS`](crate::config::PART_NAME_UNITS). `None` if the disk would
    /// have 2^63 bytes or more.
    pub fn new<'a>(id: &str, parts: impl Iterator<Item = (&'a str, u64)>) -> Option<Self> {
        let parts: Vec<_> = parts.collect();
        let entries = LEAST_ENTRIES.max((parts.len() as u64).next_multiple_of(ENTRIES_PER_SECTOR));
        let entry_sectors = entries / ENTRIES_PER_SECTOR;
        let first_usable = 2 + entry_sectors;
        let mut table = Vec::with_capacity((entries * ENTRY_BYTES) as usize);
        let mut starts = Vec::with_capacity(parts.len());
        let mut end = first_usable;
        for (index, &(name, sectors)) in parts.iter().enumerate() {
            let start = end.checked_next_multiple_of(ALIGNMENT)?;
            end = start.checked_add(sectors)?;
            starts.push(start);
            table.extend(LINUX_DATA);
            table.extend(mixed_endian(uuid(id, index as u32)));
            table.extend(start.to_le_bytes());
            table.extend((end - 1).to_le_bytes());
            table.extend([0; 8]);
            let unit = table.len();
            table.extend(name.encode_utf16().flat_map(u16::to_le_bytes));
            table.resize(unit + 72, 0);
        }
        table.resize((entries * ENTRY_BYTES) as usize, 0);
        let sectors = end
            .checked_add(entry_sectors + 1)?
            .checked_next_multiple_of(ALIGNMENT)?;
        if sectors >= (1 << 63) / SECTOR {
            return None;
        }
        let last = sectors - 1;
        let header = |own: u64, other: u64, first_entry: u64| {
            let mut header = Vec::with_capacity(SECTOR as usize);
            header.extend(b"EFI PART");
            // Revision 1.0.
            header.extend(0x1_0000_u32.to_le_bytes());
            header.extend((HEADER_BYTES as u32).to_le_bytes());
            // The checksum's place, and reserved bytes.
            header.extend([0; 8]);
            for value in [own, other, first_usable, last - entry_sectors - 1] {
                header.extend(value.to_le_bytes());
            }
            header.extend(mixed_endian(uuid(id, WHOLE)));
            header.extend(first_entry.to_le_bytes());
            header.extend((entries as u32).to_le_bytes());
            header.extend((ENTRY_BYTES as u32).to_le_bytes());
            header.extend(crc32fast::hash(&table).to_le_bytes());
            let checksum = crc32fast::hash(&header);
            header[16..20].copy_from_slice(&checksum.to_le_bytes());
            header.resize(SECTOR as usize, 0);
            header
        };
        let mut primary = protective_mbr(sectors);
        primary.extend(header(1, last, 2));
        primary.extend(&table);
        let mut backup = table.clone();
        backup.extend(header(last, 1, last - entry_sectors));
        Some(Self {
            starts,
            sectors,
            primary,
            backup,
        })
    }
}

/// One partition of the type "GPT protective" over the whole disk (UEFI 2.10 section 5.2.3).
fn protective_mbr(sectors: u64) -> Vec<u8> {
    let mut mbr = vec![0; SECTOR as usize];
    // Not bootable, first sector 0/0/2, last sector beyond what cylinders can say.
    mbr[446..454].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
    mbr[454..458].copy_from_slice(&1_u32.to_le_bytes());
    let size = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    mbr[458..462].copy_from_slice(&size.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    mbr
}

/// Stands for the disk among the indices of its partitions.
const WHOLE: u32 = u32::MAX;

/// A UUID that the same disk id and index always give: version 8 (RFC 9562 section 5.8).
fn uuid(id: &str, index: u32) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(b"nacre partition\0");
    hash.update(index.to_le_bytes());
    hash.update(id.as_bytes());
    let mut uuid: [u8; 16] = std::array::from_fn({
        let hash = hash.finalize();
        move |i| hash[i]
    });
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// As EFI stores it: the first three fields little-endian.
fn mixed_endian(mut uuid: [u8; 16]) -> [u8; 16] {
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    uuid
}

/// The UUID of partition `index`, counted from 0, of a disk of parts with this id: what the guest
/// finds as PARTUUID, in the same form. It depends on nothing else, so disks of one VM whose
/// partitions are to be told apart by it have different ids.
pub fn part_uuid(id: &str, index: usize) -> String {
    let uuid = uuid(id, index as u32);
    let mut text = String::with_capacity(36);
    for (i, byte) in uuid.into_iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_depend_on_id_and_index_and_are_of_version_8() {
        let first = part_uuid("layers", 0);
        assert_eq!(first, part_uuid("layers", 0));
        assert_ne!(first, part_uuid("layers", 1));
        assert_ne!(first, part_uuid("layer", 0));
        assert_eq!((first.len(), &first[14..15]), (36, "8"));
        assert!(matches!(&first[19..20], "8" | "9" | "a" | "b"), "{first}");
    }

    #[test]
    fn the_table_grows_with_the_parts() {
        for (count, entry_sectors) in [(1, 32), (128, 32), (129, 33), (255, 64)] {
            let parts = vec![("part", 1); count];
            let layout = Layout::new("id", parts.into_iter()).expect("fits");
            assert_eq!(layout.primary.len() as u64, (2 + entry_sectors) * SECTOR);
            assert_eq!(layout.backup.len() as u64, (1 + entry_sectors) * SECTOR);
            assert!(layout.starts.iter().all(|start| start % ALIGNMENT == 0));
            assert_eq!(layout.sectors % ALIGNMENT, 0);
        }
    }

    #[test]
    fn a_disk_of_2_to_the_63_bytes_is_too_large() {
        let half = (1 << 62) / SECTOR;
        for sizes in [
            vec![half, half],
            vec![u64::MAX],
            vec![u64::MAX - 4096],
            vec![half * 2 - 1],
        ] {
            let parts = sizes.iter().map(|&sectors| ("part", sectors));
            assert!(Layout::new("id", parts).is_none(), "{sizes:?}");
        }
        let fits = Layout::new("id", [("part", half), ("part", half / 2)].into_iter());
        assert!(fits.is_some());
    }
}
