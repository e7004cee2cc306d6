//! Whether guests with stock kernels can run on this machine directly.

use std::fs;
use std::path::Path;

/// Where guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the machine's own `/dev/kvm`.
    Host,
    /// In the nested testbed.
    Testbed,
}

/// Decides by the machine's KVM, and says why in a sentence.
pub fn place(force_nested: bool) -> (Place, String) {
    if force_nested {
        return (Place::Testbed, "the nested testbed was asked for".into());
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    decide(
        Path::new("/dev/kvm").exists(),
        Path::new("/sys/module/kvm_pvm").exists(),
        &cpuinfo,
    )
}

fn decide(has_device: bool, is_pvm: bool, cpuinfo: &str) -> (Place, String) {
    let virtualization = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| {
            line.split_whitespace()
                .any(|flag| flag == "svm" || flag == "vmx")
        });
    if !has_device {
        (Place::Testbed, "this machine has no /dev/kvm".into())
    } else if is_pvm {
        (
            Place::Testbed,
            "this machine's /dev/kvm is KVM-PVM, which runs no stock kernel".into(),
        )
    } else if !virtualization {
        (
            Place::Testbed,
            "this machine's CPU shows neither SVM nor VMX".into(),
        )
    } else {
        (
            Place::Host,
            "this machine's /dev/kvm runs stock kernels".into(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hardware_virtualization_without_pvm_runs_on_the_host() {
        let (svm, vmx, none) = (
            "flags\t\t: fpu svm\n",
            "flags : vmx fpu\n",
            "flags : fpu svmx\n",
        );
        for (device, pvm, cpu, expected) in [
            (true, false, svm, Place::Host),
            (true, false, vmx, Place::Host),
            (true, false, none, Place::Testbed),
            (true, true, svm, Place::Testbed),
            (false, false, svm, Place::Testbed),
        ] {
            assert_eq!(decide(device, pvm, cpu).0, expected, "{device} {pvm} {cpu}");
        }
    }
}
