//! With real plugins, as root: bridge, host-local and loopback between two namespaces of the test's own, of which one stands for
//! the host. `NACRE_CNI_PLUGINS` names their directory; `cargo xtask test` has them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};

use serde_json::json;

use super::*;
use crate::cni::Kind;
use crate::link;
use crate::netlink::Socket;
use crate::netns::Netns;

const GATEWAY: &str = "10.77.0.1";

fn plugins() -> PathBuf {
    let directory = std::env::var_os("NACRE_CNI_PLUGINS");
    directory
        .expect("NACRE_CNI_PLUGINS names no directory")
        .into()
}

fn path_of(netns: &Netns) -> PathBuf {
    let fd = netns.as_fd().as_raw_fd();
    format!("/proc/{}/fd/{fd}", std::process::id()).into()
}

fn names(netns: &Netns) -> Vec<String> {
    let links = netns.enter(|| link::list(&mut Socket::open()?)).unwrap();
    links.into_iter().map(|link| link.name).collect()
}

struct World {
    files: Host,
    host: Netns,
}

impl World {
    fn new() -> Self {
        Self {
            files: Host::new(),
            host: Netns::create().unwrap(),
        }
    }

    /// A network with room for one container.
    fn attachment(&self, id: &str, container: &Netns, more: &[Value]) -> Attachment {
        let ranges = json!([[{"subnet": "10.77.0.0/30", "gateway": GATEWAY}]]);
        let bridge = json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam":
            {"type": "host-local", "dataDir": self.files.path("ipam"), "ranges": ranges,
             "routes": [{"dst": "0.0.0.0/0"}]}, "dns": {"nameservers": [GATEWAY]}});
        let mut list = vec![bridge];
        list.extend_from_slice(more);
        let mut attachment = self.files.attachment("1.0.0", list.into());
        attachment.plugin_dirs = vec![plugins()];
        attachment.container_id = id.to_owned();
        attachment.netns = path_of(container);
        attachment.interface = "eth0".to_owned();
        attachment
    }

    fn add(&self, attachment: &mut Attachment) -> Result<AddResult, Error> {
        self.host.enter(|| Ok(add(attachment))).unwrap()
    }

    fn check(&self, attachment: &Attachment) -> Result<(), Error> {
        self.host.enter(|| Ok(attachment.check())).unwrap()
    }

    fn del(&self, attachment: &Attachment) -> Result<(), Error> {
        self.host.enter(|| Ok(attachment.del())).unwrap()
    }

    fn reserved(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.files.path("ipam/dbnet")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("10.")).collect()
    }
}

/// Bytes from one namespace to the other over TCP.
fn talks(from: &Netns, to: &Netns, address: &str) -> bool {
    let listener = to
        .enter(|| Ok(TcpListener::bind(address).unwrap()))
        .unwrap();
    let goal = listener.local_addr().unwrap();
    let limit = Duration::from_secs(10);
    let connected = from
        .enter(|| Ok(TcpStream::connect_timeout(&goal, limit)))
        .unwrap();
    let mut stream = connected.unwrap();
    stream.write_all(b"ping").unwrap();
    let mut heard = [0; 4];
    listener.accept().unwrap().0.read_exact(&mut heard).unwrap();
    &heard == b"ping"
}

#[test]
#[ignore = "needs root and the directory of real plugins"]
fn bridge_and_host_local_attach_check_and_let_go() {
    let world = World::new();
    let container = Netns::create().unwrap();
    let mut attachment = world.attachment("c1", &container, &[]);
    let result = world.add(&mut attachment).unwrap();
    println!("{:#}", result.raw());
    assert_eq!(result.ips[0].address.to_string(), "10.77.0.2");
    assert_eq!(result.dns.nameservers, [GATEWAY]);
    let eth0 = &result.interfaces[result.ips[0].interface.unwrap()];
    assert_eq!(
        (eth0.name.as_str(), eth0.sandbox.as_deref()),
        ("eth0", attachment.netns.to_str())
    );
    assert!(names(&container).contains(&"eth0".to_owned()));
    assert!(names(&world.host).contains(&"cni0".to_owned()));
    assert!(talks(&container, &world.host, "10.77.0.1:0"));
    world.check(&attachment).unwrap();
    world.del(&attachment).unwrap();
    assert_eq!(names(&container), ["lo"]);
    assert_eq!(world.reserved(), [""; 0]);
    world.del(&attachment).unwrap();
    let error = world.check(&attachment).unwrap_err();
    println!("{error}");
    assert_eq!(error.kind(), Kind::Plugin);
}

