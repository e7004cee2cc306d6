//! Disks of several files: the partition table as another parser reads it, and bytes across the
//! borders of parts.

use proptest::prelude::*;

use super::*;
use crate::config::{DiskPart, DiskSource};
use crate::virtio::block::part_uuid;
use crate::virtio::queue::driver::ISLAND;

const MIB: usize = 1 << 20;

/// Files of these sizes, of which no two have the same bytes.
fn files(sizes: &[usize]) -> Vec<NamedTempFile> {
    let make = |(index, &size): (usize, &usize)| {
        let file = NamedTempFile::new().expect("an image");
        std::fs::write(file.path(), pattern(index, size)).expect("written");
        file
    };
    sizes.iter().enumerate().map(make).collect()
}

fn pattern(index: usize, size: usize) -> Vec<u8> {
    let byte = |at: usize| (at * 13 + at / 251 + index * 71) as u8 | 1;
    (0..size).map(byte).collect()
}

fn joined(files: &[NamedTempFile], read_only: bool) -> DiskConfig {
    let part = |(index, file): (usize, &NamedTempFile)| DiskPart {
        path: file.path().to_owned(),
        name: format!("layer {index}"),
    };
    let parts = files.iter().enumerate().map(part).collect();
    DiskConfig {
        source: DiskSource::Parts(parts),
        ..DiskConfig::parts([""; 0], read_only, "layers")
    }
}

/// `sectors` sectors, by requests of up to a megabyte each.
fn read(io: DiskIo, disk: &Arc<Disk>, sector: u64, sectors: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut at = sector;
    while at < sector + sectors {
        let count = (sector + sectors - at).min(2048);
        let len = count as u32 * 512;
        // In unequal pieces.
        let first = (len / 3) | 1;
        let parts = [
            (ISLAND, first, true),
            (ISLAND + u64::from(first), len - first, true),
        ];
        let (driver, status, used) = request(io, disk, IN, at, &parts);
        assert_eq!((status, used), (OK, len + 1), "{count} at {at}");
        bytes.extend(driver.bytes(ISLAND, len as usize));
        at += count;
    }
    bytes
}

#[test]
fn another_parser_finds_the_parts_by_either_table() {
    both(|io| {
        for count in [1, 3, 130, 255] {
            let sizes: Vec<usize> = (0..count).map(|index| 1 + index * 300).collect();
            let files = files(&sizes);
            let disk = disk(&joined(&files, true));
            let sectors = disk.sectors();
            assert_eq!(sectors as usize, (count + 1) * MIB / 512);
            // Reading all of the disks with many parts says nothing more.
            let mut bytes = vec![0; sectors as usize * 512];
            let ends = if count < 4 { sectors } else { 128 };
            bytes[..ends as usize * 512].copy_from_slice(&read(io, &disk, 0, ends));
            let tail = (sectors - ends) as usize * 512;
            bytes[tail..].copy_from_slice(&read(io, &disk, sectors - ends, ends));
            for broken in [false, true] {
                if broken {
                    bytes[512..1024].fill(0);
                }
                let device = std::io::Cursor::new(&mut bytes[..]);
                let table = ::gpt::GptConfig::new()
                    .writable(false)
                    .only_valid_headers(!broken)
                    .open_from_device(device)
                    .expect("a sound table");
                assert_eq!(table.primary_header().is_err(), broken);
                assert!(table.backup_header().is_ok());
                let found = table.partitions();
                assert_eq!(found.len(), count);
                for (index, (number, partition)) in found.iter().enumerate() {
                    assert_eq!(*number as usize, index + 1);
                    assert_eq!(partition.name, format!("layer {index}"));
                    assert_eq!(partition.part_guid.to_string(), part_uuid("layers", index));
                    assert_eq!(partition.part_type_guid, ::gpt::partition_types::LINUX_FS);
                    assert_eq!(partition.first_lba, (index as u64 + 1) * 2048);
                    let sectors = sizes[index].div_ceil(512) as u64;
                    assert_eq!(partition.last_lba, partition.first_lba + sectors - 1);
                }
            }
            let mbr = ::gpt::mbr::ProtectiveMBR::from_bytes(
                &bytes[..512],
                ::gpt::disk::DEFAULT_SECTOR_SIZE,
            )
            .expect("a protective MBR");
            let partition = mbr.partition(0).expect("one partition");
            assert_eq!((partition.os_type, partition.lb_start), (0xee, 1));
            assert_eq!(u64::from(partition.lb_size), sectors - 1);
        }
    });
}

