//! Containers that have users of their own, by a user namespace: who they are outside of it, and how a process that is added
//! becomes one of them. The library puts such a process into every namespace of the container but this one, so it
//! is made as root of the guest, and enters the last one itself, right before its program runs.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::PathBuf;

use caps::{CapSet, CapsHashSet};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Uid, User, chdir, getgroups, setgroups, setresgid, setresuid};
use oci_spec::runtime::{
    Capabilities, Capability, Linux, LinuxCapabilities, LinuxIdMapping, LinuxNamespaceType,
    Process, User as SpecifiedUser,
};
use serde::{Deserialize, Serialize};

use crate::confinement::{self, Own};

/// To enter the namespace and to become a user there.
const LOAN: [Capability; 4] = [
    Capability::SysAdmin,
    Capability::Setuid,
    Capability::Setgid,
    Capability::Setpcap,
];

/// Who the users and groups of a container are outside of it.
#[derive(Clone, Debug)]
pub struct Users {
    uids: Vec<LinuxIdMapping>,
    gids: Vec<LinuxIdMapping>,
}

impl Users {
    /// Those of a container, if they are its own.
    pub fn of(linux: &Linux) -> Option<Self> {
        let mut namespaces = linux.namespaces().iter().flatten();
        namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::User)?;
        Some(Self {
            uids: linux.uid_mappings().clone().unwrap_or_default(),
            gids: linux.gid_mappings().clone().unwrap_or_default(),
        })
    }

    /// A user and a group as they are outside: root for what is nobody there.
    pub fn outside(&self, (uid, gid): (u32, u32)) -> (u32, u32) {
        (mapped(&self.uids, uid), mapped(&self.gids, gid))
    }
}

fn mapped(maps: &[LinuxIdMapping], id: u32) -> u32 {
    let by = |map: &LinuxIdMapping| {
        let offset = id.checked_sub(map.container_id())?;
        let within = offset < map.size();
        within.then(|| map.host_id().checked_add(offset)).flatten()
    };
    maps.iter().find_map(by).unwrap_or(0)
}

/// Who a process is to be in its container's user namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The container's init, in the guest's first pid namespace.
    init: i32,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    capabilities: Option<LinuxCapabilities>,
    cwd: PathBuf,
    /// Whether the specification leaves HOME to the runtime.
    wants_home: bool,
}

/// Makes a process root of the guest, with what it takes to become who it is to be.
pub fn lend(process: &mut Process, init: i32) -> Identity {
    let user = process.user().clone();
    let mut environment = process.env().iter().flatten();
    let identity = Identity {
        init,
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        capabilities: process.capabilities().clone(),
        cwd: process.cwd().clone(),
        wants_home: !environment
            .any(|variable| variable.starts_with("HOME=") && variable != "HOME="),
    };
    let mut root = SpecifiedUser::default();
    root.set_umask(user.umask());
    process.set_user(root);
    let mut capabilities = LinuxCapabilities::default();
    let loan: Capabilities = LOAN.into_iter().collect();
    capabilities.set_bounding(Some(loan.clone()));
    capabilities.set_effective(Some(loan.clone()));
    capabilities.set_permitted(Some(loan));
    capabilities.set_inheritable(None);
    capabilities.set_ambient(None);
    process.set_capabilities(Some(capabilities));
    identity
}

impl Identity {
    /// The namespace, which is to be opened where the guest's `/proc` is.
    ///
    /// # Errors
    /// As the kernel has them; the init may be gone.
    pub fn namespace(&self) -> io::Result<File> {
        File::open(format!("/proc/{}/ns/user", self.init))
    }

    /// The capabilities that stay at the end, if the specification says which.
    pub fn own(&self) -> Option<Own> {
        self.capabilities.as_ref().map(Own::of)
    }

