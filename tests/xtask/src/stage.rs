//! A file tree for the outer guest, put together by name and made into an ext4 image that is cached by content.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::paths;
use crate::run::{self, step};

enum Entry {
    File { source: PathBuf, mode: u32 },
    Bytes { data: Vec<u8>, mode: u32 },
    Link(PathBuf),
    Dir(u32),
}

/// The tree: absolute paths in the guest, with `/bin`, `/sbin`, `/lib` and `/lib64` merged into `/usr`.
#[derive(Default)]
pub struct Stage {
    entries: BTreeMap<PathBuf, Entry>,
}

impl Stage {
    /// A file with the source's mode.
    pub fn file(&mut self, source: &Path, target: impl AsRef<Path>) -> Result<()> {
        let source = source
            .canonicalize()
            .with_context(|| format!("staging {}", source.display()))?;
        let mode = fs::metadata(&source)?.mode() & 0o7777;
        self.put(target.as_ref(), Entry::File { source, mode });
        Ok(())
    }

    /// A file with these contents.
    pub fn bytes(&mut self, target: impl AsRef<Path>, mode: u32, data: impl Into<Vec<u8>>) {
        self.put(
            target.as_ref(),
            Entry::Bytes {
                data: data.into(),
                mode,
            },
        );
    }

    /// A symbolic link.
    pub fn link(&mut self, target: impl AsRef<Path>, to: impl Into<PathBuf>) {
        self.put(target.as_ref(), Entry::Link(to.into()));
    }

    /// An empty folder.
    pub fn dir(&mut self, target: impl AsRef<Path>, mode: u32) {
        self.put(target.as_ref(), Entry::Dir(mode));
    }

    /// A file, or a folder with all below it; programs among them bring their libraries.
    pub fn tree(&mut self, source: &Path, target: &Path) -> Result<()> {
        self.each(source, target, &|stage, source, target| {
            stage.program(source, target, &[])
        })
    }

    /// The same without libraries of this machine.
    pub fn tree_alone(&mut self, source: &Path, target: &Path) -> Result<()> {
        self.each(source, target, &|stage, source, target| {
            stage.file(source, target)
        })
    }

    fn each(
        &mut self,
        source: &Path,
        target: &Path,
        file: &dyn Fn(&mut Self, &Path, &Path) -> Result<()>,
    ) -> Result<()> {
        let metadata = fs::symlink_metadata(source)
            .with_context(|| format!("staging {}", source.display()))?;
        if metadata.is_dir() {
            self.dir(target, metadata.mode() & 0o7777);
            for entry in fs::read_dir(source)? {
                let entry = entry?;
                self.each(&entry.path(), &target.join(entry.file_name()), file)?;
            }
            Ok(())
        } else if metadata.is_symlink() {
            self.link(target, fs::read_link(source)?);
            Ok(())
        } else {
            file(self, source, target)
        }
    }

    /// A file and, if it is a dynamically linked program or library, all shared libraries that it needs, at the places where the
    /// machine has them. `libraries` are folders to look in besides the machine's own.
    pub fn program(
        &mut self,
        source: &Path,
        target: impl AsRef<Path>,
        libraries: &[PathBuf],
    ) -> Result<()> {
        self.file(source, target)?;
        for library in shared_libraries(source, libraries)? {
            let staged = match libraries.iter().any(|folder| library.starts_with(folder)) {
                true => Path::new("/usr/lib/x86_64-linux-gnu")
                    .join(library.file_name().context("library without a name")?),
                false => library.clone(),
            };
            self.file(&library, staged)?;
        }
        Ok(())
    }

    fn put(&mut self, target: &Path, entry: Entry) {
        self.entries.insert(merged(target), entry);
    }

