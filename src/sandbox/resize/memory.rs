//! Which way memory goes, and how much of it: the size that is asked for is that of the whole VM.

use std::time::Duration;

use nacre_vmm::virtio::mem::BLOCK_BYTES;
use tokio::time::Instant;

use super::requested::AGAIN;
use super::units::is_short;
use super::{MemoryWay, Resized, Step, us};
use crate::control::Memory;
use crate::sandbox::Sandbox;
use crate::sandbox::error::{Error, chain};
use crate::sandbox::host::bounded;

/// How long what a container has just let go of may take to be available.
const SOON: Duration = Duration::from_secs(2);

/// Where a size goes that is between two steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To the larger.
    Up,
    /// To the one that is nearer to the present size.
    Towards,
}

impl Rounding {
    /// What is to come, as a multiple of `step`. What is to go is always rounded down.
    fn apply(self, more: u64, step: u64) -> u64 {
        match self {
            Self::Up => more.next_multiple_of(step),
            Self::Towards => more - more % step,
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

    /// Brings the VM's memory to `to_mib` in all, or a little more where the way has larger steps. What the VM began with stays.
    /// What a change that failed or was given up has left is brought online, or goes, before other memory. Waits for the agent.
    ///
    /// # Errors
    /// [`Error::Resize`] with the cause, and the size is as before; where the guest did not let that be, the words say so. For
    /// less than the VM began with, more than it was started for, and a VM that has ended, at once.
    pub async fn resize_memory(&self, to_mib: u64) -> Result<Resized, Error> {
        self.resize_memory_rounded(to_mib, Rounding::Up).await
    }

    /// [`Self::resize_memory`], with a choice of where a size between two steps goes.
    ///
    /// # Errors
    /// As there.
    pub async fn resize_memory_rounded(
        &self,
        to_mib: u64,
        rounding: Rounding,
    ) -> Result<Resized, Error> {
        let doing = format!("bring the VM to {to_mib} MiB of memory");
        let failed = |before: u64, cause: String| Error::Resize {
            doing: format!("{doing} from {before}"),
            cause,
        };
        let possible = self.unless_gone(self.within_bounds(to_mib));
        let wanted = possible.map_err(|cause| failed(self.memory_mib(), cause))?;
        let _turn = self.turn(&doing).await?;
        let before = self.memory_mib();
        let outcome = self.to_plugged(wanted, rounding).await;
        let steps = self
            .unless_gone(outcome)
            .map_err(|cause| failed(before, cause))?;
        let now = self.memory_mib();
        tracing::info!(id = self.0.id, before, now, "memory resized");
        Ok(Resized { before, now, steps })
    }

    /// Bytes to be plugged for a size.
    fn within_bounds(&self, to_mib: u64) -> Result<u64, String> {
        let (boot, max) = (self.0.memory_mib, self.max_memory_mib());
        let Some(plugged) = to_mib.checked_sub(boot) else {
            return Err(format!(
                "it began with {boot} MiB, and only what was plugged can be unplugged"
            ));
        };
        if plugged > 0 && max == boot {
            let what = match self.0.memory_way {
                MemoryWay::VirtioMem => "a virtio-mem device",
                MemoryWay::Acpi => "units of ACPI memory",
                MemoryWay::Auto => "a virtio-mem device or units of ACPI memory",
            };
            return Err(format!("the VM was started without {what}"));
        }
        if to_mib > max {
            return Err(format!(
                "it was started for {max} MiB at most (the most is fixed when the VM starts)"
            ));
        }
        Ok(plugged * MIB)
    }

    async fn to_plugged(&self, wanted: u64, rounding: Rounding) -> Result<Vec<Step>, String> {
        let now = self.plugged_bytes();
        if wanted < now {
            return self.shrink(now - wanted).await;
        }
        let mut steps = Vec::new();
        for unit in self.left_over_units() {
            steps.extend(self.use_unit(&unit).await?);
        }
        let now = self.plugged_bytes();
        // Where the last change of the virtio-mem device came to another size than it was to, the device is not to move any more.
        if let Some(status) = self.mem_status()
            && status.requested != status.plugged
        {
            steps.extend(self.request(status.plugged).await?);
        }
        if wanted > now {
            steps.extend(self.grow(wanted, rounding).await?);
        }
        Ok(steps)
    }

    /// Gives the guest more, until `wanted` bytes are plugged.
    async fn grow(&self, wanted: u64, rounding: Rounding) -> Result<Vec<Step>, String> {
        let resources = self.resources().await.map_err(|error| chain(&error))?;
        let lacks = |what: &str| {
            let mut why = what.to_owned();
            for lack in resources.lacks.iter().take(8) {
                why.push_str("; the guest lacks ");
                why.push_str(&bounded(lack, 128));
            }
            Err(why)
        };
        let (units, status) = (self.unit_bytes(), self.mem_status());
        let virtio = match self.0.memory_way {
            MemoryWay::VirtioMem => true,
            MemoryWay::Acpi => false,
            MemoryWay::Auto => resources.virtio_mem && status.is_some(),
        };
        if virtio {
            // A VM without the device is refused before.
            let status = status.unwrap_or_default();
            if !status.driver && !resources.virtio_mem {
                return lacks("no driver has taken the virtio-mem device up");
            }
            let more = wanted.saturating_sub(units + status.plugged);
            let to = status.plugged + rounding.apply(more, BLOCK_BYTES);
            if to > status.region {
                return Err(format!(
                    "it was started for {} MiB at most",
                    self.0.memory_mib + (status.region + units) / MIB
                ));
            }
            room_for_pages(
                to.saturating_sub(status.plugged),
                resources.memory_available_bytes,
            )?;
            if to == status.plugged {
                return Ok(Vec::new());
            }
            let began = Instant::now();
            let mut steps = self.request(to).await?;
            let total = resources
                .memory_total_bytes
                .saturating_add(to - status.plugged);
            if let Err(why) = self.shows(total).await {
                let undone = match self.request(status.plugged).await {
                    Ok(_) => format!("it is back at {} MiB", status.plugged / MIB),
                    Err(error) => error,
                };
                return Err(format!("{why}; {undone}"));
            }
            if let Some(step) = steps.last_mut() {
                step.online_us = us(began);
                step.total_us = us(began);
            }
            return Ok(steps);
        }
        let area = self.0.machine.memory_area();
        if area.units == 0 {
            return lacks("the VM was started without units of ACPI memory");
        }
        if resources.memory_block_bytes == 0 {
            return lacks("the guest's kernel takes no memory while it runs");
        }
        if !area.unit.is_multiple_of(resources.memory_block_bytes) {
            return Err(format!(
                "the VM's units of memory have {} MiB, and the guest's kernel takes multiples of {} MiB",
                area.unit / MIB,
                resources.memory_block_bytes / MIB
            ));
        }
        let more = wanted.saturating_sub(self.plugged_bytes());
        let more = rounding.apply(more, area.unit);
        if more == 0 {
            return Ok(Vec::new());
        }
        room_for_pages(more, resources.memory_available_bytes)?;
        self.add_units(more).await
    }

    /// Waits until the guest's kernel manages `total` bytes: its driver plugs a block before the kernel has it online. The agent
    /// is asked again and again, which is for moments.
    async fn shows(&self, total: u64) -> Result<(), String> {
        const FIRST_PAUSE: Duration = Duration::from_millis(5);
        const LONGEST_PAUSE: Duration = Duration::from_millis(100);
        let patience = self.0.timeouts.resize;
        let mut told = Instant::now();
        let deadline = told + patience;
        let mut pause = FIRST_PAUSE;
        loop {
            let seen = self.resources().await.map_err(|error| chain(&error))?;
            if seen.memory_total_bytes >= total.saturating_sub(MIB) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "after {patience:?} the guest's kernel has {} MiB online of {}",
                    seen.memory_total_bytes / MIB,
                    total / MIB
                ));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            // The driver gives a block back that the kernel does not take, and tries again when it is told.
            if told.elapsed() >= AGAIN
                && let Some(status) = self.mem_status()
            {
                told = Instant::now();
                let _ = self.0.machine.request_memory(status.requested);
            }
        }
    }

