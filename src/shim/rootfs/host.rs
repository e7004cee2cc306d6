//! A root of directories of the host, or of disks and directories: mounts to make
//! on the bundle's `rootfs`, in this process's own mount namespace, until it is shared.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use containerd_shim_protos::api::Mount;
use nacre_fs::Owners;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use self::mapped::{mapped, names_other_layers};
use super::loops::Device;
use super::template::{Earlier, is_template};
use super::{DATA_LIMIT, Error, Type, guest};

mod mapped;

/// A root that is there; dropping it unmounts what was mounted for it.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    mounted: Vec<PathBuf>,
}

impl Root {
    /// Mounts `mounts` on `path` in their order. Without mounts `path` is the root as it is. Those that others build on are not
    /// in the root.
    ///
    /// # Errors
    /// A mount that is not served, by name, or that the system refused.
    pub fn mount(path: &Path, mounts: &[Mount]) -> Result<Self, Error> {
        let built_on = super::built_on(mounts);
        // Where something is built on, a small tmpfs has places for all of it.
        let root = match built_on {
            0 => path.to_owned(),
            _ => path.join("root"),
        };
        let places: Vec<PathBuf> = (0..mounts.len())
            .map(|index| match index < built_on {
                true => path.join(index.to_string()),
                false => root.clone(),
            })
            .collect();
        let mut plans = Vec::new();
        for (index, mount) in mounts.iter().enumerate() {
            plans.push(Plan::of(mount, &Before(&places[..index]))?);
        }
        let mut made = Self {
            path: root,
            mounted: Vec::new(),
        };
        if !plans.is_empty() {
            make_directory(path)?;
        }
        if built_on > 0 {
            let options = Some("mode=0700,size=4m");
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            mount_tmpfs(path, flags, options)?;
            made.mounted.push(path.to_owned());
            for place in &places[..=built_on] {
                make_directory(place)?;
            }
        }
        for (index, (plan, place)) in plans.into_iter().zip(&places).enumerate() {
            let target = match index < built_on {
                true => place.clone(),
                false => below(place, &plan.target)?,
            };
            plan.mount(&target, &mut made.mounted)?;
        }
        Ok(made)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            if let Err(errno) = umount2(target, MntFlags::MNT_DETACH) {
                tracing::warn!(path = %target.display(), %errno, "cannot unmount a root");
            }
        }
    }
}

fn make_directory(path: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(path).map_err(|source| Error::System {
        doing: "make the directory".to_owned(),
        path: path.to_owned(),
        source,
    })
}

fn mount_tmpfs(path: &Path, flags: MsFlags, options: Option<&str>) -> Result<(), Error> {
    mount(Some("nacre"), path, Some("tmpfs"), flags, options).map_err(|errno| Error::System {
        doing: "mount a tmpfs on".to_owned(),
        path: path.to_owned(),
        source: errno.into(),
    })
}

/// Where `target` is in what is mounted on `root` by now. Links that an image has lead nowhere outside.
fn below(root: &Path, target: &Path) -> Result<PathBuf, Error> {
    if target.as_os_str().is_empty() {
        return Ok(root.to_owned());
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |errno: nix::Error| Error::System {
            doing: "find the place of a mount at".to_owned(),
            path,
            source: errno.into(),
        }
    };
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let open = |at: &Path, how: ResolveFlag, from: Option<&OwnedFd>| {
        let how = OpenHow::new().flags(flags).resolve(how);
        match from {
            Some(from) => openat2(from, at, how),
            None => openat2(nix::fcntl::AT_FDCWD, at, how),
        }
    };
    let directory = open(root, ResolveFlag::empty(), None).map_err(failed(root))?;
    let how = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let place = root.join(target);
    let found = open(target, how, Some(&directory)).map_err(failed(&place))?;
    let link = format!("/proc/self/fd/{}", found.as_raw_fd());
    std::fs::read_link(link).map_err(|source| Error::System {
        doing: "find the place of a mount at".to_owned(),
        path: place,
        source,
    })
}

/// The places of the mounts before one, for its templates.
struct Before<'a>(&'a [PathBuf]);

impl Earlier for Before<'_> {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn mount_point(&self, index: usize) -> String {
        self.0[index].to_string_lossy().into_owned()
    }

    fn source(&self, index: usize) -> Result<String, String> {
        Err(format!(
            "what mount {index} is mounted from is known when it is mounted"
        ))
    }
}

