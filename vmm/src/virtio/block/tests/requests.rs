//! One request at a time: what it changes, what is refused, and what comes back.

use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::*;
use crate::virtio::queue::driver::{END, GAP, ISLAND, SEAM};

#[test]
fn reading_gives_the_sectors_and_counts_the_status() {
    both(|io| {
        let image = image(8);
        let disk = disk(&config(&image, true));
        let parts = [(BUFFER, 600, true), (SEAM - 100, 424, true)];
        let (driver, status, len) = request(io, &disk, 0, 3, &parts);
        assert_eq!((status, len), (OK, 1025));
        let mut bytes = driver.bytes(BUFFER, 600);
        bytes.extend(driver.bytes(SEAM - 100, 424));
        assert_eq!(bytes, [[4; 512], [5; 512]].concat());
    });
}

#[test]
fn writing_changes_these_sectors_only() {
    both(|io| {
        let image = image(4);
        let disk = disk(&config(&image, false));
        let mut driver = Driver::new(memory(), 8);
        driver.fill(HEADER, &header(1, 1));
        driver.fill(ISLAND, &[0xaa; 1024]);
        let parts = [
            (HEADER, 16, false),
            (ISLAND, 1000, false),
            (ISLAND + 1000, 24, false),
            (STATUS, 1, true),
        ];
        assert_eq!(answer(io, &disk, &mut driver, &parts), (OK, 1));
        let expected = [[1; 512], [0xaa; 512], [0xaa; 512], [4; 512]].concat();
        assert_eq!(content(&image), expected);
    });
}

#[test]
fn a_read_only_disk_is_not_written_and_its_file_is_not_open_for_it() {
    both(|io| {
        let image = image(4);
        let disk = disk(&config(&image, true));
        let (_, status, len) = request(io, &disk, 1, 0, &[(BUFFER, 512, false)]);
        assert_eq!((status, len), (IOERR, 1));
        let (_, status, _) = request(io, &disk, 4, 0, &[]);
        assert_eq!(status, OK, "there is nothing to flush");
        assert_eq!(content(&image)[..512], [1; 512]);
    });
}

#[test]
fn sectors_past_the_end_or_wrapping_are_errors() {
    both(|io| {
        let image = image(4);
        let disk = disk(&config(&image, false));
        for kind in [0, 1] {
            for (sector, len) in [
                (4, 512),
                (3, 1024),
                (u64::MAX, 512),
                (u64::MAX / 512, 512),
                (1 << 55, 512),
                (0, 511),
                (0, 513),
                (0, 4096),
            ] {
                let (driver, status, used) =
                    request(io, &disk, kind, sector, &[(BUFFER, len, kind == 0)]);
                assert_eq!(status, IOERR, "kind {kind}: {len} at {sector}");
                assert_eq!(
                    used, kind,
                    "kind {kind}: nothing was written before the status"
                );
                assert_eq!(driver.bytes(BUFFER, 512), [0; 512]);
            }
        }
        assert_eq!(content(&image).len(), 4 * 512);
    });
}

#[test]
fn a_request_of_no_length_is_fine_within_the_disk() {
    both(|io| {
        let image = image(4);
        let disk = disk(&config(&image, false));
        for kind in [0, 1] {
            for (sector, expected) in [(0, OK), (4, OK), (5, IOERR)] {
                let (_, status, len) = request(io, &disk, kind, sector, &[]);
                assert_eq!((status, len), (expected, 1), "kind {kind} at {sector}");
            }
        }
    });
}

#[test]
fn unknown_requests_are_unsupported() {
    both(|io| {
        let image = image(4);
        let disk = disk(&config(&image, false));
        for kind in [2, 3, 5, 14, 15, 24, 0x8000_0000, u32::MAX] {
            let (_, status, len) = request(io, &disk, kind, 0, &[]);
            assert_eq!((status, len), (UNSUPP, 1), "kind {kind}");
        }
    });
}

