//! Which way memory goes, and how much of it: the size that is asked for is that of the whole VM.

use super::{MemoryWay, Resized, Step};
use crate::control::Memory;
use crate::sandbox::Sandbox;
use crate::sandbox::error::Error;

/// Where a size goes that is between two steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To the larger.
    Up,
    /// To the one that is nearer to the present size.
    Towards,
}

impl Rounding {
    /// `wanted` as a multiple of `step`, for a present size of `now`.
    fn apply(self, wanted: u64, step: u64, now: u64) -> u64 {
        match self {
            Self::Towards if wanted > now => (wanted - wanted % step).max(now),
            Self::Up | Self::Towards => wanted.next_multiple_of(step),
        }
    }
}

/// Bytes of a page, and of what the kernel keeps for each: 1.56 %.
const PAGE: u64 = 4096;
const PAGE_STRUCTURE: u64 = 64;
/// What a guest keeps for itself while it takes memory in.
const SPARE: u64 = 8 << 20;
const MIB: u64 = 1 << 20;

impl Sandbox {
    /// Memory that is there, in MiB: of the boot, and plugged.
    pub fn memory_mib(&self) -> u64 {
        self.0.memory_mib + self.plugged_bytes() / MIB
    }

    /// What the VM began with, in MiB; it does not get smaller than this.
    pub fn boot_memory_mib(&self) -> u64 {
        self.0.memory_mib
    }

    /// Most memory that there may be, in MiB.
    pub fn max_memory_mib(&self) -> u64 {
        let area = self.0.machine.memory_area();
        let units = u64::from(area.units) * area.unit;
        let region = self.mem_status().map_or(0, |status| status.region);
        let most = match self.0.memory_way {
            MemoryWay::Auto => units.max(region),
            MemoryWay::VirtioMem => region,
            MemoryWay::Acpi => units,
        };
        self.0.memory_mib + most / MIB
    }

    /// Guest memory by its parts.
    pub(crate) fn memory_parts(&self) -> Memory {
        Memory {
            boot_mib: self.0.memory_mib,
            plugged_mib: self.plugged_bytes() / MIB,
            max_mib: self.max_memory_mib(),
            given_back_mib: self.0.machine.given_back() / MIB,
        }
    }

    /// What is plugged.
    fn plugged_bytes(&self) -> u64 {
        self.unit_bytes() + self.mem_status().map_or(0, |status| status.plugged)
    }

    /// Brings the VM's memory to `to_mib` in all, rounded to a step of the way that it goes. What the VM began with stays.
    /// Waits for the agent.
    ///
    /// # Errors
    /// [`Error::Resize`] with the cause, and the size is as before; where the guest did not let that be, the words say so.
    pub async fn resize_memory(&self, to_mib: u64, rounding: Rounding) -> Result<Resized, Error> {
        let doing = format!("bring the VM to {to_mib} MiB of memory");
        let _turn = self.turn(&doing).await?;
        let before = self.memory_mib();
        let failed = |cause: String| Error::Resize {
            doing: format!("{doing} from {before}"),
            cause,
        };
        let boot = self.0.memory_mib;
        let Some(wanted) = to_mib.checked_sub(boot) else {
            return Err(failed(format!(
                "it began with {boot} MiB, and only what was plugged can be unplugged"
            )));
        };
        let result = self.to_plugged(wanted.saturating_mul(MIB), rounding).await;
        let steps = result.map_err(failed)?;
        let now = self.memory_mib();
        tracing::info!(id = self.0.id, before, now, "memory resized");
        Ok(Resized { before, now, steps })
    }

