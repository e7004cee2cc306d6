//! What a hostile guest can ask of the file server, as a function of bytes:
//! the body of a fuzz target. It ends by itself, panics when a promise is broken, and leaves nothing behind.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use arbitrary::{Result, Unstructured};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use crate::abi::{InHeader, OutHeader, ROOT_ID, opcode};
use crate::testing::{ANSWER, Guest, REQUEST, opath};
use crate::{Access, Caching, FileServer, Limits};

/// Requests of one input.
const STEPS: usize = 64;
/// Most bytes of a request's body.
const BODY: usize = 512;
/// Names that lead somewhere, or are meant to lead out.
const NAMES: [&str; 12] = [
    "x",
    "sealed",
    "f",
    "d",
    "link",
    "out",
    "..",
    "../outside/secret",
    "/etc/passwd",
    "new",
    "fifo",
    "",
];

/// Inputs to begin with: walks through what there is, and all operations on it.
pub fn seeds() -> Vec<Vec<u8>> {
    let opcodes: Vec<u8> = (0..=52).collect();
    let mut seeds = Vec::new();
    for part in opcodes.chunks(9) {
        let mut bytes = Vec::new();
        for step in [&[1_u8; 9][..], part].concat() {
            // Operation, node, room, pieces, how many fields and names, and their bytes.
            bytes.extend([step, step.wrapping_mul(7), 255, 1, step % 4]);
            bytes.extend([1, 0, 2, 0, 3, 0, 4, 0]);
        }
        seeds.push(bytes);
    }
    seeds
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let folder = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a folder");
    let path = folder.path();
    for name in ["outside", "export/d", "sealed/d"] {
        fs::create_dir_all(path.join(name)).expect("made");
    }
    for name in [
        "outside/secret",
        "export/f",
        "export/d/f",
        "sealed/f",
        "sealed/d/f",
    ] {
        fs::write(path.join(name), name).expect("written");
    }
    for name in ["export", "sealed"] {
        symlink(path.join("outside/secret"), path.join(name).join("link")).expect("made");
        symlink("../outside", path.join(name).join("out")).expect("made");
    }
    let canaries = ["outside", "sealed"].map(|name| path.join(name));
    let before = canaries.each_ref().map(|path| facts(path));
    let server = FileServer::new(Limits {
        inodes: 20,
        handles: 6,
        kept: 4,
        pinned: 16,
        workers: 1,
    })
    .expect("a server");
    for (name, folder, access) in [
        ("x", "export", Access::ReadWrite),
        ("sealed", "sealed", Access::ReadOnly),
    ] {
        server
            .export_cached(name, opath(&path.join(folder)), access, Caching::Always)
            .expect("exported");
    }
    let mut guest = Guest::new(&server);
    // A run that ends for want of bytes is a run.
    let _ = steps(&mut guest, &mut Unstructured::new(data));
    let counters = server.counters();
    assert!(
        counters.inodes <= 20 && counters.handles <= 6,
        "{counters:?}"
    );
    assert!(counters.node_descriptors <= 4 + 16, "{counters:?}");
    for name in ["x", "sealed"] {
        server.withdraw(name);
    }
    let counters = server.counters();
    assert_eq!(
        (counters.inodes, counters.handles, counters.node_descriptors),
        (0, 0, 0)
    );
    assert_eq!(canaries.each_ref().map(|path| facts(path)), before);
}

fn steps(guest: &mut Guest, input: &mut Unstructured<'_>) -> Result<()> {
    for _ in 0..STEPS {
        let opcode = match input.arbitrary::<u8>()? {
            code @ 0..=60 => u32::from(code),
            code if code < 128 => opcode::LOOKUP,
            code if code < 250 => u32::from(code % 53),
            _ => input.arbitrary()?,
        };
        let node = match input.arbitrary::<u8>()? {
            code @ 0..=240 => ROOT_ID + u64::from(code % 12),
            _ => input.arbitrary()?,
        };
        let room = match input.arbitrary::<u8>()? {
            255 => 0x4000,
            code => u32::from(code),
        };
        let pieces = usize::from(input.arbitrary::<u8>()? % 5);
        let body = body(input)?;
        request(guest, input, opcode, node, room, pieces, &body)?;
    }
    Ok(())
}

