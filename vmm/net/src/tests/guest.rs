//! A kernel in the guest's place: it has what is described, and talks TCP over the mirrored interface.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nacre_vmm::virtio::net::{FRAME_BYTES, Tap};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use rustix::event::{PollFd, PollFlags, poll};

use super::bench::*;
use crate::{Netns, apply, mirror};

const BYTES: usize = 3 << 20;

fn fd(tap: &Tap) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the TAP interface's, which lives as long as the borrow.
    unsafe { BorrowedFd::borrow_raw(tap.as_raw_fd()) }
}

/// What a driver of virtio-net takes: checksums to be made, and segments of TCP to be cut.
fn take_offloads(tap: &Tap) {
    // include/uapi/linux/if_tun.h: TUN_F_CSUM, TUN_F_TSO4 and TUN_F_TSO6.
    const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
    let flags: libc::c_ulong = 1 | 2 | 4;
    // SAFETY: the argument is an integer by value.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, flags) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// A device and its driver: frames with their headers, both ways, until it is over. Whether one was longer than the MTU.
fn carry(taps: [&Tap; 2], mtu: usize, over: &AtomicBool) -> bool {
    let mut long = false;
    let mut bytes = vec![0; FRAME_BYTES];
    while !over.load(Ordering::SeqCst) {
        let mut ready = taps.map(|tap| PollFd::from_borrowed_fd(fd(tap), PollFlags::IN));
        let tenth = Duration::from_millis(100).try_into().unwrap();
        let _ = poll(&mut ready, Some(&tenth));
        for (from, to) in [(0, 1), (1, 0)] {
            while let Ok(got) = rustix::io::read(fd(taps[from]), &mut bytes[..]) {
                long |= got > mtu + 100;
                // Where it is full, TCP sends again.
                let _ = rustix::io::write(fd(taps[to]), &bytes[..got]);
            }
        }
    }
    long
}

/// Sends and gets back what is larger than any buffer on the way.
fn talk(server: &Netns, client: &Netns, at: &str) {
    let at: SocketAddr = at.parse().unwrap();
    let listener = server.enter(|| Ok(TcpListener::bind(at).unwrap())).unwrap();
    let stream = client
        .enter(|| Ok(TcpStream::connect_timeout(&at, Duration::from_secs(20)).unwrap()))
        .unwrap();
    let (served, _) = listener.accept().unwrap();
    let sent: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::io::copy(&mut &served, &mut &served).map(|_| served.shutdown(Shutdown::Write))
        });
        scope.spawn(|| {
            (&stream)
                .write_all(&sent)
                .map(|()| stream.shutdown(Shutdown::Write))
        });
        let mut got = Vec::new();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        (&stream).read_to_end(&mut got).unwrap();
        assert!(got == sent, "{} of {BYTES} bytes, or others", got.len());
    });
}

#[test]
fn a_guest_talks_over_what_is_described_and_sends_large_segments() {
    let [here, there, guest] = [(); 3].map(|()| Netns::create().unwrap());
    pair(&here, "eth0", 1, &there, 1400);
    for (netns, name, v4, v6) in [
        (&here, "eth0", "10.88.0.2", "fd00:1::2"),
        (&there, "peer-eth0", "10.88.0.1", "fd00:1::1"),
    ] {
        address(netns, name, v4, 24);
        address(netns, name, v6, 64);
    }
    // Beyond the gateway, which is the other end itself.
    set_up(&there, "lo", true);
    address(&there, "lo", "9.9.9.9", 32);
    address(&there, "lo", "fd00:9::9", 128);
    for (all, gateway) in [("0.0.0.0", "10.88.0.1"), ("::", "fd00:1::1")] {
        let gateway = Some(gateway);
        route(
            &here,
            NewRoute {
                gateway,
                ..to(all, 0)
            },
        );
    }
    let mut mirror = mirror(&here, &mut |_| Ok(())).unwrap();
    let device = mirror.take_ports().remove(0).tap;
    let driver = guest.enter(|| Ok(Tap::open("tap0")?)).unwrap();
    for tap in [&device, &driver] {
        take_offloads(tap);
    }
    let mut message = LinkMessage::default();
    message.header.index = find(&guest, "tap0").index;
    message.attributes = vec![LinkAttribute::Address(MAC.to_vec())];
    change(&guest, RouteNetlinkMessage::SetLink(message), 0);
    guest.enter(|| apply(mirror.network())).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let carrier = std::thread::spawn({
        let over = Arc::clone(&over);
        move || carry([&device, &driver], 1400, &over)
    });
    talk(&there, &guest, "10.88.0.1:80");
    talk(&there, &guest, "9.9.9.9:80");
    talk(&there, &guest, "[fd00:9::9]:80");
    talk(&guest, &there, "10.88.0.2:80");
    talk(&guest, &there, "[fd00:1::2]:80");
    over.store(true, Ordering::SeqCst);
    assert!(carrier.join().unwrap(), "no frame was longer than a packet");
}
