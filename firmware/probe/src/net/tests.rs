//! Both ends in one process, over loopback.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::thread::JoinHandle;

use super::wire::{HEADER, Header, Tally};
use super::*;

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A server of the real kind.
fn served() -> SocketAddr {
    let server = Server::listen(Ipv4Addr::LOCALHOST.into(), 0).unwrap();
    let address = loopback(server.port);
    std::thread::spawn(move || server.run());
    address
}

/// A server of one connection that does what it is told.
fn played(
    play: impl FnOnce(&mut std::net::TcpStream, Header) + Send + 'static,
) -> (Address, JoinHandle<()>) {
    let listener = TcpListener::bind(loopback(0)).unwrap();
    let address = Address::Ip(listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).unwrap();
        play(&mut stream, Header::from_bytes(&header).unwrap());
    });
    (address, thread)
}

#[test]
fn many_streams_are_carried_both_ways() {
    let to = Address::Ip(served());
    for direction in [Direction::Send, Direction::Receive] {
        let carried = carry(&to, direction, 64, 300_001, 4096).unwrap();
        assert_eq!(carried.bytes, 64 * 300_001);
        assert!(carried.seconds > 0.0);
        // More than the content's cycle, in the longest blocks; and nothing.
        carry(&to, direction, 1, 5 << 20, 1 << 20).unwrap();
        assert_eq!(carry(&to, direction, 2, 0, 1).unwrap().bytes, 0);
    }
}

#[test]
fn a_server_that_listens_to_both_families_is_reached_by_ipv4() {
    let server = Server::listen(Ipv6Addr::UNSPECIFIED.into(), 0).unwrap();
    let to = Address::Ip(loopback(server.port));
    std::thread::spawn(move || server.run());
    carry(&to, Direction::Send, 1, 1000, 100).unwrap();
}

#[test]
fn a_server_that_counts_wrong_is_found_out() {
    let (to, server) = played(|stream, header| {
        let mut bytes = vec![0; header.bytes as usize];
        stream.read_exact(&mut bytes).unwrap();
        bytes[7] ^= 1;
        let mut tally = Tally::default();
        tally.add(&bytes);
        stream.write_all(&tally.to_bytes()).unwrap();
    });
    let error = carry(&to, Direction::Send, 1, 1000, 1000).unwrap_err();
    let text = format!("{error:#}");
    assert!(
        text.contains("stream 1 of 1") && text.contains("checksum"),
        "{text}"
    );
    server.join().unwrap();
}

#[test]
fn a_server_that_ends_early_is_an_error() {
    let (to, server) = played(|stream, _| stream.write_all(b"x").unwrap());
    let error = carry(&to, Direction::Receive, 1, 1000, 1000).unwrap_err();
    assert!(format!("{error:#}").contains("stream 1 of 1"), "{error:#}");
    server.join().unwrap();
    let (to, server) = played(|stream, header| {
        let content = wire::Content::new();
        let bytes = content.at(header.stream, 0, 10);
        stream.write_all(bytes).unwrap();
    });
    let error = carry(&to, Direction::Receive, 1, 1000, 1000).unwrap_err();
    assert!(
        format!("{error:#}").contains("after 10 of 1000"),
        "{error:#}"
    );
    server.join().unwrap();
}

#[test]
fn a_server_that_sends_another_streams_content_is_an_error() {
    let (to, server) = played(|stream, header| {
        let content = wire::Content::new();
        let mut tally = Tally::default();
        let bytes = content.at(header.stream + 1, 0, 100);
        tally.add(bytes);
        let _ = stream.write_all(bytes);
        let _ = stream.write_all(&tally.to_bytes());
    });
    let error = carry(&to, Direction::Receive, 1, 100, 100).unwrap_err();
    assert!(format!("{error:#}").contains("something else"), "{error:#}");
    server.join().unwrap();
}

#[test]
fn requests_are_answered_by_tcp_and_by_udp() {
    let to = served();
    for size in [1, 64, 65_507] {
        let answered = ask(&Address::Ip(to), 20, size).unwrap();
        assert_eq!(answered.microseconds.len(), 20);
        assert!(answered.microseconds.iter().all(|us| *us > 0.0));
        let answered = ask_by_datagrams(to, 20, size).unwrap();
        assert_eq!(answered.microseconds.len(), 20);
    }
    ask(&Address::Ip(to), 2, 1 << 20).unwrap();
}

#[test]
fn a_late_answer_is_passed_over_and_a_lost_datagram_is_sent_again() {
    let socket = UdpSocket::bind(loopback(0)).unwrap();
    let to = socket.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let mut first = [0; 64];
        let (_, from) = socket.recv_from(&mut first).unwrap();
        socket.send_to(&first, from).unwrap();
        let mut second = [0; 64];
        socket.recv_from(&mut second).unwrap();
        socket.send_to(&first, from).unwrap();
        socket.recv_from(&mut second).unwrap();
        socket.send_to(&second, from).unwrap();
    });
    let answered = ask_by_datagrams(to, 2, 64).unwrap();
    assert_eq!((answered.microseconds.len(), answered.resent), (2, 1));
    assert!(answered.microseconds[1] >= 1e6);
    server.join().unwrap();
}

#[test]
fn an_answer_that_is_no_echo_is_an_error() {
    let socket = UdpSocket::bind(loopback(0)).unwrap();
    let to = socket.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (_, from) = socket.recv_from(&mut [0; 64]).unwrap();
        socket.send_to(b"what?", from).unwrap();
    });
    let error = ask_by_datagrams(to, 1, 64).unwrap_err();
    assert!(format!("{error:#}").contains("request 1 of 1"), "{error:#}");
    server.join().unwrap();
}

#[test]
fn where_nobody_listens_is_said() {
    let free = TcpListener::bind(loopback(0)).unwrap();
    let to = free.local_addr().unwrap();
    drop(free);
    let error = carry(&Address::Ip(to), Direction::Send, 1, 1, 1).unwrap_err();
    let text = format!("{error:#}");
    assert!(
        text.contains(&to.to_string()) && text.contains("refused"),
        "{text}"
    );
    let error = ask_by_datagrams(to, 1, 1).unwrap_err();
    assert!(format!("{error:#}").contains("refused"), "{error:#}");
}
