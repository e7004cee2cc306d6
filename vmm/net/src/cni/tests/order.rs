//! Which plugins run, in which order, and what they are told.

use std::io;

use serde_json::json;

use super::*;
use crate::cni::{Kind, PortMapping, Protocol};
use crate::netns::Netns;

fn failing(text: &str) -> String {
    says(&json!({"code": 999, "msg": text})) + "; exit 1"
}

/// Fails a command, and does `body` with the others.
fn failing_at(command: &str, text: &str, body: &str) -> String {
    format!(
        "case $CNI_COMMAND in {command}) {};; esac\n{body}",
        failing(text)
    )
}

fn second_result() -> Value {
    let mut second = result();
    second["routes"] = json!([{"dst": "0.0.0.0/0"}]);
    second
}

/// A network of two plugins that work.
fn two(host: &Host, version: &str) -> Attachment {
    host.plugin("first", &says(&result()));
    host.plugin("second", &says(&second_result()));
    host.attachment(
        version,
        json!([
            {"type": "first", "bridge": "cni0", "keyA": ["some", {"more": 1}]},
            {"type": "second", "capabilities": {"portMappings": true}},
        ]),
    )
}

#[test]
fn add_check_and_del_run_in_order_with_the_results_before() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    let added = add(&mut attachment).unwrap();
    assert_eq!(added.raw(), &second_result());
    assert_eq!(attachment.result(), Some(&added));
    attachment.check().unwrap();
    attachment.del().unwrap();
    attachment.del().unwrap();
    let order = [
        "ADD first",
        "ADD second",
        "CHECK first",
        "CHECK second",
        "DEL second",
        "DEL first",
        "DEL second",
        "DEL first",
    ];
    assert_eq!(host.order(), order);
    let first = host.stdin("first.ADD");
    let expected = json!({"type": "first", "bridge": "cni0", "keyA": ["some", {"more": 1}],
        "name": "dbnet", "cniVersion": "1.0.0"});
    assert_eq!(first, expected);
    assert_eq!(host.stdin("second.ADD")["prevResult"], result());
    for run in ["first.CHECK", "second.CHECK", "second.DEL", "first.DEL"] {
        assert_eq!(host.stdin(run)["prevResult"], second_result(), "{run}");
    }
}

#[test]
fn the_environment_is_what_cni_says_and_path() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    attachment.plugin_dirs.insert(0, host.path("empty"));
    attachment.args = vec![
        ("IgnoreUnknown".to_owned(), "1".to_owned()),
        ("K8S_POD_NAME".to_owned(), "pod=1".to_owned()),
    ];
    add(&mut attachment).unwrap();
    let path = format!(
        "{}:{}",
        host.path("empty").display(),
        host.path("bin").display()
    );
    let ours = std::env::var("PATH").unwrap();
    let expected = [
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=pod=1"),
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_IFNAME", INTERFACE),
        ("CNI_NETNS", NETNS),
        ("CNI_PATH", &path),
        ("PATH", &ours),
    ];
    let shells = ["PWD", "OLDPWD", "SHLVL", "_"];
    let mut all = host.environment("first.ADD");
    all.retain(|(name, _)| !shells.contains(&name.as_str()));
    all.sort();
    let all: Vec<_> = all
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    assert_eq!(all, expected);
    attachment.args.clear();
    attachment.check().unwrap();
    assert_eq!(
        host.variable("first.CHECK", "CNI_ARGS").as_deref(),
        Some("")
    );
    assert_eq!(
        host.variable("first.CHECK", "CNI_COMMAND").as_deref(),
        Some("CHECK")
    );
}

#[test]
fn a_plugin_holds_no_directory_of_the_callers() {
    let host = Host::new();
    let body = format!("pwd >{}\n{}", host.path("cwd").display(), says(&result()));
    host.plugin("first", &body);
    add(&mut host.attachment("1.0.0", json!([{"type": "first"}]))).unwrap();
    let cwd = std::fs::read_to_string(host.path("cwd")).unwrap();
    assert_eq!(cwd, "/\n");
}

#[test]
fn port_mappings_reach_those_that_ask() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    let mapping = |host_ip: Option<&str>, protocol| PortMapping {
        host_port: 8080,
        container_port: 80,
        protocol,
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
    };
    attachment.port_mappings = vec![
        mapping(None, Protocol::Tcp),
        mapping(Some("127.0.0.1"), Protocol::Udp),
    ];
    add(&mut attachment).unwrap();
    attachment.del().unwrap();
    let expected = json!({"portMappings": [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIP": "127.0.0.1"},
    ]});
    for command in ["ADD", "DEL"] {
        let second = host.stdin(&format!("second.{command}"));
        assert_eq!(second["runtimeConfig"], expected);
        assert_eq!(second.get("capabilities"), None);
        assert_eq!(
            host.stdin(&format!("first.{command}")).get("runtimeConfig"),
            None
        );
    }
    let mut without = two(&host, "1.0.0");
    add(&mut without).unwrap();
    assert_eq!(host.stdin("second.ADD").get("runtimeConfig"), None);
}

