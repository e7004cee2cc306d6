//! The VMMs that boot the same guest, and how each is told to: by its own command line or, Firecracker, by a file. What they are given is
//! the same but for how each wants its serial port.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nacre_vmm::config::default_cmdline;
use serde_json::json;

use crate::bench::probed::PROBE;

/// A VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vmm {
    /// Ours, by `vmctl boot`.
    Ours,
    /// QEMU's machine `microvm`.
    Qemu,
    Firecracker,
    CloudHypervisor,
}

/// What is booted.
#[derive(Debug, Clone)]
pub(super) struct Guest {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub vcpus: u8,
    pub memory_mib: u64,
}

impl Vmm {
    /// What it is called in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "nacre",
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }

    /// Its command line, without the program. What it reads besides is written into `folder`.
    pub fn arguments(self, guest: &Guest, folder: &Path) -> Result<Vec<String>> {
        let kernel = guest.kernel.display().to_string();
        let initrd = guest.initrd.display().to_string();
        let (vcpus, memory) = (guest.vcpus.to_string(), guest.memory_mib);
        let line = cmdline();
        let words: Vec<String> = match self {
            Self::Ours => words(&[
                "boot",
                "--no-agent",
                "--kernel",
                &kernel,
                "--initrd",
                &initrd,
                "--cmdline",
                &line,
                "--memory",
                &format!("{memory}M"),
                "--vcpus",
                &vcpus,
            ]),
            Self::Qemu => words(&[
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
                "-machine",
                // With ACPI, SeaBIOS's tables are where the initrd is then put; without, the serial port's interrupt needs the
                // PIC, and the kernel waits for a clock that is not there.
                "microvm,accel=kvm,acpi=off,x-option-roms=off,rtc=on,isa-serial=on",
                "-cpu",
                "host",
                "-smp",
                &vcpus,
                "-m",
                &format!("{memory}M"),
                "-serial",
                "stdio",
                "-kernel",
                &kernel,
                "-initrd",
                &initrd,
                "-append",
                &line,
            ]),
            Self::Firecracker => {
                let file = folder.join("firecracker.json");
                let description = json!({
                    "boot-source": {
                        "kernel_image_path": kernel,
                        "initrd_path": initrd,
                        "boot_args": line,
                    },
                    "drives": [],
                    "machine-config": { "vcpu_count": guest.vcpus, "mem_size_mib": memory },
                });
                std::fs::write(&file, serde_json::to_vec_pretty(&description)?)
                    .with_context(|| format!("writing {}", file.display()))?;
                let file = file.display().to_string();
                words(&["--no-api", "--config-file", &file])
            }
            Self::CloudHypervisor => words(&[
                "--kernel",
                &kernel,
                "--initramfs",
                &initrd,
                "--cmdline",
                &line,
                "--cpus",
                &format!("boot={vcpus}"),
                "--memory",
                &format!("size={memory}M"),
                "--serial",
                "tty",
                "--console",
                "off",
            ]),
        };
        Ok(words)
    }
}

/// The kernel command line, the same for all: our default one, but a guest that panics resets its machine by the keyboard controller,
/// which most of them have; none has a keyboard or a mouse at it to look for, which Firecracker's own command line says by the words
/// of i8042.
fn cmdline() -> String {
    let base = default_cmdline().replace("reboot=a", "reboot=k");
    format!("{base} i8042.noaux i8042.nomux i8042.dumbkbd rdinit=/{PROBE} -- hello")
}

fn words(all: &[&str]) -> Vec<String> {
    all.iter().map(|word| (*word).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> Guest {
        Guest {
            kernel: "/k".into(),
            initrd: "/i".into(),
            vcpus: 2,
            memory_mib: 384,
        }
    }

    #[test]
    fn each_is_given_the_same_guest() {
        let folder = tempfile::tempdir().unwrap();
        for (vmm, parts) in [
            (
                Vmm::Ours,
                &[
                    "boot --no-agent",
                    "--initrd /i",
                    "--memory 384M",
                    "--vcpus 2",
                ][..],
            ),
            (
                Vmm::Qemu,
                &["microvm,accel=kvm,", "-initrd /i", "-m 384M", "-smp 2"],
            ),
            (
                Vmm::CloudHypervisor,
                &[
                    "--initramfs /i",
                    "--memory size=384M",
                    "--cpus boot=2",
                    "--serial tty --console off",
                ],
            ),
        ] {
            let words = vmm.arguments(&guest(), folder.path()).unwrap();
            assert!(words.contains(&cmdline()), "{words:?}");
            assert!(words.contains(&"/k".to_owned()), "{words:?}");
            let line = words.join(" ");
            for part in parts {
                assert!(line.contains(part), "{part} in {line}");
            }
        }
    }

    #[test]
    fn firecracker_is_given_it_by_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let words = Vmm::Firecracker.arguments(&guest(), folder.path()).unwrap();
        assert_eq!(words[..2], ["--no-api", "--config-file"]);
        let text = std::fs::read(&words[2]).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(value["boot-source"]["kernel_image_path"], "/k");
        assert_eq!(value["boot-source"]["initrd_path"], "/i");
        assert_eq!(value["boot-source"]["boot_args"], cmdline());
        assert_eq!(value["machine-config"]["vcpu_count"], 2);
        assert_eq!(value["machine-config"]["mem_size_mib"], 384);
    }

    #[test]
    fn the_command_line_ends_with_the_probes_word() {
        let line = cmdline();
        assert!(line.ends_with("rdinit=/nacre-probe -- hello"), "{line}");
        assert!(line.contains("console=ttyS0 "), "{line}");
    }
}
