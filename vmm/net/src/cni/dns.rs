//! Text of `/etc/resolv.conf` for a guest: of what the plugins say, or of what the host has. No file is read or written here.

use std::net::{IpAddr, Ipv6Addr};

use super::Dns;

/// The text for what an attachment resulted in. None if it names no name server, so that the guest is better given
/// [`host_resolv_conf`]. What is no address, and words with spaces in them, are left out.
pub fn resolv_conf(dns: &Dns) -> Option<String> {
    let servers: Vec<&String> = dns
        .nameservers
        .iter()
        .filter(|server| server.parse::<IpAddr>().is_ok())
        .collect();
    if servers.is_empty() {
        return None;
    }
    let mut text = String::new();
    // Of `domain` and `search`, the last counts.
    let domain: Vec<String> = dns.domain.iter().cloned().collect();
    line(&mut text, "domain", &domain);
    line(&mut text, "search", &dns.search);
    for server in servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    line(&mut text, "options", &dns.options);
    Some(text)
}

fn line(text: &mut String, keyword: &str, words: &[String]) {
    let is_word = |word: &&String| {
        let is_other = |letter: char| letter.is_whitespace() || letter.is_control();
        !word.is_empty() && !word.contains(is_other)
    };
    let words: Vec<&str> = words.iter().filter(is_word).map(String::as_str).collect();
    if !words.is_empty() {
        text.push_str(&format!("{keyword} {}\n", words.join(" ")));
    }
}

/// The host's `/etc/resolv.conf` without the name servers that are the host itself: 127.0.0.0/8, `::1`, and the addresses
/// that are all zero. In a guest they mean the guest. If no name server is left, a comment says so. Comments are left out.
///
/// Where the host's only one is systemd-resolved's 127.0.0.53, the file to read is `/run/systemd/resolve/resolv.conf`.
pub fn host_resolv_conf(text: &str) -> String {
    let mut kept = String::new();
    let mut left_out = Vec::new();
    let mut has_server = false;
    for line in text.lines() {
        // As in resolv.conf(5), a keyword begins its line.
        if line.starts_with([';', '#', ' ', '\t']) || line.is_empty() {
            continue;
        }
        let mut words = line.split_whitespace();
        if words.next() == Some("nameserver") {
            match words.next() {
                Some(server) if is_host_itself(server) => {
                    left_out.push(server);
                    continue;
                }
                Some(_) => has_server = true,
                None => continue,
            }
        }
        kept.push_str(line.trim_end());
        kept.push('\n');
    }
    if has_server {
        return kept;
    }
    let why = match left_out.as_slice() {
        [] => "the host's resolv.conf has none".to_owned(),
        servers => format!(
            "the host's own, {}, cannot be reached from here",
            servers.join(" and ")
        ),
    };
    format!("# No name server: {why}.\n{kept}")
}

fn is_host_itself(server: &str) -> bool {
    let address = server.split('%').next().unwrap_or_default();
    match address.parse() {
        Ok(IpAddr::V4(address)) => address.is_loopback() || address.is_unspecified(),
        Ok(IpAddr::V6(address)) => match address.to_ipv4_mapped() {
            Some(address) => address.is_loopback() || address.is_unspecified(),
            None => address == Ipv6Addr::LOCALHOST || address.is_unspecified(),
        },
        Err(_) => false,
    }
}
