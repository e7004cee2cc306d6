//! Reading directories: the host's entries as the guest's, with the host's
//! offsets as cookies.

use std::ffi::CStr;
use std::mem::size_of;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::abi::{self, Dirent, EntryOut};
use crate::handles::Handle;
use crate::message::Out;
use crate::sys;

/// Bytes of one answer, at most: each entry may take a lookup.
const MOST: u64 = 32 << 10;
/// Bytes read from the host at once, at least: the longest entry fits.
const LEAST: usize = 512;
/// The same, at most: what finds no room stays with the handle.
const REFILL: usize = 4096;
/// `struct linux_dirent64` up to the name.
const HOST_HEADER: usize = 19;

/// Where reading a directory has come to. Entries that were read from the host and found no room wait for the next
/// request: going back for them would skip some, or show some twice, where offsets are places in a list that changes
/// meanwhile (tmpfs before Linux 6.6).
#[derive(Debug, Default)]
pub(crate) struct Stream {
    /// The offset of what comes next.
    position: u64,
    /// The host's records from there on, before what the descriptor stands at.
    waiting: Vec<u8>,
}

/// One entry of a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub ino: u64,
    /// Where the next one is.
    pub next: u64,
    pub kind: u8,
    pub name: &'a CStr,
}

impl Entry<'_> {
    /// Whether it is the directory itself or the one above.
    pub fn is_dots(&self) -> bool {
        matches!(self.name.to_bytes(), b"." | b"..")
    }

    /// Adds it to the answer; whether there was room. `node` is asked only then.
    pub fn put(
        &self,
        out: &mut Out<'_>,
        left: &mut u64,
        node: Option<&mut dyn FnMut() -> EntryOut>,
    ) -> Result<bool, Errno> {
        let name = self.name.to_bytes();
        let plain = (size_of::<Dirent>() + name.len()).next_multiple_of(8);
        let plus = node.as_ref().map_or(0, |_| size_of::<EntryOut>());
        let size = (plus + plain) as u64;
        if size > *left {
            return Ok(false);
        }
        *left -= size;
        let mut ino = self.ino;
        if let Some(node) = node {
            let entry = node();
            if entry.nodeid != 0 {
                ino = entry.attr.ino;
            }
            out.put(&entry)?;
        }
        let header = Dirent {
            ino,
            off: self.next,
            namelen: name.len() as u32,
            kind: self.kind.into(),
        };
        let mut record = [0; size_of::<Dirent>() + 256];
        record[..size_of::<Dirent>()].copy_from_slice(header.as_bytes());
        // A host's file system with longer names has no place here.
        record
            .get_mut(size_of::<Dirent>()..size_of::<Dirent>() + name.len())
            .ok_or(Errno::NAMETOOLONG)?
            .copy_from_slice(name);
        out.bytes(record.get(..plain).ok_or(Errno::NAMETOOLONG)?)?;
        Ok(true)
    }
}

/// Bytes that an answer to this request may have.
pub(crate) fn budget(request: &abi::ReadIn, out: &Out<'_>) -> u64 {
    u64::from(request.size).min(out.room()).min(MOST)
}

/// Hands the host's entries from `offset` on to `each`, until it says that there is no more room.
/// `part` is about how many bytes of theirs fit.
pub(crate) fn read(
    handle: &Handle,
    offset: u64,
    part: u64,
    mut each: impl FnMut(&Entry<'_>) -> Result<bool, Errno>,
) -> Result<(), Errno> {
    let stream = handle.stream.as_ref().ok_or(Errno::NOTDIR)?;
    // Poisoned by a panic, it only lacks its position.
    let mut stream = stream.lock().unwrap_or_else(|poisoned| {
        let mut stream = poisoned.into_inner();
        stream.position = u64::MAX;
        stream.waiting = Vec::new();
        stream
    });
    // The beginning is always looked at anew.
    if stream.position != offset || offset == 0 {
        stream.waiting = Vec::new();
        stream.position = u64::MAX;
        rustix::fs::seek(&handle.file, SeekFrom::Start(offset))?;
        stream.position = offset;
    }
    let mut buffer = std::mem::take(&mut stream.waiting);
    let mut count = buffer.len();
    loop {
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            let (entry, behind) = parse(rest).ok_or(Errno::IO)?;
            match each(&entry) {
                Ok(true) => {}
                full => {
                    stream.waiting = rest.to_vec();
                    return full.map(drop);
                }
            }
            stream.position = entry.next;
            rest = behind;
        }
        buffer.resize(
            usize::try_from(part).unwrap_or(REFILL).clamp(LEAST, REFILL),
            0,
        );
        count = sys::read_directory(&handle.file, &mut buffer)?;
        if count == 0 {
            return Ok(());
        }
    }
}

/// The first `struct linux_dirent64`, and those behind it.
fn parse(bytes: &[u8]) -> Option<(Entry<'_>, &[u8])> {
    let field = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let len = u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?);
    let (record, behind) = bytes.split_at_checked(len.into())?;
    let entry = Entry {
        ino: field(0)?,
        next: field(8)?,
        kind: *record.get(18)?,
        name: CStr::from_bytes_until_nul(record.get(HOST_HEADER..)?).ok()?,
    };
    Some((entry, behind))
}
