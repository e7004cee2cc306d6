//! What plugins say when they fail, in their own words, and what it is taken to mean.

use serde_json::json;

use super::*;
use crate::cni::Kind;

/// Code and text as the plugins in wide use write them; code 999 is what their common library gives to every error of Go.
const SAID: &[(u64, &str, &str, Kind)] = &[
    (
        999,
        "failed to allocate for range 0: no IP addresses available in range set: 10.88.0.1-10.88.255.254",
        "",
        Kind::Exhausted,
    ),
    (
        100,
        "failed to allocate for range 1: no IP addresses available in range set: fd00::2-fd00::3",
        "",
        Kind::Exhausted,
    ),
    (
        999,
        "failed to request IPv4 addresses: Assigned 0 out of 1 requested IPv4 addresses; No IPs available in pools: [10.99.9.0/29]",
        "",
        Kind::Exhausted,
    ),
    (
        999,
        "error at storage engine: Could not allocate IP in range: ip: 172.16.0.1 / - 172.16.0.6 / range: net.IPNet{}",
        "",
        Kind::Exhausted,
    ),
    (
        999,
        "add cmd: failed to assign an IP address to container",
        "",
        Kind::Exhausted,
    ),
    (
        999,
        "unable to allocate IP via local cilium agent: range is full",
        "",
        Kind::Exhausted,
    ),
    (
        999,
        "failed to allocate for range 0: 10.88.0.4 has been allocated to c1, duplicate allocation is not allowed",
        "",
        Kind::Conflict,
    ),
    (
        999,
        "failed to allocate for range 0: requested IP address 10.1.2.9 is not available in range set 10.1.2.1-10.1.2.254",
        "",
        Kind::Conflict,
    ),
    (
        999,
        "failed to allocate for range 0: requested ip 10.1.2.1 is subnet's gateway",
        "",
        Kind::Conflict,
    ),
    (
        999,
        "failed to allocate all requested IPs: 192.0.2.9",
        "",
        Kind::Argument,
    ),
    (
        999,
        "container veth name provided (eth0) already exists",
        "",
        Kind::Conflict,
    ),
    (
        999,
        "container veth name (\"eth0\") peer provided (\"veth1\") already exists",
        "",
        Kind::Conflict,
    ),
    (
        999,
        "failed to set bridge addr: \"cni0\" already has an IP address different from 10.88.0.1/16",
        "",
        Kind::Conflict,
    ),
    (
        999,
        "failed to create bridge \"eth1\": \"eth1\" already exists but is not a bridge",
        "",
        Kind::Conflict,
    ),
    (
        999,
        "failed to add IP addr 10.1.0.5/16 to \"eth0\": file exists",
        "",
        Kind::Conflict,
    ),
    (
        999,
        "link eth0 has address fd00::5/64 in DADFAILED state",
        "",
        Kind::Conflict,
    ),
    (
        999,
        "failed to find plugin \"host-local\" in path [/opt/cni/bin]",
        "",
        Kind::MissingPlugin,
    ),
    (
        999,
        "failed to locate iptables: exec: \"iptables\": executable file not found in $PATH",
        "",
        Kind::MissingPlugin,
    ),
    (
        999,
        "failed to open iptables: exec: \"iptables\": executable file not found in $PATH",
        "",
        Kind::MissingPlugin,
    ),
    (
        999,
        "neither iptables nor ip6tables usable",
        "",
        Kind::MissingPlugin,
    ),
    (
        999,
        "neither iptables nor ip6tables is usable, (iptables) x, (ip6tables) y",
        "",
        Kind::MissingPlugin,
    ),
    (
        999,
        "failed to open netns \"/run/netns/x\": failed to Statfs \"/run/netns/x\": no such file or directory",
        "",
        Kind::Namespace,
    ),
    (
        999,
        "failed to open netns \"/tmp/x\": unknown FS magic on \"/tmp/x\": ef53",
        "",
        Kind::Namespace,
    ),
    (
        8,
        "plugin's netns and netns from CNI_NETNS should not be the same",
        "",
        Kind::Namespace,
    ),
    (3, "container unknown", "c1", Kind::Namespace),
    (
        1,
        "incompatible CNI versions",
        "config is \"1.1.0\", plugin supports [\"0.4.0\" \"1.0.0\"]",
        Kind::Version,
    ),
    (
        999,
        "unsupported CNI result version \"1.1.0\"",
        "",
        Kind::Version,
    ),
    (
        11,
        "try again later",
        "the IPAM daemon is starting",
        Kind::TryAgain,
    ),
    (50, "plugin not available", "", Kind::TryAgain),
    (
        51,
        "plugin not available, limited connectivity",
        "",
        Kind::TryAgain,
    ),
    (
        4,
        "required env variables [CNI_NETNS] missing",
        "",
        Kind::Argument,
    ),
    (2, "unsupported field", "ipam.x = 1", Kind::Configuration),
    (
        6,
        "error unmarshall network config: unexpected end of JSON input",
        "",
        Kind::Configuration,
    ),
    (7, "missing network name", "", Kind::Configuration),
    (
        999,
        "failed to load netconf: json: cannot unmarshal string into Go struct field NetConf.mtu of type int",
        "",
        Kind::Configuration,
    ),
    (
        999,
        "invalid range set 0: Network 192.168.0.0/31 too small to allocate from",
        "",
        Kind::Configuration,
    ),
    (
        999,
        "IPAM config missing 'ipam' key",
        "",
        Kind::Configuration,
    ),
    (
        999,
        "must be called as chained plugin",
        "",
        Kind::Configuration,
    ),
    (
        999,
        "failed to parse config: unrecognized backend \"x\"",
        "",
        Kind::Configuration,
    ),
    (
        999,
        "failed to lookup master \"eth9\": Link not found",
        "",
        Kind::Configuration,
    ),
    (
        999,
        "invalid VLAN ID 5000 (must be between 0 and 4094)",
        "",
        Kind::Configuration,
    ),
    (
        5,
        "error reading from stdin: input/output error",
        "",
        Kind::Plugin,
    ),
    (
        999,
        "unable to setup DNAT: running [/usr/sbin/iptables -t nat -N CNI-DN-1 --wait]: exit status 4",
        "",
        Kind::Plugin,
    ),
    (120, "a code of the plugin's own", "more", Kind::Plugin),
    (
        7,
        "failed to allocate for range 0: no IP addresses available in range set: 10.0.0.1-10.0.0.2",
        "",
        Kind::Exhausted,
    ),
];

