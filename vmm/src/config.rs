//! What a caller says about the VM that it wants. Checked in one place,
//! before anything is made.

use std::fmt;
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

/// Windows that [`VmConfig::windows`] should have unless there is a reason: vsock, rng, memory, balloon, files and six disks. A spare one costs
/// a Linux guest's boot three reads of its registers, and no time that could be told from noise.
pub const DEFAULT_WINDOWS: u8 = 11;

/// Most bytes of a disk's serial (virtio 1.3 section 5.2.6.1).
pub const DISK_ID_BYTES: usize = 20;

/// Most parts of one disk: Linux finds no more than 255 partitions.
pub const MAXIMUM_PARTS: usize = 255;

/// Most UTF-16 units of a partition's name (UEFI 2.10 section 5.3.3).
pub const PART_NAME_UNITS: usize = 36;

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

/// A disk: what is behind it, and how.
///
/// ```
/// use nacre_vmm::{DiskConfig, DiskIo};
///
/// let root = DiskConfig::file("root.img", false, "root");
/// let mut layers = DiskConfig::parts(["base.erofs", "app.erofs"], true, "layers");
/// layers.io = DiskIo::Threads;
/// assert!(root.check().is_ok() && layers.check().is_ok());
/// ```
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// The file, or the files, with the bytes.
    pub source: DiskSource,
    /// How the bytes are to be read.
    pub format: DiskFormat,
    /// Opened read-only and offered with VIRTIO_BLK_F_RO.
    pub read_only: bool,
    /// Serial that the guest reads by VIRTIO_BLK_T_GET_ID, at most 20 bytes.
    pub id: String,
    /// How the host reads and writes.
    pub io: DiskIo,
    /// Whether it does so by way of its page cache.
    pub cache: DiskCache,
}

/// What a disk's bytes are in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// One file or block device, which is the whole disk.
    File(PathBuf),
    /// Several, 1 to [`MAXIMUM_PARTS`], each one partition of a disk whose partition table (GPT) is
    /// made up in memory: `/dev/vdX1` for the first, `/dev/vdX2` for the second, with the PARTUUID
    /// that [`part_uuid`](crate::virtio::block::part_uuid) says. The guest's kernel needs
    /// CONFIG_EFI_PARTITION, as Debian's has. Each begins at a multiple of 1 MiB. A part that ends
    /// within a sector ends with zeros there if the disk is read only, and else with the last whole
    /// sector. The partition table itself cannot be written.
    Parts(Vec<DiskPart>),
}

/// One partition of [`DiskSource::Parts`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPart {
    /// The file or block device.
    pub path: PathBuf,
    /// The partition's name, at most [`PART_NAME_UNITS`] UTF-16 units without a zero. Linux shows
    /// it as PARTNAME in `/sys/class/block/vdXN/uevent`, with `!` for what is not printable ASCII.
    pub name: String,
}

/// The format of a disk's files. It is declared, and never guessed from what is in them: a guest
/// that writes a header of another format into a raw image changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskFormat {
    /// The bytes of the disk, in order.
    #[default]
    Raw,
}

/// How a disk's requests are carried out on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskIo {
    /// By io_uring where the host has and allows it, else by threads.
    #[default]
    Auto,
    /// By io_uring; a host without it is an error.
    IoUring,
    /// By a few threads with a system call for each transfer.
    Threads,
}

/// Whether a disk's transfers go through the host's page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskCache {
    /// Through it.
    #[default]
    Host,
    /// Past it (O_DIRECT), where a transfer is aligned as the file system asks.
    Direct,
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
    /// No part, or more than a guest finds.
    #[error("disk {id:?} of {asked} parts: 1 to {MAXIMUM_PARTS} are possible")]
    Parts {
        /// The disk's serial.
        id: String,
        /// Parts that were asked for.
        asked: usize,
    },
    /// A part's name does not fit into a partition table.
    #[error(
        "part name {name:?} of {} UTF-16 units: at most {PART_NAME_UNITS} without a zero are possible",
        name.encode_utf16().count()
    )]
    PartName {
        /// The name.
        name: String,
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
    /// A disk that is one raw file or block device.
    pub fn file(path: impl Into<PathBuf>, read_only: bool, id: impl Into<String>) -> Self {
        Self::over(DiskSource::File(path.into()), read_only, id.into())
    }

    /// A disk of several raw files, each one partition with its file's name for a name as far as
    /// that fits.
    pub fn parts(
        paths: impl IntoIterator<Item = impl Into<PathBuf>>,
        read_only: bool,
        id: impl Into<String>,
    ) -> Self {
        let part = |path: PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let mut units = 0;
            let name = name.chars().filter(|&character| character != '\0');
            let name = name.take_while(|character| {
                units += character.len_utf16();
                units <= PART_NAME_UNITS
            });
            DiskPart {
                name: name.collect(),
                path,
            }
        };
        let parts = paths.into_iter().map(|path| part(path.into())).collect();
        Self::over(DiskSource::Parts(parts), read_only, id.into())
    }

    fn over(source: DiskSource, read_only: bool, id: String) -> Self {
        Self {
            source,
            format: DiskFormat::Raw,
            read_only,
            id,
            io: DiskIo::Auto,
            cache: DiskCache::Host,
        }
    }

    /// Checks all but the files, which are looked at when the disk is made.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]: the serial, or the parts' number or names.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.id.len() > DISK_ID_BYTES {
            return Err(ConfigError::DiskId {
                id: self.id.clone(),
            });
        }
        let DiskSource::Parts(parts) = &self.source else {
            return Ok(());
        };
        if !(1..=MAXIMUM_PARTS).contains(&parts.len()) {
            return Err(ConfigError::Parts {
                id: self.id.clone(),
                asked: parts.len(),
            });
        }
        let unfit =
            |name: &str| name.contains('\0') || name.encode_utf16().count() > PART_NAME_UNITS;
        match parts.iter().find(|part| unfit(&part.name)) {
            Some(part) => Err(ConfigError::PartName {
                name: part.name.clone(),
            }),
            None => Ok(()),
        }
    }
}

