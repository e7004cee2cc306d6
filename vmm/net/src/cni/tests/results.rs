//! Results of ADD in all versions, and what resolv.conf becomes of them.

use serde_json::json;

use super::*;
use crate::cni::dns::{host_resolv_conf, resolv_conf};
use crate::cni::{Dns, Interface, Ip, Route};

fn parse(value: Value) -> Result<AddResult, String> {
    AddResult::try_from(value)
}

#[test]
fn a_result_of_each_version_is_understood() {
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let mut ip = json!({"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1});
        if version.starts_with('0') {
            ip["version"] = json!("4");
        }
        let raw = json!({
            "cniVersion": version,
            "interfaces": [
                {"name": "cni0", "mac": "00:11:22:33:44:55", "sandbox": ""},
                {"name": "eth0", "mac": "99:88:77:66:55:44", "mtu": 1400, "sandbox": "/run/netns/blue"},
            ],
            "ips": [ip, {"address": "fd00::5/64"}],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "fd01::/48", "gw": "fd00::1"}],
            "dns": {"nameservers": ["10.1.0.1"], "domain": "a.example", "search": ["b.example"], "options": ["ndots:2"]},
        });
        let result = parse(raw.clone()).unwrap();
        let eth0 = Interface {
            name: "eth0".to_owned(),
            mac: Some("99:88:77:66:55:44".to_owned()),
            mtu: Some(1400),
            sandbox: Some("/run/netns/blue".to_owned()),
        };
        assert_eq!(result.interfaces[1], eth0, "{version}");
        assert_eq!(result.interfaces[0].sandbox, None);
        let four = Ip {
            address: "10.1.0.5".parse().unwrap(),
            prefix: 16,
            gateway: Some("10.1.0.1".parse().unwrap()),
            interface: Some(1),
        };
        assert_eq!(result.ips_of(1).collect::<Vec<_>>(), [&four]);
        assert_eq!((result.ips[1].prefix, result.ips[1].gateway), (64, None));
        assert_eq!(result.routes[0].gateway, None);
        assert_eq!(result.routes[1].gateway, Some("fd00::1".parse().unwrap()));
        assert_eq!(result.dns.nameservers, ["10.1.0.1"]);
        assert_eq!(result.dns.domain.as_deref(), Some("a.example"));
        assert_eq!(result.raw(), &raw);
    }
}

#[test]
fn a_route_has_all_that_1_1_0_gives_it() {
    let result = parse(json!({"routes": [
        {"dst": "192.0.2.0/24", "gw": "10.0.0.1", "mtu": 1300, "advmss": 1260, "priority": 50, "table": 100, "scope": 253}
    ]}));
    let expected = Route {
        destination: "192.0.2.0".parse().unwrap(),
        prefix: 24,
        gateway: Some("10.0.0.1".parse().unwrap()),
        mtu: Some(1300),
        advmss: Some(1260),
        priority: Some(50),
        table: Some(100),
        scope: Some(253),
    };
    assert_eq!(result.unwrap().routes, [expected]);
}

#[test]
fn what_is_null_empty_or_unknown_does_no_harm_and_is_kept() {
    let raw = json!({"interfaces": null, "ips": [{"address": "10.0.0.1/8", "gateway": "", "interface": null, "x": 1}],
        "dns": {"nameservers": null, "domain": ""}, "future": {"y": [1, 2]}});
    let result = parse(raw.clone()).unwrap();
    assert!(result.interfaces.is_empty() && result.routes.is_empty());
    assert_eq!(
        (result.ips[0].gateway, result.ips[0].interface),
        (None, None)
    );
    assert_eq!(result.dns, Dns::default());
    let text = serde_json::to_string(&result).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), raw);
    assert_eq!(serde_json::from_str::<AddResult>(&text).unwrap(), result);
    assert_eq!(parse(json!({})).unwrap().ips, []);
}

#[test]
fn what_is_no_address_is_refused_and_shown() {
    for (raw, shown) in [
        (json!({"ips": [{"address": "10.0.0.1"}]}), "10.0.0.1"),
        (json!({"ips": [{"address": "10.0.0.1/33"}]}), "10.0.0.1/33"),
        (json!({"ips": [{"address": "fe80::1/129"}]}), "fe80::1/129"),
        (json!({"ips": [{"address": "x/8"}]}), "x/8"),
        (
            json!({"ips": [{"address": "10.0.0.1/8", "gateway": "gw"}]}),
            "gw",
        ),
        (json!({"ips": [{}]}), "address"),
        (json!({"routes": [{"dst": "default"}]}), "default"),
        (json!({"interfaces": [{"mac": "x"}]}), "name"),
        (json!({"dns": "10.0.0.1"}), "invalid"),
    ] {
        let error = parse(raw.clone()).unwrap_err();
        assert!(error.contains(shown), "{raw}: {error}");
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

#[test]
fn resolv_conf_is_made_of_a_result() {
    let dns = Dns {
        nameservers: words(&[
            "10.1.0.1",
            "not an address",
            "fd00::1",
            "1.1.1.1\nnameserver 6.6.6.6",
        ]),
        domain: Some("a.example".to_owned()),
        search: words(&["a.example", "b.example", "two words", ""]),
        options: words(&["ndots:2", "edns0\nnameserver 6.6.6.6"]),
    };
    let expected = "domain a.example\nsearch a.example b.example\nnameserver 10.1.0.1\nnameserver fd00::1\noptions ndots:2\n";
    assert_eq!(resolv_conf(&dns).as_deref(), Some(expected));
    let alone = Dns {
        nameservers: words(&["10.1.0.1"]),
        ..Dns::default()
    };
    assert_eq!(
        resolv_conf(&alone).as_deref(),
        Some("nameserver 10.1.0.1\n")
    );
    let none = Dns {
        nameservers: words(&["nonsense"]),
        ..dns
    };
    assert_eq!(resolv_conf(&none), None);
    assert_eq!(resolv_conf(&Dns::default()), None);
}

#[test]
fn the_hosts_resolv_conf_loses_what_means_the_host_itself() {
    let cases = [
        (
            "# a comment\nnameserver 127.0.0.53\nnameserver 10.0.0.2\noptions edns0\nsearch a.example b.example\n",
            "nameserver 10.0.0.2\noptions edns0\nsearch a.example b.example\n",
        ),
        (
            "nameserver ::1\nnameserver 2001:db8::1\nnameserver 127.8.8.8\nnameserver fe80::1%eth0",
            "nameserver 2001:db8::1\nnameserver fe80::1%eth0\n",
        ),
        (
            "nameserver 127.0.0.53\nsearch a.example\n",
            "# No name server: the host's own, 127.0.0.53, cannot be reached from here.\nsearch a.example\n",
        ),
        (
            "nameserver 127.0.0.1\nnameserver\t::ffff:127.0.0.1\nnameserver ::\nnameserver 0.0.0.0\n",
            "# No name server: the host's own, 127.0.0.1 and ::ffff:127.0.0.1 and :: and 0.0.0.0, cannot be reached from here.\n",
        ),
        (
            "; nothing\n",
            "# No name server: the host's resolv.conf has none.\n",
        ),
        ("", "# No name server: the host's resolv.conf has none.\n"),
        (
            "nameserver\n nameserver 10.0.0.1\n",
            "# No name server: the host's resolv.conf has none.\n",
        ),
        ("nameserver 128.0.0.1  \n", "nameserver 128.0.0.1\n"),
    ];
    for (host, guest) in cases {
        assert_eq!(host_resolv_conf(host), guest, "{host:?}");
    }
}