#[test]
fn keys_that_only_runtimes_set_are_not_taken_from_a_file() {
    let host = Host::new();
    host.plugin("first", &says(&result()));
    let plugin = json!({"type": "first", "cniVersion": "0.1.0", "name": "other", "prevResult": {"x": 1},
        "cni.dev/valid-attachments": [], "cni.development": 1, "args": {"cni": {}}});
    add(&mut host.attachment("1.0.0", json!([plugin]))).unwrap();
    let expected = json!({"type": "first", "cniVersion": "1.0.0", "name": "dbnet",
        "cni.development": 1, "args": {"cni": {}}});
    assert_eq!(host.stdin("first.ADD"), expected);
}

#[test]
fn versions_before_0_4_0_have_no_check_and_no_result_in_del() {
    for version in ["0.3.0", "0.3.1"] {
        let host = Host::new();
        let mut attachment = two(&host, version);
        add(&mut attachment).unwrap();
        attachment.check().unwrap();
        attachment.del().unwrap();
        assert_eq!(
            host.order(),
            ["ADD first", "ADD second", "DEL second", "DEL first"]
        );
        assert_eq!(host.stdin("second.ADD")["prevResult"], result());
        assert_eq!(host.stdin("first.DEL").get("prevResult"), None);
    }
}

#[test]
fn check_can_be_disabled_and_stops_at_the_first_failure() {
    let host = Host::new();
    let mut attachment = two(&host, "0.4.0");
    let error = attachment.check().unwrap_err();
    assert_eq!(error.kind(), Kind::Argument, "{error}");
    add(&mut attachment).unwrap();
    host.plugin("first", &failing("the veth is gone"));
    host.forget();
    let error = attachment.check().unwrap_err();
    assert_eq!(error.kind(), Kind::Plugin);
    assert!(error.to_string().contains("CHECK"), "{error}");
    assert_eq!(host.order(), ["CHECK first"]);
    host.forget();
    let config = json!({"cniVersion": "0.4.0", "name": "dbnet", "disableCheck": true,
        "plugins": [{"type": "first"}]});
    host.attachment_of(&config).check().unwrap();
    assert_eq!(host.order(), [""; 0]);
}

#[test]
fn a_result_without_a_version_gets_the_configurations() {
    let host = Host::new();
    for without in [json!({"dns": {}}), json!({"dns": {}, "cniVersion": ""})] {
        host.plugin("first", &says(&without));
        host.plugin("second", &says(&result()));
        let plugins = json!([{"type": "first"}, {"type": "second"}]);
        add(&mut host.attachment("1.0.0", plugins)).unwrap();
        let expected = json!({"dns": {}, "cniVersion": "1.0.0"});
        assert_eq!(host.stdin("second.ADD")["prevResult"], expected);
    }
}

#[test]
fn an_add_that_fails_is_undone_in_reverse() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    host.plugin(
        "second",
        &failing_at("ADD", "no IP addresses available in range set: x", ""),
    );
    let error = add(&mut attachment).unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted, "{error}");
    assert!(
        error.to_string().contains("by the plugin second"),
        "{error}"
    );
    assert!(error.also().is_empty(), "{error}");
    assert_eq!(
        host.order(),
        ["ADD first", "ADD second", "DEL second", "DEL first"]
    );
    assert_eq!(host.stdin("first.DEL").get("prevResult"), None);
    assert_eq!(attachment.result(), None);
}

#[test]
fn an_add_whose_undoing_fails_says_both() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    host.plugin(
        "first",
        &failing_at("DEL", "the bridge is stuck", &says(&result())),
    );
    host.plugin("second", &failing("x already exists"));
    let error = add(&mut attachment).unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
    let also = error.also().join(" ");
    assert!(
        also.contains("DEL") && also.contains("the bridge is stuck"),
        "{also}"
    );
    assert!(error.to_string().contains("the bridge is stuck"), "{error}");
    assert_eq!(
        host.order(),
        ["ADD first", "ADD second", "DEL second", "DEL first"]
    );
}