#[test]
fn the_id_is_given_in_twenty_bytes_or_as_many_as_fit() {
    both(|io| {
        let image = image(4);
        let disk = disk(&config(&image, true));
        for (room, expected_len) in [(20, 21), (4, 5), (30, 20), (0, 1)] {
            let (driver, status, len) = request(io, &disk, 8, 0, &[(BUFFER, room, true)]);
            assert_eq!((status, len), (OK, expected_len), "{room} bytes of room");
            let expected = &b"root\0\0\0\0"[..room.min(8) as usize];
            assert_eq!(driver.bytes(BUFFER, expected.len()), expected);
        }
    });
}

#[test]
fn requests_without_header_or_status_are_answered_as_far_as_they_can_be() {
    both(|io| {
        let image = image(4);
        let disk = disk(&config(&image, false));
        for (name, parts, expected) in [
            ("no status", vec![(HEADER, 16, false)], (NONE, 0)),
            ("nothing", vec![(HEADER, 0, false)], (NONE, 0)),
            (
                "empty status",
                vec![(HEADER, 16, false), (STATUS, 0, true)],
                (NONE, 0),
            ),
            ("no header", vec![(STATUS, 1, true)], (IOERR, 1)),
            (
                "short header",
                vec![(HEADER, 15, false), (STATUS, 1, true)],
                (IOERR, 1),
            ),
            (
                "writable header",
                vec![(HEADER, 16, true), (STATUS, 1, true)],
                (IOERR, 0),
            ),
            (
                "read into a readable buffer",
                vec![(HEADER, 16, false), (BUFFER, 512, false), (STATUS, 1, true)],
                (OK, 1),
            ),
            (
                "buffer in the gap",
                vec![(HEADER, 16, false), (GAP, 512, true), (STATUS, 1, true)],
                (NONE, 0),
            ),
            (
                "status outside",
                vec![(HEADER, 16, false), (END, 1, true)],
                (NONE, 0),
            ),
            (
                "status in the gap",
                vec![
                    (HEADER, 16, false),
                    (BUFFER, 512, true),
                    (u64::MAX, 1, true),
                ],
                (NONE, 0),
            ),
        ] {
            let mut driver = Driver::new(memory(), 8);
            driver.fill(HEADER, &header(0, 0));
            assert_eq!(answer(io, &disk, &mut driver, &parts), expected, "{name}");
        }
        assert_eq!(content(&image)[..512], [1; 512]);
    });
}

#[test]
fn header_and_status_may_be_split_and_joined() {
    both(|io| {
        let image = image(4);
        let disk = disk(&config(&image, true));
        let mut driver = Driver::new(memory(), 32);
        driver.fill(HEADER, &header(0, 2));
        let mut parts: Vec<Part> = (0..16).map(|i| (HEADER + i, 1, false)).collect();
        // Data and status in one descriptor.
        driver.fill(BUFFER + 512, &[NONE]);
        parts.push((BUFFER, 513, true));
        let (_, len) = answer(io, &disk, &mut driver, &parts);
        assert_eq!(len, 513);
        assert_eq!(driver.bytes(BUFFER, 512), [3; 512]);
        assert_eq!(driver.read::<u8>(BUFFER + 512), OK);
    });
}

#[test]
fn a_file_that_became_shorter_is_an_error_and_not_a_hang() {
    both(|io| {
        let image = image(4);
        let disk = disk(&config(&image, false));
        image.as_file().set_len(512).expect("shortened");
        let (driver, status, len) = request(io, &disk, 0, 0, &[(BUFFER, 1024, true)]);
        assert_eq!((status, len), (IOERR, 512), "what was read before counts");
        assert_eq!(driver.bytes(BUFFER, 512), [1; 512]);
    });
}

/// A discard or write-zeroes of these segments.
fn erase(io: DiskIo, disk: &Arc<Disk>, kind: u32, segments: &[[u8; 16]], cut: u32) -> u8 {
    let mut driver = Driver::new(memory(), 8);
    driver.fill(HEADER, &header(kind, 0));
    driver.fill(BUFFER, &segments.concat());
    let len = segments.len() as u32 * 16 - cut;
    let parts = [
        (HEADER, 16, false),
        (BUFFER, len / 2, false),
        (BUFFER + u64::from(len / 2), len - len / 2, false),
        (STATUS, 1, true),
    ];
    let (status, used) = answer(io, disk, &mut driver, &parts);
    assert_eq!(used, 1);
    status
}

