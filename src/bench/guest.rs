//! What the guests of a run booted: which files, of which release and content.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Hexadecimal digits of a digest that are kept: enough to tell two builds apart.
const DIGITS: usize = 16;

/// What the guests ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct GuestKernel {
    pub file: PathBuf,
    /// Its `uname -r`, where that is known.
    pub release: Option<String>,
    /// The beginning of its SHA-256; none if it cannot be read, and in files of before.
    #[serde(default)]
    pub sha256: Option<String>,
    /// What was booted with it, unless that was nacre-bench's own.
    #[serde(default)]
    pub initrd: Option<Initrd>,
}

/// An initrd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Initrd {
    pub file: PathBuf,
    /// As of the kernel.
    pub sha256: Option<String>,
}

impl GuestKernel {
    /// The kernel in this file, which says its own release, and an initrd.
    pub fn of(file: &Path, initrd: Option<&Path>) -> Self {
        let image = std::fs::read(file).ok();
        Self {
            file: file.to_owned(),
            release: image.as_deref().and_then(release_of),
            sha256: image.as_deref().map(digest),
            initrd: initrd.map(|file| Initrd {
                file: file.to_owned(),
                sha256: digest_of(file),
            }),
        }
    }
}

/// The beginning of a file's SHA-256; None if it cannot be read.
pub(super) fn digest_of(file: &Path) -> Option<String> {
    std::fs::read(file).ok().map(|bytes| digest(&bytes))
}

fn digest(bytes: &[u8]) -> String {
    let mut text = format!("{:x}", Sha256::digest(bytes));
    text.truncate(DIGITS);
    text
}

/// For people.
impl fmt::Display for GuestKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let release = self.release.as_deref().unwrap_or("of an unknown release");
        write!(f, "Linux {release}, from {}", self.file.display())?;
        write_digest(f, self.sha256.as_deref())?;
        if let Some(initrd) = &self.initrd {
            write!(f, ", with {}", initrd.file.display())?;
            write_digest(f, initrd.sha256.as_deref())?;
        }
        Ok(())
    }
}

fn write_digest(f: &mut fmt::Formatter<'_>, digest: Option<&str>) -> fmt::Result {
    digest.map_or(Ok(()), |digest| write!(f, " (SHA-256 {digest}…)"))
}

/// The release in a kernel's image: of an ELF file from its banner, of a bzImage from where the boot protocol has it
/// (`kernel_version` of the setup header, Documentation/arch/x86/boot.rst).
fn release_of(image: &[u8]) -> Option<String> {
    let rest = if image.get(0x202..0x206) == Some(b"HdrS") {
        let at: [u8; 2] = image.get(0x20e..0x210)?.try_into().ok()?;
        image.get(usize::from(u16::from_le_bytes(at)) + 0x200..)?
    } else {
        let banner = b"Linux version ";
        let mut found = memchr::memmem::find_iter(image, banner).map(|at| at + banner.len());
        let at = found.find(|at| image.get(*at).is_some_and(u8::is_ascii_digit))?;
        image.get(at..)?
    };
    let end = rest
        .iter()
        .take(64)
        .position(|byte| matches!(byte, b' ' | 0))?;
    let text = std::str::from_utf8(rest.get(..end)?).ok()?;
    Some(text.to_owned()).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_says_its_release() {
        let mut bz_image = vec![0; 0x400];
        bz_image[0x202..0x206].copy_from_slice(b"HdrS");
        bz_image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        bz_image[0x300..0x30c].copy_from_slice(b"6.1.0 (me) #");
        let elf = b"\x7fELF..Linux version of \0..Linux version 6.12.48-cloud (gcc)";
        for (image, expected) in [
            (&bz_image[..], Some("6.1.0")),
            (elf, Some("6.12.48-cloud")),
            (b"\x7fELF", None),
            (b"Linux version 6", None),
        ] {
            assert_eq!(release_of(image).as_deref(), expected);
        }
    }

    #[test]
    fn the_same_content_is_the_same_wherever_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let file = folder.path().join(name);
            std::fs::write(&file, text).unwrap();
            file
        };
        let kernel = write("vmlinux", "abc");
        let initrd = write("initrd", "");
        let guest = GuestKernel::of(&kernel, Some(&initrd));
        // The examples of FIPS 180.
        assert_eq!(guest.sha256.as_deref(), Some("ba7816bf8f01cfea"));
        let text = guest.to_string();
        for words in ["ba7816bf8f01cfea", "initrd (SHA-256 e3b0c44298fc1c14"] {
            assert!(text.contains(words), "{words} in {text}");
        }
        let none = GuestKernel::of(Path::new("/nowhere/vmlinux"), None);
        assert_eq!((none.sha256, none.initrd), (None, None));
        let before = r#"{"file":"/k","release":"6.1"}"#;
        let before: GuestKernel = serde_json::from_str(before).unwrap();
        assert_eq!(before.sha256, None);
    }
}