/// A mount as mount(2) takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plan {
    kind: String,
    /// Whether the source is a disk: a file, or a block device.
    on_disk: bool,
    source: PathBuf,
    /// Further disks of the file system.
    devices: Vec<PathBuf>,
    target: PathBuf,
    flags: MsFlags,
    data: Vec<String>,
    directories: Vec<Directory>,
    /// The owners that the root is to show, if not those that its files have.
    owners: Option<Owners>,
}

/// A directory that is made before a mount, unless it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Directory {
    path: PathBuf,
    mode: u32,
    owner: (u32, u32),
}

impl Directory {
    /// `PATH[:MODE[:UID[:GID]]]` with an absolute path; by default of root's alone.
    fn of(value: &str) -> Option<Self> {
        let relative = super::guest::directory(value.strip_prefix('/')?)?;
        Some(Self {
            path: Path::new("/").join(relative.path),
            mode: relative.mode,
            owner: (relative.uid, relative.gid),
        })
    }

    fn make(&self) -> Result<(), Error> {
        let failed = |source: std::io::Error| Error::System {
            doing: "make the directory".to_owned(),
            path: self.path.clone(),
            source,
        };
        match std::fs::DirBuilder::new().mode(0o700).create(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
        let (uid, gid) = self.owner;
        std::os::unix::fs::lchown(&self.path, Some(uid), Some(gid)).map_err(failed)?;
        let mode = std::fs::Permissions::from_mode(self.mode);
        std::fs::set_permissions(&self.path, mode).map_err(failed)
    }
}

impl Plan {
    fn of(mount: &Mount, earlier: &Before<'_>) -> Result<Self, Error> {
        let of = Type::of(&mount.type_)?;
        let kind = of.base;
        if of.mkfs {
            return Err(Error::Type(mount.type_.clone()));
        }
        let mount = &super::filled(mount, &of, earlier)?;
        let on_disk = guest::is_on_disk(&of);
        let target = Path::new(mount.target.trim_start_matches('/'));
        if target
            .components()
            .any(|part| !matches!(part, Component::Normal(_)))
        {
            return Err(Error::Target(mount.target.clone()));
        }
        let mut flags = MsFlags::empty();
        let mut data = Vec::new();
        let (mut directories, mut devices) = (Vec::new(), Vec::new());
        let mut owners = None;
        match kind {
            "bind" => flags |= MsFlags::MS_BIND,
            "erofs" => flags |= MsFlags::MS_RDONLY,
            _ => {}
        }
        for option in &mount.options {
            let directory = option.strip_prefix("X-containerd.mkdir.path=");
            if let Some(value) = directory.filter(|_| of.mkdir) {
                let directory = Directory::of(value).ok_or_else(|| Error::Option {
                    option: option.clone(),
                    kind: mount.type_.clone(),
                })?;
                directories.push(directory);
                continue;
            }
            if on_disk && let Some(device) = option.strip_prefix("device=") {
                devices.push(device.into());
                continue;
            }
            if let Some(more) = mapped(option, &mut owners) {
                more.ok_or_else(|| Error::Owners(option.clone()))?;
                continue;
            }
            match option.as_str() {
                "loop" if on_disk => {}
                "rw" if kind == "erofs" => {}
                "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
                "bind" => flags |= MsFlags::MS_BIND,
                "ro" => flags |= MsFlags::MS_RDONLY,
                "rw" => flags -= MsFlags::MS_RDONLY,
                "noatime" => flags |= MsFlags::MS_NOATIME,
                "relatime" => flags |= MsFlags::MS_RELATIME,
                "strictatime" => flags |= MsFlags::MS_STRICTATIME,
                "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
                "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
                "dirsync" => flags |= MsFlags::MS_DIRSYNC,
                "nodev" => flags |= MsFlags::MS_NODEV,
                "noexec" => flags |= MsFlags::MS_NOEXEC,
                "nosuid" => flags |= MsFlags::MS_NOSUID,
                // Defaults; and propagation, which ends at the guest.
                "" | "defaults" | "dev" | "exec" | "suid" | "atime" | "norelatime" | "diratime"
                | "async" | "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave"
                | "unbindable" | "runbindable" => {}
                option
                    if option == "loop"
                        || option.starts_with("X-containerd.")
                        || is_template(option) =>
                {
                    return Err(Error::Option {
                        option: option.to_owned(),
                        kind: mount.type_.clone(),
                    });
                }
                option => data.push(option.to_owned()),
            }
        }
        if let Some(owners) = &owners
            && (owners.users.is_empty() || owners.groups.is_empty())
        {
            return Err(Error::Owners("uidmap= or gidmap= alone".to_owned()));
        }
        if owners.is_some()
            && let Some(option) = data.iter().find(|option| names_other_layers(option))
        {
            return Err(Error::Option {
                option: option.clone(),
                kind: mount.type_.clone(),
            });
        }
        if flags.contains(MsFlags::MS_BIND) {
            // A bind mount has no options of a file system.
            data.clear();
        }
        Ok(Self {
            kind: kind.to_owned(),
            on_disk,
            source: PathBuf::from(&mount.source),
            devices,
            target: target.to_owned(),
            flags,
            data,
            directories,
            owners,
        })
    }

