//! The root file system that containerd hands to Create: mounts to make on the
//! bundle's `rootfs`, in this process's own mount namespace, for as long as an image is made of it.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use containerd_shim_protos::api::Mount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// What mount(2) takes of options: a page, with the NUL.
const DATA_LIMIT: usize = 4095;

/// Why the root is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A mount type that this shim does not mount.
    #[error("Rootfs mount type {0:?} is not served; bind, overlay and plain file systems are")]
    Type(String),
    /// An option that this shim does not know how to honour.
    #[error("Rootfs mount option {option:?} of type {kind} is not served")]
    Option {
        /// The option.
        option: String,
        /// The mount's type.
        kind: String,
    },
    /// A target that would leave the root.
    #[error("Rootfs mount target {0:?} must stay below the root")]
    Target(String),
    /// The options do not fit mount(2).
    #[error("The options of rootfs mount {kind} are {length} bytes long; {DATA_LIMIT} fit")]
    TooLong {
        /// The mount's type.
        kind: String,
        /// Their length.
        length: usize,
    },
    /// The system refused.
    #[error("Cannot {doing} {}: {source}", path.display())]
    System {
        /// What was being done.
        doing: String,
        /// To which path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A root that is there; dropping it unmounts what was mounted for it.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    mounted: Vec<PathBuf>,
}

impl Root {
    /// Mounts `mounts` on `path` in their order, read-only. Without mounts `path` is the root as it is.
    ///
    /// # Errors
    /// A mount that is not served, by name, or that the system refused.
    pub fn mount(path: &Path, mounts: &[Mount]) -> Result<Self, Error> {
        let plans = mounts.iter().map(Plan::of).collect::<Result<Vec<_>, _>>()?;
        let mut root = Self {
            path: path.to_owned(),
            mounted: Vec::new(),
        };
        if !plans.is_empty() {
            let error = |source| Error::System {
                doing: "make the directory".to_owned(),
                path: path.to_owned(),
                source,
            };
            std::fs::create_dir_all(path).map_err(error)?;
        }
        for plan in plans {
            let target = path.join(&plan.target);
            plan.mount(&target)?;
            root.mounted.push(target);
        }
        Ok(root)
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

/// A mount as mount(2) takes it.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    kind: String,
    source: PathBuf,
    target: PathBuf,
    flags: MsFlags,
    data: Vec<String>,
}

impl Plan {
    fn of(mount: &Mount) -> Result<Self, Error> {
        let kind = mount.type_.as_str();
        if kind.is_empty() || kind.contains('/') {
            return Err(Error::Type(kind.to_owned()));
        }
        let target = Path::new(mount.target.trim_start_matches('/'));
        if target
            .components()
            .any(|part| !matches!(part, Component::Normal(_)))
        {
            return Err(Error::Target(mount.target.clone()));
        }
        // The image only reads it.
        let mut flags = MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
        let mut data = Vec::new();
        if kind == "bind" {
            flags |= MsFlags::MS_BIND;
        }
        for option in &mount.options {
            match option.as_str() {
                "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
                "bind" => flags |= MsFlags::MS_BIND,
                "nodev" => flags |= MsFlags::MS_NODEV,
                "noexec" => flags |= MsFlags::MS_NOEXEC,
                "nosuid" => flags |= MsFlags::MS_NOSUID,
                // What only concerns writing, times or propagation says nothing about the content.
                "" | "ro" | "rw" | "defaults" | "dev" | "exec" | "suid" | "atime" | "noatime"
                | "relatime" | "norelatime" | "strictatime" | "diratime" | "nodiratime"
                | "sync" | "async" | "dirsync" | "private" | "rprivate" | "shared" | "rshared"
                | "slave" | "rslave" | "unbindable" | "runbindable" | "volatile" => {}
                option
                    if option == "loop"
                        || option.starts_with("X-containerd.")
                        || option.contains("{{") =>
                {
                    return Err(Error::Option {
                        option: option.to_owned(),
                        kind: kind.to_owned(),
                    });
                }
                option => data.push(option.to_owned()),
            }
        }
        if flags.contains(MsFlags::MS_BIND) {
            // A bind mount has no options of a file system.
            data.clear();
        }
        Ok(Self {
            kind: kind.to_owned(),
            source: PathBuf::from(&mount.source),
            target: target.to_owned(),
            flags,
            data,
        })
    }

    fn mount(&self, target: &Path) -> Result<(), Error> {
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
            return mount(None::<&str>, target, None::<&str>, flags, None::<&str>).map_err(
                |errno| {
                    // It is not in the caller's list yet.
                    let _ = umount2(target, MntFlags::MNT_DETACH);
                    error("make read-only")(errno)
                },
            );
        }
        let (data, _kept) = self.data()?;
        mount(
            Some(&self.source),
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

    fn of(kind: &str, target: &str, options: &[&str]) -> Result<Plan, Error> {
        let mut mount = Mount::new();
        mount.type_ = kind.into();
        mount.source = "/source".into();
        mount.target = target.into();
        mount.options = options.iter().map(ToString::to_string).collect();
        Plan::of(&mount)
    }

    #[test]
    fn overlay_keeps_its_directories_and_is_read_only() {
        let plan = of(
            "overlay",
            "",
            &[
                "index=off",
                "workdir=/w",
                "upperdir=/u",
                "lowerdir=/a:/b",
                "rw",
            ],
        )
        .unwrap();
        assert_eq!(plan.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOATIME);
        assert_eq!(
            plan.data().unwrap().0,
            "index=off,workdir=/w,upperdir=/u,lowerdir=/a:/b"
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
        assert!(!of("bind", "", &[]).unwrap().flags.contains(MsFlags::MS_REC));
    }

    #[test]
    fn what_is_not_served_is_named() {
        assert!(
            of("format/mkdir/overlay", "", &[])
                .unwrap_err()
                .to_string()
                .contains("format/mkdir/overlay")
        );
        assert!(matches!(of("", "", &[]), Err(Error::Type(_))));
        assert!(matches!(
            of("erofs", "", &["loop"]),
            Err(Error::Option { .. })
        ));
        assert!(matches!(
            of("overlay", "", &["lowerdir={{ overlay 0 2 }}"]),
            Err(Error::Option { .. })
        ));
        assert!(matches!(of("bind", "../up", &[]), Err(Error::Target(_))));
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