    /// Takes `less` bytes of what is plugged, rounded down to what can go: of the virtio-mem device first, if its driver runs. Both
    /// ways have plugged some only in a guest whose driver came or went.
    async fn shrink(&self, less: u64) -> Result<Vec<Step>, String> {
        let units = self.unit_bytes();
        let status = self.mem_status().unwrap_or_default();
        let by_device = if status.driver {
            less.min(status.plugged)
        } else {
            0
        };
        let to = (status.plugged - by_device).next_multiple_of(BLOCK_BYTES);
        let rest = less.saturating_sub(status.plugged.saturating_sub(to));
        let unit = self.0.machine.memory_area().unit.max(1);
        let by_units = (rest - rest % unit).min(units);
        if !status.driver && status.plugged > 0 && rest > by_units {
            return Err(format!(
                "the virtio-mem device has {} MiB plugged, and no driver runs it any more",
                status.plugged / MIB
            ));
        }
        let mut steps = Vec::new();
        let mut total = None;
        if status.driver && (status.plugged, status.requested) != (to, to) {
            let seen = self.resources().await.ok();
            total = seen.as_ref().map(|seen| seen.memory_total_bytes);
            if status.requested == status.plugged
                && let Some(seen) = seen
            {
                self.has_room(seen.memory_available_bytes, status.plugged - to)
                    .await?;
            }
            match self.request(to).await {
                Ok(step) => steps = step,
                Err(mut why) => {
                    why.push_str(&self.has_again(status.plugged, total).await);
                    let available = self.available().await;
                    let available = available.map_or_else(String::new, |bytes| {
                        format!("; the guest has {} MiB available", bytes / MIB)
                    });
                    return Err(format!("{why}{available}"));
                }
            }
        }
        if by_units == 0 {
            return Ok(steps);
        }
        match self.remove_units(units - by_units).await {
            Ok(more) => steps.extend(more),
            Err(why) if steps.is_empty() => return Err(why),
            Err(why) => {
                let mut undone = match self.request(status.plugged).await {
                    Ok(_) => "what the virtio-mem device gave back is plugged again".to_owned(),
                    Err(error) => error,
                };
                undone.push_str(&self.has_again(status.plugged, total).await);
                return Err(format!("{why}; {undone}"));
            }
        }
        Ok(steps)
    }

