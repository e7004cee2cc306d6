//! Extended attributes: as the host has them, but for those by which an
//! overlay on the host keeps its books.

use std::ffi::CStr;
use std::mem::size_of;

use rustix::fs::{XattrFlags, getxattr, getxattr_query, listxattr, removexattr, setxattr};
use rustix::io::Errno;

use crate::abi::{self, ROOT_ID};
use crate::message::{Args, Out, split};
use crate::worker::{Worker, path};

/// Largest value and largest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const SIZE_MAX: usize = 64 << 10;
/// Longest name with its zero (`XATTR_NAME_MAX`).
const NAME_BYTES: usize = 256;

/// Whether an attribute is the host's own: what is written there would be believed by an overlay that has this directory as
/// a layer.
fn is_private(name: &CStr) -> bool {
    name.to_bytes().starts_with(b"trusted.overlay.")
}

fn check(name: &CStr) -> Result<&CStr, Errno> {
    match name.count_bytes() {
        0 => Err(Errno::INVAL),
        len if len >= NAME_BYTES => Err(Errno::RANGE),
        _ => Ok(name),
    }
}

impl Worker {
    pub(crate) fn setxattr(&mut self, node: u64, args: &mut Args<'_>) -> Result<(), Errno> {
        let mut request = abi::SetxattrIn {
            size: args.get()?,
            flags: args.get()?,
            ..Default::default()
        };
        if self
            .core
            .setxattr_ext
            .load(std::sync::atomic::Ordering::SeqCst)
        {
            request.setxattr_flags = args.get()?;
            request.padding = args.get()?;
        }
        let size = usize::try_from(request.size).map_err(|_| Errno::TOOBIG)?;
        if size > SIZE_MAX {
            return Err(Errno::TOOBIG);
        }
        let bytes = args.rest(NAME_BYTES + SIZE_MAX)?;
        let (name, value) = split(&bytes)?;
        let name = check(name)?;
        let value = value.get(..size).ok_or(Errno::INVAL)?;
        let found = self.changeable(node)?;
        if is_private(name) {
            return Err(Errno::PERM);
        }
        let kill = request.setxattr_flags & abi::SETXATTR_KILL_SGID != 0;
        self.credentials.changing(kill, || Ok(()))?;
        let flags = XattrFlags::from_bits_retain(request.flags);
        setxattr(path(&found), name, value, flags)
    }

    pub(crate) fn removexattr(&mut self, node: u64, args: &mut Args<'_>) -> Result<(), Errno> {
        let bytes = args.rest(NAME_BYTES)?;
        let name = check(split(&bytes)?.0)?;
        let found = self.changeable(node)?;
        if is_private(name) {
            return Err(Errno::PERM);
        }
        removexattr(path(&found), name)
    }

    pub(crate) fn getxattr(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::GetxattrIn = args.get()?;
        let bytes = args.rest(NAME_BYTES)?;
        let name = check(split(&bytes)?.0)?;
        if node == ROOT_ID {
            return Err(Errno::NODATA);
        }
        let found = self.core.nodes.find(node)?;
        if is_private(name) {
            return Err(Errno::NODATA);
        }
        if request.size == 0 {
            out.wants(size_of::<abi::GetxattrOut>())?;
            let size = getxattr_query(path(&found), name)?;
            return out.put(&abi::GetxattrOut {
                size: size as u32,
                padding: 0,
            });
        }
        let mut value = vec![0; (request.size as usize).min(SIZE_MAX)];
        let len = getxattr(path(&found), name, &mut value[..])?;
        value.truncate(len);
        fits(&value, request.size, out)?;
        out.bytes(&value)
    }

    pub(crate) fn listxattr(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::GetxattrIn = args.get()?;
        let list = if node == ROOT_ID {
            Vec::new()
        } else {
            let found = self.core.nodes.find(node)?;
            let mut list = vec![0; SIZE_MAX];
            let len = listxattr(path(&found), &mut list[..])?;
            public(&list[..len])
        };
        if request.size == 0 {
            return out.put(&abi::GetxattrOut {
                size: list.len() as u32,
                padding: 0,
            });
        }
        fits(&list, request.size, out)?;
        out.bytes(&list)
    }
}

/// Whether the answer is neither longer than was asked for nor than there is room.
fn fits(bytes: &[u8], asked: u32, out: &Out<'_>) -> Result<(), Errno> {
    if bytes.len() as u64 > u64::from(asked).min(out.room()) {
        return Err(Errno::RANGE);
    }
    Ok(())
}

/// The names of a list without those that are the host's own.
fn public(list: &[u8]) -> Vec<u8> {
    list.split_inclusive(|byte| *byte == 0)
        .filter(|name| CStr::from_bytes_with_nul(name).is_ok_and(|name| !is_private(name)))
        .flatten()
        .copied()
        .collect()
}
