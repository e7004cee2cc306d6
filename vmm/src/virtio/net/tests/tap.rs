//! The device on a TAP interface of the machine's own kernel.

use super::*;

/// A socket that sees an interface's frames and sends some.
struct Packets(OwnedFd);

const EXPERIMENT: u16 = 0x88b5;

impl Packets {
    fn on(interface: &str) -> Self {
        let protocol = EXPERIMENT.to_be();
        // SAFETY: takes integers.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK,
                i32::from(protocol),
            )
        };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the descriptor is new and nobody else's.
        let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        let name = std::ffi::CString::new(interface).unwrap();
        // SAFETY: the structures are all zero but for what is set, and live over the calls.
        unsafe {
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
                *to = *from as libc::c_char;
            }
            request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
            let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
            assert_eq!(libc::ioctl(raw, libc::SIOCSIFFLAGS, &raw const request), 0);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            assert_eq!(libc::bind(raw, (&raw const address).cast(), size), 0);
        }
        Self(fd)
    }

    fn send(&self, bytes: &[u8]) {
        let raw = std::os::fd::AsRawFd::as_raw_fd(&self.0);
        // SAFETY: the pointer and length are those of a slice.
        let sent = unsafe { libc::send(raw, bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(sent, bytes.len() as isize);
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 4096];
        let raw = std::os::fd::AsRawFd::as_raw_fd(&self.0);
        // SAFETY: the pointer and length are those of a slice that is ours alone.
        let got = unsafe { libc::recv(raw, bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        bytes.truncate(usize::try_from(got).ok()?);
        Some(bytes)
    }
}

/// Broadcast, of a type that nobody else uses.
fn ethernet(payload: u8) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend([2, 0, 0, 0, 0, 9]);
    bytes.extend(EXPERIMENT.to_be_bytes());
    bytes.extend([payload; 60]);
    bytes
}

/// On the machine's own TAP interface, in a network namespace of this thread: header size and offloads are those of the kernel.
#[test]
fn frames_cross_a_real_interface_both_ways() {
    // SAFETY: the namespace is this thread's alone, which ends with the test.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(unshared, 0, "as root: {}", io::Error::last_os_error());
    let tap = Tap::open("nacre-t0").unwrap();
    let error = Tap::open("nacre-t0").unwrap_err();
    assert!(
        matches!(&error, Error::Tap { doing: "make", .. }),
        "{error}"
    );
    let packets = Packets::on("nacre-t0");
    let (_events, handle) =
        EventLoop::start("test", |message| panic!("unexpected: {message}")).unwrap();
    let (mut net, host) = Net::new(config(), tap, handle).unwrap();
    let mut driver = Driver::new(memory(), SIZE);
    let features = net.features();
    let queues = queues(&driver, false);
    let kicks = [Arc::clone(&queues[0].kick), Arc::clone(&queues[1].kick)];
    net.activate(Activation {
        ram: GuestRam::new(driver.memory.clone()),
        interrupt: Interrupt::new(eventfd()),
        queues: queues.into(),
        features,
    })
    .unwrap();
    let mut out = vec![0; HEADER_BYTES];
    out.extend(ethernet(7));
    driver.fill(DATA, &out);
    send(&driver, 0, &[(DATA, 12, false), (DATA + 12, 74, false)]);
    kicks[1].write(1).unwrap();
    let mut got = None;
    until("the guest's frame", || {
        got = packets.receive();
        got.is_some()
    });
    assert_eq!(got.unwrap(), ethernet(7));
    // A header that cannot be is the host's to refuse: a segment size of none.
    driver.fill(DATA, &[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    send(&driver, 1, &[(DATA, 12, false), (DATA + 12, 74, false)]);
    kicks[1].write(1).unwrap();
    until("the frame that is refused", || {
        host.counters().send_dropped == 1
    });
    let mut used = 0;
    let mut frames = Vec::new();
    until("the host's frame", || {
        // Others on the interface are the kernel's own.
        while used < frames.len() + 4 {
            driver.chain(&[(DATA + 0x1000 * (used as u64 % 4 + 1), 2000, true)]);
            used += 1;
        }
        kicks[0].write(1).unwrap();
        packets.send(&ethernet(9));
        while let Some((head, len)) = driver.used() {
            let at: u64 = driver.read(DESCRIPTORS + u64::from(head) * 16);
            frames.push(driver.bytes(at, len as usize));
        }
        frames.iter().any(|frame| frame.ends_with(&ethernet(9)))
    });
    let ours = frames.iter().find(|frame| frame.ends_with(&[9; 60]));
    assert_eq!(ours.map(Vec::len), Some(HEADER_BYTES + 74));
    net.reset();
}
