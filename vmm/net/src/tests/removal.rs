//! What was made is removed, by whoever has the record, and nothing else.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};

use super::bench::*;
use crate::{Error, Made, Netns, filter, mirror};

fn configured() -> (Netns, Netns) {
    let (here, there) = (Netns::create().unwrap(), Netns::create().unwrap());
    for (name, last, mtu) in [("eth0", 1, 1400), ("net1", 2, 9000)] {
        pair(&here, name, last, &there, mtu);
    }
    address(&here, "eth0", "10.88.0.2", 16);
    address(&here, "net1", "fd00:1::2", 64);
    route(
        &here,
        NewRoute {
            gateway: Some("10.88.0.1"),
            ..to("0.0.0.0", 0)
        },
    );
    settled(&here);
    (here, there)
}

fn add_discipline(netns: &Netns, name: &str, kind: &str, major: u16, parent: TcHandle) {
    let mut message = TcMessage::with_index(find(netns, name).index.cast_signed());
    message.header.handle = TcHandle { major, minor: 0 };
    message.header.parent = parent;
    message.attributes = vec![TcAttribute::Kind(kind.to_owned())];
    let message = RouteNetlinkMessage::NewQueueDiscipline(message);
    change(netns, message, NLM_F_CREATE | NLM_F_EXCL);
}

#[test]
fn all_is_as_before_when_it_is_removed_or_dropped() {
    let (here, _there) = configured();
    let before = dump(&here);
    for removed in [true, false] {
        let mirror = mirror(&here, &mut |_| Ok(())).unwrap();
        assert_ne!(dump(&here), before);
        if removed {
            mirror.remove().unwrap();
        } else {
            drop(mirror);
        }
        assert_eq!(dump(&here), before);
    }
}

#[test]
fn the_record_alone_is_enough_and_twice_is_well() {
    let (here, _there) = configured();
    let before = dump(&here);
    let mut noted = None;
    let mut mirrored = mirror(&here, &mut |made| {
        assert_eq!(dump(&here), before, "noted before anything is made");
        noted = Some(serde_json::to_string(made).map_err(io::Error::other)?);
        Ok(())
    })
    .unwrap();
    let devices = mirrored.take_ports();
    let made: Made = serde_json::from_str(&noted.unwrap()).unwrap();
    assert_eq!(Some(&made), mirrored.made());
    assert_eq!(mirrored.leave().as_ref(), Some(&made));
    // The process is gone, and its descriptors.
    drop(devices);
    assert_ne!(dump(&here), before, "redirects stay");
    let said = mirror(&here, &mut |_| Ok(())).unwrap_err().to_string();
    assert!(said.contains("leads to a guest already"), "{said}");
    for _ in 0..2 {
        made.remove(&here).unwrap();
        assert_eq!(dump(&here), before);
    }
    mirror(&here, &mut |_| Ok(())).unwrap().remove().unwrap();
    assert_eq!(dump(&here), before);
}

#[test]
fn a_tap_interface_that_somebody_still_holds_is_removed_too() {
    let (here, _there) = configured();
    let before = dump(&here);
    let mut mirrored = mirror(&here, &mut |_| Ok(())).unwrap();
    let _held = mirrored.take_ports();
    let said = mirror(&here, &mut |_| Ok(())).unwrap_err().to_string();
    assert!(said.contains("leads to a guest already"), "{said}");
    mirrored.remove().unwrap();
    assert_eq!(dump(&here), before);
}

#[test]
fn a_record_of_what_was_not_made_is_well() {
    let (here, _there) = configured();
    let before = dump(&here);
    let mut noted = None;
    let error = mirror(&here, &mut |made| {
        noted = Some(made.clone());
        Err(io::Error::other("the disk is full"))
    })
    .unwrap_err();
    assert!(matches!(error, Error::Note { .. }), "{error:?}");
    assert_eq!(dump(&here), before);
    noted.unwrap().remove(&here).unwrap();
    assert_eq!(dump(&here), before);
}

/// The second interface's name is taken between the look and the making.
#[test]
fn a_failure_on_the_way_leaves_nothing() {
    let (here, _there) = configured();
    let mut held = None;
    let mut before = Vec::new();
    let error = mirror(&here, &mut |made| {
        let name = made.ports[1].tap.clone();
        held = here
            .enter(|| Ok(nacre_vmm::virtio::net::Tap::open(&name)?))
            .ok();
        before = dump(&here);
        Ok(())
    })
    .unwrap_err();
    assert!(matches!(error, Error::Tap(_)), "{error:?}");
    drop(held);
    before.retain(|line| !line.contains("nacre"));
    assert_eq!(dump(&here), before);
}

