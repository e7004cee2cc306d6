//! The root file system that containerd hands to Create, as a list of mounts.
//! Directories of the host are mounted here, in this process's own mount
//! namespace, and shared with the guest; files that hold a file system become
//! disks of the VM, which the guest mounts. Where the one builds on the other,
//! all is mounted here.

use std::path::PathBuf;

use containerd_shim_protos::api::Mount;

pub mod guest;
pub mod host;
mod loops;
mod template;

/// What mount(2) takes of options: a page, with the NUL.
const DATA_LIMIT: usize = 4095;

/// Why the root is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A mount type that is not served.
    #[error(
        "Rootfs mount type {0:?} is not served; bind, overlay, tmpfs and file systems on files or block devices are, each also behind format/, mkdir/ and mkfs/"
    )]
    Type(String),
    /// A file system that the guest's kernel does not have.
    #[error("The guest has no file system {0}; on disks of the rootfs it has erofs and ext4")]
    GuestFileSystem(String),
    /// An option that this shim does not know how to honour.
    #[error("Rootfs mount option {option:?} of type {kind} is not served")]
    Option {
        /// The option.
        option: String,
        /// The mount's type.
        kind: String,
    },
    /// Owners are to be mapped, and it does not say which to which.
    #[error(
        "Rootfs mount option {0:?} maps no owners: it takes uidmap=STORED:SHOWN:COUNT and gidmap=STORED:SHOWN:COUNT, several behind each other with commas"
    )]
    Owners(String),
    /// A file system is to be made in a file of unknown size.
    #[error("A rootfs mount of type mkfs/… needs the option X-containerd.mkfs.size=BYTES")]
    NoSize,
    /// A template that cannot be filled in.
    #[error("The template {text:?} of a rootfs mount cannot be filled in: {why}")]
    Template {
        /// The text with it.
        text: String,
        /// What is wrong.
        why: String,
    },
    /// A directory of the host in a root that is mounted in the guest.
    #[error(
        "Rootfs mount {kind} names {path}, a path of the host, in a root of disks that are made (mkfs/…), which the guest mounts: name what was mounted before by {{{{ mount N }}}}"
    )]
    HostAmongDisks {
        /// The mount's type.
        kind: String,
        /// The path.
        path: String,
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

/// A mount's type, taken apart: what is to be done before, and the file system.
#[derive(Debug, PartialEq, Eq)]
struct Type<'a> {
    format: bool,
    mkdir: bool,
    mkfs: bool,
    base: &'a str,
}

impl<'a> Type<'a> {
    fn of(text: &'a str) -> Result<Self, Error> {
        let mut kind = Self {
            format: false,
            mkdir: false,
            mkfs: false,
            base: text,
        };
        while let Some((prefix, rest)) = kind.base.split_once('/') {
            match prefix {
                "format" => kind.format = true,
                "mkdir" => kind.mkdir = true,
                "mkfs" => kind.mkfs = true,
                // It is no loop device that the guest has its disks from.
                "loop" => {}
                _ => return Err(Error::Type(text.to_owned())),
            }
            kind.base = rest;
        }
        match kind.base.is_empty() {
            true => Err(Error::Type(text.to_owned())),
            false => Ok(kind),
        }
    }
}

/// Where a root is mounted.
#[derive(Debug)]
pub enum Form {
    /// On the host, from its directories; or it lies in the bundle already.
    Host,
    /// In the guest, from disks.
    Guest(guest::Plan),
}

impl Form {
    /// Judges the mounts of a root.
    ///
    /// # Errors
    /// What is not served, by name.
    pub fn of(mounts: &[Mount]) -> Result<Self, Error> {
        let (mut on_disk, mut mkfs) = (false, false);
        for mount in mounts {
            let kind = Type::of(&mount.type_)?;
            on_disk |= guest::is_on_disk(&kind);
            mkfs |= kind.mkfs;
        }
        if !on_disk {
            return Ok(Self::Host);
        }
        match guest::Plan::of(mounts) {
            Err(Error::HostAmongDisks { .. }) if !mkfs => Ok(Self::Host),
            plan => plan.map(Self::Guest),
        }
    }
}

/// How many of the mounts come before the last that builds on others: they are only built on, and not in the root.
fn built_on(mounts: &[Mount]) -> usize {
    let templates = |mount: &Mount| {
        let mut texts = mount.options.iter().chain([&mount.source, &mount.target]);
        texts.any(|text| template::is_template(text))
    };
    mounts.iter().rposition(templates).unwrap_or(0)
}

/// Fills in the templates of a mount that has some by its type.
fn filled(
    mount: &Mount,
    kind: &Type<'_>,
    earlier: &impl template::Earlier,
) -> Result<Mount, Error> {
    let mut filled = mount.clone();
    if kind.format {
        filled.source = template::fill(&mount.source, earlier)?;
        filled.target = template::fill(&mount.target, earlier)?;
        for option in &mut filled.options {
            *option = template::fill(option, earlier)?;
        }
    }
    Ok(filled)
}
