//! QEMU (`q35`) with the same kernel, beside our VM: vCPUs and DIMMs come and
//! go by QMP. Our agent powers off where no host answers on vsock, so the guest
//! has busybox as its init, which makes memory come online by the kernel's own
//! policy and vCPUs when it is told to on its console, outside what is measured.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::Instant;

use super::parts::{Parts, REPORTED, TOTAL};
use super::qmp::{Event, Qmp};
use super::{Plugging, Setup, What};

/// What the guest's init says when it is there, and when it has done what it was told.
const READY: &str = "nacre-bench: ready";
const DONE: &str = "nacre-bench: done";
/// The guest's init: each line that it reads brings all vCPUs online.
const INIT: &str = "\
#!/busybox sh
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sysfs /sys
echo online_movable > /sys/devices/system/memory/auto_online_blocks
echo 'nacre-bench: ready'
while read -r line; do
  for file in /sys/devices/system/cpu/cpu[1-9]*/online; do
    [ -e \"$file\" ] && echo 1 > \"$file\"
  done
  echo 'nacre-bench: done'
done
";
/// Time between two tries to connect to a QEMU that is starting.
const RETRY: Duration = Duration::from_millis(20);

/// A QEMU that runs; killed when dropped.
pub(super) struct Qemu {
    qmp: Qmp<UnixStream>,
    /// As QEMU says it.
    pub version: String,
    console: Lines<BufReader<ChildStdout>>,
    keys: ChildStdin,
    plugged: Vec<String>,
    made: u64,
    patience: Duration,
    _child: Child,
    _folder: tempfile::TempDir,
}

/// What is booted in it, and by which program.
pub(super) struct Booted<'p> {
    pub program: &'p Path,
    pub kernel: &'p Path,
    pub busybox: &'p Path,
}

impl Qemu {
    /// Boots the guest and waits for its init.
    pub async fn boot(what: &Booted<'_>, setup: &Setup, patience: Duration) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("nacre-bench-")
            .tempdir()
            .context("making a folder for QEMU")?;
        let initrd_file = folder.path().join("initrd");
        let busybox = std::fs::read(what.busybox)
            .with_context(|| format!("reading {}", what.busybox.display()))?;
        std::fs::write(&initrd_file, initrd(&busybox)?).context("writing QEMU's initrd")?;
        let socket = folder.path().join("qmp");
        let mut child = Command::new(what.program)
            .args(arguments(setup, what.kernel, &initrd_file, &socket))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", what.program.display()))?;
        let keys = child.stdin.take().context("QEMU has no stdin")?;
        let console = child.stdout.take().context("QEMU has no stdout")?;
        let stream = connect(&socket, &mut child, patience).await?;
        let (qmp, version) = Qmp::begin(stream, patience).await?;
        let mut this = Self {
            qmp,
            version,
            console: BufReader::new(console).lines(),
            keys,
            plugged: Vec::new(),
            made: 0,
            patience,
            _child: child,
            _folder: folder,
        };
        this.said(READY).await.context("Booting QEMU's guest")?;
        Ok(this)
    }

    /// Until the guest's init has said something.
    async fn said(&mut self, words: &str) -> Result<()> {
        let mut last = String::new();
        let found = tokio::time::timeout(self.patience, async {
            while let Some(line) = self.console.next_line().await? {
                if line.contains(words) {
                    return Ok(());
                }
                last = line;
            }
            bail!("QEMU has ended")
        });
        match found.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.context(format!("its console ends with {last:?}"))),
            Err(_) => bail!(
                "its console did not say {words:?} within {:?}; it ends with {last:?}",
                self.patience
            ),
        }
    }

    fn new_id(&mut self, kind: &str) -> String {
        self.made += 1;
        let id = format!("{kind}{}", self.made);
        self.plugged.push(id.clone());
        id
    }
}

impl Plugging for Qemu {
    /// Plugs, until the guest's kernel has reported all of it; it is online when this returns.
    async fn plug(&mut self, what: What) -> Result<Parts> {
        let mut all = Plugged::default();
        match what {
            What::Vcpus(count) => {
                for _ in 0..count {
                    let id = self.new_id("cpu");
                    all.add(plug_vcpu(&mut self.qmp, &id).await?);
                }
                self.keys.write_all(b"online\n").await?;
                self.keys.flush().await?;
                self.said(DONE).await.context("bringing vCPUs online")?;
            }
            What::Memory(mib, _) => {
                let id = self.new_id("dimm");
                all.add(plug_memory(&mut self.qmp, &id, mib << 20).await?);
            }
        }
        Ok(vec![
            ("host call", ms(all.host)),
            (REPORTED, ms(all.reported)),
        ])
    }

