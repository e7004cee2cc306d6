//! The server against a mock driver, without a guest.

mod device;
mod directories;
mod exports;
mod hostile;
mod limits;
mod linux;
mod operations;
mod random;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What a tree is, with the content of its files: but for inode numbers and the times in `times`.
pub(crate) fn snapshot(root: &Path, times: bool) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let metadata = path.symlink_metadata().expect("there");
            let kind = metadata.file_type();
            let content = if kind.is_file() {
                format!("{:?}", contents(&path))
            } else if kind.is_symlink() {
                format!("{:?}", std::fs::read_link(&path).expect("a link"))
            } else {
                String::new()
            };
            if kind.is_dir() {
                folders.push(path.clone());
            }
            let mut facts = format!(
                "{:o} {}:{} links {} {content}",
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                metadata.nlink()
            );
            if times {
                facts += &format!(
                    " {}.{} {}.{}",
                    metadata.mtime(),
                    metadata.mtime_nsec(),
                    metadata.ctime(),
                    metadata.ctime_nsec(),
                );
                if kind.is_file() {
                    facts += &format!(" {}.{}", metadata.atime(), metadata.atime_nsec());
                }
            }
            let name = path.strip_prefix(root).expect("below");
            found.insert(name.to_string_lossy().into_owned(), facts);
        }
    }
    found
}

/// A file's content, without a trace in its time of access.
fn contents(path: &Path) -> Vec<u8> {
    let mut content = Vec::new();
    let mut options = std::fs::OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOATIME);
    let mut file = options.read(true).open(path).expect("readable");
    std::io::Read::read_to_end(&mut file, &mut content).expect("readable");
    content
}

/// Descriptors of this process for what is in `folder`. Other tests have their own.
pub(crate) fn descriptors(folder: &Path) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .expect("proc")
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.starts_with(folder))
        .count()
}