#[test]
fn another_namespace_and_none_are_left_alone() {
    let (here, _there) = configured();
    let folder = tempfile::tempdir().unwrap();
    let made = mirror(&here, &mut |_| Ok(())).unwrap().leave().unwrap();
    let (other, _far) = configured();
    let mirrored = mirror(&other, &mut |_| Ok(())).unwrap();
    let before = dump(&other);
    // A new namespace may look the same in all but its number.
    let alike = Made {
        ports: mirrored.made().unwrap().ports.clone(),
        ..made.clone()
    };
    alike.remove(&other).unwrap();
    assert_eq!(dump(&other), before);
    drop(mirrored);
    // The mount on its file is gone, then the file.
    let path = folder.path().join("cni-1");
    std::fs::write(&path, "").unwrap();
    let at_path = Made {
        path: path.clone(),
        ..made.clone()
    };
    at_path.remove_at_path().unwrap();
    std::fs::remove_file(&path).unwrap();
    at_path.remove_at_path().unwrap();
    // An interface that is gone meanwhile.
    delete(&here, "net1");
    made.remove(&here).unwrap();
    assert_eq!(names(&here), ["lo", "eth0"]);
}

#[test]
fn what_others_have_for_outgoing_frames_stays_and_their_empty_hook_is_used() {
    let (here, _there) = configured();
    let eth0 = find(&here, "eth0");
    add_discipline(&here, "eth0", "pfifo", 0x10, TcHandle::ROOT);
    for kind in ["clsact", "ingress"] {
        add_discipline(&here, "eth0", kind, 0xffff, TcHandle::CLSACT);
        let before = dump(&here);
        let mirrored = mirror(&here, &mut |_| Ok(())).unwrap();
        let ours = mirrored.made().unwrap().ports.iter();
        assert_eq!(
            ours.map(|port| port.discipline).collect::<Vec<_>>(),
            [false, true]
        );
        mirrored.remove().unwrap();
        assert_eq!(dump(&here), before, "{kind}");
        // With somebody's filter, it is theirs.
        let there_too = find(&here, "net1");
        inside(&here, |socket| {
            filter::redirect(socket, &eth0, &there_too, "theirs")
        });
        let before = dump(&here);
        let said = mirror(&here, &mut |_| panic!("noted"))
            .unwrap_err()
            .to_string();
        assert!(
            said.contains(&format!(
                "\"eth0\" into the guest: its {kind} queueing discipline has tc filters"
            )),
            "{said}"
        );
        assert_eq!(dump(&here), before);
        let mut message = TcMessage::with_index(eth0.index.cast_signed());
        message.header.parent = TcHandle::CLSACT;
        change(&here, RouteNetlinkMessage::DelQueueDiscipline(message), 0);
    }
}

/// Somebody came to use the discipline that was made here.
#[test]
fn a_discipline_that_others_use_by_now_stays_with_their_filter() {
    let (here, _there) = configured();
    let mirrored = mirror(&here, &mut |_| Ok(())).unwrap();
    let (eth0, net1) = (find(&here, "eth0"), find(&here, "net1"));
    inside(&here, |socket| {
        filter::redirect_at(socket, &eth0, &net1, "theirs", 7)
    });
    mirrored.remove().unwrap();
    let lines = dump(&here);
    let left = lines.iter().filter(|line| line.contains("clsact"));
    assert_eq!(left.count(), 1, "{lines:#?}");
    assert_eq!(names(&here), ["lo", "eth0", "net1"]);
    let error = mirror(&here, &mut |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("someone else's"), "{error}");
}

/// Both look before either makes. The one that comes second fails, and the first is not touched.
#[test]
fn of_two_that_come_at_once_one_has_it_whole() {
    let (here, _there) = configured();
    let before = dump(&here);
    let mut first = None;
    let mut between = Vec::new();
    let error = mirror(&here, &mut |_| {
        first = mirror(&here, &mut |_| Ok(())).ok();
        between = dump(&here);
        Ok(())
    })
    .unwrap_err();
    assert!(error.to_string().contains("make a clsact"), "{error}");
    assert_eq!(dump(&here), between);
    first.unwrap().remove().unwrap();
    assert_eq!(dump(&here), before);
}