    fn mount_plainly(&self, target: &Path) -> Result<(), Error> {
        let error = |doing: &str| {
            let doing = format!("{doing} {} {} on", self.kind, self.source.display());
            let path = target.to_owned();
            move |errno: nix::Error| Error::System {
                doing,
                path,
                source: errno.into(),
            }
        };
        if self.flags.contains(MsFlags::MS_BIND) {
            let bind = self.flags & (MsFlags::MS_BIND | MsFlags::MS_REC);
            mount(Some(&self.source), target, None::<&str>, bind, None::<&str>)
                .map_err(error("mount"))?;
            // A bind mount takes its flags only when it is there.
            let flags = (self.flags - MsFlags::MS_REC) | MsFlags::MS_REMOUNT;
            if self.flags == bind {
                return Ok(());
            }
            return mount(None::<&str>, target, None::<&str>, flags, None::<&str>).map_err(
                |errno| {
                    // It is not in the caller's list yet.
                    let _ = umount2(target, MntFlags::MNT_DETACH);
                    error("set the flags of")(errno)
                },
            );
        }
        let (mut data, _kept) = self.data()?;
        // A loop device stays until the mount is gone, from when it is mounted.
        let mut disks = Vec::new();
        if self.on_disk {
            let read_only = self.flags.contains(MsFlags::MS_RDONLY);
            for path in std::iter::once(&self.source).chain(&self.devices) {
                disks.push(Device::of(path, read_only)?);
            }
            for disk in disks.iter().skip(1) {
                let comma = if data.is_empty() { "" } else { "," };
                data.push_str(&format!("{comma}device={}", disk.path().display()));
            }
        }
        mount(
            Some(disks.first().map_or(self.source.as_path(), Device::path)),
            target,
            Some(OsStr::new(&self.kind)),
            self.flags,
            Some(OsStr::new(&data)),
        )
        .map_err(error("mount"))
    }

    /// The options as one text. Where they are too long, an overlay's lower directories are named by
    /// descriptors, which stay open as long as the second value lives.
    fn data(&self) -> Result<(String, Vec<File>), Error> {
        let data = self.data.join(",");
        if data.len() <= DATA_LIMIT {
            return Ok((data, Vec::new()));
        }
        let mut files = Vec::new();
        let mut short = Vec::new();
        for option in &self.data {
            let Some(directories) = option.strip_prefix("lowerdir=") else {
                short.push(option.clone());
                continue;
            };
            let mut names = Vec::new();
            for directory in directories.split(':') {
                let file = std::fs::OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
                    .open(directory)
                    .map_err(|source| Error::System {
                        doing: "open the layer".to_owned(),
                        path: directory.into(),
                        source,
                    })?;
                names.push(format!("/proc/self/fd/{}", file.as_raw_fd()));
                files.push(file);
            }
            short.push(format!("lowerdir={}", names.join(":")));
        }
        let data = short.join(",");
        if data.len() > DATA_LIMIT {
            return Err(Error::TooLong {
                kind: self.kind.clone(),
                length: data.len(),
            });
        }
        Ok((data, files))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn of(kind: &str, target: &str, options: &[&str]) -> Result<Plan, Error> {
        of_places(kind, target, options, &[])
    }

    fn of_places(
        kind: &str,
        target: &str,
        options: &[&str],
        places: &[PathBuf],
    ) -> Result<Plan, Error> {
        let mut mount = Mount::new();
        mount.type_ = kind.into();
        mount.source = "/source".into();
        mount.target = target.into();
        mount.options = options.iter().map(ToString::to_string).collect();
        Plan::of(&mount, &Before(places))
    }

    #[test]
    fn what_builds_on_disks_names_where_they_are_mounted() {
        let places = [PathBuf::from("/b/0"), PathBuf::from("/b/1")];
        let options = [
            "lowerdir={{ overlay 1 0 }}",
            "upperdir=/s/fs",
            "workdir=/s/work",
        ];
        let plan = of_places("format/overlay", "", &options, &places).unwrap();
        assert_eq!(plan.data[0], "lowerdir=/b/1:/b/0");
        assert!(!plan.on_disk);
        let plan = of("erofs", "", &["loop", "ro", "device=/other", "rw"]).unwrap();
        assert!(plan.on_disk && plan.flags == MsFlags::MS_RDONLY && plan.data.is_empty());
        assert_eq!(plan.devices, [PathBuf::from("/other")]);
    }

    #[test]
    fn links_of_an_image_lead_nowhere_outside() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir_all(root.join("inside/etc")).unwrap();
        std::os::unix::fs::symlink("/inside/../inside", root.join("link")).unwrap();
        std::os::unix::fs::symlink("../../..", root.join("up")).unwrap();
        let root = root.canonicalize().unwrap();
        let at = |target: &str| below(&root, Path::new(target));
        assert_eq!(at("").unwrap(), root);
        assert_eq!(at("link/etc").unwrap(), root.join("inside/etc"));
        assert_eq!(at("up").unwrap(), root);
        let error = at("missing").unwrap_err().to_string();
        assert!(error.contains("missing"), "{error}");
    }