    /// All that was plugged goes, the last first.
    async fn unplug(&mut self, what: What) -> Result<Parts> {
        let began = Instant::now();
        while let Some(id) = self.plugged.last() {
            unplug(&mut self.qmp, id).await?;
            if let What::Memory(..) = what {
                let backend = json!({ "id": format!("{id}-memory") });
                self.qmp.execute("object-del", backend).await?;
            }
            self.plugged.pop();
        }
        Ok(vec![(TOTAL, ms(began.elapsed()))])
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Until QMP had answered, and until the guest's kernel had reported success.
#[derive(Debug, Default, PartialEq)]
struct Plugged {
    host: Duration,
    reported: Duration,
}

impl Plugged {
    fn add(&mut self, other: Plugged) {
        self.host += other.host;
        self.reported += other.reported;
    }
}

async fn connect(socket: &Path, child: &mut Child, patience: Duration) -> Result<UnixStream> {
    let deadline = Instant::now() + patience;
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).context("connecting to QEMU's QMP socket");
            }
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            bail!("QEMU ended with {status} before it listened; its words are above");
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Plugs one vCPU at any place that is free.
async fn plug_vcpu<S: AsyncRead + AsyncWrite + Unpin>(
    qmp: &mut Qmp<S>,
    id: &str,
) -> Result<Plugged> {
    let places = qmp.execute("query-hotpluggable-cpus", Value::Null).await?;
    let free = places.as_array().and_then(|all| {
        all.iter()
            .rev()
            .find(|place| place.get("qom-path").is_none())
    });
    let free = free.context("QEMU has no free place for a vCPU")?;
    let mut device: Map<String, Value> = free["props"].as_object().cloned().unwrap_or_default();
    device.insert("driver".to_owned(), free["type"].clone());
    device.insert("id".to_owned(), id.into());
    let began = Instant::now();
    qmp.execute("device_add", device.into()).await?;
    let host = began.elapsed();
    let reported = reported(qmp, id).await? - began;
    Ok(Plugged { host, reported })
}

/// Plugs one DIMM.
async fn plug_memory<S: AsyncRead + AsyncWrite + Unpin>(
    qmp: &mut Qmp<S>,
    id: &str,
    bytes: u64,
) -> Result<Plugged> {
    let backend = format!("{id}-memory");
    let began = Instant::now();
    let memory = json!({ "qom-type": "memory-backend-ram", "id": backend, "size": bytes });
    qmp.execute("object-add", memory).await?;
    let dimm = json!({ "driver": "pc-dimm", "id": id, "memdev": backend });
    qmp.execute("device_add", dimm).await?;
    let host = began.elapsed();
    let reported = reported(qmp, id).await? - began;
    Ok(Plugged { host, reported })
}

/// When the guest's kernel reported that it has taken a device (`_OST` after a device check, status 0).
async fn reported<S: AsyncRead + AsyncWrite + Unpin>(
    qmp: &mut Qmp<S>,
    id: &str,
) -> Result<Instant> {
    let is_report = |event: &Event| {
        let info = &event.data["info"];
        event.name == "ACPI_DEVICE_OST" && info["device"] == id && info["source"] != 3
    };
    let event = qmp.event(is_report).await;
    let event = event.with_context(|| format!("waiting for the guest's report on {id}"))?;
    let status = &event.data["info"]["status"];
    ensure!(
        *status == 0,
        "the guest's kernel reports that it has not taken {id}: _OST status {status}"
    );
    Ok(event.at)
}

/// Has the guest eject a device, until it is gone.
async fn unplug<S: AsyncRead + AsyncWrite + Unpin>(qmp: &mut Qmp<S>, id: &str) -> Result<()> {
    qmp.execute("device_del", json!({ "id": id })).await?;
    let is_end = |event: &Event| {
        let ends = ["DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"];
        ends.contains(&event.name.as_str()) && event.data["device"] == id
    };
    let event = qmp.event(is_end).await;
    let event = event.with_context(|| format!("waiting for the guest to eject {id}"))?;
    ensure!(
        event.name == "DEVICE_DELETED",
        "the guest does not eject {id}"
    );
    Ok(())
}

fn arguments(setup: &Setup, kernel: &Path, initrd: &Path, socket: &Path) -> Vec<PathBuf> {
    let (boot, more) = (setup.boot_mib, setup.most_mib());
    let mut arguments: Vec<PathBuf> = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-machine",
        "q35,accel=kvm",
        "-cpu",
        "host",
        "-serial",
        "stdio",
        "-append",
        "console=ttyS0 panic=-1 quiet",
        "-smp",
        &format!("cpus=1,maxcpus={}", 1 + u16::from(setup.most_vcpus())),
        "-m",
        &format!("size={boot}M,slots=4,maxmem={}M", boot + more.max(128)),
        "-qmp",
        &format!("unix:{},server=on,wait=off", socket.display()),
    ]
    .map(PathBuf::from)
    .to_vec();
    arguments.extend(["-kernel".into(), kernel.to_owned()]);
    arguments.extend(["-initrd".into(), initrd.to_owned()]);
    arguments
}

