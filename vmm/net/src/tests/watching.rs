//! Links that go up and down are told.

use std::sync::mpsc;
use std::time::Duration;

use super::bench::*;
use crate::{LinkChange, LinkState, Netns, mirror};

#[test]
fn a_links_state_is_told_at_first_and_as_it_changes() {
    let (here, there) = (Netns::create().unwrap(), Netns::create().unwrap());
    pair(&here, "eth0", 1, &there, 1500);
    pair(&here, "net1", 2, &there, 1500);
    let mirror = mirror(&here, &mut |_| Ok(())).unwrap();
    let (tell, told) = mpsc::channel();
    let watch = mirror
        .watch(move |change| tell.send(change).unwrap())
        .unwrap();
    let next = |interface: &str, state| {
        let change = told.recv_timeout(Duration::from_secs(20)).unwrap();
        let interface = interface.to_owned();
        assert_eq!(change, LinkChange { interface, state });
    };
    next("eth0", LinkState::Up);
    next("net1", LinkState::Up);
    for _ in 0..2 {
        set_up(&there, "peer-eth0", false);
        next("eth0", LinkState::Down);
        set_up(&there, "peer-eth0", true);
        next("eth0", LinkState::Up);
    }
    set_up(&here, "net1", false);
    next("net1", LinkState::Down);
    delete(&there, "peer-eth0");
    next("eth0", LinkState::Down);
    next("eth0", LinkState::Gone);
    drop(watch);
    assert!(told.recv().is_err(), "nobody tells any more");
}