    /// Becomes it, but for the permitted and effective capabilities: a filter is still to be installed. The calling process must
    /// have one thread.
    ///
    /// # Errors
    /// As the kernel has them: the program must not be run then.
    pub fn take_on(&self, namespace: &File) -> io::Result<()> {
        setns(namespace, CloneFlags::CLONE_NEWUSER)?;
        // All capabilities are there now, and stay beyond the change of the user.
        nix::sys::prctl::set_keepcaps(true)?;
        let groups: Vec<Gid> = self.groups.iter().copied().map(Gid::from_raw).collect();
        // A namespace may deny the call.
        if !(groups.is_empty() && getgroups()?.is_empty()) {
            setgroups(&groups)?;
        }
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        let all = caps::read(None, CapSet::Permitted).map_err(io::Error::other)?;
        caps::set(None, CapSet::Effective, &all).map_err(io::Error::other)?;
        // Root of the guest has entered it already, who may enter more.
        chdir(&self.cwd)?;
        if let Some(capabilities) = &self.capabilities {
            limit(capabilities, &all)?;
        }
        if self.wants_home {
            let user = User::from_uid(uid).ok().flatten();
            let home = user.map_or_else(|| "/".into(), |user| user.dir);
            // SAFETY: this process has one thread.
            unsafe { std::env::set_var("HOME", home) };
        }
        Ok(())
    }
}

/// Sets the three sets that outlive a program's beginning.
fn limit(capabilities: &LinuxCapabilities, all: &CapsHashSet) -> io::Result<()> {
    let of = |set: &Option<Capabilities>| -> io::Result<CapsHashSet> {
        let set = set.iter().flatten();
        set.map(|capability| confinement::of_kernel(*capability))
            .collect()
    };
    let bounding = of(capabilities.bounding())?;
    for other in all.difference(&bounding) {
        caps::drop(None, CapSet::Bounding, *other).map_err(io::Error::other)?;
    }
    let inheritable = of(capabilities.inheritable())?;
    caps::set(None, CapSet::Inheritable, &inheritable).map_err(io::Error::other)?;
    let ambient = of(capabilities.ambient())?;
    // What is not to be had as ambient is left out, as it is for an init.
    let ambient: HashSet<_> = ambient.intersection(&inheritable).copied().collect();
    for capability in ambient {
        caps::raise(None, CapSet::Ambient, capability).map_err(io::Error::other)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_nobody_outside_is_root_there() {
        let linux: Linux = serde_json::from_str(
            r#"{"namespaces": [{"type": "user"}],
                "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}, {"containerID": 50, "hostID": 4294967290, "size": 10}],
                "gidMappings": [{"containerID": 5, "hostID": 2000, "size": 1}]}"#,
        )
        .unwrap();
        let users = Users::of(&linux).unwrap();
        for (inside, outside) in [
            ((0, 5), (1000, 2000)),
            ((9, 4), (1009, 0)),
            ((10, 6), (0, 0)),
            ((55, 0), (u32::MAX, 0)),
            ((56, 0), (0, 0)),
        ] {
            assert_eq!(users.outside(inside), outside, "{inside:?}");
        }
        assert!(Users::of(&Linux::default()).is_none());
    }

    #[test]
    fn a_process_is_root_until_it_is_itself() {
        let mut process: Process = serde_json::from_str(
            r#"{"user": {"uid": 7, "gid": 8, "umask": 18, "additionalGids": [9]}, "args": ["x"], "cwd": "/", "env": ["A=HOME=b"],
                "capabilities": {"bounding": ["CAP_CHOWN"], "effective": [], "permitted": ["CAP_CHOWN"]}}"#,
        )
        .unwrap();
        let before = process.capabilities().clone();
        let identity = lend(&mut process, 12);
        let user = process.user();
        assert_eq!((user.uid(), user.gid(), user.umask()), (0, 0, Some(18)));
        assert!(user.additional_gids().is_none());
        let capabilities = process.capabilities().clone().unwrap();
        for set in [capabilities.effective(), capabilities.permitted()] {
            assert_eq!(set.as_ref().map(Capabilities::len), Some(LOAN.len()));
        }
        assert!(capabilities.ambient().is_none());
        assert_eq!((identity.uid, identity.gid), (7, 8));
        assert_eq!((identity.groups.as_slice(), identity.init), (&[9][..], 12));
        assert_eq!(identity.capabilities, before);
        assert!(identity.wants_home && identity.own().is_some());
        let json = serde_json::to_vec(&identity).unwrap();
        assert_eq!(serde_json::from_slice::<Identity>(&json).unwrap(), identity);
        let mut with_home = process.clone();
        for (home, wants) in [("HOME=/x", false), ("HOME=", true)] {
            with_home.set_env(Some(vec![home.to_owned()]));
            assert_eq!(lend(&mut with_home, 1).wants_home, wants, "{home}");
        }
    }
}
