//! CPUs that come and go. The host knows a CPU by its ACPI `_UID`, the kernel
//! by a number of its own; the ACPI node of the CPU's device joins the two. The
//! kernel makes the device when the CPU is plugged, and leaves it offline.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::error::{Doing, Error};
use crate::hotplug::kernel_files::{KernelFiles, line, number_list, put, words};
use crate::uevents::{self, Changes};

/// Names of ACPI nodes that may be a processor's: the device's id, and what Linux calls a `Processor` object.
const NODES: [&str; 2] = ["ACPI0007:", "LNXCPU:"];

/// The machine's CPUs, as sysfs shows them. Clones share what is remembered.
#[derive(Clone)]
pub struct Cpus {
    files: KernelFiles,
    /// Linux's numbers of CPUs that were taken offline, by `_UID`: without an ACPI node nothing tells them apart then.
    taken: Arc<Mutex<BTreeMap<u32, u32>>>,
}

/// A CPU that the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// ACPI `_UID`.
    pub uid: u32,
    /// Linux's number.
    pub number: u32,
}

impl Cpus {
    pub fn new(files: KernelFiles) -> Cpus {
        Cpus {
            files,
            taken: Arc::default(),
        }
    }

    fn folder(&self) -> PathBuf {
        self.files.sys.join("devices/system/cpu")
    }

    fn device(&self, number: u32) -> PathBuf {
        self.folder().join(format!("cpu{number}"))
    }

    /// Linux's numbers of the CPUs that are online, in ascending order.
    pub fn online(&self) -> Vec<u32> {
        number_list(&line(&self.folder().join("online")).unwrap_or_default())
    }

    /// The `_UID`s of the CPUs that are online; where the kernel shows none, APIC ids, which is the same here.
    pub fn online_uids(&self) -> Vec<u32> {
        let apic_ids = apic_ids(&self.files.proc_text("cpuinfo"));
        let apic_id = |number: u32| apic_ids.iter().find(|(of, _)| *of == number);
        self.online()
            .into_iter()
            .map(|number| {
                self.uid_of(number)
                    .or_else(|| apic_id(number).map(|(_, id)| *id))
                    .unwrap_or(number)
            })
            .collect()
    }

    fn uid_of(&self, number: u32) -> Option<u32> {
        let uid = line(&self.device(number).join("firmware_node/uid"))?;
        uid.parse().ok()
    }

    /// The CPU with this `_UID`: by the link from the CPU's device to its ACPI node, else by that from the node to the
    /// device, else, without such nodes, by the APIC id, which the kernel tells of CPUs that are online, or by what it was
    /// before it was taken offline.
    pub fn find(&self, uid: u32) -> Option<Cpu> {
        let devices = names(&self.folder())
            .filter_map(|name| name.strip_prefix("cpu")?.parse::<u32>().ok())
            .find(|number| self.uid_of(*number) == Some(uid));
        let nodes = self.files.sys.join("bus/acpi/devices");
        let by_node = || {
            names(&nodes)
                .filter(|name| NODES.iter().any(|node| name.starts_with(node)))
                .map(|name| nodes.join(name))
                .filter(|node| {
                    line(&node.join("uid")).and_then(|text| text.parse().ok()) == Some(uid)
                })
                .find_map(|node| {
                    let device = fs::read_link(node.join("physical_node")).ok()?;
                    device
                        .file_name()?
                        .to_str()?
                        .strip_prefix("cpu")?
                        .parse()
                        .ok()
                })
        };
        let apic_ids = apic_ids(&self.files.proc_text("cpuinfo"));
        let by_apic_id = || {
            let mut online = apic_ids.iter();
            online.find(|(number, id)| *id == uid && self.uid_of(*number).is_none())
        };
        let by_memory = || {
            let taken = self.taken.lock().expect("CPUs that were taken offline");
            let number = *taken.get(&uid)?;
            let is_other = apic_ids.iter().any(|(online, _)| *online == number);
            let is_there = self.device(number).exists() && self.uid_of(number).is_none();
            (is_there && !is_other).then_some(number)
        };
        let number = devices
            .or_else(by_node)
            .or_else(|| by_apic_id().map(|(number, _)| *number))
            .or_else(by_memory)?;
        Some(Cpu { uid, number })
    }