#[test]
fn each_of_a_hundred_parts_is_its_own_file() {
    both(|io| {
        let files = files(&[512; 100]);
        let disk = disk(&joined(&files, true));
        for index in 0..100 {
            let bytes = read(io, &disk, (index as u64 + 1) * 2048, 1);
            assert_eq!(bytes, pattern(index, 512), "part {index}");
        }
    });
}

#[test]
fn what_is_written_to_a_part_is_in_its_file_and_the_table_stays() {
    both(|io| {
        let files = files(&[MIB, 2048]);
        let disk = disk(&joined(&files, false));
        let before = read(io, &disk, 0, disk.sectors());
        let write = |sector: u64, sectors: u32| {
            let mut driver = Driver::new(memory(), 8);
            driver.fill(HEADER, &header(OUT, sector));
            driver.fill(ISLAND, &vec![0xee; sectors as usize * 512]);
            let parts = [
                (HEADER, 16, false),
                (ISLAND, sectors * 512, false),
                (STATUS, 1, true),
            ];
            answer(io, &disk, &mut driver, &parts)
        };
        for (sector, sectors) in [
            (0, 1),
            (1, 1),
            (34, 1),
            (2047, 1),
            (4096 + 4, 1),
            (6143, 1),
            (6144, 2),
        ] {
            assert_eq!(write(sector, sectors), (IOERR, 1), "{sectors} at {sector}");
        }
        assert!(read(io, &disk, 0, disk.sectors()) == before);
        // Across the border of two parts that touch, and up to the end of the last.
        assert_eq!(write(4094, 4), (OK, 1));
        assert_eq!(write(4096 + 3, 1), (OK, 1));
        assert_eq!(request(io, &disk, FLUSH, 0, &[]).1, OK);
        let mut first = pattern(0, MIB);
        first[MIB - 1024..].fill(0xee);
        assert!(content(&files[0]) == first);
        let mut second = pattern(1, 2048);
        second[..1024].fill(0xee);
        second[1536..].fill(0xee);
        assert!(content(&files[1]) == second);
        // Into the gap after it: nothing past the part is written, and no file grows.
        assert_eq!(write(4096 + 3, 2), (IOERR, 1));
        assert_eq!(content(&files[1]).len(), 2048);
        for (sector, count, expected) in [(4095, 2, OK), (4099, 2, IOERR), (0, 1, IOERR)] {
            let mut driver = Driver::new(memory(), 8);
            driver.fill(HEADER, &header(ZEROES, 0));
            driver.fill(BUFFER, &segment(sector, count, 1));
            let parts = [(HEADER, 16, false), (BUFFER, 16, false), (STATUS, 1, true)];
            let (status, _) = answer(io, &disk, &mut driver, &parts);
            assert_eq!(status, expected, "{count} at {sector}");
        }
        assert_eq!(content(&files[0])[MIB - 512..], [0; 512]);
        assert_eq!(content(&files[1])[..512], [0; 512]);
        assert_eq!(content(&files[1]).len(), 2048);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// What is read across borders is what a disk put together by hand would hold.
    #[test]
    fn reads_across_parts_are_those_of_a_disk_put_together_by_hand(
        sizes in prop::collection::vec(prop_oneof![1..3000_usize, MIB - 600..MIB + 600], 1..5),
        reads in prop::collection::vec((0..8_u64, -6..6_i64, 1..9_u64), 1..6),
        long in any::<bool>(),
        ring in any::<bool>(),
    ) {
        let io = if ring { DiskIo::Auto } else { DiskIo::Threads };
        let files = files(&sizes);
        let disk = disk(&joined(&files, true));
        let total = disk.sectors();
        let table = read(io, &disk, 0, 34);
        let mut expected = vec![0; total as usize * 512];
        expected[..table.len()].copy_from_slice(&table);
        let backup = read(io, &disk, total - 33, 33);
        let at = expected.len() - backup.len();
        expected[at..].copy_from_slice(&backup);
        let mut start = MIB;
        for (index, &size) in sizes.iter().enumerate() {
            expected[start..start + size].copy_from_slice(&pattern(index, size));
            start = (start + size).next_multiple_of(MIB);
        }
        for (border, shift, count) in reads {
            let sector = (border * 2048).saturating_add_signed(shift).min(total - 1);
            let count = if long { count * 500 } else { count }.min(total - sector);
            let bytes = read(io, &disk, sector, count);
            let from = sector as usize * 512;
            prop_assert!(bytes == expected[from..from + bytes.len()], "{count} at {sector}");
        }
    }
}