    /// The image of this tree, made unless one of the same content is cached.
    pub fn ext4(&self, label: &str) -> Result<PathBuf> {
        let folder = paths::testbed("images");
        fs::create_dir_all(&folder)?;
        let (digest, size) = self.digest()?;
        let image = folder.join(format!("{label}-{}.img", &digest[..16]));
        if image.exists() {
            // Touched, so that the clean-up below sees it as used.
            fs::File::options()
                .append(true)
                .open(&image)?
                .set_modified(std::time::SystemTime::now())?;
            return Ok(image);
        }
        step(format!(
            "making the {label} disk: {} files, {} MiB",
            self.entries.len(),
            size >> 20
        ));
        let scratch = tempfile::tempdir_in(&folder)?;
        let root = scratch.path().join("root");
        fs::create_dir(&root)?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755))?;
        self.write(&root)?;
        let file = scratch.path().join("image");
        let mebibytes = (size >> 20) + (size >> 24) + self.entries.len() as u64 / 128 + 24;
        let mut command = Command::new("mke2fs");
        command.args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-m",
            "0",
            "-L",
            label,
            "-E",
            "lazy_itable_init=1,nodiscard",
            "-O",
            "^has_journal",
        ]);
        command
            .arg("-N")
            .arg((self.entries.len() * 2 + 512).to_string())
            .arg("-d")
            .arg(&root);
        run::output(command.arg(&file).arg(format!("{mebibytes}m")))?;
        fs::rename(&file, &image)?;
        forget_old(&folder, label)?;
        Ok(image)
    }

    fn digest(&self) -> Result<(String, u64)> {
        let mut hash = Sha256::new();
        let mut size = 0;
        for (target, entry) in &self.entries {
            hash.update(target.as_os_str().as_encoded_bytes());
            match entry {
                Entry::File { source, mode } => {
                    let metadata = fs::metadata(source)?;
                    size += metadata.len().next_multiple_of(4096);
                    hash.update(source.as_os_str().as_encoded_bytes());
                    for number in [
                        i64::from(*mode),
                        metadata.len() as i64,
                        metadata.mtime(),
                        metadata.mtime_nsec(),
                    ] {
                        hash.update(number.to_le_bytes());
                    }
                }
                Entry::Bytes { data, mode } => {
                    size += (data.len() as u64).next_multiple_of(4096);
                    hash.update(mode.to_le_bytes());
                    hash.update(Sha256::digest(data));
                }
                Entry::Link(to) => hash.update(to.as_os_str().as_encoded_bytes()),
                Entry::Dir(mode) => hash.update(mode.to_le_bytes()),
            }
            hash.update([0]);
        }
        Ok((format!("{:x}", hash.finalize()), size))
    }

    fn write(&self, root: &Path) -> Result<()> {
        let own = paths::target();
        for (target, entry) in &self.entries {
            let path = root.join(target.strip_prefix("/")?);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            match entry {
                Entry::File { source, mode } => {
                    // What the build made is linked, not copied; what the machine owns is never linked to.
                    if !source.starts_with(&own) || fs::hard_link(source, &path).is_err() {
                        fs::copy(source, &path)
                            .with_context(|| format!("copying {}", source.display()))?;
                        fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
                    }
                }
                Entry::Bytes { data, mode } => {
                    fs::write(&path, data)?;
                    fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
                }
                Entry::Link(to) => {
                    symlink(to, &path).with_context(|| format!("linking {}", target.display()))?;
                }
                Entry::Dir(mode) => {
                    fs::create_dir_all(&path)?;
                    fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
                }
            }
        }
        for (link, to) in [
            ("bin", "usr/bin"),
            ("sbin", "usr/sbin"),
            ("lib", "usr/lib"),
            ("lib64", "usr/lib64"),
        ] {
            fs::create_dir_all(root.join(to))?;
            symlink(to, root.join(link))?;
        }
        Ok(())
    }
}

/// Keeps the four images of a kind that were used last.
fn forget_old(folder: &Path, label: &str) -> Result<()> {
    let mut images = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&format!("{label}-")) {
            images.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    images.sort();
    for (_, path) in images.iter().rev().skip(4) {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn merged(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(part) => clean.push(part),
            Component::ParentDir => drop(clean.pop()),
            _ => {}
        }
    }
    for top in ["bin", "sbin", "lib", "lib64"] {
        if let Ok(rest) = clean.strip_prefix(Path::new("/").join(top)) {
            return Path::new("/usr").join(top).join(rest);
        }
    }
    clean
}

/// The libraries and the loader that a file needs, by the loader's own account; nothing for what is no dynamic ELF file.
fn shared_libraries(program: &Path, folders: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut magic = [0u8; 4];
    if fs::File::open(program)?.read_exact(&mut magic).is_err() || &magic != b"\x7fELF" {
        return Ok(Vec::new());
    }
    let search = std::env::join_paths(folders)?;
    let mut command = Command::new("ldd");
    command.arg(program).env("LC_ALL", "C");
    if !folders.is_empty() {
        command.env("LD_LIBRARY_PATH", search);
    }
    let output = command.output().context("cannot start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        // "not a dynamic executable": a static program, a kernel, an object.
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.ends_with("not found") {
            bail!(
                "{} needs a library that this machine lacks: {line}",
                program.display()
            );
        }
        let path = line
            .split_once("=> ")
            .map_or(line, |(_, path)| path)
            .split(" (")
            .next()
            .unwrap_or_default();
        if path.starts_with('/') {
            found.push(PathBuf::from(path));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_merged_into_usr() {
        for (given, expected) in [
            ("/lib64/ld.so", "/usr/lib64/ld.so"),
            ("/bin", "/usr/bin"),
            ("/usr/../etc/x", "/etc/x"),
            ("/library/x", "/library/x"),
        ] {
            assert_eq!(merged(Path::new(given)), Path::new(expected));
        }
    }

    #[test]
    fn the_digest_tells_trees_apart() {
        let of = |path: &str, mode, data: &str| {
            let mut stage = Stage::default();
            stage.bytes(path, mode, data);
            stage.digest().unwrap().0
        };
        let one = of("/a", 0o644, "x");
        assert_eq!(one, of("/a", 0o644, "x"));
        for other in [
            of("/b", 0o644, "x"),
            of("/a", 0o600, "x"),
            of("/a", 0o644, "y"),
        ] {
            assert_ne!(one, other);
        }
    }
}