#[test]
fn what_a_plugin_says_is_classified_and_shown() {
    let host = Host::new();
    let answer = host.path("answer");
    host.silent_plugin("sayer", &format!("cat {}; exit 1", answer.display()));
    let attachment = host.attachment("1.0.0", json!([{"type": "sayer"}]));
    for (code, msg, details, kind) in SAID {
        let said = json!({"cniVersion": "1.0.0", "code": code, "msg": msg, "details": details});
        std::fs::write(&answer, said.to_string()).unwrap();
        let error = add(&mut attachment.clone()).unwrap_err();
        assert_eq!(error.kind(), *kind, "{msg}");
        let kept = error.answer().unwrap();
        assert_eq!(
            (kept.code, kept.msg.as_str(), kept.details.as_str()),
            (*code, *msg, *details)
        );
        let words = error.to_string();
        for part in ["ADD", "\"dbnet\"", "sayer", "\"c1\"", msg, details] {
            assert!(words.contains(part), "no {part} in {words}");
        }
    }
}

#[test]
fn an_error_says_what_to_do() {
    let host = Host::new();
    let answer = host.path("answer");
    host.silent_plugin("sayer", &format!("cat {}; exit 1", answer.display()));
    let attachment = host.attachment("1.0.0", json!([{"type": "sayer"}]));
    let bin = host.path("bin");
    let bin = bin.to_str().unwrap();
    for (msg, code, part) in [
        (
            "no IP addresses available in range set: x",
            999,
            "10-db.conflist",
        ),
        ("failed to find plugin \"host-local\" in path [x]", 999, bin),
        ("x already exists", 999, "choose another"),
        ("must be called as chained plugin", 999, "10-db.conflist"),
        ("incompatible CNI versions", 1, "cniVersion"),
        ("failed to open netns \"x\": y", 999, NETNS),
        ("later", 11, "try again in"),
    ] {
        std::fs::write(&answer, json!({"code": code, "msg": msg}).to_string()).unwrap();
        let error = add(&mut attachment.clone()).unwrap_err();
        let words = error.to_string();
        let help = words.split_once("; ").map(|(_, help)| help);
        assert!(
            help.is_some_and(|help| help.contains(part)),
            "no {part} in {words}"
        );
    }
}

#[test]
fn what_is_no_answer_is_shown_as_it_is() {
    let host = Host::new();
    let cases = [
        (
            "echo 'panic: boom' >&2; exit 2",
            Kind::Plugin,
            "panic: boom",
        ),
        ("exit 3", Kind::Plugin, "exit status: 3"),
        ("kill -SEGV $$", Kind::Plugin, "signal: 11"),
        ("echo '<html>'; exit 1", Kind::Output, "<html>"),
        (
            "echo '{\"code\":999,\"msg\":\"on stderr\"}' >&2; exit 1",
            Kind::Plugin,
            "it says: on stderr",
        ),
        (
            "echo 'no IP addresses available in range set: x' >&2; exit 1",
            Kind::Exhausted,
            "no IP",
        ),
        (
            "echo 'exec: \"iptables\": executable file not found in $PATH'; exit 1",
            Kind::MissingPlugin,
            "iptables",
        ),
        ("echo '[1'", Kind::Output, "[1"),
        ("exit 0", Kind::Output, "no JSON object"),
        ("echo '[]'", Kind::Output, "[]"),
        (
            "echo '{\"ips\":[{\"address\":\"x\"}]}'",
            Kind::Output,
            "\"x\"",
        ),
        ("echo '{\"cniVersion\":\"0.2.0\"}'", Kind::Version, "0.2.0"),
        ("printf '%0500d' 0; exit 1", Kind::Output, "000\"…"),
    ];
    for (body, kind, part) in cases {
        host.silent_plugin("odd", body);
        let error = add(&mut host.attachment("1.0.0", json!([{"type": "odd"}]))).unwrap_err();
        let words = error.to_string();
        assert_eq!(error.kind(), kind, "{words}");
        assert!(words.contains(part), "no {part} in {words}");
        assert!(words.contains("odd") && words.len() < 2000, "{words}");
    }
}

#[test]
fn a_program_that_cannot_be_executed_is_named() {
    let host = Host::new();
    let path = host.path("bin/none");
    std::fs::write(&path, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = add(&mut host.attachment("1.0.0", json!([{"type": "none"}]))).unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
    let words = text_of(&error);
    assert!(words.contains(path.to_str().unwrap()), "{words}");
    assert!(words.contains("No such file"), "{words}");
}