#[test]
#[ignore = "needs root and the directory of real plugins"]
fn what_real_plugins_say_when_they_fail_is_understood() {
    let world = World::new();
    let (one, two) = (Netns::create().unwrap(), Netns::create().unwrap());
    let mut first = world.attachment("c1", &one, &[]);
    world.add(&mut first).unwrap();
    let expect = |attachment: &mut Attachment, kind| {
        let error = world.add(attachment).unwrap_err();
        println!("{kind:?}: {error}");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.also().is_empty(), "{error}");
    };
    expect(&mut world.attachment("c2", &two, &[]), Kind::Exhausted);
    assert_eq!(names(&two), ["lo"]);
    assert_eq!(world.reserved(), ["10.77.0.2"]);
    let mut taken = world.attachment("c3", &one, &[]);
    expect(&mut taken, Kind::Conflict);
    // The other's interface and address are as they were.
    world.check(&first).unwrap();
    world.del(&first).unwrap();
    let mut newer = world.attachment("c4", &two, &[]);
    newer.network = Conflist::load(world.files.write(
        "11.conflist",
        &json!({"cniVersion": "1.1.0", "name": "newer", "plugins": [{"type": "bridge"}]}),
    ))
    .unwrap();
    if let Err(error) = world.add(&mut newer) {
        println!("{error}");
        assert_eq!((error.kind(), error.also().len()), (Kind::Version, 0));
    }
    let alone = world.files.path("bin");
    std::fs::copy(plugins().join("bridge"), alone.join("bridge")).unwrap();
    let mut without = world.attachment("c5", &two, &[]);
    without.plugin_dirs = vec![alone];
    let error = world.add(&mut without).unwrap_err();
    println!("{error}");
    assert_eq!(error.kind(), Kind::MissingPlugin);
}

#[test]
#[ignore = "needs root and the directory of real plugins"]
fn an_address_is_given_back_when_the_namespace_is_gone() {
    let world = World::new();
    let container = Netns::create().unwrap();
    let mut attachment = world.attachment("c1", &container, &[]);
    // A descriptor's number may become another file's, of a test beside this one: a link that goes with the namespace may not.
    let path = world.files.path("netns");
    std::os::unix::fs::symlink(path_of(&container), &path).unwrap();
    attachment.netns.clone_from(&path);
    world.add(&mut attachment).unwrap();
    assert_eq!(world.reserved(), ["10.77.0.2"]);
    std::fs::remove_file(path).unwrap();
    drop(container);
    let record = serde_json::to_string(&attachment).unwrap();
    let record: Attachment = serde_json::from_str(&record).unwrap();
    world.del(&record).unwrap();
    assert_eq!(world.reserved(), [""; 0]);
}

#[test]
#[ignore = "needs root and the directory of real plugins"]
fn loopback_is_brought_up() {
    let world = World::new();
    let container = Netns::create().unwrap();
    let config = json!({"cniVersion": "1.0.0", "name": "lo", "type": "loopback"});
    let network = Conflist::load(world.files.write("99-loopback.conf", &config)).unwrap();
    let mut attachment = Attachment::new(network, vec![plugins()], "c1", "lo", path_of(&container));
    let result = world.add(&mut attachment).unwrap();
    assert_eq!(result.ips[0].address.to_string(), "127.0.0.1");
    world.check(&attachment).unwrap();
    assert!(talks(&container, &container, "127.0.0.1:0"));
    world.del(&attachment).unwrap();
}
