//! What a caller says about the VM that it wants. Checked in one place,
//! before anything is made.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use thiserror::Error;

use crate::hotplug::memory::{MAX_UNITS, SMALLEST_UNIT};
use crate::memory::layout::{CMDLINE_SIZE, MAX_WINDOWS, MIB};
use crate::virtio::device::VirtioDevice;
use crate::virtio::mem::SLOT_UNIT;

/// Smallest guest memory that a stock kernel and the agent's initrd boot in, in MiB.
pub const MINIMUM_MEMORY_MIB: u64 = 96;

/// Largest guest memory, in MiB: with the hole below 4 GiB it ends at 1 TiB, which every host can address.
pub const MAXIMUM_MEMORY_MIB: u64 = (1 << 20) - (1 << 10);

/// Most vCPUs of one VM, as the in-kernel interrupt controllers address them.
pub const MAXIMUM_VCPUS: u8 = 254;

/// Windows that [`VmConfig::windows`] should have unless there is a reason: vsock, rng, memory, balloon and six disks. A spare one costs
/// a Linux guest's boot three reads of its registers, and no time that could be told from noise.
pub const DEFAULT_WINDOWS: u8 = 10;

/// Most bytes of a disk's serial (virtio 1.3 section 5.2.6.1).
pub const DISK_ID_BYTES: usize = 20;

/// Where the serial console's bytes go and come from.
pub struct Console {
    /// Receives what the guest prints. It is called from vCPU threads, byte by byte, and the guest
    /// waits meanwhile: it must be bounded in time and space. What it refuses (an error) is lost
    /// and counted.
    pub output: Box<dyn Write + Send>,
    /// A readable, pollable file (terminal, pipe, socket) whose bytes the guest receives, if any.
    pub input: Option<File>,
}

impl Console {
    /// A console that swallows everything.
    pub fn none() -> Self {
        Self {
            output: Box::new(std::io::sink()),
            input: None,
        }
    }
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console")
            .field("input", &self.input)
            .finish_non_exhaustive()
    }
}

/// Virtio devices that others have made, for windows after those of the VM's own.
#[derive(Default)]
pub struct ReadyDevices(pub Vec<Box<dyn VirtioDevice>>);

impl std::fmt::Debug for ReadyDevices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|device| device.kind()))
            .finish()
    }
}

/// One VM.
#[derive(Debug)]
pub struct VmConfig {
    /// Names the VM in logs and thread names; any text without a zero byte.
    pub name: String,
    /// ELF `vmlinux` with a PVH note, or a bzImage.
    pub kernel: PathBuf,
    /// initramfs, uncompressed or in a form that the kernel unpacks.
    pub initrd: Option<PathBuf>,
    /// Kernel command line, whole; see [`default_cmdline`]. At most 2047 bytes, without a zero.
    pub cmdline: String,
    /// Boot memory in MiB, from [`MINIMUM_MEMORY_MIB`] to [`MAXIMUM_MEMORY_MIB`].
    pub memory_mib: u64,
    /// vCPUs at boot, 1–254.
    pub vcpus: u8,
    /// Disks that are there from the start, in window order.
    pub disks: Vec<DiskConfig>,
    /// virtio-mmio windows declared, those with a device included; 1–18. The rest are spare.
    pub windows: u8,
    /// Whether to have a virtio-vsock device.
    pub vsock: bool,
    /// Whether to have a virtio-rng device.
    pub rng: bool,
    /// Devices that the caller brings along, in window order after the VM's own and before the disks.
    pub devices: ReadyDevices,
    /// What may come while the VM runs.
    pub plug: PlugConfig,
    /// Serial console.
    pub console: Console,
}

/// What may be plugged into a VM while it runs. What is not said here is not announced to the guest at boot, and cannot come
/// later. The default is nothing but disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlugConfig {
    /// Most vCPUs, those at boot included, up to [`MAXIMUM_VCPUS`]; less than those at boot means just those. Each costs the
    /// guest some memory and three reads of a register at boot.
    pub max_vcpus: u8,
    /// Units of ACPI memory that may be plugged, up to [`MAX_UNITS`].
    pub acpi_units: u8,
    /// Size of such a unit in MiB: a multiple of 128, and of the guest's memory block size, which is 128 MiB for guests that
    /// begin with less than 64 GiB.
    pub acpi_unit_mib: u64,
    /// Most memory in MiB that a virtio-mem device plugs: a multiple of 128; 0: there is no such device.
    pub virtio_mem_mib: u64,
    /// Whether to have a virtio-balloon device, by which the guest gives back what it frees.
    pub balloon: bool,
}

