//! The state that a vCPU begins with: CPUID, MSRs, local APIC and registers.
//!
//! The guest sees one package with one thread a core; a vCPU's APIC id is its index. Virtualization
//! and performance monitoring are hidden from it. Everything else in CPUID is what KVM supports on
//! this host.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_cpuid_entry2,
    kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, VcpuFd};

use super::Error;

/// Where a vCPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// At a PVH entry point (the boot vCPU): 32-bit protected mode, flat, without paging.
    Pvh {
        /// Physical address of the first instruction.
        entry: u64,
        /// Physical address of `hvm_start_info`, given in ebx.
        start_info: u64,
    },
    /// Nowhere until another vCPU sends it INIT and SIPI.
    WaitForSipi,
}

const MSR_ARCH_CAPABILITIES: u32 = 0x10a;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
/// MTRRs on, write-back where no range says otherwise.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const LVT_MASKED: u32 = 1 << 16;
const LVT_EXTINT: u32 = 7 << 8;
const LVT_NMI: u32 = 4 << 8;

/// What KVM supports on this host, to be fitted to each vCPU.
///
/// # Errors
///
/// If KVM does not say.
pub fn supported_cpuid(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map(|cpuid| cpuid.as_slice().to_vec())
        .map_err(Error::Cpuid)
}

/// Brings a fresh vCPU into its first state. `cores` is how many vCPUs the guest is told of.
///
/// # Errors
///
/// If KVM refuses any of it, except for single MSRs: those are logged.
pub fn set_up(
    vcpu: &VcpuFd,
    kvm: &Kvm,
    supported: &[kvm_cpuid_entry2],
    index: u8,
    cores: u8,
    entry: Entry,
) -> Result<(), Error> {
    let setup = |what| {
        move |source| Error::Setup {
            what,
            vcpu: index,
            source,
        }
    };
    let entries = cpuid(supported, index, cores);
    let table = CpuId::from_entries(&entries).map_err(|_| Error::CpuidSize(index))?;
    vcpu.set_cpuid2(&table).map_err(setup("set the CPUID"))?;
    set_msrs(vcpu, kvm, &entries, index);
    let mut lapic = vcpu.get_lapic().map_err(setup("read the local APIC"))?;
    set_register(&mut lapic, APIC_LVT0, LVT_EXTINT | LVT_MASKED);
    set_register(&mut lapic, APIC_LVT1, LVT_NMI);
    vcpu.set_lapic(&lapic)
        .map_err(setup("set the local APIC"))?;
    match entry {
        // KVM begins all vCPUs but the first in just that state.
        Entry::WaitForSipi => Ok(()),
        Entry::Pvh { entry, start_info } => {
            let mut sregs = vcpu
                .get_sregs()
                .map_err(setup("read the system registers"))?;
            let data = segment(0x3, 2);
            sregs.cs = segment(0xb, 1);
            sregs.ds = data;
            sregs.es = data;
            sregs.fs = data;
            sregs.gs = data;
            sregs.ss = data;
            sregs.tr = kvm_segment {
                limit: 0x67,
                g: 0,
                db: 0,
                s: 0,
                ..segment(0xb, 3)
            };
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
            vcpu.set_sregs(&sregs)
                .map_err(setup("set the system registers"))?;
            vcpu.set_regs(&kvm_regs {
                rip: entry,
                rbx: start_info,
                rflags: RFLAGS_RESERVED,
                ..kvm_regs::default()
            })
            .map_err(setup("set the registers"))
        }
    }
}

/// MSRs of KVM's paravirtual features by which the host writes into guest memory, and the TSC deadline: what an unplugged
/// vCPU leaves of them is not for its successor.
const RESET_MSRS: [u32; 6] = [
    0x4b56_4d01, // MSR_KVM_SYSTEM_TIME_NEW
    0x4b56_4d02, // MSR_KVM_ASYNC_PF_EN
    0x4b56_4d03, // MSR_KVM_STEAL_TIME
    0x4b56_4d04, // MSR_KVM_PV_EOI_EN
    0x4b56_4d06, // MSR_KVM_ASYNC_PF_INT
    0x6e0,       // IA32_TSC_DEADLINE
];

/// The state that a vCPU has before its first entry into the guest, to come back to when it is plugged again.
pub struct Birth {
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    debug: kvm_debugregs,
    fpu: kvm_fpu,
}

impl Birth {
    /// Takes down the state of a vCPU that has been set up and not run.
    ///
    /// # Errors
    ///
    /// If KVM does not tell.
    pub fn of(vcpu: &VcpuFd, index: u8) -> Result<Self, Error> {
        let read = |source| Error::Setup {
            what: "read the first state",
            vcpu: index,
            source,
        };
        Ok(Self {
            regs: vcpu.get_regs().map_err(read)?,
            sregs: vcpu.get_sregs().map_err(read)?,
            lapic: vcpu.get_lapic().map_err(read)?,
            debug: vcpu.get_debug_regs().map_err(read)?,
            fpu: vcpu.get_fpu().map_err(read)?,
        })
    }

