//! Reading directories: the host's entries as the guest's, with the host's
//! offsets as cookies.

use std::ffi::CStr;
use std::fs::File;
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
/// `NAME_MAX`.
const LONGEST_NAME: usize = 255;
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
        // A host's file system with longer names has no place here.
        if name.len() > LONGEST_NAME {
            return Err(Errno::NAMETOOLONG);
        }
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
        let mut record = [0; size_of::<Dirent>() + LONGEST_NAME.next_multiple_of(8)];
        record[..size_of::<Dirent>()].copy_from_slice(header.as_bytes());
        record[size_of::<Dirent>()..size_of::<Dirent>() + name.len()].copy_from_slice(name);
        out.bytes(&record[..plain])?;
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
    each: impl FnMut(&Entry<'_>) -> Result<bool, Errno>,
) -> Result<(), Errno> {
    let stream = handle.stream.as_ref().ok_or(Errno::NOTDIR)?;
    // Poisoned by a panic, it only lacks its position.
    let mut stream = stream.lock().unwrap_or_else(|poisoned| {
        let mut stream = poisoned.into_inner();
        stream.position = u64::MAX;
        stream.waiting = Vec::new();
        stream
    });
    stream.read(&handle.file, offset, part, each)
}

impl Stream {
    /// An error behind the first entry ends the answer and is met again by the next request: the guest must learn of
    /// the nodes that it has been given.
    fn read(
        &mut self,
        file: &File,
        offset: u64,
        part: u64,
        mut each: impl FnMut(&Entry<'_>) -> Result<bool, Errno>,
    ) -> Result<(), Errno> {
        // The beginning is always looked at anew.
        if self.position != offset || offset == 0 {
            self.waiting = Vec::new();
            self.position = u64::MAX;
            rustix::fs::seek(file, SeekFrom::Start(offset))?;
            self.position = offset;
        }
        let mut buffer = std::mem::take(&mut self.waiting);
        let mut count = buffer.len();
        let mut given = false;
        loop {
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let (entry, behind) = parse(rest).ok_or(Errno::IO)?;
                match each(&entry) {
                    Ok(true) => given = true,
                    full => {
                        self.waiting = rest.to_vec();
                        return if given { Ok(()) } else { full.map(drop) };
                    }
                }
                self.position = entry.next;
                rest = behind;
            }
            buffer.resize(
                usize::try_from(part).unwrap_or(REFILL).clamp(LEAST, REFILL),
                0,
            );
            count = match sys::read_directory(file, &mut buffer) {
                Err(_) if given => return Ok(()),
                read => read?,
            };
            if count == 0 {
                return Ok(());
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_behind_the_first_entry_waits_for_the_next_request() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let file = File::open(folder.path()).unwrap();
        let mut stream = Stream::default();
        let mut given = Vec::new();
        let mut next = 0;
        // `.`, `..` and one of the three; the fourth fails, twice.
        let mut request = |stream: &mut Stream, limit: usize| {
            stream.read(&file, next, REFILL as u64, |entry| {
                if given.len() == limit {
                    return Err(Errno::NAMETOOLONG);
                }
                given.push(entry.name.to_owned());
                next = entry.next;
                Ok(true)
            })
        };
        request(&mut stream, 3).expect("three entries");
        assert_eq!(request(&mut stream, 3), Err(Errno::NAMETOOLONG));
        request(&mut stream, 5).expect("the others");
        given.sort();
        assert_eq!(given, [c".", c"..", c"a", c"b", c"c"].map(CStr::to_owned));
    }
}
