//! Who is measured beside nacre, where the benchmarks run: Debian's QEMU and virtiofsd, unpacked, and VMMs that the user named.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::apt::Release;
use crate::image::KernelRelease;
use crate::kvm::Place;
use crate::testbed::Request;
use crate::{apt, image, paths};

/// Where QEMU is in the testbed, and what of its root is needed.
const QEMU: &str = "/opt/qemu";
const QEMU_PARTS: [&str; 4] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/share/qemu",
    "usr/share/seabios",
    "usr/bin/qemu-system-x86_64",
];

/// Where virtiofsd is in the testbed, and what of its root is needed.
const VIRTIOFSD: &str = "/opt/virtiofsd";
const VIRTIOFSD_PARTS: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "usr/libexec/virtiofsd"];
/// QEMU's initrd in the testbed.
pub(super) const QEMU_INITRD: &str = "/opt/qemu/initrd";

/// Who else is measured, where the benchmarks run.
#[derive(Clone, Copy, Default)]
pub(super) struct Peers<'p> {
    pub(super) qemu: Option<&'p Qemu>,
    pub(super) firecracker: Option<&'p Path>,
    pub(super) cloud_hypervisor: Option<&'p Path>,
}

/// A program that the user named, where the benchmarks run: in the testbed it is brought along.
pub(super) fn brought(
    place: Place,
    program: Option<&Path>,
    name: &str,
    request: &mut Request,
) -> Result<Option<PathBuf>> {
    let Some(program) = program else {
        return Ok(None);
    };
    ensure!(
        program.is_file(),
        "There is no program {} to measure",
        program.display()
    );
    let program = std::path::absolute(program)?;
    if place == Place::Host {
        return Ok(Some(program));
    }
    let there = Path::new("/opt").join(name);
    request.copies.push((program, there.clone()));
    Ok(Some(there))
}

/// QEMU's programs and files, where the benchmarks run.
pub(super) struct Qemu {
    pub(super) program: PathBuf,
    pub(super) direct: Direct,
    pub(super) virtiofsd: Option<PathBuf>,
    pub(super) initrd: Option<PathBuf>,
}

/// How QEMU is started without the script, whose shell is not to be measured where the start is.
pub(super) struct Direct {
    /// Its own loader.
    pub(super) loader: PathBuf,
    /// What comes first of the loader's arguments: its own, the program, and the program's.
    pub(super) arguments: Vec<String>,
    /// Where its modules are, for `QEMU_MODULE_DIR`.
    pub(super) modules: PathBuf,
}

impl Direct {
    /// Of a QEMU that is unpacked there.
    pub(super) fn of(root: &Path) -> Self {
        let path = |name: &str| root.join(name).display().to_string();
        Self {
            loader: root.join("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"),
            arguments: vec![
                "--library-path".to_owned(),
                path("usr/lib/x86_64-linux-gnu"),
                path("usr/bin/qemu-system-x86_64"),
                "-L".to_owned(),
                path("usr/share/qemu"),
                "-L".to_owned(),
                path("usr/share/seabios"),
            ],
            modules: root.join("usr/lib/x86_64-linux-gnu/qemu"),
        }
    }
}

/// What of it is needed.
pub(super) struct Parts {
    pub(super) virtiofsd: bool,
    /// With this kernel.
    pub(super) initrd: Option<KernelRelease>,
}

