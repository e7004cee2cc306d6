//! QEMU beside our VM: its `virtio-net-pci` has a TAP interface that mirrors its namespace's, as ours has, without vhost.

use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nacre_net::Mirror;
use nacre_vmm::virtio::net::mac;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::bridge::Joined;
use crate::bench::console::{Booted, Guest, with_probe};

/// Where its guest finds what to configure.
const DESCRIPTION: &str = "network.json";

/// A QEMU whose guest waits for orders; killed when dropped.
pub(super) struct Qemu {
    pub guest: Guest,
    _mirror: Mirror,
}

impl Qemu {
    /// Boots the guest and waits until it has configured its network.
    pub fn boot(
        what: &Booted<'_>,
        probe: &Path,
        joined: &Joined,
        folder: &Path,
        patience: Duration,
    ) -> Result<Self> {
        let mut mirror = nacre_net::mirror(&joined.netns, &mut |_| Ok(()))?;
        let description = serde_json::to_vec(mirror.network())?;
        let initrd = folder.join("qemu-initrd");
        with_probe(what.initrd, probe, &[(DESCRIPTION, &description)], &initrd)?;
        let ports = mirror.take_ports();
        ensure!(ports.len() == 1, "{} interfaces are mirrored", ports.len());
        let tap = ports[0].tap.as_fd();
        let mac = mac(mirror.network().interfaces[0].mac);
        // QEMU inherits it, and nothing else is started meanwhile.
        fcntl(tap, FcntlArg::F_SETFD(FdFlag::empty())).context("handing a TAP interface over")?;
        let arguments = arguments(what, &initrd, tap.as_raw_fd(), &mac);
        let guest = what.boot(&arguments, patience)?;
        Ok(Self {
            guest,
            _mirror: mirror,
        })
    }
}

fn arguments(what: &Booted<'_>, initrd: &Path, tap: i32, mac: &str) -> Vec<PathBuf> {
    let mut arguments = what.arguments(initrd, &format!("init --network /{DESCRIPTION}"));
    let devices = [
        "-netdev",
        &format!("tap,id=net,fd={tap},vhost=off"),
        "-device",
        &format!("virtio-net-pci,netdev=net,mac={mac},romfile="),
    ];
    arguments.extend(devices.map(PathBuf::from));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_has_the_tap_interface_and_its_guest_the_description() {
        let path = Path::new;
        let what = Booted {
            program: path("/q"),
            kernel: path("/k"),
            initrd: path("/i"),
            vcpus: 2,
            memory_mib: 768,
        };
        let all = arguments(&what, path("/i2"), 7, "02:00:00:00:00:01");
        let words: Vec<_> = all.iter().map(|word| word.display().to_string()).collect();
        let line = words.join(" ");
        for part in [
            "fd=7,vhost=off",
            "mac=02:00:00:00:00:01",
            "-m 768M",
            "-- init --network /network.json",
            "-initrd /i2",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }
}