/// The path, or the first of the paths and how many more there are.
impl fmt::Display for DiskSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Parts(parts) => match &parts[..] {
                [] => f.write_str("of no parts"),
                [part] => part.path.display().fmt(f),
                [first, rest @ ..] => {
                    write!(f, "{} and {} more", first.path.display(), rest.len())
                }
            },
        }
    }
}

/// The kernel command line for a stock kernel on this machine.
///
/// `panic=-1` reboots at once after a panic, which pvpanic has told before. `reboot=a` goes through
/// the ACPI reset register: without EFI, Linux's own choice for hardware-reduced ACPI is the BIOS.
///
/// The rest is left out of the boot because it takes long and is of no use to a guest: `cryptomgr.notests`, the self-tests of the
/// kernel's ciphers, which FIPS mode still runs; and with `initcall_blacklist`, the search for functions that tracing could
/// list twice, the names of constants in the formats of trace events, and the jitter random number generator, whose own test
/// is slow, where the CPU's and virtio-rng's are there. A kernel without one of these does not mind.
pub fn default_cmdline() -> String {
    let skipped = [
        "ftrace_check_for_weak_functions",
        "trace_eval_init",
        "jent_mod_init",
    ];
    format!(
        "console=ttyS0 quiet panic=-1 reboot=a tsc=reliable random.trust_cpu=on cryptomgr.notests \
         initcall_blacklist={}",
        skipped.join(",")
    )
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
        DiskConfig::file("disk", true, id)
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
        let parts = |count: usize| DiskConfig::parts(vec!["part"; count], true, "layers");
        let named = |name: String| {
            let mut disk = parts(1);
            let path = "part".into();
            disk.source = DiskSource::Parts(vec![DiskPart { path, name }]);
            disk
        };
        let cases: [(String, &[&str]); 20] = [
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
                    c.disks = vec![disk("a"); 7];
                }),
                &["7 disks", "5 other devices", "room for 6"],
            ),
            (
                refused(|c| c.disks = vec![disk("a"); 10]),
                &["10 disks", "room for 9"],
            ),
            (
                refused(|c| c.disks = vec![disk("123456789012345678901")]),
                &["21 bytes", "20"],
            ),
            (
                refused(|c| c.disks = vec![parts(0)]),
                &["\"layers\" of 0 parts", "1 to 255"],
            ),
            (
                refused(|c| c.disks = vec![parts(256)]),
                &["256 parts", "1 to 255"],
            ),
            (
                refused(|c| c.disks = vec![named("\u{1f41a}".repeat(19))]),
                &["38 UTF-16 units", "at most 36"],
            ),
            (
                refused(|c| c.disks = vec![named("a\0".to_owned())]),
                &["without a zero"],
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

    #[test]
    fn parts_are_named_after_their_files_as_far_as_that_fits() {
        let long = format!("/layers/{}.erofs", "\u{1f41a}".repeat(20));
        let disk = DiskConfig::parts(["/layers/base.erofs", "/", &long], true, "layers");
        assert_eq!(disk.check(), Ok(()));
        let DiskSource::Parts(parts) = &disk.source else {
            panic!("{disk:?}");
        };
        let names: Vec<&str> = parts.iter().map(|part| &part.name[..]).collect();
        assert_eq!(names, ["base.erofs", "", &"\u{1f41a}".repeat(18)]);
        assert_eq!(disk.source.to_string(), "/layers/base.erofs and 2 more");
    }
}
