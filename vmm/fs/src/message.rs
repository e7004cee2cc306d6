//! One request and its answer in a descriptor chain.

use std::ffi::{CStr, CString};
use std::mem::size_of;

use nacre_vmm::virtio::queue::{Buffers, Chain};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::abi::{InHeader, OutHeader};

/// Longest name of a file.
const NAME_MAX: usize = 255;

/// A chain that holds no request, or has no room for any answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// What a request says after its header.
pub(crate) struct Args<'m> {
    rest: Buffers<'m>,
}

impl<'m> Args<'m> {
    /// The next structure.
    pub fn get<T: FromBytes + IntoBytes>(&mut self) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.rest
            .read_exact(value.as_mut_bytes())
            .map_err(|_| Errno::INVAL)?;
        Ok(value)
    }

    /// Bytes left.
    pub fn len(&self) -> u64 {
        self.rest.len()
    }

    /// The next bytes, where they are.
    pub fn take(&mut self, count: u64) -> Buffers<'m> {
        self.rest.take(count)
    }

    /// All bytes left, of which there are at most `most`.
    pub fn rest(&mut self, most: usize) -> Result<Vec<u8>, Errno> {
        let len = usize::try_from(self.rest.len()).map_err(|_| Errno::NAMETOOLONG)?;
        if len > most {
            return Err(Errno::NAMETOOLONG);
        }
        let mut bytes = vec![0; len];
        self.rest.read_exact(&mut bytes).map_err(|_| Errno::INVAL)?;
        Ok(bytes)
    }

    /// The name that is the rest: one path component.
    pub fn name(&mut self) -> Result<CString, Errno> {
        let bytes = self.rest(NAME_MAX + 1)?;
        component(split(&bytes)?.0)
    }

    /// Two names, which are the rest.
    pub fn names(&mut self) -> Result<(CString, CString), Errno> {
        let bytes = self.rest(2 * (NAME_MAX + 1))?;
        let (one, rest) = split(&bytes)?;
        let (two, _) = split(rest)?;
        Ok((component(one)?, component(two)?))
    }
}

/// The bytes before the first zero, with it, and those behind.
pub(crate) fn split(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let first = CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::INVAL)?;
    Ok((first, &bytes[first.count_bytes() + 1..]))
}

/// The text if it is one path component that leads downwards.
pub(crate) fn component(name: &CStr) -> Result<CString, Errno> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
        _ => Ok(name.to_owned()),
    }
}

/// Where the answer goes. The header is written last.
pub(crate) struct Out<'m> {
    head: Buffers<'m>,
    body: Buffers<'m>,
    written: u64,
}

impl<'m> Out<'m> {
    /// Bytes of the body that there is room for.
    pub fn room(&self) -> u64 {
        self.body.len()
    }

    /// Whether an answer of so many bytes fits: asked before something is done that it must tell.
    pub fn wants(&self, bytes: usize) -> Result<(), Errno> {
        if self.body.len() < bytes as u64 {
            return Err(Errno::IO);
        }
        Ok(())
    }

    /// Adds a structure to the body.
    pub fn put<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<(), Errno> {
        self.bytes(value.as_bytes())
    }

    /// Adds bytes to the body.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        self.wants(bytes.len())?;
        self.written += self.body.write(bytes) as u64;
        Ok(())
    }

    /// The next bytes of the body, at most `count`, to be written where they are.
    pub fn take(&mut self, count: u64) -> Buffers<'m> {
        self.body.take(count)
    }

    /// So many bytes have been written into what was taken.
    pub fn add(&mut self, bytes: u64) {
        self.written += bytes;
    }

    /// Ends the answer; bytes written from the start of the chain's writable part.
    pub fn finish(mut self, unique: u64, result: Result<(), Errno>) -> u32 {
        let (len, error) = match result {
            Ok(()) => (self.written, 0),
            Err(error) => (0, -error.raw_os_error()),
        };
        // A body is at most some MiB.
        let len = (size_of::<OutHeader>() as u64 + len) as u32;
        let header = OutHeader { len, error, unique };
        self.head.write(header.as_bytes());
        len
    }
}

/// A request taken apart.
pub(crate) struct Opened<'m> {
    pub header: InHeader,
    /// An error where the header's length is not the chain's.
    pub args: Result<Args<'m>, Errno>,
    /// `None` where there is no room for an answer.
    pub out: Option<Out<'m>>,
}

/// Reads the header.
pub(crate) fn open(chain: Chain<'_>) -> Result<Opened<'_>, Malformed> {
    let Chain {
        mut readable,
        mut writable,
    } = chain;
    let mut header = InHeader::default();
    readable
        .read_exact(header.as_mut_bytes())
        .map_err(|_| Malformed)?;
    let said = u64::from(header.len);
    let args = match said.checked_sub(size_of::<InHeader>() as u64) {
        Some(len) if len <= readable.len() => Ok(Args {
            rest: readable.take(len),
        }),
        _ => Err(Errno::INVAL),
    };
    let size = size_of::<OutHeader>() as u64;
    let out = (writable.len() >= size).then(|| Out {
        head: writable.take(size),
        body: writable,
        written: 0,
    });
    Ok(Opened { header, args, out })
}