#[test]
fn del_runs_all_whatever_fails() {
    let host = Host::new();
    host.plugin("third", &says(&result()));
    host.plugin(
        "second",
        &failing_at("DEL", "second is stuck", &says(&result())),
    );
    host.plugin(
        "first",
        &failing_at("DEL", "first is stuck", &says(&result())),
    );
    let plugins = json!([{"type": "first"}, {"type": "second"}, {"type": "third"}]);
    let mut attachment = host.attachment("1.0.0", plugins);
    add(&mut attachment).unwrap();
    host.forget();
    std::fs::remove_file(host.path("bin/third")).unwrap();
    let error = attachment.del().unwrap_err();
    assert_eq!(error.kind(), Kind::MissingPlugin);
    let words = error.to_string();
    for part in [
        "\"third\"",
        host.path("bin").to_str().unwrap(),
        "second is stuck",
        "first is stuck",
    ] {
        assert!(words.contains(part), "no {part} in {words}");
    }
    assert_eq!(error.also().len(), 2);
    assert_eq!(host.order(), ["DEL second", "DEL first"]);
}

#[test]
fn a_plugin_that_knows_no_such_container_has_nothing_to_delete() {
    let host = Host::new();
    let attachment = two(&host, "1.0.0");
    host.plugin(
        "second",
        &(says(&json!({"code": 3, "msg": "unknown container"})) + "; exit 1"),
    );
    attachment.del().unwrap();
    assert_eq!(host.order(), ["DEL second", "DEL first"]);
}

#[test]
fn a_missing_plugin_is_found_before_any_runs() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    std::fs::remove_file(host.path("bin/second")).unwrap();
    std::fs::create_dir(host.path("bin/second")).unwrap();
    let error = attachment
        .add(&mut |_| panic!("nothing is to be noted"))
        .unwrap_err();
    assert_eq!(error.kind(), Kind::MissingPlugin);
    let words = error.to_string();
    assert!(
        words.contains("\"second\"") && words.contains(host.path("bin").to_str().unwrap()),
        "{words}"
    );
    assert_eq!(host.order(), [""; 0]);
    attachment.plugin_dirs.clear();
    let error = add(&mut attachment).unwrap_err();
    assert!(error.to_string().contains("none is given"), "{error}");
}

#[test]
fn it_is_noted_before_the_first_plugin_and_with_the_result() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    let mut notes = Vec::new();
    let mut note = |noted: &Attachment| {
        notes.push((host.order().len(), serde_json::to_string(noted)?));
        Ok(())
    };
    let added = attachment.add(&mut note).unwrap();
    assert_eq!(
        notes.iter().map(|(runs, _)| *runs).collect::<Vec<_>>(),
        [0, 2]
    );
    let noted = |index: usize| serde_json::from_str::<Attachment>(&notes[index].1).unwrap();
    assert_eq!(noted(0).result(), None);
    assert_eq!(noted(1).result(), Some(&added));
    host.forget();
    // Of a process that was killed at its first plugin.
    noted(0).del().unwrap();
    assert_eq!(host.order(), ["DEL second", "DEL first"]);
    assert_eq!(
        host.variable("first.DEL", "CNI_NETNS").as_deref(),
        Some(NETNS)
    );
    assert_eq!(host.stdin("first.DEL").get("prevResult"), None);
    noted(1).del().unwrap();
    assert_eq!(host.stdin("first.DEL")["prevResult"], second_result());
    let error = noted(1).add(&mut |_| Ok(())).unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
}

#[test]
fn what_cannot_be_noted_is_not_made_or_not_left() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    let full = || io::Error::from_raw_os_error(libc::ENOSPC);
    let error = attachment.add(&mut |_| Err(full())).unwrap_err();
    assert_eq!(error.kind(), Kind::Note);
    assert!(
        text_of(&error).contains("No space left"),
        "{}",
        text_of(&error)
    );
    assert!(
        !host.order().iter().any(|run| run.starts_with("ADD")),
        "{:?}",
        host.order()
    );
    let mut count = 0;
    let error = attachment.add(&mut |_| {
        count += 1;
        if count == 2 { Err(full()) } else { Ok(()) }
    });
    assert_eq!(error.unwrap_err().kind(), Kind::Note);
    assert_eq!(
        host.order(),
        ["ADD first", "ADD second", "DEL second", "DEL first"]
    );
    assert_eq!(host.stdin("first.DEL")["prevResult"], second_result());
    assert_eq!(attachment.result(), None);
}