impl PlugConfig {
    /// Most bytes of ACPI memory that may be plugged.
    pub fn acpi_bytes(&self) -> u64 {
        u64::from(self.acpi_units) * (self.acpi_unit_mib * MIB)
    }
}

/// A disk backed by a raw file or block device.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// Raw image. Its format is never guessed.
    pub path: PathBuf,
    /// Opened read-only and offered with VIRTIO_BLK_F_RO.
    pub read_only: bool,
    /// Serial that the guest reads by VIRTIO_BLK_T_GET_ID, at most 20 bytes.
    pub id: String,
}

/// A configuration that cannot be: which value, and what would be right.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Too little or too much memory.
    #[error(
        "memory of {asked} MiB: at least {MINIMUM_MEMORY_MIB} MiB and at most {MAXIMUM_MEMORY_MIB} MiB are possible"
    )]
    Memory {
        /// MiB that were asked for.
        asked: u64,
    },
    /// No vCPU, or more than can be addressed.
    #[error("{asked} vCPUs: 1 to {MAXIMUM_VCPUS} are possible")]
    Vcpus {
        /// vCPUs that were asked for.
        asked: u8,
    },
    /// No window, or more than there are interrupt lines.
    #[error("{asked} virtio-mmio windows: 1 to {MAX_WINDOWS} are possible")]
    Windows {
        /// Windows that were asked for.
        asked: u8,
    },
    /// More devices than windows.
    #[error(
        "{asked} disks: with {windows} virtio-mmio windows and {others} other devices there is room for {room}"
    )]
    Disks {
        /// Disks that were asked for.
        asked: usize,
        /// Windows declared.
        windows: u8,
        /// vsock, rng, memory, balloon, and those that the caller brings along.
        others: u8,
        /// Disks that fit.
        room: u8,
    },
    /// More devices other than disks than windows.
    #[error(
        "{windows} virtio-mmio windows are too few for {others} devices (vsock, rng, memory, balloon, ready-made ones)"
    )]
    Others {
        /// Windows declared.
        windows: u8,
        /// vsock, rng, memory, balloon, and those that the caller brings along.
        others: u8,
    },
    /// A disk's serial is too long.
    #[error("disk id {id:?} of {} bytes: at most {DISK_ID_BYTES} are possible", id.len())]
    DiskId {
        /// The serial.
        id: String,
    },
    /// The command line does not fit.
    #[error("kernel command line of {length} bytes: at most {} are possible", CMDLINE_SIZE - 1)]
    CmdlineLength {
        /// Its length in bytes.
        length: usize,
    },
    /// More units of ACPI memory than there are slots.
    #[error("{asked} units of ACPI memory: at most {MAX_UNITS} are possible")]
    Units {
        /// Units that were asked for.
        asked: u8,
    },
    /// Units of ACPI memory of a size that no guest can use.
    #[error(
        "units of ACPI memory of {asked} MiB: multiples of {} MiB are possible, and all of them with the memory at boot at most {MAXIMUM_MEMORY_MIB} MiB",
        SMALLEST_UNIT / MIB
    )]
    UnitSize {
        /// MiB that were asked for.
        asked: u64,
    },
    /// A virtio-mem device of a size that cannot be.
    #[error(
        "a virtio-mem device of {asked} MiB: multiples of {} MiB are possible, and all memory together at most {MAXIMUM_MEMORY_MIB} MiB",
        SLOT_UNIT / MIB
    )]
    VirtioMem {
        /// MiB that were asked for.
        asked: u64,
    },
    /// The name has a zero byte in it.
    #[error("VM name {name:?} with a zero byte")]
    Name {
        /// The name.
        name: String,
    },
    /// The command line has a zero byte in it.
    #[error("kernel command line with a zero byte at offset {at}")]
    CmdlineZero {
        /// Where.
        at: usize,
    },
}

