//! Makes what a guest boots from: `vmlinux`, an initrd that holds the agent and
//! the modules that the kernel needs, and a manifest of both.
//!
//! The kernel comes from a distribution's package, which is unpacked and not
//! installed, or from a vmlinuz and a modules folder. [`make`] caches by
//! content: the same inputs give the same folder, and a second call does
//! nothing. Where packages come from is not known here.

#![forbid(unsafe_code)]

mod initrd;
mod manifest;
mod modinfo;
mod modules;
mod source;
mod vmlinux;

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use thiserror::Error;

pub use initrd::InitrdError;
pub use manifest::{FileEntry, Group, KernelEntry, Manifest, ModuleEntry};
pub use modinfo::ModuleFileError;
pub use modules::ModulesError;
use modules::Signatures;
pub use source::{KernelSource, SourceError};

/// Version of what is made: goes into the cache's key and the manifest, so that
/// a change of this crate's output makes a new image.
pub const FORMAT: u32 = 3;

/// What to make an image of.
#[derive(Debug, Clone)]
pub struct Request {
    /// Where the kernel and its modules are.
    pub source: KernelSource,
    /// The agent's static binary, which becomes `/init`.
    pub agent: PathBuf,
    /// Names of modules beyond the usual ones; each is necessary.
    pub modules: Vec<String>,
    /// Leave the signatures on the modules. They are left too if the configuration beside the kernel says that it loads no module
    /// without one.
    pub keep_signatures: bool,
    /// The folder that gets `DIGEST/` and the symlink `current`.
    pub out: PathBuf,
}

/// An image that is there.
#[derive(Debug, Clone)]
pub struct Image {
    /// The folder with `vmlinux`, `initrd` and `manifest.json`.
    pub dir: PathBuf,
    /// What the manifest says.
    pub manifest: Manifest,
    /// Whether it was there already.
    pub cached: bool,
}