    /// Waits for a CPU to be there, online or not, with the file that brings it online. The kernel makes a device's folder before
    /// the files in it. A CPU that never gets one is answered with all the same: why it has none is for who needs it to say.
    ///
    /// # Errors
    /// `NotFound` after `wait`, with the CPUs that are there.
    pub async fn appeared(
        &self,
        uid: u32,
        wait: Duration,
        changes: &mut impl Changes,
    ) -> Result<Cpu, Error> {
        let whole = |cpu: &Cpu| {
            self.device(cpu.number).join("online").exists() || self.online().contains(&cpu.number)
        };
        uevents::appear(changes, wait, || self.find(uid).filter(whole))
            .await
            .doing(|| format!("waiting for CPU _UID {uid}"))?
            .or_else(|| self.find(uid))
            .ok_or_else(|| {
                Error::NotFound(format!(
                    "CPU _UID {uid}: the kernel showed no such CPU within {} ms; present are {}",
                    wait.as_millis(),
                    line(&self.folder().join("present")).unwrap_or_default()
                ))
            })
    }

    /// Whether it is online. One that cannot be taken offline has no file for it, and is.
    fn is_online(&self, cpu: Cpu) -> io::Result<bool> {
        match fs::read_to_string(self.device(cpu.number).join("online")) {
            Ok(text) => Ok(text.trim() == "1"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(self.online().contains(&cpu.number))
            }
            Err(error) => Err(error),
        }
    }

    /// Brings a CPU online. Online already is fine.
    ///
    /// # Errors
    /// `Internal` with the error's name and words if the kernel refuses, or if it agrees and the CPU is not online.
    pub fn bring_online(&self, cpu: Cpu) -> Result<(), Error> {
        self.switch(cpu, true)
    }

    /// Takes a CPU offline; what ran on it alone runs elsewhere then. Offline already is fine.
    ///
    /// # Errors
    /// `FailedPrecondition` if it is the first, or the kernel cannot do without it now (EBUSY); `Internal` otherwise.
    pub fn take_offline(&self, cpu: Cpu) -> Result<(), Error> {
        if cpu.number == 0 {
            return Err(first_stays(cpu.uid));
        }
        self.switch(cpu, false)?;
        let mut taken = self.taken.lock().expect("CPUs that were taken offline");
        taken.insert(cpu.uid, cpu.number);
        Ok(())
    }

    fn switch(&self, cpu: Cpu, on: bool) -> Result<(), Error> {
        if self.is_online(cpu).doing(|| doing(cpu, on))? == on {
            return Ok(());
        }
        let file = self.device(cpu.number).join("online");
        put(&file, if on { "1" } else { "0" }).map_err(|error| refused(cpu, on, &error))?;
        if self.online().contains(&cpu.number) != on {
            let list = self.folder().join("online");
            return Err(Error::Internal(format!(
                "{}: the kernel agreed, but {} says {}",
                doing(cpu, on),
                list.display(),
                line(&list).unwrap_or_default()
            )));
        }
        Ok(())
    }
}

fn doing(Cpu { uid, number }: Cpu, on: bool) -> String {
    match on {
        true => format!("bringing CPU {number} (_UID {uid}) online"),
        false => format!("taking CPU {number} (_UID {uid}) offline"),
    }
}

