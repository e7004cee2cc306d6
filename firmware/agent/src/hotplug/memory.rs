//! Memory that comes and goes, in the kernel's blocks: a block is there when
//! its memory was plugged, usable when it is online, and may be ejected when it
//! is offline. A range goes as a whole or not at all.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::warn;

use crate::error::{Doing, Error};
use crate::hotplug::kernel_files::{KernelFiles, blocking, line, put, words};
use crate::hotplug::offliner::{Ended, Offline};
use crate::hotplug::zones::{Managed, Zone};
use crate::uevents::{self, Changes};

/// The most blocks of one call: 2 TiB of the usual 128 MiB.
const BLOCKS: u64 = 16 * 1024;
/// How long blocks that this call brought online may take to go again when another did not come.
const ROLL_BACK_LIMIT: Duration = Duration::from_secs(10);

/// The machine's memory, as sysfs shows it.
#[derive(Clone)]
pub struct Memory {
    files: KernelFiles,
    page_bytes: u64,
}

/// A block and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Address / block size.
    pub number: u64,
    /// The zone that it is in.
    pub zone: Zone,
}

/// One block did not come online; those that had come before it by the same call.
struct Incomplete {
    refusal: String,
    brought: Vec<u64>,
}

/// Writes to a file of the kernel's; another in tests.
type Put = fn(&Path, &str) -> io::Result<()>;

impl Memory {
    pub fn new(files: KernelFiles, page_bytes: u64) -> Memory {
        Memory { files, page_bytes }
    }

    fn folder(&self) -> PathBuf {
        self.files.sys.join("devices/system/memory")
    }

    fn block(&self, number: u64) -> PathBuf {
        self.folder().join(format!("memory{number}"))
    }

    /// Bytes of a block; 0: the kernel has no memory hotplug.
    pub fn block_bytes(&self) -> u64 {
        line(&self.folder().join("block_size_bytes"))
            .and_then(|text| u64::from_str_radix(&text, 16).ok())
            .unwrap_or(0)
    }

    /// What the buddy allocator manages.
    pub fn managed(&self) -> Managed {
        Managed::parse(&self.files.proc_text("zoneinfo"), self.page_bytes)
    }

    /// The blocks of a range.
    ///
    /// # Errors
    /// `InvalidArgument` for a range that is empty, no multiple of the block size, too long, or past the end of
    /// addresses; `FailedPrecondition` if the kernel has no blocks.
    pub fn blocks(&self, base: u64, bytes: u64) -> Result<Range<u64>, Error> {
        let size = self.block_bytes();
        if size == 0 {
            return Err(Error::FailedPrecondition(format!(
                "the guest's kernel has no memory hotplug: {} is not there",
                self.folder().join("block_size_bytes").display()
            )));
        }
        let wrong = |why: &str| {
            Error::InvalidArgument(format!("memory of {bytes:#x} bytes at {base:#x}: {why}"))
        };
        if bytes == 0 {
            return Err(wrong("there is nothing in it"));
        }
        if !base.is_multiple_of(size) || !bytes.is_multiple_of(size) {
            return Err(wrong(&format!(
                "both must be multiples of the guest's memory block size, {size:#x}"
            )));
        }
        let (first, count) = (base / size, bytes / size);
        if count > BLOCKS {
            return Err(wrong(&format!("that is more than {BLOCKS} blocks")));
        }
        match first.checked_add(count) {
            Some(end) if base.checked_add(bytes - 1).is_some() => Ok(first..end),
            _ => Err(wrong("it ends past the end of addresses")),
        }
    }

    /// Waits for all blocks to be there, online or not.
    ///
    /// # Errors
    /// `NotFound` after `wait`, with the first that is missing.
    pub async fn appeared(
        &self,
        blocks: &Range<u64>,
        wait: Duration,
        changes: &mut impl Changes,
    ) -> Result<(), Error> {
        let mut missing = blocks.start;
        let look = || {
            while missing < blocks.end && self.state(missing).is_some() {
                missing += 1;
            }
            (missing == blocks.end).then_some(())
        };
        let came = uevents::appear(changes, wait, look)
            .await
            .doing(|| format!("waiting for memory blocks {}", shown(blocks)))?;
        came.ok_or_else(|| {
            Error::NotFound(format!(
                "memory blocks {}: the kernel did not show block {missing} within {} ms",
                shown(blocks),
                wait.as_millis()
            ))
        })
    }

