//! A root that the guest mounts: from disks of the VM that are the host's files. Read-only ones, such as an
//! image's layers, are joined as one disk; each that is written is one of its own. Planned here from what
//! containerd handed over, before anything is done.

use std::path::{Component, Path, PathBuf};

use containerd_shim_protos::api::Mount;
use nacre_protocol::agent::{GuestDirectory, GuestMount};

use super::template::{self, Earlier};
use super::{Error, Type};

/// The root, relative to a bundle in the guest.
const ROOT: &str = "rootfs";
/// Before the name of each of containerd's own options.
const OWN: &str = "X-containerd.";

/// File systems that the guest's kernel has for disks.
const OF_THE_GUEST: [&str; 4] = ["erofs", "ext2", "ext3", "ext4"];

/// Whether a mount's type is that of a file system on a disk that the guest mounts. Others the host mounts.
pub(super) fn is_on_disk(kind: &Type<'_>) -> bool {
    OF_THE_GUEST.contains(&kind.base)
}

/// A file to be made and formatted, unless it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mkfs {
    /// Bytes.
    pub size: u64,
    /// `ext2`, `ext3` or `ext4`.
    pub kind: String,
    /// Its UUID, if it is to have a certain one.
    pub uuid: Option<String>,
}

/// A disk of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The file or block device.
    pub path: PathBuf,
    /// Whether it is only read.
    pub read_only: bool,
    /// How it is made.
    pub mkfs: Option<Mkfs>,
}

/// What is mounted in the guest, and the disks for it.
#[derive(Debug, Default)]
pub struct Plan {
    /// Read-only files that are joined as one disk, each a partition.
    pub layers: Vec<PathBuf>,
    /// The other disks.
    pub disks: Vec<Disk>,
    mounts: Vec<Planned>,
}

/// Where something of a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Device {
    Layer(usize),
    Disk(usize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Device(Device),
    Text(String),
}

#[derive(Debug)]
struct Planned {
    kind: String,
    source: Source,
    target: String,
    options: Vec<String>,
    /// Further devices of a file system on several.
    devices: Vec<Device>,
    directories: Vec<GuestDirectory>,
}

/// The mounts before one, for its templates.
struct Before<'a>(&'a [Planned]);

impl Earlier for Before<'_> {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn mount_point(&self, index: usize) -> String {
        self.0[index].target.clone()
    }

    fn source(&self, index: usize) -> Result<String, String> {
        match &self.0[index].source {
            Source::Text(text) => Ok(text.clone()),
            Source::Device(_) => Err(format!(
                "mount {index} is of a disk, whose name is the guest's to give"
            )),
        }
    }
}

impl Plan {
    /// Plans the mounts of a root.
    ///
    /// # Errors
    /// What is not served, by name.
    pub fn of(mounts: &[Mount]) -> Result<Self, Error> {
        let first_of_root = super::built_on(mounts);
        let mut plan = Self::default();
        for (index, mount) in mounts.iter().enumerate() {
            let kind = Type::of(&mount.type_)?;
            let mount = super::filled(mount, &kind, &Before(&plan.mounts))?;
            let target = match index < first_of_root {
                true => format!("m/{index}"),
                false => root_target(&mount.target)?,
            };
            let planned = plan.one(&mount, &kind, target)?;
            plan.mounts.push(planned);
        }
        Ok(plan)
    }