/// Why an image could not be made.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A file or folder could not be read or written.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done, as "reading".
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The kernel's source is not usable.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The modules do not give what is needed.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The initrd could not be written.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// The agent's binary could not run in the guest.
    #[error("the agent {} cannot be the guest's init: {why}", path.display())]
    Agent {
        /// The binary.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The manifest could not be written as JSON.
    #[error("writing the manifest")]
    Manifest(#[source] serde_json::Error),
}

/// Makes the image, or finds it made, and points `current` at it.
///
/// # Errors
///
/// If an input is missing or not usable, a necessary module is neither in the
/// folder nor built in, or the output cannot be written. Nothing half made is
/// left in place.
pub fn make(request: &Request) -> Result<Image, ImageError> {
    let agent = read(&request.agent)?;
    check_agent(&request.agent, &agent)?;
    let digest = inputs_digest(request, &agent)?;
    let dir = request.out.join(&digest);
    if let Some(manifest) = made_already(&dir) {
        point_current_at(&request.out, &digest)?;
        return Ok(Image {
            dir,
            manifest,
            cached: true,
        });
    }

    fs::create_dir_all(&request.out).map_err(io("making", &request.out))?;
    let unfinished = tempfile::Builder::new()
        .prefix(".unfinished-")
        .tempdir_in(&request.out)
        .map_err(io("making a folder in", &request.out))?;
    let manifest = make_in(unfinished.path(), request, &agent)?;

    // What is left of an image that is not whole would be in the way of the rename.
    if dir.exists() && made_already(&dir).is_none() {
        fs::remove_dir_all(&dir).map_err(io("removing the broken image", &dir))?;
    }
    let unfinished = unfinished.keep();
    if let Err(error) = fs::rename(&unfinished, &dir) {
        let _ = fs::remove_dir_all(&unfinished);
        // Someone else may have made the same at the same time.
        if made_already(&dir).is_none() {
            return Err(io("renaming the finished image to", &dir)(error));
        }
    }
    point_current_at(&request.out, &digest)?;
    Ok(Image {
        dir,
        manifest,
        cached: false,
    })
}

fn make_in(dir: &Path, request: &Request, agent: &[u8]) -> Result<Manifest, ImageError> {
    use std::os::unix::fs::PermissionsExt;

    let kernel = source::open(&request.source)?;
    let signatures = match request.keep_signatures || kernel.insists_on_signatures {
        true => Signatures::Kept,
        false => Signatures::Removed,
    };
    let plan = modules::plan(&kernel.modules, &request.modules, signatures)?;
    let initrd = initrd::build(agent, &plan.modules)?;
    let manifest = Manifest {
        format: FORMAT,
        kernel: KernelEntry {
            release: kernel.release,
            version: kernel.version,
            vmlinux: FileEntry::of(&kernel.vmlinux),
        },
        initrd: FileEntry::of(&initrd),
        agent: FileEntry::of(agent),
        signatures_kept: signatures == Signatures::Kept,
        modules: plan.modules.iter().map(ModuleEntry::of).collect(),
        built_in: plan.built_in,
        missing: plan.missing,
    };
    let json = serde_json::to_vec_pretty(&manifest).map_err(ImageError::Manifest)?;
    for (name, content) in [
        ("vmlinux", &kernel.vmlinux),
        ("initrd", &initrd),
        ("manifest.json", &json),
    ] {
        let path = dir.join(name);
        fs::write(&path, content).map_err(io("writing", &path))?;
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
        .map_err(io("setting the mode of", dir))?;
    Ok(manifest)
}

/// The manifest of a whole image: one whose files have the lengths that it says.
fn made_already(dir: &Path) -> Option<Manifest> {
    let manifest: Manifest =
        serde_json::from_slice(&fs::read(dir.join("manifest.json")).ok()?).ok()?;
    let whole = manifest.format == FORMAT
        && [
            ("vmlinux", &manifest.kernel.vmlinux),
            ("initrd", &manifest.initrd),
        ]
        .iter()
        .all(|(name, entry)| {
            fs::metadata(dir.join(name)).is_ok_and(|file| file.len() == entry.size)
        });
    whole.then_some(manifest)
}

/// Replaces the symlink in one step, so that it never names nothing.
fn point_current_at(out: &Path, digest: &str) -> Result<(), ImageError> {
    let current = out.join("current");
    if fs::read_link(&current).is_ok_and(|target| target == Path::new(digest)) {
        return Ok(());
    }
    let new = out.join(format!(".current-{}", std::process::id()));
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(digest, &new).map_err(io("making the symlink", &new))?;
    fs::rename(&new, &current).map_err(io("renaming to", &current))
}

/// The agent is PID 1 of a system without any library in it.
fn check_agent(path: &Path, agent: &[u8]) -> Result<(), ImageError> {
    let refuse = |why| {
        Err(ImageError::Agent {
            path: path.to_owned(),
            why,
        })
    };
    let Ok(file) = elf::ElfBytes::<elf::endian::AnyEndian>::minimal_parse(agent) else {
        return refuse("it is not an ELF file");
    };
    if file.ehdr.e_machine != elf::abi::EM_X86_64 {
        return refuse("it is not built for x86_64");
    }
    let interpreter = file.segments().is_some_and(|all| {
        all.iter()
            .any(|header| header.p_type == elf::abi::PT_INTERP)
    });
    if interpreter {
        return refuse("it is not static, and the initrd has no libraries");
    }
    Ok(())
}

/// The cache's key: everything that the output depends on.
fn inputs_digest(request: &Request, agent: &[u8]) -> Result<String, ImageError> {
    let mut hash = Sha256::new();
    hash.update(format!("nacre image {FORMAT}\n"));
    let mut part = |kind: &str, name: &str, content: &[u8]| {
        hash.update(format!("{kind} {} {name} {}\n", name.len(), content.len()));
        hash.update(content);
    };
    part("agent", "", agent);
    let mut modules = request.modules.clone();
    modules.sort();
    modules.dedup();
    for module in &modules {
        part("module", module, &[]);
    }
    if request.keep_signatures {
        part("signatures", "kept", &[]);
    }
    for file in source::inputs(&request.source)? {
        part("file", &file.name, &read(&file.path)?);
    }
    let mut text = hex(&hash.finalize());
    text.truncate(32);
    Ok(text)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    fs::read(path).map_err(io("reading", path))
}

fn io<'a>(action: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> ImageError + 'a {
    move |source| ImageError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modinfo::tests::made_up_module;

    /// The smallest ELF file that could be an agent, or a kernel.
    fn static_elf() -> Vec<u8> {
        let mut file = vec![0; 64];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        file[16] = 2;
        file[18] = 62;
        file[20] = 1;
        file[52] = 64;
        file[54] = 56;
        file[58] = 64;
        file
    }

    fn request(root: &Path) -> Request {
        let modules = root.join("6.1.0-test");
        let kernel = modules.join("kernel/drivers");
        fs::create_dir_all(&kernel).expect("a folder");
        fs::write(modules.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").expect("a file");
        for (name, depends) in [
            ("virtio_mmio", "virtio"),
            ("virtio", ""),
            ("virtio_blk", "virtio"),
            ("vmw_vsock_virtio_transport", "virtio"),
            ("overlay", ""),
            ("virtiofs", "virtio"),
        ] {
            let module = made_up_module(&[("name", name), ("depends", depends)]);
            fs::write(kernel.join(format!("{name}.ko")), module).expect("a file");
        }
        let vmlinux = root.join("vmlinux");
        fs::write(&vmlinux, static_elf()).expect("a file");
        let agent = root.join("agent");
        fs::write(&agent, static_elf()).expect("a file");
        Request {
            source: KernelSource::Files {
                kernel: vmlinux,
                modules,
            },
            agent,
            modules: Vec::new(),
            keep_signatures: false,
            out: root.join("out"),
        }
    }

    #[test]
    fn a_second_call_with_the_same_inputs_does_nothing() {
        let root = tempfile::tempdir().expect("a folder");
        let request = request(root.path());
        let first = make(&request).expect("an image");
        assert!(!first.cached);
        assert_eq!(first.manifest.kernel.release, "6.1.0-test");
        assert_eq!(first.manifest.built_in, ["ext4"]);
        let again = make(&request).expect("the same image");
        assert!(again.cached);
        assert_eq!(again.dir, first.dir);
        assert_eq!(
            fs::canonicalize(request.out.join("current")).expect("a symlink"),
            fs::canonicalize(&first.dir).expect("the image")
        );
    }

    #[test]
    fn another_agent_or_module_makes_another_image() {
        let root = tempfile::tempdir().expect("a folder");
        let mut request = request(root.path());
        let first = make(&request).expect("an image");
        let mut agent = static_elf();
        agent.push(0);
        fs::write(&request.agent, agent).expect("a file");
        let second = make(&request).expect("an image");
        assert_ne!(first.dir, second.dir);
        let extra = made_up_module(&[("name", "extra")]);
        let KernelSource::Files { modules, .. } = &request.source else {
            unreachable!()
        };
        fs::write(modules.join("kernel/extra.ko"), extra).expect("a file");
        let third = make(&request).expect("an image");
        assert_ne!(second.dir, third.dir);
        request.modules.push("extra".into());
        let fourth = make(&request).expect("an image");
        assert!(
            fourth
                .manifest
                .modules
                .iter()
                .any(|module| module.name == "extra")
        );
        assert_ne!(third.dir, fourth.dir);
    }

    #[test]
    fn signatures_stay_where_they_are_asked_for_or_insisted_on() {
        let root = tempfile::tempdir().expect("a folder");
        let mut request = request(root.path());
        let KernelSource::Files { kernel, modules } = &request.source else {
            unreachable!()
        };
        let overlay = modules.join("kernel/drivers/overlay.ko");
        let plain = fs::metadata(&overlay).expect("a module").len();
        let mut signed = fs::read(&overlay).expect("a module");
        signed.extend_from_slice(&[0; 12 + 8]);
        let at = signed.len() - 4;
        signed[at..].copy_from_slice(&8u32.to_be_bytes());
        signed.extend_from_slice(b"~Module signature appended~\n");
        fs::write(&overlay, &signed).expect("a file");
        let config = kernel.with_file_name("config-6.1.0-test");
        let size = |request: &Request| {
            let modules = make(request).expect("an image").manifest.modules;
            let overlay = modules.iter().find(|module| module.name == "overlay");
            overlay.expect("the module").content.size
        };
        assert_eq!(size(&request), plain);
        fs::write(
            &config,
            "CONFIG_MODULE_SIG=y\n# CONFIG_MODULE_SIG_FORCE is not set\n",
        )
        .expect("a file");
        assert_eq!(size(&request), plain);
        fs::write(&config, "CONFIG_MODULE_SIG_FORCE=y\n").expect("a file");
        assert_eq!(size(&request), signed.len() as u64);
        fs::remove_file(&config).expect("a file");
        request.keep_signatures = true;
        assert_eq!(size(&request), signed.len() as u64);
    }

    #[test]
    fn an_image_with_a_file_cut_short_is_made_again() {
        let root = tempfile::tempdir().expect("a folder");
        let request = request(root.path());
        let first = make(&request).expect("an image");
        fs::write(first.dir.join("initrd"), "cut").expect("a file");
        let second = make(&request).expect("an image");
        assert!(!second.cached);
        assert_eq!(
            fs::metadata(second.dir.join("initrd"))
                .expect("a file")
                .len(),
            first.manifest.initrd.size
        );
    }

    #[test]
    fn an_agent_that_could_not_run_is_refused() {
        let root = tempfile::tempdir().expect("a folder");
        let request = request(root.path());
        fs::write(&request.agent, "#!/bin/sh\n").expect("a file");
        let error = make(&request).expect_err("a script");
        assert!(error.to_string().contains("not an ELF file"), "{error}");
        // One program header, of an interpreter.
        let mut agent = static_elf();
        agent[32] = 64;
        agent[56] = 1;
        agent.extend_from_slice(&3u32.to_le_bytes());
        agent.resize(64 + 56, 0);
        fs::write(&request.agent, agent).expect("a file");
        let error = make(&request).expect_err("a dynamic program");
        assert!(error.to_string().contains("not static"), "{error}");
        assert!(!request.out.exists());
    }
}