    async fn to_plugged(&self, wanted: u64, rounding: Rounding) -> Result<Vec<Step>, String> {
        let now = self.plugged_bytes();
        if wanted == now {
            return Ok(Vec::new());
        }
        let resources = self.resources().await.map_err(|error| error.to_string())?;
        let virtio = match self.0.memory_way {
            MemoryWay::VirtioMem => true,
            MemoryWay::Acpi => false,
            MemoryWay::Auto => resources.virtio_mem && self.mem_status().is_some(),
        };
        if wanted > now {
            room_for_pages(wanted - now, resources.memory_available_bytes)?;
        }
        let units = self.unit_bytes();
        let lacks = |what: &str| {
            let mut why = what.to_owned();
            for lack in resources.lacks.iter().take(8) {
                why.push_str("; the guest lacks ");
                why.push_str(&super::super::host::bounded(lack, 128));
            }
            why
        };
        if virtio {
            let Some(status) = self.mem_status() else {
                return Err("the VM was started without a virtio-mem device".to_owned());
            };
            if !status.driver && !resources.virtio_mem {
                return Err(lacks("no driver has taken the virtio-mem device up"));
            }
            if wanted.saturating_sub(units) > status.region {
                return Err(format!(
                    "it was started for {} MiB at most",
                    self.0.memory_mib + (status.region + units) / MIB
                ));
            }
            let wanted = rounding.apply(
                wanted.saturating_sub(units),
                2 * MIB,
                now.saturating_sub(units),
            );
            return self.request(wanted).await;
        }
        let area = self.0.machine.memory_area();
        if area.units == 0 {
            return Err(lacks("the VM was started without units of ACPI memory"));
        }
        if resources.memory_block_bytes == 0 {
            return Err(lacks("the guest's kernel takes no memory while it runs"));
        }
        if !area.unit.is_multiple_of(resources.memory_block_bytes) {
            return Err(format!(
                "the VM's units of memory have {} MiB, and the guest's kernel takes multiples of {} MiB",
                area.unit / MIB,
                resources.memory_block_bytes / MIB
            ));
        }
        let requested = self.mem_status().map_or(0, |status| status.plugged);
        let wanted = wanted.saturating_sub(requested).next_multiple_of(area.unit);
        match wanted.checked_sub(units) {
            Some(0) => Ok(Vec::new()),
            Some(more) => self.add_units(more).await,
            None => self.remove_units(units - wanted).await,
        }
    }
}

/// Whether the guest has room for the structures that its kernel keeps of each new page.
fn room_for_pages(more: u64, available: u64) -> Result<(), String> {
    let needed = more / PAGE * PAGE_STRUCTURE;
    if available >= needed.saturating_add(SPARE) {
        return Ok(());
    }
    Err(format!(
        "for {} MiB more the guest's kernel needs {} MiB for page structures (1.56 %) and {} MiB to spare, and has {} MiB available: ask for less at a time",
        more / MIB,
        needed.div_ceil(MIB),
        SPARE / MIB,
        available / MIB
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_between_two_steps_goes_up_or_towards_the_present_one() {
        // wanted, step, now → up, towards
        for (wanted, step, now, up, towards) in [
            (0, 128, 256, 0, 0),
            (100, 128, 256, 128, 128),
            (256, 128, 256, 256, 256),
            (300, 128, 256, 384, 256),
            (384, 128, 256, 384, 384),
            (511, 128, 0, 512, 384),
            // A present size that is no multiple is not shrunk by growing.
            (130, 128, 129, 256, 129),
        ] {
            assert_eq!(Rounding::Up.apply(wanted, step, now), up, "{wanted} {now}");
            assert_eq!(
                Rounding::Towards.apply(wanted, step, now),
                towards,
                "{wanted} {now}"
            );
        }
    }

    #[test]
    fn new_memory_needs_room_for_its_page_structures() {
        let gib = 1 << 30;
        room_for_pages(128 * MIB, 10 * MIB).unwrap();
        room_for_pages(gib, 24 * MIB).unwrap();
        let why = room_for_pages(gib, 24 * MIB - 1).unwrap_err();
        for words in [
            "1024 MiB more",
            "16 MiB for page structures",
            "8 MiB to spare",
            "has 23 MiB",
        ] {
            assert!(why.contains(words), "{why}");
        }
        room_for_pages(u64::MAX, u64::MAX - 1).unwrap();
    }
}