impl VmConfig {
    /// Windows that devices other than disks take.
    pub fn others(&self) -> u8 {
        [
            self.vsock,
            self.rng,
            self.plug.virtio_mem_mib > 0,
            self.plug.balloon,
        ]
        .into_iter()
        .map(u8::from)
        .sum::<u8>()
        .saturating_add(u8::try_from(self.devices.0.len()).unwrap_or(u8::MAX))
    }

    /// Checks all that can be checked without the host.
    ///
    /// # Errors
    ///
    /// The first value that cannot be.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.name.contains('\0') {
            return Err(ConfigError::Name {
                name: self.name.clone(),
            });
        }
        let asked = self.memory_mib;
        if !(MINIMUM_MEMORY_MIB..=MAXIMUM_MEMORY_MIB).contains(&asked) {
            return Err(ConfigError::Memory { asked });
        }
        if !(1..=MAXIMUM_VCPUS).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus { asked: self.vcpus });
        }
        if self.plug.max_vcpus > MAXIMUM_VCPUS {
            return Err(ConfigError::Vcpus {
                asked: self.plug.max_vcpus,
            });
        }
        self.plug.check_memory(self.memory_mib)?;
        let windows = self.windows;
        if !(1..=MAX_WINDOWS).contains(&windows) {
            return Err(ConfigError::Windows { asked: windows });
        }
        let others = self.others();
        let Some(room) = windows.checked_sub(others) else {
            return Err(ConfigError::Others { windows, others });
        };
        if self.disks.len() > usize::from(room) {
            return Err(ConfigError::Disks {
                asked: self.disks.len(),
                windows,
                others,
                room,
            });
        }
        self.disks.iter().try_for_each(DiskConfig::check)?;
        if self.cmdline.len() >= CMDLINE_SIZE {
            return Err(ConfigError::CmdlineLength {
                length: self.cmdline.len(),
            });
        }
        match self.cmdline.find('\0') {
            Some(at) => Err(ConfigError::CmdlineZero { at }),
            None => Ok(()),
        }
    }
}

impl PlugConfig {
    fn check_memory(&self, boot_mib: u64) -> Result<(), ConfigError> {
        let asked = self.virtio_mem_mib;
        if !asked.is_multiple_of(SLOT_UNIT / MIB) || asked > MAXIMUM_MEMORY_MIB - boot_mib {
            return Err(ConfigError::VirtioMem { asked });
        }
        if self.acpi_units == 0 {
            return Ok(());
        }
        if self.acpi_units > MAX_UNITS {
            return Err(ConfigError::Units {
                asked: self.acpi_units,
            });
        }
        let asked = self.acpi_unit_mib;
        let most =
            (MAXIMUM_MEMORY_MIB - boot_mib - self.virtio_mem_mib) / u64::from(self.acpi_units);
        if asked == 0 || !asked.is_multiple_of(SMALLEST_UNIT / MIB) || asked > most {
            return Err(ConfigError::UnitSize { asked });
        }
        Ok(())
    }
}

impl DiskConfig {
    /// Checks the serial; the file is looked at when the disk is made.
    ///
    /// # Errors
    ///
    /// [`ConfigError::DiskId`].
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.id.len() > DISK_ID_BYTES {
            return Err(ConfigError::DiskId {
                id: self.id.clone(),
            });
        }
        Ok(())
    }
}