    fn one(&mut self, mount: &Mount, kind: &Type<'_>, target: String) -> Result<Planned, Error> {
        let mut planned = Planned {
            kind: kind.base.to_owned(),
            source: Source::Text(mount.source.clone()),
            target,
            options: Vec::new(),
            devices: Vec::new(),
            directories: Vec::new(),
        };
        let mut mkfs = Making::default();
        let mut devices = Vec::new();
        for option in &mount.options {
            let odd = || Error::Option {
                option: option.clone(),
                kind: mount.type_.clone(),
            };
            if let Some(own) = option.strip_prefix(OWN) {
                match own.split_once('=') {
                    Some(("mkdir.path", value)) if kind.mkdir => {
                        planned.directories.push(directory(value).ok_or_else(odd)?);
                    }
                    Some((key, value)) if kind.mkfs && key.starts_with("mkfs.") => {
                        mkfs.take(&key["mkfs.".len()..], value).ok_or_else(odd)?;
                    }
                    _ => return Err(odd()),
                }
            } else if template::is_template(option)
                || option.starts_with("uidmap=")
                || option.starts_with("gidmap=")
            {
                return Err(odd());
            } else if let Some(device) = option.strip_prefix("device=") {
                devices.push(PathBuf::from(device));
            } else if !matches!(option.as_str(), "loop" | "" | "defaults") {
                planned.options.push(option.clone());
            }
        }
        if is_on_disk(kind) {
            self.on_disk(kind, &mut planned, mkfs, devices)?;
        } else {
            judge(mount, &planned)?;
        }
        Ok(planned)
    }

    fn on_disk(
        &mut self,
        kind: &Type<'_>,
        planned: &mut Planned,
        mkfs: Making,
        devices: Vec<PathBuf>,
    ) -> Result<(), Error> {
        let Source::Text(path) = &planned.source else {
            return Ok(());
        };
        let path = PathBuf::from(path);
        let mut states = planned.options.iter().rev();
        let state = states.find(|option| matches!(option.as_str(), "ro" | "rw"));
        let read_only = kind.base == "erofs" || state.is_some_and(|option| option == "ro");
        let mkfs = match kind.mkfs {
            true => Some(mkfs.done(kind.base)?),
            false => None,
        };
        planned.source = Source::Device(if read_only && mkfs.is_none() {
            Device::Layer(self.layer(path))
        } else {
            self.disks.push(Disk {
                path,
                read_only: false,
                mkfs,
            });
            Device::Disk(self.disks.len() - 1)
        });
        for device in devices {
            let layer = self.layer(device);
            planned.devices.push(Device::Layer(layer));
        }
        if read_only && state.is_none() {
            planned.options.push("ro".to_owned());
        }
        Ok(())
    }

    /// The place of a file among the layers; a file is there once.
    fn layer(&mut self, path: PathBuf) -> usize {
        let known = self.layers.iter().position(|layer| *layer == path);
        known.unwrap_or_else(|| {
            self.layers.push(path);
            self.layers.len() - 1
        })
    }

    /// The mounts for the guest, with the names it has given: of the joined layers' disk and of each other one.
    pub fn mounts(&self, layers: Option<&str>, disks: &[String]) -> Vec<GuestMount> {
        let name = |device: &Device| match *device {
            Device::Layer(layer) => {
                let disk = layers.unwrap_or_default();
                match self.layers.len() {
                    1 => disk.to_owned(),
                    _ => format!("{disk}{}", layer + 1),
                }
            }
            Device::Disk(disk) => disks.get(disk).cloned().unwrap_or_default(),
        };
        let mount = |planned: &Planned| {
            let mut mount = GuestMount::new();
            mount.fstype.clone_from(&planned.kind);
            mount.source = match &planned.source {
                Source::Device(device) => name(device),
                Source::Text(text) => text.clone(),
            };
            mount.target.clone_from(&planned.target);
            mount.options.clone_from(&planned.options);
            let further = planned.devices.iter().map(name);
            mount
                .options
                .extend(further.map(|device| format!("device={device}")));
            mount.directories.clone_from(&planned.directories);
            mount
        };
        self.mounts.iter().map(mount).collect()
    }
}

