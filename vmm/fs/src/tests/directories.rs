//! Reading directories.

use std::fs;

use zerocopy::{FromBytes, IntoBytes};

use super::operations::guest;
use crate::abi::{self, Dirent, EntryOut, OpenIn, OpenOut, ReadIn, opcode};
use crate::testing::Guest;

/// All names and cookies of a directory, by answers of `room` bytes.
fn read_all(guest: &mut Guest, node: u64, plus: bool, room: u32) -> Vec<(String, u64, u64)> {
    read_each(guest, node, plus, room, |_| {})
}

/// The same; `each` is called with the names of an answer before the next is asked for.
fn read_each(
    guest: &mut Guest,
    node: u64,
    plus: bool,
    room: u32,
    mut each: impl FnMut(&str),
) -> Vec<(String, u64, u64)> {
    let opened: OpenOut = guest
        .call(opcode::OPENDIR, node, &OpenIn::default(), &[])
        .expect("opened");
    let opcode = if plus {
        opcode::READDIRPLUS
    } else {
        opcode::READDIR
    };
    let mut all = Vec::new();
    let mut offset = 0;
    loop {
        let request = ReadIn {
            fh: opened.fh,
            offset,
            size: room,
            ..Default::default()
        };
        let answer = guest.ask(opcode, node, request.as_bytes()).expect("read");
        assert!(answer.len() <= room as usize);
        if answer.is_empty() {
            break;
        }
        let mut rest = &answer[..];
        while !rest.is_empty() {
            let mut id = 0;
            if plus {
                let (entry, behind) = EntryOut::read_from_prefix(rest).unwrap();
                (id, rest) = (entry.nodeid, behind);
            }
            let (entry, behind) = Dirent::read_from_prefix(rest).unwrap();
            let len = entry.namelen as usize;
            let text = String::from_utf8(behind[..len].to_vec()).unwrap();
            rest = &behind[len.next_multiple_of(8)..];
            offset = entry.off;
            each(&text);
            all.push((text, id, entry.off));
        }
    }
    guest
        .release(opcode::RELEASEDIR, node, opened.fh)
        .expect("closed");
    all
}

#[test]
fn directories_are_read_whole_and_once_by_answers_of_any_size() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..500 {
        fs::write(
            folder.path().join(format!("{}{i}", "n".repeat(i % 200))),
            "",
        )
        .unwrap();
    }
    let (mut guest, root) = guest(folder.path());
    let mut expected: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .chain([".".into(), "..".into()])
        .collect();
    expected.sort();
    for (plus, room) in [
        (false, 512),
        (false, 4096),
        (true, 512),
        (true, 4096),
        (true, 1 << 20),
    ] {
        let all = read_all(&mut guest, root, plus, room);
        let mut sorted: Vec<_> = all.iter().map(|entry| entry.0.clone()).collect();
        sorted.sort();
        assert_eq!(sorted, expected, "{plus} {room}");
        if plus {
            for (text, id, _) in &all {
                assert_eq!(*id == 0, text == "." || text == "..", "{text}");
            }
            assert_eq!(guest.server.counters().inodes, 501);
            for (_, id, _) in &all {
                guest.forget(*id, 1);
            }
            assert_eq!(
                guest.server.counters().inodes,
                1,
                "one lookup for each name"
            );
        }
    }
    // The virtual root as well.
    let all = read_all(&mut guest, abi::ROOT_ID, true, 512);
    let texts: Vec<_> = all.iter().map(|entry| entry.0.as_str()).collect();
    assert_eq!(texts, [".", "..", "x"]);
}

/// As `rm -r` does. In memory, where offsets of older kernels are places in the list of what is there.
#[test]
fn a_directory_that_is_emptied_while_it_is_read_is_read_whole() {
    for place in ["/dev/shm", "/tmp"] {
        let folder = tempfile::tempdir_in(place).unwrap();
        for i in 0..300 {
            fs::write(folder.path().join(format!("file-{i:04}")), "").unwrap();
        }
        let (mut guest, root) = guest(folder.path());
        for plus in [false, true] {
            if plus {
                for i in 0..300 {
                    fs::write(folder.path().join(format!("file-{i:04}")), "").unwrap();
                }
            }
            let mut removed = 0;
            let remove = |name: &str| {
                if !name.starts_with('.') {
                    fs::remove_file(folder.path().join(name)).unwrap();
                    removed += 1;
                }
            };
            read_each(&mut guest, root, plus, 1024, remove);
            assert_eq!(removed, 300, "{place} {plus}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }
}

#[test]
fn a_cookie_leads_to_the_same_place_though_entries_came_and_went() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..100 {
        fs::write(folder.path().join(format!("f{i}")), "").unwrap();
    }
    let (mut guest, root) = guest(folder.path());
    let opened: OpenOut = guest
        .call(opcode::OPENDIR, root, &OpenIn::default(), &[])
        .unwrap();
    let mut offset = 0;
    let mut seen = Vec::new();
    loop {
        let request = ReadIn {
            fh: opened.fh,
            offset,
            size: 300,
            ..Default::default()
        };
        let answer = guest
            .ask(opcode::READDIR, root, request.as_bytes())
            .unwrap();
        let Ok((entry, behind)) = Dirent::read_from_prefix(&answer) else {
            break;
        };
        // Only the first of each answer is believed, and it is removed.
        let text = String::from_utf8(behind[..entry.namelen as usize].to_vec()).unwrap();
        offset = entry.off;
        if !text.starts_with('.') {
            fs::remove_file(folder.path().join(&text)).unwrap();
        }
        seen.push(text);
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 102, "each once");
}