/// The kernel command line for a stock kernel on this machine.
///
/// `panic=-1` reboots at once after a panic, which pvpanic has told before. `reboot=a` goes through
/// the ACPI reset register: without EFI, Linux's own choice for hardware-reduced ACPI is the BIOS.
pub fn default_cmdline() -> String {
    "console=ttyS0 quiet panic=-1 reboot=a tsc=reliable random.trust_cpu=on".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::device::{ActivateError, Activation};

    fn good() -> VmConfig {
        VmConfig {
            name: "test".to_owned(),
            kernel: "vmlinux".into(),
            initrd: None,
            cmdline: default_cmdline(),
            memory_mib: 256,
            vcpus: 1,
            disks: Vec::new(),
            windows: DEFAULT_WINDOWS,
            vsock: true,
            rng: true,
            devices: ReadyDevices::default(),
            plug: PlugConfig::default(),
            console: Console::none(),
        }
    }

    fn disk(id: &str) -> DiskConfig {
        DiskConfig {
            path: "disk".into(),
            read_only: true,
            id: id.to_owned(),
        }
    }

    /// Devices that do nothing.
    fn ready(count: usize) -> ReadyDevices {
        struct Idle;
        impl VirtioDevice for Idle {
            fn kind(&self) -> &'static str {
                "idle"
            }
            fn device_id(&self) -> u32 {
                63
            }
            fn features(&self) -> u64 {
                0
            }
            fn queue_sizes(&self) -> &[u16] {
                &[]
            }
            fn read_config(&self, _offset: u64, data: &mut [u8]) {
                data.fill(0);
            }
            fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
            fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
                Ok(())
            }
            fn reset(&mut self) {}
        }
        let devices = ReadyDevices((0..count).map(|_| Box::new(Idle) as _).collect());
        assert_eq!(
            format!("{devices:?}").matches("idle").count(),
            count,
            "named by their kind"
        );
        devices
    }

    fn refused(change: impl Fn(&mut VmConfig)) -> String {
        let mut config = good();
        change(&mut config);
        config.check().expect_err("refused").to_string()
    }

    #[test]
    fn the_ends_of_the_ranges_are_possible() {
        for (memory_mib, vcpus, windows) in [
            (MINIMUM_MEMORY_MIB, 1, 2),
            (MAXIMUM_MEMORY_MIB, MAXIMUM_VCPUS, MAX_WINDOWS),
        ] {
            let config = VmConfig {
                memory_mib,
                vcpus,
                windows,
                plug: PlugConfig {
                    max_vcpus: MAXIMUM_VCPUS,
                    acpi_units: if memory_mib == MINIMUM_MEMORY_MIB {
                        240
                    } else {
                        0
                    },
                    acpi_unit_mib: 1024,
                    ..PlugConfig::default()
                },
                ..good()
            };
            assert_eq!(config.check(), Ok(()));
        }
    }

    #[test]
    fn a_refusal_names_the_value_and_the_bound() {
        let units = |acpi_units, acpi_unit_mib| PlugConfig {
            acpi_units,
            acpi_unit_mib,
            ..PlugConfig::default()
        };
        let cases: [(String, &[&str]); 16] = [
            (
                refused(|c| c.plug.virtio_mem_mib = 100),
                &["100 MiB", "multiples of 128"],
            ),
            (
                refused(|c| c.plug.virtio_mem_mib = 1 << 20),
                &["1048576 MiB", "1047552"],
            ),
            (refused(|c| c.plug.max_vcpus = 255), &["255 vCPUs", "254"]),
            (refused(|c| c.plug = units(241, 128)), &["241 units", "240"]),
            (
                refused(|c| c.plug = units(1, 192)),
                &["192 MiB", "multiples of 128"],
            ),
            (
                refused(|c| c.plug = units(2, 1 << 19)),
                &["524288 MiB", "1047552"],
            ),
            (refused(|c| c.memory_mib = 16), &["16 MiB", "96 MiB"]),
            (refused(|c| c.memory_mib = u64::MAX), &["1047552 MiB"]),
            (refused(|c| c.vcpus = 0), &["0 vCPUs", "1 to 254"]),
            (refused(|c| c.vcpus = 255), &["255 vCPUs", "254"]),
            (refused(|c| c.windows = 0), &["0 virtio-mmio", "1 to 18"]),
            (refused(|c| c.windows = 19), &["19 virtio-mmio", "18"]),
            (refused(|c| c.windows = 1), &["1 virtio-mmio", "2 devices"]),
            (
                refused(|c| {
                    c.devices = ready(3);
                    c.disks = vec![disk("a"); 6];
                }),
                &["6 disks", "5 other devices", "room for 5"],
            ),
            (
                refused(|c| c.disks = vec![disk("a"); 9]),
                &["9 disks", "room for 8"],
            ),
            (
                refused(|c| c.disks = vec![disk("123456789012345678901")]),
                &["21 bytes", "20"],
            ),
        ];
        for (message, parts) in cases {
            for part in parts {
                assert!(message.contains(part), "{message:?} lacks {part:?}");
            }
        }
        assert!(refused(|c| c.name = "a\0".to_owned()).contains("zero byte"));
        assert!(refused(|c| c.cmdline = "x".repeat(2048)).contains("2047"));
        assert!(refused(|c| c.cmdline = "a\0b".to_owned()).contains("offset 1"));
    }
}