/// Refuses a mount that is of no disk and names something of the host.
fn judge(mount: &Mount, planned: &Planned) -> Result<(), Error> {
    let of_host = |path: &str| Error::HostAmongDisks {
        kind: mount.type_.clone(),
        path: path.to_owned(),
    };
    match planned.kind.as_str() {
        "overlay" => {
            for option in &planned.options {
                let Some((key @ ("lowerdir" | "upperdir" | "workdir"), value)) =
                    option.split_once('=')
                else {
                    continue;
                };
                let all: Vec<&str> = match key {
                    "lowerdir" => value.split(':').collect(),
                    _ => vec![value],
                };
                // `a::b` has a data-only layer at its end.
                if let Some(path) = all
                    .iter()
                    .find(|path| !path.is_empty() && !is_inside(Path::new(path)))
                {
                    return Err(of_host(path));
                }
            }
            Ok(())
        }
        "bind" => match &planned.source {
            Source::Text(path) if !is_inside(Path::new(path)) => Err(of_host(path)),
            _ => Ok(()),
        },
        "tmpfs" => Ok(()),
        _ => Err(Error::Type(mount.type_.clone())),
    }
}

/// Whether a path stays below where it is relative to.
fn is_inside(path: &Path) -> bool {
    let mut components = path.components();
    !path.as_os_str().is_empty() && components.all(|part| matches!(part, Component::Normal(_)))
}

/// Where in the root a mount goes.
fn root_target(target: &str) -> Result<String, Error> {
    let below = target.trim_start_matches('/');
    if below.is_empty() {
        return Ok(ROOT.to_owned());
    }
    match is_inside(Path::new(below)) {
        true => Ok(format!("{ROOT}/{below}")),
        false => Err(Error::Target(target.to_owned())),
    }
}

/// `PATH[:MODE[:UID[:GID]]]`; by default of root's alone.
pub(super) fn directory(value: &str) -> Option<GuestDirectory> {
    let mut parts = value.split(':');
    let path = parts.next().filter(|path| is_inside(Path::new(path)))?;
    let mut directory = GuestDirectory::new();
    directory.path = path.to_owned();
    directory.mode = match parts.next() {
        Some(mode) => u32::from_str_radix(mode, 8)
            .ok()
            .filter(|mode| *mode <= 0o7777)?,
        None => 0o700,
    };
    directory.uid = parts.next().map_or(Some(0), |uid| uid.parse().ok())?;
    directory.gid = parts.next().map_or(Some(0), |gid| gid.parse().ok())?;
    parts.next().is_none().then_some(directory)
}

/// The options of a file system that is to be made, as they come.
#[derive(Debug, Default)]
struct Making {
    size: Option<u64>,
    kind: Option<String>,
    uuid: Option<String>,
}

impl Making {
    fn take(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "size" => self.size = Some(bytes(value)?),
            "fs" => self.kind = Some(value.to_owned()),
            "uuid" => {
                let plain = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
                let uuid = value.len() == 36 && value.bytes().all(plain);
                self.uuid = Some(uuid.then(|| value.to_owned())?);
            }
            _ => return None,
        }
        Some(())
    }

    fn done(self, base: &str) -> Result<Mkfs, Error> {
        let kind = self.kind.unwrap_or_else(|| base.to_owned());
        if !kind.starts_with("ext") || !OF_THE_GUEST.contains(&kind.as_str()) {
            return Err(Error::GuestFileSystem(kind));
        }
        let size = self.size.filter(|size| *size > 0);
        Ok(Mkfs {
            size: size.ok_or(Error::NoSize)?,
            kind,
            uuid: self.uuid,
        })
    }
}

