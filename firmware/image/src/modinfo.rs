//! Reads a module's file: unpacks it, and finds what its `.modinfo` section says.
//!
//! Dependencies are taken from here and not from `modules.dep`, which a kernel
//! package does not bring: `depmod` makes it from the same section when a
//! package is installed.

use std::io::Read;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// The largest module that is unpacked.
const MAX_MODULE: u64 = 256 << 20;

/// The endings of a module's file.
const ENDINGS: [&str; 4] = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];

/// How the file of a signed module ends.
const SIGNED: &[u8] = b"~Module signature appended~\n";

/// Bytes of the kernel's `struct module_signature` before that; the last four are the signature's length, big-endian.
const SIGNATURE_HEADER: usize = 12;

/// What a module says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ModuleInfo {
    pub depends: Vec<String>,
    pub soft_pre: Vec<String>,
    pub soft_post: Vec<String>,
    pub aliases: Vec<String>,
    pub version: Option<String>,
    pub vermagic: String,
}

/// Why a module's file could not be used.
#[derive(Debug, Error)]
pub enum ModuleFileError {
    /// It could not be read or unpacked.
    #[error("reading the module {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system or the decoder says.
        #[source]
        source: std::io::Error,
    },
    /// It is no module.
    #[error("the module {} {why}", path.display())]
    NotAModule {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// The module's name if the file is one: its base name with underscores.
pub(crate) fn module_name(file_name: &str) -> Option<String> {
    ENDINGS
        .iter()
        .find_map(|ending| file_name.strip_suffix(ending))
        .filter(|name| !name.is_empty())
        .map(normal_name)
}

/// Modules are the same to Linux with hyphens and with underscores.
pub(crate) fn normal_name(name: &str) -> String {
    name.replace('-', "_")
}

/// The module's file, unpacked.
pub(crate) fn read_module(path: &Path) -> Result<Vec<u8>, ModuleFileError> {
    let read = || -> std::io::Result<Vec<u8>> {
        let file = std::io::BufReader::new(std::fs::File::open(path)?);
        let ending = path
            .extension()
            .and_then(|ending| ending.to_str())
            .unwrap_or_default();
        let reader: Box<dyn Read> = match ending {
            "xz" => Box::new(liblzma::bufread::XzDecoder::new(file)),
            "zst" => Box::new(zstd::stream::read::Decoder::with_buffer(file)?),
            "gz" => Box::new(flate2::bufread::GzDecoder::new(file)),
            _ => Box::new(file),
        };
        let mut content = Vec::new();
        reader.take(MAX_MODULE).read_to_end(&mut content)?;
        Ok(content)
    };
    read().map_err(|source| ModuleFileError::Read {
        path: path.to_owned(),
        source,
    })
}

/// The module's content without the signature at its end, if it has one.
pub(crate) fn without_signature(content: &[u8]) -> &[u8] {
    let cut = || {
        let signed = content.strip_suffix(SIGNED)?;
        let (rest, length) = signed.split_last_chunk()?;
        let behind = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let behind = behind.checked_add(SIGNATURE_HEADER - length.len())?;
        rest.get(..rest.len().checked_sub(behind)?)
    };
    cut().unwrap_or(content)
}

/// What the `.modinfo` section of a module's content says.
pub(crate) fn parse(path: &Path, content: &[u8]) -> Result<ModuleInfo, ModuleFileError> {
    let not = |why| ModuleFileError::NotAModule {
        path: path.to_owned(),
        why,
    };
    let file = elf::ElfBytes::<elf::endian::AnyEndian>::minimal_parse(content)
        .map_err(|_| not("is not an ELF file"))?;
    let header = file
        .section_header_by_name(".modinfo")
        .ok()
        .flatten()
        .ok_or_else(|| not("has no .modinfo section"))?;
    let (section, _) = file
        .section_data(&header)
        .map_err(|_| not("has a broken .modinfo section"))?;
    let mut info = ModuleInfo::default();
    for entry in section.split(|&byte| byte == 0) {
        let entry = String::from_utf8_lossy(entry);
        let Some((key, value)) = entry.split_once('=') else {
            continue;
        };
        match key {
            "depends" => info.depends.extend(
                value
                    .split(',')
                    .map(str::trim)
                    .filter(|name| !name.is_empty())
                    .map(normal_name),
            ),
            "softdep" => add_softdep(&mut info, value),
            "alias" => info.aliases.push(normal_name(value)),
            "version" => info.version = Some(value.to_owned()),
            "vermagic" => info.vermagic = value.trim().to_owned(),
            _ => {}
        }
    }
    Ok(info)
}

/// `pre: NAME… post: NAME…`, each part optional.
fn add_softdep(info: &mut ModuleInfo, value: &str) {
    let mut post = false;
    for word in value.split_whitespace() {
        match word {
            "pre:" => post = false,
            "post:" => post = true,
            name if post => info.soft_post.push(normal_name(name)),
            name => info.soft_pre.push(normal_name(name)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;

    /// An ELF file with nothing but a `.modinfo` section of these entries.
    pub(crate) fn made_up_module(entries: &[(&str, &str)]) -> Vec<u8> {
        let mut modinfo = Vec::new();
        for (key, value) in entries {
            modinfo.extend_from_slice(format!("{key}={value}\0").as_bytes());
        }
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut file = vec![0; 64];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        file[16] = 1;
        file[18] = 62;
        file[20] = 1;
        file[52] = 64;
        file.extend_from_slice(&modinfo);
        file.extend_from_slice(names);
        let table = file.len() as u64;
        file[40..48].copy_from_slice(&table.to_le_bytes());
        file[58] = 64;
        file[60] = 3;
        file[62] = 2;
        let mut section = |name: u32, kind: u32, offset: usize, size: usize| {
            file.extend_from_slice(&name.to_le_bytes());
            file.extend_from_slice(&kind.to_le_bytes());
            file.extend_from_slice(&[0; 16]);
            file.extend_from_slice(&(offset as u64).to_le_bytes());
            file.extend_from_slice(&(size as u64).to_le_bytes());
            file.extend_from_slice(&[0; 24]);
        };
        section(0, 0, 0, 0);
        section(1, 1, 64, modinfo.len());
        section(10, 3, 64 + modinfo.len(), names.len());
        file
    }

    #[test]
    fn modinfo_gives_dependencies_and_aliases() {
        let module = made_up_module(&[
            ("version", "1.2"),
            ("alias", "crypto-crc32c"),
            ("softdep", "pre: crypto-crc32c a post: b"),
            ("depends", "virtio_ring,vsock-core"),
            ("vermagic", "6.1.0 SMP "),
        ]);
        let info = parse(Path::new("x.ko"), &module).expect("a module");
        assert_eq!(info.depends, ["virtio_ring", "vsock_core"]);
        assert_eq!(info.soft_pre, ["crypto_crc32c", "a"]);
        assert_eq!(info.soft_post, ["b"]);
        assert_eq!(info.aliases, ["crypto_crc32c"]);
        assert_eq!(info.version.as_deref(), Some("1.2"));
        assert_eq!(info.vermagic, "6.1.0 SMP");
    }

    #[test]
    fn a_signature_is_cut_off_and_nothing_else() {
        let module = made_up_module(&[("name", "a")]);
        let sign = |length: u32| {
            let mut signed = module.clone();
            signed.extend_from_slice(&[7; 5]);
            signed.extend_from_slice(&[0; SIGNATURE_HEADER - 4]);
            signed.extend_from_slice(&length.to_be_bytes());
            signed.extend_from_slice(SIGNED);
            signed
        };
        assert_eq!(without_signature(&sign(5)), module);
        assert_eq!(without_signature(&module), module);
        assert_eq!(without_signature(SIGNED), SIGNED);
        for length in [1 << 20, u32::MAX] {
            assert_eq!(without_signature(&sign(length)), sign(length));
        }
    }

    #[test]
    fn what_is_no_module_is_refused_by_path() {
        for content in [&b"no ELF"[..], &made_up_module(&[])[..64]] {
            let error = parse(Path::new("/m/x.ko"), content).expect_err("no module");
            assert!(error.to_string().contains("/m/x.ko"), "{error}");
        }
    }

    #[test]
    fn names_come_from_files_with_any_ending() {
        for (file, name) in [
            ("a-b.ko", Some("a_b")),
            ("a.ko.xz", Some("a")),
            ("a.ko.zst", Some("a")),
            ("a.ko.gz", Some("a")),
            (".ko", None),
            ("modules.builtin", None),
            ("a.ko.bz2", None),
        ] {
            assert_eq!(module_name(file).as_deref(), name, "{file}");
        }
    }

    #[test]
    fn packed_modules_are_unpacked() {
        let folder = tempfile::tempdir().expect("a folder");
        let module = made_up_module(&[("depends", "x")]);
        let xz = {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 6);
            encoder.write_all(&module).expect("in memory");
            encoder.finish().expect("in memory")
        };
        let gz = {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&module).expect("in memory");
            encoder.finish().expect("in memory")
        };
        let zst = zstd::encode_all(&module[..], 3).expect("in memory");
        for (ending, packed) in [
            ("ko", module.clone()),
            ("ko.xz", xz),
            ("ko.gz", gz),
            ("ko.zst", zst),
        ] {
            let path = folder.path().join(format!("m.{ending}"));
            std::fs::write(&path, packed).expect("a file");
            assert_eq!(read_module(&path).expect("unpacks"), module, "{ending}");
        }
        let cut = folder.path().join("cut.ko.xz");
        std::fs::write(&cut, b"\xfd7zXZ\0").expect("a file");
        assert!(read_module(&cut).is_err());
    }
}