fn blocks(image: &NamedTempFile) -> u64 {
    image.as_file().sync_all().expect("synced");
    image.as_file().metadata().expect("metadata").blocks()
}

#[test]
fn a_discard_makes_holes_and_nothing_else() {
    both(|io| {
        let file = NamedTempFile::new().expect("an image");
        std::fs::write(file.path(), vec![7; 1 << 20]).expect("written");
        let disk = disk(&config(&file, false));
        let before = blocks(&file);
        let segments = [segment(8, 512, 0), segment(1024, 1024, 0), segment(0, 0, 0)];
        assert_eq!(erase(io, &disk, DISCARD, &segments, 0), OK);
        assert!(
            blocks(&file) <= before - 1536,
            "{before} blocks, then {}",
            blocks(&file)
        );
        let bytes = content(&file);
        assert_eq!(bytes.len(), 1 << 20);
        assert!(bytes[..8 * 512].iter().all(|&byte| byte == 7));
        assert!(bytes[520 * 512..1024 * 512].iter().all(|&byte| byte == 7));
    });
}

#[test]
fn zeroes_read_as_zeros_with_and_without_a_hole() {
    both(|io| {
        let file = NamedTempFile::new().expect("an image");
        std::fs::write(file.path(), vec![7; 1 << 20]).expect("written");
        let disk = disk(&config(&file, false));
        let before = blocks(&file);
        // Neither begins nor ends with a block of the file system.
        assert_eq!(erase(io, &disk, ZEROES, &[segment(1, 1021, 0)], 0), OK);
        assert!(
            blocks(&file) >= before,
            "{before} blocks, then {}",
            blocks(&file)
        );
        let bytes = content(&file);
        assert_eq!((bytes[511], bytes[512]), (7, 0));
        assert_eq!((bytes[1022 * 512 - 1], bytes[1022 * 512]), (0, 7));
        assert!(bytes[512..1022 * 512].iter().all(|&byte| byte == 0));
        assert_eq!(erase(io, &disk, ZEROES, &[segment(1024, 1024, 1)], 0), OK);
        assert!(
            blocks(&file) <= before - 1000,
            "{before} blocks, then {}",
            blocks(&file)
        );
        let bytes = content(&file);
        assert!(bytes[1024 * 512..].iter().all(|&byte| byte == 0));
        assert_eq!(bytes[1023 * 512..1024 * 512], [7; 512]);
    });
}

#[test]
fn segments_are_judged_before_the_first_is_carried_out() {
    both(|io| {
        let image = image(8);
        let disk = disk(&config(&image, false));
        let sound = segment(0, 8, 0);
        for kind in [DISCARD, ZEROES] {
            for (name, bad, expected) in [
                ("past the end", segment(8, 1, 0), IOERR),
                ("longer than the disk", segment(0, 9, 0), IOERR),
                ("wrapping", segment(u64::MAX, 2, 0), IOERR),
                ("wrapping in bytes", segment(1 << 55, 8, 0), IOERR),
                ("too many sectors", segment(0, (1 << 21) + 1, 0), IOERR),
                ("all sectors", segment(0, u32::MAX, 0), IOERR),
                ("an unknown flag", segment(0, 1, 2), UNSUPP),
                ("unknown flags", segment(0, 1, u32::MAX), UNSUPP),
            ] {
                let status = erase(io, &disk, kind, &[sound, bad], 0);
                assert_eq!(status, expected, "{kind}: {name}");
            }
            assert_eq!(erase(io, &disk, kind, &[sound, sound], 1), IOERR);
            assert_eq!(erase(io, &disk, kind, &[sound; 17], 0), IOERR);
            assert_eq!(erase(io, &disk, kind, &[], 0), OK);
        }
        assert_eq!(erase(io, &disk, DISCARD, &[segment(0, 8, 1)], 0), UNSUPP);
        let sectors = (1..=8)
            .flat_map(|sector| [sector; 512])
            .collect::<Vec<u8>>();
        assert_eq!(content(&image), sectors);
    });
}