    fn state(&self, number: u64) -> Option<String> {
        line(&self.block(number).join("state"))
    }

    fn is_online(&self, number: u64) -> bool {
        self.state(number).as_deref() == Some("online")
    }

    fn is_offline(&self, number: u64) -> bool {
        self.state(number).as_deref() == Some("offline")
    }

    /// The kernel's names of the zones that a block can be in; of an online one, the zone that it is in, or `none` where
    /// it is in several.
    fn valid_zones(&self, number: u64) -> String {
        line(&self.block(number).join("valid_zones")).unwrap_or_default()
    }

    fn zone(&self, number: u64) -> Zone {
        let zones = self.valid_zones(number);
        Zone::named(zones.split_whitespace().next().unwrap_or_default())
    }

    /// Brings all blocks online, and answers with where they are. Those that the kernel brought online by itself stay
    /// where it put them. If one does not come, those that this call brought go offline again.
    ///
    /// # Errors
    /// `Internal`, naming the block and the kernel's error.
    pub async fn bring_online(
        &self,
        blocks: &Range<u64>,
        offline: &impl Offline,
    ) -> Result<Vec<Block>, Error> {
        self.bring_online_by(blocks, offline, put).await
    }

    async fn bring_online_by(
        &self,
        blocks: &Range<u64>,
        offline: &impl Offline,
        put: Put,
    ) -> Result<Vec<Block>, Error> {
        let (this, range) = (self.clone(), blocks.clone());
        let came = blocking(move || Ok(this.bring(&range, put))).await?;
        let Incomplete { refusal, brought } = match came {
            Ok(blocks) => return Ok(blocks),
            Err(incomplete) => incomplete,
        };
        if brought.is_empty() {
            return Err(Error::Internal(refusal));
        }
        let count = brought.len();
        let tried = offline
            .offline(self.folder(), brought.clone(), ROLL_BACK_LIMIT)
            .await;
        let stay: Vec<u64> = brought
            .into_iter()
            .filter(|number| !self.is_offline(*number))
            .collect();
        Err(Error::Internal(match stay.as_slice() {
            [] => format!("{refusal}; the {count} that had come are offline again"),
            _ => format!(
                "{refusal}; of those that had come, {stay:?} did not go offline again: {tried:?}"
            ),
        }))
    }

    fn bring(&self, blocks: &Range<u64>, put: Put) -> Result<Vec<Block>, Incomplete> {
        let block_bytes = self.block_bytes();
        let mut managed = self.managed();
        let mut all = Vec::new();
        let mut brought = Vec::new();
        for number in blocks.clone() {
            if !self.is_online(number) {
                // Not by `valid_zones`: while a block is being added the kernel looks that up in a node that is not known yet,
                // and crashes (6.1, 6.12). A write waits until it is added.
                let wanted = managed.zone_for(block_bytes);
                match self.bring_one(number, wanted, put) {
                    Ok(zone) => {
                        managed.add(zone, block_bytes);
                        brought.push(number);
                        all.push(Block { number, zone });
                        continue;
                    }
                    // The kernel was about to do it by itself, and was first.
                    Err(_) if self.is_online(number) => managed.add(self.zone(number), block_bytes),
                    Err((zone, error)) => {
                        let refusal = format!(
                            "bringing memory block {number} online ({}): {}",
                            zone.online_word(),
                            words(&error)
                        );
                        return Err(Incomplete { refusal, brought });
                    }
                }
            }
            let zone = self.zone(number);
            all.push(Block { number, zone });
        }
        Ok(all)
    }

    /// Brings a block online in the zone that is wanted, or in the kernel's if it cannot be movable; where it is then, or where it
    /// was refused last.
    fn bring_one(&self, number: u64, wanted: Zone, put: Put) -> Result<Zone, (Zone, io::Error)> {
        let state = self.block(number).join("state");
        let put = |zone: Zone| {
            put(&state, zone.online_word())
                .map(|()| zone)
                .map_err(|error| (zone, error))
        };
        match put(wanted) {
            Err((Zone::Movable, error))
                if error.raw_os_error() == Some(libc::EINVAL) && !self.is_online(number) =>
            {
                put(Zone::Kernel)
            }
            result => result,
        }
    }

