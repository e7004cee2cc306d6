//! Ports of a container that are published on the host.

use std::net::IpAddr;

use nacre_net::cni::{PortMapping, Protocol};

/// `[IP:]HOST:CONTAINER[/PROTO]`; an IPv6 address is in brackets.
pub(super) fn parse(text: &str) -> Result<PortMapping, String> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        other => return Err(wrong(&format!("the protocol {other:?} is not known"))),
    };
    let Some((rest, container)) = ports.rsplit_once(':') else {
        return Err(wrong("there are no two ports"));
    };
    let (host_ip, host) = match rest.rsplit_once(':') {
        Some((ip, host)) => (Some(address(ip)?), host),
        None => (None, rest),
    };
    Ok(PortMapping {
        host_port: port(host)?,
        container_port: port(container)?,
        protocol,
        host_ip,
    })
}

fn wrong(why: &str) -> String {
    format!("{why}: write [IP:]HOST:CONTAINER[/tcp|udp|sctp], such as 8080:80")
}

fn port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(port @ 1..) => Ok(port),
        _ => Err(wrong(&format!("{text:?} is no port from 1 to 65535"))),
    }
}

fn address(text: &str) -> Result<IpAddr, String> {
    let bracketed = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    let parsed = match bracketed {
        Some(text) => text.parse().map(IpAddr::V6),
        None => text.parse().map(IpAddr::V4),
    };
    parsed.map_err(|_| wrong(&format!("{text:?} is no address")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_with_address_and_protocol() {
        for (text, host_ip, host_port, container_port, protocol) in [
            ("8080:80", None, 8080, 80, Protocol::Tcp),
            ("53:5353/udp", None, 53, 5353, Protocol::Udp),
            (
                "127.0.0.1:1:65535/sctp",
                Some("127.0.0.1"),
                1,
                65535,
                Protocol::Sctp,
            ),
            ("[fd00::1]:2:3/tcp", Some("fd00::1"), 2, 3, Protocol::Tcp),
        ] {
            let expected = PortMapping {
                host_port,
                container_port,
                protocol,
                host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            };
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
        for (text, why) in [
            ("80", "no two ports"),
            ("0:80", "\"0\" is no port"),
            ("80:65536", "\"65536\" is no port"),
            ("80:80/icmp", "\"icmp\""),
            ("fd00::1:2:3", "\"fd00::1\" is no address"),
            ("[1.2.3.4]:2:3", "no address"),
            (":80", "\"\" is no port"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why) && error.contains("8080:80"), "{error}");
        }
    }
}