#[test]
fn a_namespace_that_is_gone_is_none_for_del_and_an_error_before() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    add(&mut attachment).unwrap();
    let plain = host.path("plain");
    std::fs::write(&plain, "").unwrap();
    let under_plain = plain.join("netns");
    let socket = host.path("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let other = Netns::create().unwrap();
    let of_other = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&other))
    );
    for path in [
        host.path("gone"),
        plain,
        under_plain,
        socket,
        of_other.into(),
    ] {
        let mut record: Attachment =
            serde_json::from_value(serde_json::to_value(&attachment).unwrap()).unwrap();
        record.netns.clone_from(&path);
        record.del().unwrap();
        assert_eq!(
            host.variable("first.DEL", "CNI_NETNS").as_deref(),
            Some(""),
            "{path:?}"
        );
        assert_eq!(
            host.variable("second.DEL", "CNI_NETNS").as_deref(),
            Some("")
        );
    }
    attachment.del().unwrap();
    assert_eq!(
        host.variable("first.DEL", "CNI_NETNS").as_deref(),
        Some(NETNS)
    );
    host.forget();
    attachment.netns = host.path("gone");
    let error = attachment.check().unwrap_err();
    assert_eq!(error.kind(), Kind::Namespace);
    let mut fresh = two(&host, "1.0.0");
    fresh.netns = host.path("gone");
    let error = fresh
        .add(&mut |_| panic!("nothing is to be noted"))
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Namespace);
    assert!(error.to_string().contains("gone"), "{error}");
    assert_eq!(host.order(), [""; 0]);
}

#[test]
fn what_cni_does_not_allow_is_refused_before_anything_runs() {
    let host = Host::new();
    let good = two(&host, "1.0.0");
    let changed = |change: &dyn Fn(&mut Attachment)| {
        let mut attachment = good.clone();
        change(&mut attachment);
        attachment
    };
    let mut wrong = Vec::new();
    for id in ["", "-x", ".x", "_x", "a b", "a/b", "a\n", "ü", "aü"] {
        wrong.push(changed(&|a| a.container_id = id.to_owned()));
    }
    for name in [
        "",
        ".",
        "..",
        "a/b",
        "a:b",
        "a b",
        "a\tb",
        "a\0b",
        "sixteen-letters!",
    ] {
        wrong.push(changed(&|a| a.interface = name.to_owned()));
    }
    for (name, value) in [
        ("", "x"),
        ("a=b", "x"),
        ("a;b", "x"),
        ("a", "x;y"),
        ("a", "\0"),
    ] {
        wrong.push(changed(&|a| {
            a.args = vec![(name.to_owned(), value.to_owned())];
        }));
    }
    wrong.push(changed(&|a| a.netns = "ns/net".into()));
    wrong.push(changed(&|a| a.plugin_dirs.push("bin".into())));
    for mut attachment in wrong {
        let error = attachment
            .add(&mut |_| panic!("nothing is to be noted"))
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Argument, "{error}");
        assert_eq!(attachment.del().unwrap_err().kind(), Kind::Argument);
    }
    let colon = changed(&|a| a.plugin_dirs.push("/a:b".into()))
        .del()
        .unwrap_err();
    assert_eq!(colon.kind(), Kind::Argument);
    assert_eq!(host.order(), [""; 0]);
    let mut fine = changed(&|a| {
        a.container_id = "9.x_Y-z".to_owned();
        a.interface = "fifteen-letters".to_owned();
    });
    add(&mut fine).unwrap();
}

#[test]
fn an_interface_that_was_there_before_is_not_deleted_by_an_add_that_fails() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    attachment.interface = "lo".to_owned();
    let mut first_note = None;
    let note = &mut |noted: &Attachment| {
        first_note.get_or_insert(serde_json::to_string(noted)?);
        Ok(())
    };
    attachment.add(note).unwrap();
    attachment.del().unwrap();
    let netns = || host.variable("first.DEL", "CNI_NETNS").unwrap();
    assert_eq!(netns(), NETNS);
    // Of a process that was killed at its first plugin.
    let noted: Attachment = serde_json::from_str(&first_note.unwrap()).unwrap();
    noted.del().unwrap();
    assert_eq!(netns(), "");
    let mut again = two(&host, "1.0.0");
    host.plugin("second", &failing_at("ADD", "lo already exists", ""));
    again.interface = "lo".to_owned();
    add(&mut again).unwrap_err();
    assert_eq!(netns(), "");
    again.interface = INTERFACE.to_owned();
    add(&mut again).unwrap_err();
    assert_eq!(netns(), NETNS);
}

#[test]
fn a_version_that_is_refused_twice_is_said_once() {
    let host = Host::new();
    let mut attachment = two(&host, "1.0.0");
    let refused = says(&json!({"code": 1, "msg": "incompatible CNI versions"})) + "; exit 1";
    host.plugin("second", &refused);
    let error = add(&mut attachment).unwrap_err();
    assert_eq!(
        (error.kind(), error.also().len()),
        (Kind::Version, 0),
        "{error}"
    );
    assert_eq!(
        host.order(),
        ["ADD first", "ADD second", "DEL second", "DEL first"]
    );
    host.plugin(
        "first",
        &failing_at("DEL", "the bridge is stuck", &says(&result())),
    );
    let error = add(&mut attachment).unwrap_err();
    assert!(error.to_string().contains("the bridge is stuck"), "{error}");
}