/// What a refused write to a CPU's `online` means.
fn refused(cpu: Cpu, on: bool, error: &io::Error) -> Error {
    let text = format!("{}: {}", doing(cpu, on), words(error));
    match (error.raw_os_error(), on) {
        (Some(libc::EIO), true) => Error::Internal(format!(
            "{text}: it did not start when the kernel called it"
        )),
        (Some(libc::EBUSY), false) => Error::FailedPrecondition(format!(
            "{text}: the kernel keeps it, since what runs cannot do without it, or CPU hotplug is held back for now"
        )),
        (Some(libc::ENOENT), _) => Error::FailedPrecondition(format!(
            "{text}: the kernel has no CPU hotplug, or the CPU has just gone"
        )),
        _ => Error::Internal(text),
    }
}

/// Why the CPU that the machine began with stays.
pub fn first_stays(uid: u32) -> Error {
    Error::FailedPrecondition(format!(
        "taking CPU _UID {uid} offline: it is the first, which stays online"
    ))
}

fn names(folder: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// Linux's number and APIC id of each CPU in `/proc/cpuinfo`, which lists those that are online.
fn apic_ids(cpuinfo: &str) -> Vec<(u32, u32)> {
    let mut ids = Vec::new();
    let mut number = None;
    for (key, value) in cpuinfo.lines().filter_map(|line| line.split_once(':')) {
        match (key.trim(), value.trim().parse::<u32>()) {
            ("processor", Ok(of)) => number = Some(of),
            ("apicid", Ok(id)) => ids.extend(number.map(|number| (number, id))),
            _ => {}
        }
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uevents::tests::Script;

    const SECOND: Duration = Duration::from_secs(1);

    struct Machine {
        folder: tempfile::TempDir,
        cpus: Cpus,
    }

    impl Machine {
        /// CPU 0 with _UID 0, online, as every machine has it.
        fn new() -> Machine {
            let folder = tempfile::tempdir().unwrap();
            let files = KernelFiles {
                sys: folder.path().join("sys"),
                proc: folder.path().join("proc"),
            };
            fs::create_dir_all(&files.proc).unwrap();
            let machine = Machine {
                folder,
                cpus: Cpus::new(files),
            };
            machine.add(0, Some(0), None);
            machine.list("0\n");
            machine
        }

        fn list(&self, online: &str) {
            fs::write(self.cpus.folder().join("online"), online).unwrap();
        }

        /// A CPU's device, as the kernel makes it; `online` is the content of its file, if it has one.
        fn add(&self, number: u32, uid: Option<u32>, online: Option<&str>) {
            add(&self.cpus, number, uid, online);
        }

        fn file(&self, number: u32) -> String {
            fs::read_to_string(self.cpus.device(number).join("online")).unwrap()
        }

        async fn appeared(
            &self,
            uid: u32,
            wait: Duration,
            script: &mut Script,
        ) -> Result<Cpu, Error> {
            self.cpus.appeared(uid, wait, script).await
        }
    }

    fn add(cpus: &Cpus, number: u32, uid: Option<u32>, online: Option<&str>) {
        let device = cpus.device(number);
        fs::create_dir_all(&device).unwrap();
        if let Some(uid) = uid {
            fs::create_dir_all(device.join("firmware_node")).unwrap();
            fs::write(device.join("firmware_node/uid"), format!("{uid}\n")).unwrap();
        }
        if let Some(online) = online {
            fs::write(device.join("online"), online).unwrap();
        }
    }

    #[tokio::test]
    async fn a_cpu_is_found_by_uid_and_not_by_number() {
        let machine = Machine::new();
        machine.add(1, Some(5), Some("0\n"));
        machine.add(2, Some(1), Some("0\n"));
        let cpu = machine
            .appeared(1, Duration::ZERO, &mut Script::empty())
            .await
            .unwrap();
        assert_eq!(cpu, Cpu { uid: 1, number: 2 });
        let missing = machine
            .appeared(2, Duration::ZERO, &mut Script::empty())
            .await;
        assert!(matches!(missing, Err(Error::NotFound(_))), "{missing:?}");
    }

    #[test]
    fn without_the_link_of_the_device_the_acpi_node_leads_to_it() {
        let machine = Machine::new();
        machine.add(3, None, Some("0\n"));
        let nodes = machine.folder.path().join("sys/bus/acpi/devices");
        for (name, uid) in [("ACPI0007:02", "7"), ("PNP0C80:00", "8")] {
            fs::create_dir_all(nodes.join(name)).unwrap();
            fs::write(nodes.join(name).join("uid"), uid).unwrap();
            std::os::unix::fs::symlink(
                "../../../../devices/system/cpu/cpu3",
                nodes.join(name).join("physical_node"),
            )
            .unwrap();
        }
        assert_eq!(machine.cpus.find(7), Some(Cpu { uid: 7, number: 3 }));
        assert_eq!(machine.cpus.find(8), None, "a memory device");
    }

    #[test]
    fn without_acpi_the_apic_id_tells() {
        let machine = Machine::new();
        machine.add(1, None, Some("1\n"));
        machine.list("0-1\n");
        let cpuinfo =
            "processor\t: 0\napicid\t\t: 0\ninitial apicid\t: 9\n\nprocessor\t: 1\napicid\t\t: 4\n";
        fs::write(machine.folder.path().join("proc/cpuinfo"), cpuinfo).unwrap();
        assert_eq!(machine.cpus.find(4), Some(Cpu { uid: 4, number: 1 }));
        assert_eq!(machine.cpus.find(9), None);
        assert_eq!(machine.cpus.online_uids(), [0, 4]);
        // A CPU whose node says otherwise is not taken for it.
        machine.add(1, Some(6), None);
        assert_eq!(machine.cpus.find(4), None);
        assert_eq!(machine.cpus.online_uids(), [0, 6]);
    }

    #[test]
    fn without_acpi_a_cpu_that_was_taken_offline_is_remembered() {
        let machine = Machine::new();
        machine.add(1, None, Some("1\n"));
        let cpuinfo = machine.folder.path().join("proc/cpuinfo");
        let (first, both) = (
            "processor: 0\napicid: 0\n",
            "processor: 0\napicid: 0\nprocessor: 1\napicid: 4\n",
        );
        fs::write(&cpuinfo, both).unwrap();
        machine
            .cpus
            .take_offline(machine.cpus.find(4).unwrap())
            .unwrap();
        fs::write(&cpuinfo, first).unwrap();
        assert_eq!(machine.cpus.find(4), Some(Cpu { uid: 4, number: 1 }));
        // Its number went to another.
        fs::write(&cpuinfo, both.replace("apicid: 4", "apicid: 5")).unwrap();
        assert_eq!(machine.cpus.find(4), None);
        fs::write(&cpuinfo, first).unwrap();
        machine.add(1, Some(5), None);
        assert_eq!(machine.cpus.find(4), None);
        // It was ejected.
        fs::remove_dir_all(machine.cpus.device(1)).unwrap();
        assert_eq!(machine.cpus.find(4), None);
    }

    #[tokio::test]
    async fn a_plugged_cpu_is_waited_for_until_its_node_is_linked() {
        let machine = Machine::new();
        let (first, second) = (machine.cpus.clone(), machine.cpus.clone());
        // 6.1 says `add` before it links the node, and `bind` after it.
        let mut script = Script(vec![
            Box::new(move || add(&first, 1, None, Some("0\n"))),
            Box::new(move || add(&second, 1, Some(1), None)),
        ]);
        let cpu = machine
            .appeared(1, 600 * SECOND, &mut script)
            .await
            .unwrap();
        assert_eq!(cpu.number, 1);
    }

    #[tokio::test]
    async fn a_cpu_that_comes_again_is_waited_for_until_it_has_its_file() {
        let machine = Machine::new();
        let cpus = machine.cpus.clone();
        // It is remembered from before, and found by its folder alone.
        cpus.taken.lock().unwrap().insert(1, 1);
        add(&cpus, 1, None, None);
        let kernel = cpus.clone();
        let mut script = Script::of(move || add(&kernel, 1, None, Some("0\n")));
        let cpu = machine.appeared(1, 600 * SECOND, &mut script).await;
        assert_eq!(cpu.unwrap(), Cpu { uid: 1, number: 1 });
        assert!(cpus.device(1).join("online").exists());
        // A kernel without CPU hotplug makes none.
        cpus.taken.lock().unwrap().insert(3, 3);
        add(&cpus, 3, None, None);
        let mut silent = Script::empty();
        let cpu = machine.appeared(3, Duration::ZERO, &mut silent).await;
        let refusal = cpus.bring_online(cpu.unwrap()).unwrap_err();
        assert!(refusal.to_string().contains("no CPU hotplug"), "{refusal}");
    }

    #[test]
    fn coming_online_is_written_and_verified() {
        let machine = Machine::new();
        machine.add(1, Some(1), Some("0\n"));
        let cpu = machine.cpus.find(1).unwrap();
        // The kernel agrees, and does nothing.
        let error = machine.cpus.bring_online(cpu).unwrap_err();
        assert!(
            error.to_string().contains("the kernel agreed, but"),
            "{error}"
        );
        assert_eq!(machine.file(1), "1\n");
        fs::write(machine.cpus.device(1).join("online"), "0").unwrap();
        machine.list("0-1\n");
        machine.cpus.bring_online(cpu).unwrap();
        assert_eq!(machine.file(1), "1");
    }

    #[test]
    fn what_is_as_wanted_is_not_written() {
        let machine = Machine::new();
        machine.add(1, Some(1), Some("1\n"));
        machine.add(2, Some(2), Some("0\n"));
        machine
            .cpus
            .bring_online(machine.cpus.find(1).unwrap())
            .unwrap();
        machine
            .cpus
            .take_offline(machine.cpus.find(2).unwrap())
            .unwrap();
        assert_eq!(
            (machine.file(1), machine.file(2)),
            ("1\n".into(), "0\n".into())
        );
        // CPU 0 has no such file on most machines, and is online.
        machine
            .cpus
            .bring_online(machine.cpus.find(0).unwrap())
            .unwrap();
    }

    #[test]
    fn going_offline_is_verified_and_never_the_first() {
        let machine = Machine::new();
        machine.add(1, Some(1), Some("1\n"));
        machine.list("0-1\n");
        let cpu = machine.cpus.find(1).unwrap();
        let error = machine.cpus.take_offline(cpu).unwrap_err();
        assert!(error.to_string().contains("says 0-1"), "{error}");
        fs::write(machine.cpus.device(1).join("online"), "1").unwrap();
        machine.list("0\n");
        machine.cpus.take_offline(cpu).unwrap();
        let first = machine
            .cpus
            .take_offline(Cpu { uid: 9, number: 0 })
            .unwrap_err();
        assert!(matches!(first, Error::FailedPrecondition(_)), "{first}");
    }

    #[test]
    fn a_refusal_says_which_cpu_and_why() {
        let cpu = Cpu { uid: 4, number: 1 };
        let table = [
            (
                libc::EIO,
                true,
                "bringing CPU 1 (_UID 4) online: EIO, ",
                false,
            ),
            (libc::EBUSY, true, "online: EBUSY, ", false),
            (
                libc::EBUSY,
                false,
                "taking CPU 1 (_UID 4) offline: EBUSY, ",
                true,
            ),
            (libc::ENOENT, true, "ENOENT, ", true),
            (libc::ENOMEM, true, "ENOMEM, ", false),
        ];
        for (errno, on, words, precondition) in table {
            let error = refused(cpu, on, &io::Error::from_raw_os_error(errno));
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(
                matches!(error, Error::FailedPrecondition(_)),
                precondition,
                "{error}"
            );
        }
    }

    #[test]
    fn a_kernel_without_hotplug_is_told() {
        let machine = Machine::new();
        machine.add(1, Some(1), None);
        let error = machine
            .cpus
            .bring_online(Cpu { uid: 1, number: 1 })
            .unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
    }
}
