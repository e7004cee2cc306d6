//! The host's KVM: opening it, and saying clearly why it cannot be used.

use std::path::{Path, PathBuf};

use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;

use crate::memory::layout;

/// The device that KVM is.
pub const KVM_DEVICE: &str = "/dev/kvm";

/// The version of KVM's interface; it has been this since 2007.
const API_VERSION: i32 = 12;

/// What a guest cannot be run without, each with what it is for.
pub const REQUIRED: &[(Cap, &str, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "interrupt controllers"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "device interrupts"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "queue notifications"),
    (
        Cap::SetTssAddr,
        "KVM_CAP_SET_TSS_ADDR",
        "real mode on Intel",
    ),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "secondary vCPUs"),
    (
        Cap::ImmediateExit,
        "KVM_CAP_IMMEDIATE_EXIT",
        "stopping vCPUs",
    ),
    (
        Cap::TscDeadlineTimer,
        "KVM_CAP_TSC_DEADLINE_TIMER",
        "the guest's timer",
    ),
];

/// KVM cannot be used, or a VM could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// The device is not there.
    #[error("there is no {}: this host offers no KVM (no hardware virtualization, its module is not loaded, or the device is not passed into this container)", .0.display())]
    Missing(PathBuf),
    /// The device is there and this user may not use it.
    #[error("no permission to open {}: become root or join the group that owns it", .0.display())]
    Permission(PathBuf),
    /// The device cannot be opened for another reason.
    #[error("cannot open {}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// What was opened does not speak KVM's interface.
    #[error("{} is not KVM, or not one that is known: it reports API version {version}, {API_VERSION} is needed", path.display())]
    Version {
        /// The device.
        path: PathBuf,
        /// What it answers; -1 if it does not know the question.
        version: i32,
    },
    /// Capabilities are missing.
    #[error("this host's KVM lacks {}", .0.join(", "))]
    Capabilities(Vec<String>),
    /// An ioctl that every VM needs failed.
    #[error("cannot {what}")]
    Setup {
        /// What was being done.
        what: &'static str,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Opens `/dev/kvm` and checks that it has what a VM needs.
///
/// # Errors
///
/// See [`enum@Error`]; each says what is missing.
pub fn open() -> Result<Kvm, Error> {
    open_at(Path::new(KVM_DEVICE))
}

/// [`open`] for another path of the device.
///
/// # Errors
///
/// See [`enum@Error`].
pub fn open_at(path: &Path) -> Result<Kvm, Error> {
    let shown = path.to_owned();
    // The path comes from us and has no zero byte in it.
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| Error::Missing(shown.clone()))?;
    let kvm = Kvm::new_with_path(name).map_err(|source| match source.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => Error::Missing(shown.clone()),
        libc::EACCES | libc::EPERM => Error::Permission(shown.clone()),
        _ => Error::Open {
            path: shown.clone(),
            source,
        },
    })?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Error::Version {
            path: shown,
            version,
        });
    }
    let missing: Vec<String> = REQUIRED
        .iter()
        .filter(|(cap, _, _)| !kvm.check_extension(*cap))
        .map(|(_, name, purpose)| format!("{name} ({purpose})"))
        .collect();
    if missing.is_empty() {
        Ok(kvm)
    } else {
        Err(Error::Capabilities(missing))
    }
}

/// Makes a VM with the interrupt controllers in the kernel. No timer chip (PIT) is made: guests
/// use the LAPIC's.
///
/// # Errors
///
/// [`Error::Setup`] says which step KVM refused.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let setup = |what| move |source| Error::Setup { what, source };
    let vm = retry_interrupted(|| kvm.create_vm()).map_err(setup("create a VM"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(setup("place the VM's identity map page"))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(setup("place the VM's task state segment"))?;
    vm.create_irq_chip()
        .map_err(setup("create the VM's interrupt controllers"))?;
    Ok(vm)
}

/// KVM_CREATE_VM is interrupted by signals on busy hosts; it is simply asked again.
fn retry_interrupted<T>(
    mut call: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    for _ in 0..16 {
        match call() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result,
        }
    }
    call()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_the_device_is_told() {
        let error = open_at(Path::new("/nonexistent/kvm")).expect_err("no device");
        assert!(matches!(error, Error::Missing(_)));
        assert!(error.to_string().contains("/nonexistent/kvm"), "{error}");
        let error = open_at(Path::new("/dev/null")).expect_err("not KVM");
        assert!(
            matches!(error, Error::Version { version: -1, .. }),
            "{error:?}"
        );
    }
}