    /// Brings a vCPU back to it, to wait for INIT and SIPI. Its thread is out of the guest.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub fn restore(&self, vcpu: &VcpuFd, index: u8) -> Result<(), Error> {
        let setup = |what| {
            move |source| Error::Setup {
                what,
                vcpu: index,
                source,
            }
        };
        for number in RESET_MSRS {
            let entry = kvm_msr_entry {
                index: number,
                ..kvm_msr_entry::default()
            };
            // What this KVM does not have needs no reset.
            if let Ok(msrs) = Msrs::from_entries(&[entry]) {
                let _ = vcpu.set_msrs(&msrs);
            }
        }
        vcpu.set_sregs(&self.sregs)
            .map_err(setup("reset the system registers"))?;
        vcpu.set_regs(&self.regs)
            .map_err(setup("reset the registers"))?;
        vcpu.set_fpu(&self.fpu)
            .map_err(setup("reset the floating point unit"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(setup("reset the debug registers"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(setup("reset the local APIC"))?;
        vcpu.set_vcpu_events(&kvm_vcpu_events::default())
            .map_err(setup("reset the pending events"))?;
        vcpu.set_mp_state(kvm_mp_state {
            mp_state: KVM_MP_STATE_UNINITIALIZED,
        })
        .map_err(setup("reset the run state"))
    }
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const RFLAGS_RESERVED: u64 = 2;

/// A flat 4 GiB segment of 32 bits.
fn segment(type_: u8, index: u16) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index << 3,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

fn set_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (place, byte) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *place = byte as std::ffi::c_char;
    }
}

/// Sets MSRs one by one, since not every KVM takes all of them.
fn set_msrs(vcpu: &VcpuFd, kvm: &Kvm, cpuid: &[kvm_cpuid_entry2], index: u8) {
    let mut wanted = vec![
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    let announced = cpuid
        .iter()
        .any(|leaf| leaf.function == 7 && leaf.index == 0 && leaf.edx & 1 << 29 != 0);
    if announced && let Some(value) = host_feature_msr(kvm, MSR_ARCH_CAPABILITIES) {
        wanted.push((MSR_ARCH_CAPABILITIES, value));
    }
    for (number, data) in wanted {
        let entry = kvm_msr_entry {
            index: number,
            data,
            ..kvm_msr_entry::default()
        };
        let set = Msrs::from_entries(&[entry])
            .ok()
            .and_then(|msrs| vcpu.set_msrs(&msrs).ok());
        if set != Some(1) {
            tracing::debug!(
                vcpu = index,
                msr = format_args!("{number:#x}"),
                value = format_args!("{data:#x}"),
                "this host's KVM refused an MSR; the guest sees its default"
            );
        }
    }
}

fn host_feature_msr(kvm: &Kvm, number: u32) -> Option<u64> {
    let entry = kvm_msr_entry {
        index: number,
        ..kvm_msr_entry::default()
    };
    let mut msrs = Msrs::from_entries(&[entry]).ok()?;
    (kvm.get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice()[0].data)
}

/// The CPUID table of one vCPU.
fn cpuid(supported: &[kvm_cpuid_entry2], index: u8, cores: u8) -> Vec<kvm_cpuid_entry2> {
    let cores = u32::from(cores.max(1));
    let id = u32::from(index);
    // Bits of an APIC id that tell the cores of the package apart.
    let shift = cores.next_power_of_two().trailing_zeros();
    let vendor = supported.iter().find(|leaf| leaf.function == 0);
    let largest = vendor.map_or(0, |leaf| leaf.eax);
    let amd = vendor.is_some_and(|leaf| {
        // "Auth" of AuthenticAMD, "Hygo" of HygonGenuine.
        [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")].contains(&leaf.ebx)
    });
    let mut table: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter(|leaf| !matches!(leaf.function, 0xb | 0x1f))
        .map(|leaf| {
            let mut leaf = *leaf;
            match leaf.function {
                1 => {
                    let addressable = (1 << shift).min(255);
                    leaf.ebx = leaf.ebx & 0xffff | addressable << 16 | id << 24;
                    leaf.ecx |= FEATURE_HYPERVISOR | FEATURE_TSC_DEADLINE;
                    leaf.ecx &= !FEATURE_VMX;
                    if cores > 1 {
                        leaf.edx |= FEATURE_HTT;
                    } else {
                        leaf.edx &= !FEATURE_HTT;
                    }
                }
                // Deterministic cache parameters (Intel).
                4 if leaf.eax & 0x1f != 0 => {
                    let cores_field = ((1 << shift) - 1).min(63) << 26;
                    leaf.eax = leaf.eax & 0x3fff | sharing(leaf.eax, cores) << 14 | cores_field;
                }
                // Performance monitoring is not virtualized.
                0xa => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
                0x8000_0001 => leaf.ecx &= !FEATURE_SVM,
                0x8000_000a => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
                // Cores of the package (AMD).
                0x8000_0008 if amd => leaf.ecx = shift << 12 | (cores - 1),
                // Cache properties (AMD).
                0x8000_001d if leaf.eax & 0x1f != 0 => {
                    leaf.eax = leaf.eax & 0x3fff | sharing(leaf.eax, cores) << 14;
                }
                // Extended APIC id, core and node (AMD).
                0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id & 0xff, 0),
                _ => {}
            }
            leaf
        })
        .collect();
    for function in [0xb, 0x1f] {
        if largest >= function {
            let levels = [
                // One thread a core; the type is SMT (1).
                (0, 1, 1 << 8),
                // All cores of the package; the type is core (2).
                (shift, cores, 2 << 8 | 1),
                (0, 0, 2),
            ];
            for (level, (eax, ebx, ecx)) in levels.into_iter().enumerate() {
                table.push(kvm_cpuid_entry2 {
                    function,
                    index: level as u32,
                    flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    eax,
                    ebx,
                    ecx,
                    edx: id,
                    ..kvm_cpuid_entry2::default()
                });
            }
        }
    }
    table
}

const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_VMX: u32 = 1 << 5;
const FEATURE_SVM: u32 = 1 << 2;
const FEATURE_HYPERVISOR: u32 = 1 << 31;
const FEATURE_HTT: u32 = 1 << 28;

/// How many others share a cache, by the level in bits 7:5: the third is the package's.
fn sharing(eax: u32, cores: u32) -> u32 {
    if (eax >> 5) & 7 >= 3 { cores - 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn host() -> Vec<kvm_cpuid_entry2> {
        let amd = u32::from_le_bytes(*b"Auth");
        vec![
            leaf(0, [0xd, amd, 0, 0]),
            leaf(1, [0x800f12, 0x0502_0800, FEATURE_VMX, 0]),
            leaf(0x8000_0001, [0, 0, FEATURE_SVM | 1, 0]),
            leaf(0x8000_000a, [1, 2, 3, 4]),
            leaf(4, [0x0400_0163, 0, 0, 0]),
            leaf(0xa, [1, 2, 3, 4]),
            leaf(0xb, [9, 9, 9, 9]),
            leaf(0x8000_0008, [48, 0, 0x5005, 0]),
            leaf(0x8000_001d, [0x0000_c163, 0, 0, 0]),
            leaf(0x8000_001e, [7, 7, 7, 7]),
        ]
    }

    fn find(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table
            .iter()
            .find(|leaf| leaf.function == function && leaf.index == index)
            .expect("leaf")
    }

    #[test]
    fn topology_leaves_agree_about_id_and_cores() {
        for (index, cores, shift) in [(0, 1, 0), (1, 2, 1), (2, 3, 2), (253, 254, 8)] {
            let table = cpuid(&host(), index, cores);
            let (id, cores) = (u32::from(index), u32::from(cores));
            let features = find(&table, 1, 0);
            assert_eq!(features.ebx >> 24, id);
            assert_eq!((features.ebx >> 16) & 0xff, (1u32 << shift).min(255));
            assert_eq!(features.ebx & 0xffff, 0x0800);
            assert_ne!(features.ecx & FEATURE_HYPERVISOR, 0);
            assert_ne!(features.ecx & FEATURE_TSC_DEADLINE, 0);
            assert_eq!(features.edx & FEATURE_HTT != 0, cores > 1);
            let core = find(&table, 0xb, 1);
            assert_eq!((core.eax, core.ebx, core.edx), (shift, cores, id));
            assert_eq!(find(&table, 0xb, 0).ebx, 1);
            assert_eq!(find(&table, 0xb, 2).ecx, 2);
            assert!(!table.iter().any(|leaf| leaf.function == 0x1f));
            assert_eq!(find(&table, 0x8000_0008, 0).ecx, shift << 12 | (cores - 1));
            assert_eq!(find(&table, 0x8000_001e, 0).eax, id);
            assert_eq!((find(&table, 0x8000_001d, 0).eax >> 14) & 0xfff, cores - 1);
            assert_eq!(find(&table, 0xa, 0).eax, 0);
        }
    }

    #[test]
    fn virtualization_is_hidden() {
        let table = cpuid(&host(), 0, 1);
        assert_eq!(find(&table, 1, 0).ecx & FEATURE_VMX, 0);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx, 1);
        assert_eq!(find(&table, 0x8000_000a, 0).eax, 0);
    }

    #[test]
    fn register_of_the_local_apic_is_little_endian() {
        let mut lapic = kvm_lapic_state::default();
        set_register(&mut lapic, APIC_LVT0, 0x0001_0700);
        let bytes: Vec<u8> = lapic.regs[APIC_LVT0..][..4]
            .iter()
            .map(|byte| *byte as u8)
            .collect();
        assert_eq!(bytes, [0, 7, 1, 0]);
    }
}