#[test]
fn a_segment_has_a_gibibyte_at_most_however_large_the_disk() {
    const MOST: u32 = 1 << 21;
    both(|io| {
        let image = NamedTempFile::new().expect("an image");
        let bytes = 2 * u64::from(MOST) * 512;
        image.as_file().set_len(bytes).expect("sparse");
        let disk = disk(&config(&image, false));
        for kind in [DISCARD, ZEROES] {
            let flags = u32::from(kind == ZEROES);
            let most = segment(8, MOST, flags);
            let more = segment(8, MOST + 1, flags);
            assert_eq!(erase(io, &disk, kind, &[most], 0), OK, "{kind}");
            assert_eq!(erase(io, &disk, kind, &[more], 0), IOERR, "{kind}");
        }
    });
}

#[test]
fn what_was_not_agreed_on_is_unsupported() {
    both(|io| {
        let image = image(8);
        let disk = disk(&config(&image, false));
        for kind in [DISCARD, ZEROES] {
            let mut driver = Driver::new(memory(), 8);
            driver.fill(HEADER, &header(kind, 0));
            driver.fill(BUFFER, &segment(0, 8, 0));
            driver.chain(&[(HEADER, 16, false), (BUFFER, 16, false), (STATUS, 1, true)]);
            let engine = engine::choose(io, &disk, 8).expect("an engine");
            let ram = GuestRam::new(driver.memory.clone());
            let mut service = service(&disk, ram, &driver, Agreed::default(), engine);
            serve_until(&mut service, &driver, 1);
            assert_eq!(driver.read::<u8>(STATUS), UNSUPP);
        }
        assert_eq!(content(&image)[..512], [1; 512]);
    });
}

#[test]
fn nothing_changes_a_read_only_disk() {
    both(|io| {
        let image = image(8);
        let disk = disk(&config(&image, true));
        for kind in [DISCARD, ZEROES] {
            let status = erase(io, &disk, kind, &[segment(0, 8, 0)], 0);
            assert_eq!(status, IOERR, "{kind}");
        }
        assert_eq!(content(&image)[..512], [1; 512]);
        assert_eq!(content(&image).len(), 8 * 512);
    });
}

fn part() -> impl Strategy<Value = Part> {
    let address = prop_oneof![
        4 => DATA..SEAM,
        2 => Just(HEADER),
        1 => GAP - 600..GAP + 64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => Just(512_u32), 2 => Just(16), 1 => Just(32), 2 => Just(1), 2 => 0..3000_u32, 1 => any::<u32>()];
    (address, len, any::<bool>())
}

proptest! {
    /// Whatever the chain: an answer, no more bytes than there is room for, and a disk that
    /// keeps its size.
    #[test]
    fn no_request_upsets_the_disk(
        kind in prop_oneof![Just(IN), Just(OUT), Just(FLUSH), Just(GET_ID), Just(DISCARD), Just(ZEROES), any::<u32>()],
        sector in prop_oneof![0..6_u64, any::<u64>()],
        mut parts in prop::collection::vec(part(), 1..8),
        sorted in any::<bool>(),
        read_only in any::<bool>(),
        ring in any::<bool>(),
        segment in (0..6_u64, 0..6_u32, 0..3_u32),
    ) {
        let image = image(4);
        let disk = disk(&config(&image, read_only));
        let before = content(&image);
        if sorted {
            parts.sort_by_key(|part| part.2);
        }
        let mut driver = Driver::new(memory(), 8);
        driver.fill(HEADER, &header(kind, sector));
        driver.fill(HEADER + 16, &super::segment(segment.0, segment.1, segment.2));
        let io = if ring { DiskIo::Auto } else { DiskIo::Threads };
        let (_, len) = answer(io, &disk, &mut driver, &parts);
        let room: u64 = parts.iter().filter(|part| part.2).map(|part| u64::from(part.1)).sum();
        prop_assert!(u64::from(len) <= room);
        let after = content(&image);
        prop_assert_eq!(after.len(), before.len());
        if read_only {
            prop_assert_eq!(after, before);
        }
    }
}