/// Bytes as containerd writes them: a number, a fraction too, with or without a unit such as `k`, `MB` or `GiB`, all of
/// which are powers of 1024.
fn bytes(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: f64 = number.parse().ok()?;
    let unit = unit.trim();
    let unit = unit.strip_suffix('b').unwrap_or(unit);
    let unit = unit.strip_suffix('i').unwrap_or(unit);
    let power = match unit {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return None,
    };
    let bytes = number * 1024_f64.powi(power);
    (bytes.is_finite() && bytes < 2_f64.powi(63)).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        let mut mount = Mount::new();
        mount.type_ = kind.into();
        mount.source = source.into();
        mount.options = options.iter().map(ToString::to_string).collect();
        mount
    }

    fn plan(mounts: &[Mount]) -> Plan {
        Plan::of(mounts).unwrap()
    }

    /// As the erofs snapshotter of containerd 2.2 hands over a container's root.
    fn layers_and_scratch() -> Vec<Mount> {
        vec![
            mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]),
            mount("erofs", "/s/2/layer.erofs", &["ro", "loop"]),
            mount(
                "mkfs/ext4",
                "/s/3/rwlayer.img",
                &[
                    "X-containerd.mkfs.size=64MiB",
                    "X-containerd.mkfs.fs=ext4",
                    "rw",
                    "loop",
                ],
            ),
            mount(
                "format/mkdir/overlay",
                "overlay",
                &[
                    "X-containerd.mkdir.path={{ mount 2 }}/upper:0755",
                    "X-containerd.mkdir.path={{ mount 2 }}/work:0711:5:6",
                    "workdir={{ mount 2 }}/work",
                    "upperdir={{ mount 2 }}/upper",
                    "lowerdir={{ overlay 1 0 }}",
                ],
            ),
        ]
    }

    #[test]
    fn layers_are_one_disk_and_the_scratch_another() {
        let plan = plan(&layers_and_scratch());
        assert_eq!(
            plan.layers,
            [Path::new("/s/1/layer.erofs"), Path::new("/s/2/layer.erofs")]
        );
        let scratch = Disk {
            path: "/s/3/rwlayer.img".into(),
            read_only: false,
            mkfs: Some(Mkfs {
                size: 64 << 20,
                kind: "ext4".into(),
                uuid: None,
            }),
        };
        assert_eq!(plan.disks, [scratch]);
        let mounts = plan.mounts(Some("/dev/vda"), &["/dev/vdb".to_owned()]);
        let shown: Vec<String> = mounts
            .iter()
            .map(|m| {
                format!(
                    "{} {} {} {}",
                    m.fstype,
                    m.source,
                    m.target,
                    m.options.join(",")
                )
            })
            .collect();
        assert_eq!(
            shown,
            [
                "erofs /dev/vda1 m/0 ro",
                "erofs /dev/vda2 m/1 ro",
                "ext4 /dev/vdb m/2 rw",
                "overlay overlay rootfs workdir=m/2/work,upperdir=m/2/upper,lowerdir=m/1:m/0",
            ]
        );
        let made: Vec<_> = mounts[3]
            .directories
            .iter()
            .map(|d| (d.path.as_str(), d.mode, d.uid, d.gid))
            .collect();
        assert_eq!(
            made,
            [("m/2/upper", 0o755, 0, 0), ("m/2/work", 0o711, 5, 6)]
        );
    }

    #[test]
    fn one_disk_is_the_root_itself() {
        let plan = plan(&[mount("ext4", "/b/blockfile", &["loop", "rw"])]);
        assert!(plan.layers.is_empty());
        assert!(!plan.disks[0].read_only && plan.disks[0].mkfs.is_none());
        let mounts = plan.mounts(None, &["/dev/vdc".to_owned()]);
        assert_eq!(
            (mounts[0].source.as_str(), mounts[0].target.as_str()),
            ("/dev/vdc", "rootfs")
        );
        let view = Plan::of(&[mount("ext4", "/b/blockfile", &["loop", "ro"])]).unwrap();
        assert_eq!(view.mounts(Some("/dev/vdc"), &[])[0].source, "/dev/vdc");
    }

    #[test]
    fn a_file_system_on_several_files_names_the_others() {
        let plan = plan(&[
            mount(
                "erofs",
                "/s/fsmeta.erofs",
                &["ro", "loop", "device=/s/1", "device=/s/2"],
            ),
            mount("format/bind", "{{ mount 0 }}", &["rbind", "ro"]),
        ]);
        let mounts = plan.mounts(Some("/dev/vda"), &[]);
        assert_eq!(mounts[0].source, "/dev/vda1");
        assert_eq!(
            mounts[0].options,
            ["ro", "device=/dev/vda2", "device=/dev/vda3"]
        );
        assert_eq!(
            (mounts[1].source.as_str(), mounts[1].target.as_str()),
            ("m/0", "rootfs")
        );
    }

    #[test]
    fn a_hundred_layers_are_one_disk() {
        let mut mounts: Vec<Mount> = (0..100)
            .map(|n| mount("erofs", &format!("/s/{n}"), &["ro"]))
            .collect();
        mounts.push(mount(
            "format/overlay",
            "overlay",
            &["lowerdir={{ overlay 99 0 }}"],
        ));
        let plan = plan(&mounts);
        assert_eq!((plan.layers.len(), plan.disks.len()), (100, 0));
        let mounts = plan.mounts(Some("/dev/vda"), &[]);
        assert!(mounts[100].options[0].starts_with("lowerdir=m/99:m/98:"));
        assert!(mounts[100].options[0].len() < 1000, "fits in a page");
    }

    #[test]
    fn what_is_not_served_is_named() {
        let refused = |mounts: &[Mount]| Plan::of(mounts).unwrap_err().to_string();
        let base = || mount("erofs", "/s/1", &["ro"]);
        for (text, mounts) in [
            ("xfs", vec![base(), mount("xfs", "/dev/x", &[])]),
            (
                "xfs",
                vec![mount(
                    "mkfs/ext4",
                    "/s",
                    &["X-containerd.mkfs.size=1M", "X-containerd.mkfs.fs=xfs"],
                )],
            ),
            ("mkfs.size", vec![mount("mkfs/ext4", "/s", &[])]),
            (
                "X-containerd.mkfs.size=lots",
                vec![mount("mkfs/ext4", "/s", &["X-containerd.mkfs.size=lots"])],
            ),
            (
                "X-containerd.mkfs.uuid=-rf",
                vec![mount("mkfs/ext4", "/s", &["X-containerd.mkfs.uuid=-rf"])],
            ),
            (
                "X-containerd.dmverity.x=1",
                vec![mount("erofs", "/s", &["X-containerd.dmverity.x=1"])],
            ),
            (
                "/host/dir",
                vec![
                    base(),
                    mount("format/overlay", "o", &["lowerdir={{ mount 0 }}:/host/dir"]),
                ],
            ),
            (
                "/host/up",
                vec![
                    base(),
                    mount(
                        "format/overlay",
                        "o",
                        &["lowerdir={{ mount 0 }}", "upperdir=/host/up"],
                    ),
                ],
            ),
            ("/host", vec![base(), mount("bind", "/host", &[])]),
            (
                "lowerdir={{ mount 0 }}",
                vec![base(), mount("overlay", "o", &["lowerdir={{ mount 0 }}"])],
            ),
            (
                "X-containerd.mkdir.path={{ mount 0 }}/../x",
                vec![
                    base(),
                    mount(
                        "format/mkdir/bind",
                        "m/0",
                        &["X-containerd.mkdir.path={{ mount 0 }}/../x"],
                    ),
                ],
            ),
            ("wild/erofs", vec![mount("wild/erofs", "/s", &[])]),
            ("nfs", vec![base(), mount("nfs", "/s", &[])]),
        ] {
            // A filled-in template is named as it was filled in.
            let text = text.replace("{{ mount 0 }}/..", "m/0/..");
            let error = refused(&mounts);
            assert!(error.contains(&text), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_as_containerd_reads_them() {
        for (text, expected) in [
            ("1024", Some(1024)),
            ("64M", Some(64 << 20)),
            ("64MiB", Some(64 << 20)),
            ("64 mb", Some(64 << 20)),
            ("1.5g", Some(3 << 29)),
            ("2T", Some(2 << 40)),
            ("", None),
            ("M", None),
            ("12 lots", None),
            ("99999P", None),
            ("-1", None),
        ] {
            assert_eq!(bytes(text), expected, "{text}");
        }
    }
}