    /// Whether the guest, which has so much available, or has it soon, can do without what is to go: one that gave until it had nothing
    /// left would hardly have room to take it back.
    async fn has_room(&self, mut available: u64, goes: u64) -> Result<(), String> {
        let until = Instant::now() + SOON;
        // 0 is a guest that does not know.
        while available != 0 && is_short(available, goes) {
            if Instant::now() >= until {
                return Err(format!(
                    "{} MiB were to go by virtio-mem: not tried, since the guest has only {} MiB available",
                    goes / MIB,
                    available / MIB
                ));
            }
            tokio::time::sleep(SOON / 4).await;
            available = self.available().await.unwrap_or(0);
        }
        Ok(())
    }

    /// Where the driver is back at `plugged` bytes, waits until the guest's kernel manages the `total` that it had before: what
    /// there is to say if it does not come to that.
    async fn has_again(&self, plugged: u64, total: Option<u64>) -> String {
        let status = self.mem_status().unwrap_or_default();
        match total {
            Some(total) if status.plugged == plugged => match self.shows(total).await {
                Ok(()) => String::new(),
                Err(why) => format!("; {why}"),
            },
            _ => String::new(),
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
    fn what_is_between_two_steps_goes_up_or_towards_the_present_size() {
        for (more, up, towards) in [(0, 0, 0), (1, 128, 0), (128, 128, 128), (255, 256, 128)] {
            assert_eq!(Rounding::Up.apply(more, 128), up, "{more}");
            assert_eq!(Rounding::Towards.apply(more, 128), towards, "{more}");
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