    #[test]
    fn overlay_keeps_its_directories_and_may_be_written() {
        let options = [
            "index=off",
            "workdir=/w",
            "upperdir=/u",
            "lowerdir=/a:/b",
            "rw",
        ];
        let plan = of("overlay", "", &options).unwrap();
        assert_eq!(plan.flags, MsFlags::empty());
        assert_eq!(
            plan.data().unwrap().0,
            "index=off,workdir=/w,upperdir=/u,lowerdir=/a:/b"
        );
        assert!(
            of("overlay", "", &["ro", "lowerdir=/a:/b"])
                .unwrap()
                .flags
                .contains(MsFlags::MS_RDONLY)
        );
    }

    #[test]
    fn binds_have_flags_and_no_data() {
        let plan = of("bind", "/sub", &["rbind", "ro", "foo=bar"]).unwrap();
        assert!(
            plan.flags
                .contains(MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY)
        );
        assert!(plan.data.is_empty());
        assert_eq!(plan.target, Path::new("sub"));
        assert_eq!(of("bind", "", &[]).unwrap().flags, MsFlags::MS_BIND);
    }

    #[test]
    fn what_is_not_served_is_named() {
        for (kind, options) in [
            ("wild/overlay", &[][..]),
            ("mkfs/overlay", &[]),
            ("", &[]),
            ("tmpfs", &["loop"]),
            ("format/overlay", &["lowerdir={{ overlay 0 2 }}"]),
            ("mkdir/bind", &["X-containerd.mkdir.path=relative"]),
            ("bind", &["X-containerd.mkdir.path=/not/asked/for"]),
        ] {
            let error = of(kind, "", options).unwrap_err().to_string();
            assert!(error.contains(options.first().unwrap_or(&kind)), "{error}");
        }
        assert!(matches!(of("bind", "../up", &[]), Err(Error::Target(_))));
    }

    #[test]
    fn directories_are_made_first_with_their_mode() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("upper");
        let user = nix::unistd::getuid();
        let option = format!("X-containerd.mkdir.path={}:1751:{user}", path.display());
        let plan = of("mkdir/overlay", "", &[&option]).unwrap();
        plan.directories[0].make().unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o1751);
        plan.directories[0].make().unwrap();
    }

    #[test]
    fn many_layers_are_named_by_descriptor() {
        let root = tempfile::tempdir().unwrap();
        let layers: Vec<String> = (0..60)
            .map(|n| {
                let layer = root.path().join(format!("{n}-{}", "x".repeat(100)));
                std::fs::create_dir(&layer).unwrap();
                layer.to_str().unwrap().to_owned()
            })
            .collect();
        let option = format!("lowerdir={}", layers.join(":"));
        let plan = of("overlay", "", &["index=off", &option]).unwrap();
        let (data, files) = plan.data().unwrap();
        assert_eq!(files.len(), 60);
        assert!(data.len() <= DATA_LIMIT && data.starts_with("index=off,lowerdir=/proc/self/fd/"));
        assert!(matches!(
            of("tmpfs", "", &[&"y".repeat(5000)]).unwrap().data(),
            Err(Error::TooLong { .. })
        ));
    }
}
