//! What a process gives up right before its program runs, in the order that
//! the kernel asks for: without `no_new_privs`, only CAP_SYS_ADMIN may install
//! a filter, which most containers do not have. The process is therefore made
//! with the capabilities for it on loan, and gives them back itself.

use std::io;
use std::str::FromStr;

use caps::{CapSet, CapsHashSet};
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, Process};
use serde::{Deserialize, Serialize};

use crate::seccomp::{self, Filter};

/// To install a filter, and to give it back from the bounding set.
const LOAN: [Capability; 2] = [Capability::SysAdmin, Capability::Setpcap];

/// The capabilities of a process as the specification has them, while it has others on loan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Own {
    bounding: Capabilities,
    effective: Capabilities,
    permitted: Capabilities,
}

impl Own {
    /// Those of a specification.
    pub fn of(capabilities: &LinuxCapabilities) -> Self {
        Self {
            bounding: capabilities.bounding().clone().unwrap_or_default(),
            effective: capabilities.effective().clone().unwrap_or_default(),
            permitted: capabilities.permitted().clone().unwrap_or_default(),
        }
    }

    /// Gives up all others.
    fn keep(&self) -> io::Result<()> {
        for (set, kept) in [
            (CapSet::Effective, &self.effective),
            (CapSet::Permitted, &self.permitted),
        ] {
            let kept = kept
                .iter()
                .map(|capability| of_kernel(*capability))
                .collect::<io::Result<CapsHashSet>>()?;
            caps::set(None, set, &kept).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// Lends a process what it needs to install a filter; nothing if it can do so itself.
pub fn lend(process: &mut Process) -> Option<Own> {
    if process.no_new_privileges() == Some(true) {
        return None;
    }
    let mut capabilities = process.capabilities().clone()?;
    let own = Own::of(&capabilities);
    if own.effective.contains(&Capability::SysAdmin) {
        return None;
    }
    let with_loan =
        |own: &Capabilities| Some(own.iter().chain(&LOAN).copied().collect::<Capabilities>());
    capabilities.set_bounding(with_loan(&own.bounding));
    capabilities.set_effective(with_loan(&own.effective));
    capabilities.set_permitted(with_loan(&own.permitted));
    process.set_capabilities(Some(capabilities));
    Some(own)
}

/// Installs the filter and gives the loan back, for the calling process, which must have one thread. With `no_new_privileges` the filter comes
/// last, as it takes no capability then: one that a profile is strict about may forbid what comes before.
///
/// # Errors
/// What the kernel said: the program must not be run then.
pub fn confine(
    filter: Option<&Filter>,
    own: Option<&Own>,
    no_new_privileges: bool,
) -> io::Result<()> {
    if let Some(own) = own {
        for lent in LOAN.iter().filter(|lent| !own.bounding.contains(lent)) {
            let lent = of_kernel(*lent)?;
            caps::drop(None, CapSet::Bounding, lent).map_err(io::Error::other)?;
        }
    }
    let install = || filter.map_or(Ok(()), seccomp::install);
    let give_back = || own.map_or(Ok(()), Own::keep);
    if no_new_privileges {
        give_back()?;
        install()
    } else {
        install()?;
        give_back()
    }
}

/// A capability of a specification by its kernel name.
///
/// # Errors
/// One that the kernel's list does not have.
pub fn of_kernel(capability: Capability) -> io::Result<caps::Capability> {
    let name = format!("CAP_{capability}");
    caps::Capability::from_str(&name).map_err(|_| io::Error::other(format!("{name} is unknown")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(more: &str) -> Process {
        let json = format!(
            r#"{{"user":{{"uid":0,"gid":0}},"args":["x"],"cwd":"/"{more},
            "capabilities":{{"bounding":["CAP_CHOWN","CAP_SETPCAP"],"effective":["CAP_CHOWN"],
            "permitted":["CAP_CHOWN"],"ambient":["CAP_CHOWN"]}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn what_is_lent_is_remembered_as_not_its_own() {
        let mut process = process("");
        let before = process.capabilities().clone().unwrap();
        let own = lend(&mut process).unwrap();
        let after = process.capabilities().clone().unwrap();
        for set in [after.bounding(), after.effective(), after.permitted()] {
            let set = set.as_ref().unwrap();
            assert!(LOAN.iter().all(|lent| set.contains(lent)));
            assert!(set.contains(&Capability::Chown) && set.len() == 3);
        }
        assert_eq!(after.ambient(), before.ambient());
        assert_eq!(Some(&own.bounding), before.bounding().as_ref());
        assert_eq!(own.effective.len(), 1);
    }

    #[test]
    fn who_can_do_it_gets_nothing() {
        assert!(lend(&mut process(r#","noNewPrivileges":true"#)).is_none());
        let mut able = process("");
        let mut capabilities = able.capabilities().clone().unwrap();
        capabilities.set_effective(Some([Capability::SysAdmin].into_iter().collect()));
        able.set_capabilities(Some(capabilities));
        assert!(lend(&mut able).is_none());
        able.set_capabilities(None);
        assert!(lend(&mut able).is_none());
    }

    #[test]
    fn names_are_the_kernels() {
        for (ours, theirs) in [
            (Capability::SysAdmin, caps::Capability::CAP_SYS_ADMIN),
            (Capability::Setpcap, caps::Capability::CAP_SETPCAP),
            (
                Capability::DacReadSearch,
                caps::Capability::CAP_DAC_READ_SEARCH,
            ),
            (
                Capability::CheckpointRestore,
                caps::Capability::CAP_CHECKPOINT_RESTORE,
            ),
        ] {
            assert_eq!(of_kernel(ours).unwrap(), theirs);
        }
    }
}