/// A root with busybox and the init.
fn initrd(busybox: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Vec::new();
    let entries: [(&str, u32, &[u8]); 4] = [
        ("proc", 0o040_755, &[]),
        ("sys", 0o040_755, &[]),
        ("busybox", 0o100_755, busybox),
        ("init", 0o100_755, INIT.as_bytes()),
    ];
    for (number, (name, mode, data)) in (1..).zip(entries) {
        let header = cpio::NewcBuilder::new(name).mode(mode).ino(number).nlink(1);
        let mut writer = header.write(&mut archive, u32::try_from(data.len())?);
        std::io::Write::write_all(&mut writer, data)?;
        writer.finish()?;
    }
    cpio::newc::trailer(&mut archive)?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::super::Way;
    use super::super::qmp::tests::fake;
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const OK: &str = r#"{"return": {}}"#;

    #[tokio::test]
    async fn a_vcpu_goes_to_a_free_place_and_is_waited_for() {
        let (stream, played) = fake(vec![
            vec![
                r#"{"return":[
{"props":{"core-id":2,"socket-id":0},"vcpus-count":1,"type":"host-x86_64-cpu"},
{"props":{"core-id":1,"socket-id":0},"vcpus-count":1,"type":"host-x86_64-cpu"},
{"props":{"core-id":0,"socket-id":0},"qom-path":"/machine/unattached/device[0]","type":"host-x86_64-cpu"}]}"#
                    .replace('\n', "")
                    .leak(),
            ],
            vec![
                OK,
                // Of another one, and of an eject.
                r#"{"event":"ACPI_DEVICE_OST","data":{"info":{"device":"cpu8","source":1,"status":0,"slot":"8","slot-type":"CPU"}}}"#,
                r#"{"event":"ACPI_DEVICE_OST","data":{"info":{"device":"cpu9","source":3,"status":132,"slot":"1","slot-type":"CPU"}}}"#,
                r#"{"event":"ACPI_DEVICE_OST","data":{"info":{"device":"cpu9","source":1,"status":0,"slot":"1","slot-type":"CPU"}}}"#,
            ],
        ]);
        let (mut qmp, _) = Qmp::begin(stream, SECOND).await.unwrap();
        let plugged = plug_vcpu(&mut qmp, "cpu9").await.unwrap();
        assert!(plugged.reported >= plugged.host, "{plugged:?}");
        let came = played.await.unwrap();
        let expected = json!({
            "driver": "host-x86_64-cpu", "id": "cpu9", "core-id": 1, "socket-id": 0
        });
        assert_eq!(came[2]["arguments"], expected);
    }

    #[tokio::test]
    async fn a_dimm_that_the_guest_does_not_take_is_an_error() {
        let report = r#"{"event":"ACPI_DEVICE_OST","data":{"info":{"device":"dimm1","source":1,"status":129,"slot":"0","slot-type":"DIMM"}}}"#;
        let (stream, played) = fake(vec![vec![OK], vec![report, OK]]);
        let (mut qmp, _) = Qmp::begin(stream, SECOND).await.unwrap();
        let error = plug_memory(&mut qmp, "dimm1", 128 << 20).await.unwrap_err();
        assert!(error.to_string().contains("status 129"), "{error}");
        let came = played.await.unwrap();
        assert_eq!(came[1]["arguments"]["size"], 128 << 20);
        assert_eq!(came[2]["arguments"]["memdev"], "dimm1-memory");
    }

    #[tokio::test]
    async fn an_eject_ends_when_the_device_is_gone_or_the_guest_refuses() {
        let gone = r#"{"event":"DEVICE_DELETED","data":{"device":"cpu1","path":"/x"}}"#;
        let refused = r#"{"event":"DEVICE_UNPLUG_GUEST_ERROR","data":{"device":"cpu1"}}"#;
        let other = r#"{"event":"DEVICE_DELETED","data":{"path":"/y"}}"#;
        let (stream, _played) = fake(vec![vec![other, OK, gone], vec![OK, refused]]);
        let (mut qmp, _) = Qmp::begin(stream, SECOND).await.unwrap();
        unplug(&mut qmp, "cpu1").await.unwrap();
        let error = unplug(&mut qmp, "cpu1").await.unwrap_err();
        assert!(error.to_string().contains("does not eject cpu1"), "{error}");
    }

    #[test]
    fn qemu_has_room_for_what_is_plugged() {
        let setup = Setup {
            operations: vec![What::Memory(1024, Way::Acpi), What::Memory(256, Way::Acpi)],
            way: Some(Way::Acpi),
            boot_mib: 512,
        };
        let path = Path::new;
        let all = arguments(&setup, path("/k"), path("/i"), path("/s"));
        let has = |words: &str| all.contains(&PathBuf::from(words));
        assert!(has("size=512M,slots=4,maxmem=1536M"), "{all:?}");
        assert!(has("cpus=1,maxcpus=1") && has("unix:/s,server=on,wait=off"));
    }

    #[test]
    fn the_initrd_holds_busybox_and_its_script() {
        let archive = initrd(b"\x7fELF...").unwrap();
        let mut names = Vec::new();
        let mut rest = archive.as_slice();
        loop {
            let reader = cpio::NewcReader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push((reader.entry().name().to_owned(), reader.entry().mode()));
            rest = reader.finish().unwrap();
        }
        assert_eq!(names[2], ("busybox".to_owned(), 0o100_755));
        assert_eq!(names[3], ("init".to_owned(), 0o100_755));
        assert!(INIT.contains(READY) && INIT.contains(DONE));
    }
}