    /// Takes all blocks offline, within `limit`. Blocks that are offline or gone already are fine. If one stays, those
    /// that went come online again, in the zones where they were.
    ///
    /// # Errors
    /// `NotFound` if none of them is there; `FailedPrecondition` if one cannot go now, since what is in it cannot be
    /// moved, or not in time; `Internal` otherwise. Each names the block, its zone, and the kernel's error.
    pub async fn take_offline(
        &self,
        blocks: &Range<u64>,
        limit: Duration,
        offline: &impl Offline,
    ) -> Result<(), Error> {
        let there: Vec<u64> = blocks
            .clone()
            .filter(|number| self.state(*number).is_some())
            .collect();
        if there.is_empty() {
            return Err(Error::NotFound(format!(
                "memory blocks {}: none of them is there",
                shown(blocks)
            )));
        }
        let mut going = Vec::new();
        for number in there {
            if self.is_offline(number) {
                continue;
            }
            if line(&self.block(number).join("removable")).as_deref() == Some("0")
                || self.valid_zones(number) == "none"
            {
                return Err(Error::FailedPrecondition(format!(
                    "taking memory block {number} offline: the kernel says that it cannot be removed"
                )));
            }
            let zone = self.zone(number);
            going.push(Block { number, zone });
        }
        if going.is_empty() {
            return Ok(());
        }
        // The likeliest to refuse go first: then there is little to take back.
        going.sort_by_key(|block| block.zone == Zone::Movable);
        let numbers = going.iter().map(|block| block.number).collect();
        let ended = offline.offline(self.folder(), numbers, limit).await?;
        // A block whose memory was ejected meanwhile is as good as offline.
        let stays = |block: &&Block| {
            self.state(block.number)
                .is_some_and(|state| state != "offline")
        };
        let Some(first) = going.iter().find(stays).copied() else {
            return Ok(());
        };
        let (this, went) = (self.clone(), going.clone());
        let back = blocking(move || Ok(this.bring_back(&went))).await?;
        Err(refused(first, ended, limit, &back))
    }

    /// Brings those blocks that are offline online in their zones, and answers with what to say of it.
    fn bring_back(&self, blocks: &[Block]) -> String {
        let mut count = 0;
        let mut left = String::new();
        for block in blocks.iter().filter(|block| self.is_offline(block.number)) {
            let state = self.block(block.number).join("state");
            match put(&state, block.zone.online_word()) {
                Ok(()) => count += 1,
                Err(_) if self.is_online(block.number) => count += 1,
                Err(error) => {
                    warn!(
                        block = block.number,
                        "bringing memory online again: {}",
                        words(&error)
                    );
                    if left.is_empty() {
                        left = format!(
                            "; block {} did not come online again: {}",
                            block.number,
                            words(&error)
                        );
                    }
                }
            }
        }
        match count {
            0 => left,
            _ => format!("; {count} that had gone are online again{left}"),
        }
    }
}

/// Why a block is still online.
fn refused(block: Block, ended: Ended, limit: Duration, back: &str) -> Error {
    let zone = match block.zone {
        Zone::Movable => "movable",
        Zone::Kernel => "kernel",
    };
    let number = block.number;
    let doing = format!("taking memory block {number} (of the {zone} zone) offline");
    match ended {
        Ended::TimedOut => Error::FailedPrecondition(format!(
            "{doing}: given up after {} ms, since pages in it are in use and did not move{back}",
            limit.as_millis()
        )),
        Ended::Refused(errno) => {
            let words = words(&io::Error::from_raw_os_error(errno));
            match (errno, block.zone) {
                (libc::EBUSY, Zone::Movable) => Error::FailedPrecondition(format!(
                    "{doing}: {words}: pages in it cannot be moved now{back}"
                )),
                (libc::EBUSY, Zone::Kernel) => Error::FailedPrecondition(format!(
                    "{doing}: {words}: the kernel's own data is in it{back}"
                )),
                _ => Error::Internal(format!("{doing}: {words}{back}")),
            }
        }
        Ended::Done => Error::Internal(format!(
            "{doing}: the kernel agreed, but it is online{back}"
        )),
    }
}