impl Qemu {
    /// Options of storage, and their values.
    pub(super) fn of_storage(&self) -> Option<[(&'static str, &Path); 3]> {
        let [qemu, initrd] = self.of_net()?;
        Some([qemu, ("virtiofsd", self.virtiofsd.as_ref()?), initrd])
    }

    /// The same of net.
    pub(super) fn of_net(&self) -> Option<[(&'static str, &Path); 2]> {
        let initrd = self.initrd.as_ref()?;
        Some([("qemu", &self.program), ("qemu-initrd", initrd)])
    }

    /// In the testbed all of it is brought along.
    pub(super) fn bring(place: Place, parts: &Parts, request: &mut Request) -> Result<Self> {
        let (program, direct) = bring_qemu(place, request)?;
        let virtiofsd = match parts.virtiofsd {
            true => Some(bring_virtiofsd(place, request)?),
            false => None,
        };
        let mut initrd = parts.initrd.map(image::initrd_with_pci).transpose()?;
        if place == Place::Testbed
            && let Some(made) = initrd.take()
        {
            request.copies.push((made, QEMU_INITRD.into()));
            initrd = Some(QEMU_INITRD.into());
        }
        Ok(Self {
            program,
            direct,
            virtiofsd,
            initrd,
        })
    }
}

/// Debian's QEMU as one program: a script that starts it by its own loader, with its own libraries and firmware; and what the script does.
fn bring_qemu(place: Place, request: &mut Request) -> Result<(PathBuf, Direct)> {
    let unpacked = apt::closure(Release::TrixieBackports, &["qemu-system-x86"])?;
    let program = bring(
        place,
        request,
        ("bench-qemu", &unpacked),
        (QEMU, &QEMU_PARTS),
        qemu_script,
    )?;
    let root = match place {
        Place::Host => unpacked.as_path(),
        Place::Testbed => Path::new(QEMU),
    };
    Ok((program, Direct::of(root)))
}

/// The same with virtiofsd, which QEMU no longer has with it.
fn bring_virtiofsd(place: Place, request: &mut Request) -> Result<PathBuf> {
    let unpacked = apt::closure(Release::Trixie, &["virtiofsd"])?;
    bring(
        place,
        request,
        ("bench-virtiofsd", &unpacked),
        (VIRTIOFSD, &VIRTIOFSD_PARTS),
        virtiofsd_script,
    )
}

/// A script that starts a program of an unpacked root, and in the testbed the parts of that root that it needs.
fn bring(
    place: Place,
    request: &mut Request,
    (name, unpacked): (&str, &Path),
    (root, parts): (&str, &[&str]),
    script: fn(&Path) -> String,
) -> Result<PathBuf> {
    let file = paths::cache(name);
    let root = match place {
        Place::Host => unpacked,
        Place::Testbed => Path::new(root),
    };
    fs::write(&file, script(root))
        .and_then(|()| fs::set_permissions(&file, Permissions::from_mode(0o755)))
        .with_context(|| format!("writing {}", file.display()))?;
    if place == Place::Host {
        return Ok(file);
    }
    for part in parts {
        request.roots.push((unpacked.join(part), root.join(part)));
    }
    let program = root.join("run");
    request.copies.push((file, program.clone()));
    Ok(program)
}

fn qemu_script(root: &Path) -> String {
    let Direct {
        loader,
        arguments,
        modules,
    } = Direct::of(root);
    let words: Vec<String> = arguments.iter().map(|word| format!("'{word}'")).collect();
    format!(
        "#!/bin/sh\nexport QEMU_MODULE_DIR='{}'\nexec '{}' {} \"$@\"\n",
        modules.display(),
        loader.display(),
        words.join(" ")
    )
}

fn virtiofsd_script(root: &Path) -> String {
    let root = root.display();
    format!(
        "#!/bin/sh
libraries='{root}/usr/lib/x86_64-linux-gnu'
exec \"$libraries/ld-linux-x86-64.so.2\" --library-path \"$libraries\" '{root}/usr/libexec/virtiofsd' \"$@\"
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_the_user_named_is_brought_along() {
        let mut request = Request::new(Vec::new());
        let mut bring =
            |place, program: &str| brought(place, Some(Path::new(program)), "vmm", &mut request);
        assert_eq!(
            bring(Place::Host, "/bin/sh").unwrap(),
            Some("/bin/sh".into())
        );
        assert_eq!(
            bring(Place::Testbed, "/bin/sh").unwrap(),
            Some("/opt/vmm".into())
        );
        assert!(bring(Place::Host, "/nowhere").is_err());
        assert_eq!(
            request.copies,
            [(PathBuf::from("/bin/sh"), PathBuf::from("/opt/vmm"))]
        );
    }

    #[test]
    fn qemu_is_started_by_its_own_loader() {
        let script = qemu_script(Path::new("/opt/qemu"));
        assert!(script.starts_with("#!/bin/sh\nexport QEMU_MODULE_DIR='/opt/qemu/usr/lib/"));
        let loader =
            "exec '/opt/qemu/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2' '--library-path' ";
        assert!(script.contains(loader), "{script}");
        assert!(script.trim_end().ends_with("\"$@\""), "{script}");
        let script = virtiofsd_script(Path::new("/opt/virtiofsd"));
        assert!(script.contains("'/opt/virtiofsd/usr/libexec/virtiofsd' \"$@\""));
        assert!(script.trim_end().ends_with("\"$@\""), "{script}");
    }
}