/// Numbers that may be handles, nodes or flags, and names.
fn body(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    let fields = input.arbitrary::<u8>()? % 14;
    for _ in 0..fields {
        let value = match input.arbitrary::<u8>()? {
            code @ 0..=199 => u64::from(code % 16),
            code @ 200..=230 => 1 << (code % 64),
            _ => input.arbitrary()?,
        };
        body.extend(value.to_le_bytes());
    }
    for _ in 0..input.arbitrary::<u8>()? % 3 {
        let name = NAMES[usize::from(input.arbitrary::<u8>()?) % NAMES.len()];
        body.extend(name.as_bytes());
        body.push(0);
    }
    if input.ratio(1, 8)? {
        body.extend(input.bytes(input.len().min(64))?);
    }
    body.truncate(BODY);
    Ok(body)
}

/// Sends it, in pieces, and checks that nothing but the room for the answer is written.
fn request(
    guest: &mut Guest,
    input: &mut Unstructured<'_>,
    opcode: u32,
    nodeid: u64,
    room: u32,
    pieces: usize,
    body: &[u8],
) -> Result<()> {
    let mut header = InHeader {
        len: 40 + body.len() as u32,
        opcode,
        unique: 7,
        nodeid,
        uid: u32::from(opcode.is_multiple_of(3)) * 1000,
        gid: u32::from(opcode.is_multiple_of(3)) * 1000,
        ..Default::default()
    };
    if input.ratio(1, 32)? {
        header.len = input.arbitrary()?;
    }
    let request = [header.as_bytes(), body].concat();
    let fill = [0xa5; 0x6000];
    guest
        .memory
        .write_slice(&fill, GuestAddress(ANSWER - 0x1000))
        .expect("in guest memory");
    guest
        .memory
        .write_slice(&request, GuestAddress(REQUEST))
        .expect("in guest memory");
    let mut parts = Vec::new();
    let size = (request.len() / (pieces + 1)).max(1);
    for at in (0..request.len()).step_by(size) {
        parts.push((
            REQUEST + at as u64,
            size.min(request.len() - at) as u32,
            false,
        ));
    }
    let half = room / 2;
    parts.push((ANSWER, half, true));
    parts.push((ANSWER + u64::from(half), room - half, true));
    let len = guest.chain(&parts);
    assert!(len == 0 || (16..=room).contains(&len), "{len} of {room}");
    let mut after = vec![0; fill.len()];
    guest
        .memory
        .read_slice(&mut after, GuestAddress(ANSWER - 0x1000))
        .expect("in guest memory");
    let (front, rest) = after.split_at(0x1000);
    let (answer, behind) = rest.split_at(room as usize);
    assert!(
        front.iter().chain(behind).all(|byte| *byte == 0xa5),
        "written outside"
    );
    let mut sent = vec![0; request.len()];
    guest
        .memory
        .read_slice(&mut sent, GuestAddress(REQUEST))
        .expect("in guest memory");
    assert_eq!(sent, request, "a request was written to");
    if len > 0 {
        let (out, _) = <OutHeader as zerocopy::FromBytes>::read_from_prefix(answer)
            .expect("room for a header");
        assert_eq!((out.len, out.unique), (len, 7));
        assert!((-511..=0).contains(&out.error), "{out:?}");
    }
    Ok(())
}

/// What a tree is, its times of access left out.
fn facts(folder: &Path) -> BTreeMap<std::path::PathBuf, (u32, u32, u64, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("there") {
        let path = entry.expect("an entry").path();
        let metadata = path.symlink_metadata().expect("there");
        let content = if metadata.is_file() {
            fs::read(&path).expect("readable")
        } else {
            Vec::new()
        };
        if metadata.is_dir() {
            found.extend(facts(&path));
        }
        let facts = (
            metadata.mode(),
            metadata.uid(),
            metadata.nlink(),
            metadata.ctime_nsec(),
            content,
        );
        found.insert(path, facts);
    }
    found
}