fn shown(blocks: &Range<u64>) -> String {
    format!("{} to {}", blocks.start, blocks.end.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Mutex;

    use super::*;
    use crate::uevents::tests::Script;

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 128 * MIB;
    const LIMIT: Duration = Duration::from_secs(3);

    struct Machine {
        _folder: tempfile::TempDir,
        memory: Memory,
    }

    impl Machine {
        /// Blocks of 128 MiB, and so many MiB in the kernel's zones.
        fn new(kernel_mib: u64) -> Machine {
            let folder = tempfile::tempdir().unwrap();
            let files = KernelFiles {
                sys: folder.path().join("sys"),
                proc: folder.path().join("proc"),
            };
            fs::create_dir_all(&files.proc).unwrap();
            let pages = kernel_mib * MIB / 4096;
            let zoneinfo = format!("Node 0, zone Normal\n managed {pages}\n");
            fs::write(files.proc.join("zoneinfo"), zoneinfo).unwrap();
            let memory = Memory::new(files, 4096);
            fs::create_dir_all(memory.folder()).unwrap();
            fs::write(memory.folder().join("block_size_bytes"), "8000000\n").unwrap();
            Machine {
                _folder: folder,
                memory,
            }
        }

        fn add(&self, number: u64, state: &str, zones: &str) {
            add(&self.memory, number, state, zones);
        }

        fn states(&self, blocks: Range<u64>) -> Vec<String> {
            blocks
                .map(|number| self.memory.state(number).unwrap_or_default())
                .collect()
        }
    }

    fn add(memory: &Memory, number: u64, state: &str, zones: &str) {
        let block = memory.block(number);
        fs::create_dir_all(&block).unwrap();
        fs::write(block.join("valid_zones"), zones).unwrap();
        fs::write(block.join("removable"), "1\n").unwrap();
        fs::write(block.join("state"), state).unwrap();
    }

    fn movable(blocks: &[Block]) -> Vec<bool> {
        blocks
            .iter()
            .map(|block| block.zone == Zone::Movable)
            .collect()
    }

    /// Takes blocks offline up to one that it refuses; keeps what it was asked for.
    struct Fake {
        refuses: Option<(u64, Ended)>,
        asked: Mutex<Vec<u64>>,
    }

    impl Fake {
        fn new(refuses: Option<(u64, Ended)>) -> Fake {
            Fake {
                refuses,
                asked: Mutex::default(),
            }
        }

        fn asked(&self) -> Vec<u64> {
            self.asked.lock().unwrap().clone()
        }
    }

    impl Offline for Fake {
        async fn offline(
            &self,
            folder: PathBuf,
            numbers: Vec<u64>,
            _: Duration,
        ) -> Result<Ended, Error> {
            *self.asked.lock().unwrap() = numbers.clone();
            for number in numbers {
                let state = folder.join(format!("memory{number}/state"));
                match self.refuses {
                    Some((refused, ended)) if refused == number => return Ok(ended),
                    _ => fs::write(state, "offline").unwrap(),
                }
            }
            Ok(Ended::Done)
        }
    }

    #[test]
    fn a_range_is_whole_blocks_or_refused() {
        let machine = Machine::new(512);
        let blocks = |base, bytes| machine.memory.blocks(base, bytes);
        assert_eq!(blocks(0x1_0000_0000, 4 * BLOCK).unwrap(), 32..36);
        for (base, bytes, why) in [
            (0, 0, "nothing"),
            (1, BLOCK, "multiples"),
            (BLOCK, BLOCK + 4096, "multiples"),
            (0, BLOCK * (BLOCKS + 1), "more than"),
            (u64::MAX - BLOCK + 1, 2 * BLOCK, "past the end"),
        ] {
            let error = blocks(base, bytes).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
            assert!(error.to_string().contains(why), "{error}");
        }
        fs::remove_file(machine.memory.folder().join("block_size_bytes")).unwrap();
        let error = blocks(0, BLOCK).unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
    }

    #[tokio::test]
    async fn all_blocks_are_waited_for() {
        let machine = Machine::new(512);
        machine.add(8, "offline\n", "Normal Movable\n");
        let memory = machine.memory.clone();
        let mut script = Script::of(move || add(&memory, 9, "offline\n", "Normal\n"));
        let wait = Duration::from_secs(600);
        let came = machine.memory.appeared(&(8..10), wait, &mut script).await;
        came.unwrap();
        let mut silent = Script::empty();
        let missing = machine
            .memory
            .appeared(&(8..12), Duration::ZERO, &mut silent)
            .await
            .unwrap_err();
        assert!(matches!(missing, Error::NotFound(_)), "{missing}");
        assert!(missing.to_string().contains("block 10"), "{missing}");
    }

    #[tokio::test]
    async fn blocks_come_online_movable_as_far_as_the_kernel_can_carry_them() {
        let machine = Machine::new(100);
        for number in 8..12 {
            machine.add(number, "offline\n", "Normal Movable\n");
        }
        let fake = Fake::new(None);
        let blocks = machine.memory.bring_online(&(8..12), &fake).await.unwrap();
        assert_eq!(movable(&blocks), [true, true, false, true]);
        let (m, k) = ("online_movable", "online_kernel");
        assert_eq!(machine.states(8..12), [m, m, k, m]);
        assert!(fake.asked().is_empty());
    }

    #[tokio::test]
    async fn what_the_kernel_brought_online_stays_where_it_is() {
        let machine = Machine::new(512);
        machine.add(8, "online\n", "Movable\n");
        machine.add(9, "online\n", "Normal\n");
        machine.add(10, "online\n", "none\n");
        // This one cannot be movable, whatever the ratio.
        machine.add(11, "offline\n", "");
        let put: Put = |path, value| match value {
            "online_movable" => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            _ => put(path, value),
        };
        let fake = Fake::new(None);
        let came = machine.memory.bring_online_by(&(8..12), &fake, put).await;
        let blocks = came.unwrap();
        assert_eq!(movable(&blocks), [true, false, false, false]);
        let states = machine.states(8..12);
        assert_eq!(states, ["online", "online", "online", "online_kernel"]);
    }

    #[tokio::test]
    async fn the_zones_of_a_block_that_is_offline_are_not_looked_at() {
        let machine = Machine::new(512);
        machine.add(8, "offline\n", "Normal\n");
        let put: Put = |path, value| {
            // What is online can be asked without harm.
            fs::write(path.with_file_name("valid_zones"), "Normal\n")?;
            put(path, value)
        };
        fs::remove_file(machine.memory.block(8).join("valid_zones")).unwrap();
        let fake = Fake::new(None);
        let came = machine.memory.bring_online_by(&(8..9), &fake, put).await;
        let zone = Zone::Movable;
        assert_eq!(came.unwrap(), [Block { number: 8, zone }]);
    }

    #[tokio::test]
    async fn the_kernel_may_be_first_while_we_write() {
        let machine = Machine::new(512);
        machine.add(8, "offline\n", "Normal Movable\n");
        let put: Put = |path, _| {
            fs::write(path, "online\n")?;
            fs::write(path.with_file_name("valid_zones"), "Movable\n")?;
            Err(io::Error::from_raw_os_error(libc::EINVAL))
        };
        let fake = Fake::new(None);
        let came = machine.memory.bring_online_by(&(8..9), &fake, put).await;
        let zone = Zone::Movable;
        assert_eq!(came.unwrap(), [Block { number: 8, zone }]);
    }

    #[tokio::test]
    async fn when_one_does_not_come_those_before_it_go_again() {
        let put: Put = |path, value| match path.to_string_lossy().contains("memory10") {
            true => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            false => put(path, value),
        };
        let machine = Machine::new(512);
        machine.add(8, "online\n", "Normal\n");
        for number in 9..12 {
            machine.add(number, "offline\n", "Normal Movable\n");
        }
        let fake = Fake::new(None);
        let came = machine.memory.bring_online_by(&(8..12), &fake, put).await;
        let text = came.unwrap_err().to_string();
        assert!(
            text.contains("block 10") && text.contains("ENOMEM"),
            "{text}"
        );
        assert!(text.contains("the 1 that had come"), "{text}");
        // Only what this call brought.
        assert_eq!(fake.asked(), [9]);
        let states = machine.states(8..12);
        assert_eq!(states, ["online", "offline", "offline", "offline"]);
        let fake = Fake::new(Some((9, Ended::Refused(libc::EBUSY))));
        let came = machine.memory.bring_online_by(&(8..12), &fake, put).await;
        let text = came.unwrap_err().to_string();
        assert!(text.contains("[9] did not go offline"), "{text}");
    }

    #[tokio::test]
    async fn a_range_goes_offline_and_twice_is_fine() {
        let machine = Machine::new(512);
        machine.add(8, "online\n", "Movable\n");
        machine.add(9, "online\n", "Normal\n");
        machine.add(10, "offline\n", "Normal Movable\n");
        let fake = Fake::new(None);
        let take = |fake, blocks: Range<u64>| {
            let memory = machine.memory.clone();
            async move { memory.take_offline(&blocks, LIMIT, fake).await }
        };
        // Block 11 was ejected already.
        take(&fake, 8..12).await.unwrap();
        assert_eq!(fake.asked(), [9, 8], "the kernel's zone first");
        let fake = Fake::new(Some((8, Ended::Refused(libc::EBUSY))));
        take(&fake, 8..12).await.unwrap();
        assert!(fake.asked().is_empty());
        let gone = take(&fake, 20..22).await.unwrap_err();
        assert!(matches!(gone, Error::NotFound(_)), "{gone}");
    }

    #[tokio::test]
    async fn when_one_stays_those_that_went_come_again_where_they_were() {
        let machine = Machine::new(512);
        machine.add(8, "online\n", "Normal\n");
        machine.add(9, "online\n", "Movable\n");
        machine.add(10, "online\n", "Movable\n");
        machine.add(11, "offline\n", "Normal\n");
        let busy = "EBUSY, Device or resource busy: pages in it cannot be moved";
        let table = [
            (Ended::Refused(libc::EBUSY), busy),
            (Ended::TimedOut, "given up after 3000 ms"),
        ];
        for (ended, why) in table {
            for number in 8..11 {
                fs::write(machine.memory.block(number).join("state"), "online").unwrap();
            }
            let fake = Fake::new(Some((10, ended)));
            let went = machine.memory.take_offline(&(8..12), LIMIT, &fake).await;
            let error = went.unwrap_err();
            assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
            let text = error.to_string();
            assert!(text.contains("block 10 (of the movable zone)"), "{text}");
            assert!(text.contains(why), "{text}");
            // Block 11 was offline before: it is no business of this call.
            assert!(text.contains("2 that had gone are online again"), "{text}");
            let states = machine.states(8..12);
            assert_eq!(
                states,
                ["online_kernel", "online_movable", "online", "offline"]
            );
        }
    }

    #[tokio::test]
    async fn what_cannot_be_removed_is_not_tried() {
        let machine = Machine::new(512);
        machine.add(8, "online\n", "Movable\n");
        machine.add(9, "online\n", "none\n");
        let fake = Fake::new(None);
        for fixed in [9, 8] {
            let went = machine.memory.take_offline(&(8..10), LIMIT, &fake).await;
            let error = went.unwrap_err();
            assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
            assert!(
                error.to_string().contains(&format!("block {fixed}")),
                "{error}"
            );
            fs::write(machine.memory.block(8).join("removable"), "0\n").unwrap();
        }
        assert!(fake.asked().is_empty());
        assert_eq!(machine.states(8..10), ["online", "online"]);
    }

    #[test]
    fn a_refusal_names_block_zone_and_cause() {
        let (m, k) = (Zone::Movable, Zone::Kernel);
        let busy = Ended::Refused(libc::EBUSY);
        let table = [
            (k, busy, "the kernel's own data is in it", true),
            (m, Ended::Refused(libc::EINTR), "EINTR", false),
            (m, Ended::Done, "the kernel agreed, but it is online", false),
        ];
        for (zone, ended, words, precondition) in table {
            let error = refused(Block { number: 5, zone }, ended, LIMIT, "; and so on");
            assert!(error.to_string().contains(words), "{error}");
            assert!(error.to_string().ends_with("; and so on"), "{error}");
            let is = matches!(error, Error::FailedPrecondition(_));
            assert_eq!(is, precondition, "{error}");
        }
    }
}
