//! Frames cross from the device's descriptor to the wire and back.

use std::os::fd::{AsRawFd, BorrowedFd};

use nacre_vmm::virtio::net::HEADER_BYTES;

use super::bench::*;
use crate::{Netns, Port, mirror};

const BROADCAST: [u8; 6] = [0xff; 6];

/// The guest's hand on its device.
pub struct Device(pub Port);

impl Device {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the TAP interface's, which lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.0.tap.as_raw_fd()) }
    }

    pub fn send(&self, frame: &[u8]) {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes.extend(frame);
        assert_eq!(rustix::io::write(self.fd(), &bytes), Ok(bytes.len()));
    }

    /// A frame of the tests' own type, others passed over.
    fn receive(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        while let Ok(got) = rustix::io::read(self.fd(), &mut bytes[..]) {
            let frame = &bytes[HEADER_BYTES..got];
            if frame.get(12..14) == Some(&EXPERIMENT.to_be_bytes()[..]) {
                return Some(frame.to_vec());
            }
        }
        None
    }

    pub fn expect(&self, frame: &[u8]) {
        let mut got = None;
        until("the frame", || {
            got = self.receive();
            got.is_some()
        });
        assert_eq!(got.as_deref(), Some(frame));
    }
}

/// What is sent over links that have just come up is dropped until the kernel has seen to them: sends until something has come
/// each way, and takes what has.
pub fn settle(device: &Device, wire: &Packets) {
    const PAUSE: std::time::Duration = std::time::Duration::from_millis(20);
    let probe = ethernet(BROADCAST, 0, 60);
    until("a first frame from the device", || {
        device.send(&probe);
        std::thread::sleep(PAUSE);
        wire.receive().is_some()
    });
    until("a first frame for the device", || {
        wire.send(&probe);
        std::thread::sleep(PAUSE);
        device.receive().is_some()
    });
    std::thread::sleep(PAUSE);
    while wire.receive().is_some() || device.receive().is_some() {}
}

fn devices(mirror: &mut crate::Mirror) -> Vec<Device> {
    mirror.take_ports().into_iter().map(Device).collect()
}

#[test]
fn frames_cross_both_ways_at_each_mtu() {
    for mtu in [1280, 1400, 1500, 9000, 65_521] {
        let (here, there) = (Netns::create().unwrap(), Netns::create().unwrap());
        pair(&here, "eth0", 1, &there, mtu);
        let mut mirror = mirror(&here, &mut |_| Ok(())).unwrap();
        assert_eq!(u32::from(mirror.network().interfaces[0].mtu), mtu);
        let [device] = &devices(&mut mirror)[..] else {
            panic!("one device");
        };
        let tap = &mirror.made().unwrap().ports[0].tap;
        assert_eq!(find(&here, tap).mtu, mtu);
        let wire = Packets::on(&there, "peer-eth0");
        settle(device, &wire);
        for len in [60, mtu as usize + 14] {
            for address in [BROADCAST, MAC] {
                device.send(&ethernet(address, 1, len));
                wire.expect(&ethernet(address, 1, len));
                wire.send(&ethernet(address, 2, len));
                device.expect(&ethernet(address, 2, len));
            }
        }
        assert_eq!(device.receive(), None, "nothing comes twice");
        mirror.remove().unwrap();
    }
}

#[test]
fn each_of_several_interfaces_has_its_own_frames() {
    let (here, there) = (Netns::create().unwrap(), Netns::create().unwrap());
    for (name, last) in [("eth0", 1), ("net1", 2), ("net2", 3)] {
        pair(&here, name, last, &there, 1500);
    }
    let mut mirror = mirror(&here, &mut |_| Ok(())).unwrap();
    let devices = devices(&mut mirror);
    let interfaces = &mirror.network().interfaces;
    let told = interfaces.iter().map(|interface| interface.name.as_str());
    assert_eq!(told.collect::<Vec<_>>(), ["eth0", "net1", "net2"]);
    for (number, device) in devices.iter().enumerate() {
        let interface = &interfaces[number];
        assert_eq!(device.0.interface, interface.name);
        assert_eq!(interface.mac, [2, 0, 0, 0, 0, number as u8 + 1]);
        let wire = Packets::on(&there, &format!("peer-{}", interface.name));
        settle(device, &wire);
        let frame = ethernet(BROADCAST, number as u8, 100);
        device.send(&frame);
        wire.expect(&frame);
        wire.send(&frame);
        device.expect(&frame);
    }
    for device in &devices {
        assert_eq!(device.receive(), None);
    }
}

/// What the guest has, the namespace's kernel has not: it neither answers for the guest nor learns of it.
#[test]
fn the_namespaces_own_kernel_hears_nothing() {
    let (here, there) = (Netns::create().unwrap(), Netns::create().unwrap());
    pair(&here, "eth0", 1, &there, 1500);
    address(&here, "eth0", "10.1.0.2", 24);
    let mut mirror = mirror(&here, &mut |_| Ok(())).unwrap();
    let [device] = &devices(&mut mirror)[..] else {
        panic!("one device");
    };
    // Who has 10.1.0.2? Tell 10.1.0.1.
    let mut request = BROADCAST.to_vec();
    request.extend([2, 0, 0, 0, 0, 9, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend([2, 0, 0, 0, 0, 9, 10, 1, 0, 1, 0, 0, 0, 0, 0, 0, 10, 1, 0, 2]);
    let wire = Packets::on(&there, "peer-eth0");
    settle(device, &wire);
    wire.send(&request);
    let mut bytes = [0; 2000];
    until("the question", || {
        let got = rustix::io::read(device.fd(), &mut bytes[..]);
        got.is_ok_and(|got| bytes[HEADER_BYTES..got].starts_with(&request))
    });
    let learned = dump(&here);
    assert!(!learned.iter().any(|line| line.contains("NeighbourHeader")));
    assert_eq!(wire.receive(), None);
}

/// A TAP interface must have no addresses and send nothing of its own.
#[test]
fn a_tap_interface_is_silent() {
    let (here, there) = (Netns::create().unwrap(), Netns::create().unwrap());
    pair(&here, "eth0", 1, &there, 1500);
    let mut mirror = mirror(&here, &mut |_| Ok(())).unwrap();
    let index = find(&here, &mirror.made().unwrap().ports[0].tap).index;
    let devices = devices(&mut mirror);
    std::thread::sleep(std::time::Duration::from_millis(300));
    let lines = dump(&here);
    let addresses = lines
        .iter()
        .filter(|line| line.starts_with("AddressMessage"));
    assert!(addresses.clone().count() > 0, "{lines:?}");
    for line in addresses {
        assert!(!line.contains(&format!("index: {index} ")), "{line}");
    }
    let mut bytes = [0; 2000];
    while let Ok(got) = rustix::io::read(devices[0].fd(), &mut bytes[..]) {
        let source = &bytes[HEADER_BYTES..got][6..12];
        assert_eq!(
            source,
            find(&there, "peer-eth0").mac.unwrap(),
            "the other end's own"
        );
    }
}
