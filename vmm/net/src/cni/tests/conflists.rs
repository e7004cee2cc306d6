//! Files of configurations: which is chosen, what is understood, and what is refused with which words.

use serde_json::json;

use super::*;
use crate::cni::{Kind, Version};

fn list(name: &str) -> Value {
    json!({"cniVersion": "1.0.0", "name": name, "plugins": [{"type": "bridge"}, {"type": "portmap"}]})
}

fn single(name: &str) -> Value {
    json!({"cniVersion": "0.4.0", "name": name, "type": "ptp", "mtu": 1400})
}

fn types(network: &Conflist) -> Vec<&str> {
    network.types().collect()
}

#[test]
fn a_list_and_a_single_plugin_are_read() {
    let host = Host::new();
    let network = Conflist::load(host.write("a.conflist", &list("one"))).unwrap();
    assert_eq!(network.name(), "one");
    assert_eq!(network.version(), Version::V1_0_0);
    assert_eq!(types(&network), ["bridge", "portmap"]);
    for name in ["a.conf", "a.json"] {
        let network = Conflist::load(host.write(name, &single("two"))).unwrap();
        assert_eq!((network.name(), types(&network)), ("two", vec!["ptp"]));
        assert_eq!(network.version(), Version::V0_4_0);
    }
}

#[test]
fn the_first_is_chosen_by_name_among_all_three_endings() {
    let host = Host::new();
    let directory = host.path("net.d");
    std::fs::create_dir(directory.join("00-directory.conflist")).unwrap();
    host.write("00-other.txt", &list("text"));
    host.write("30-c.conflist", &list("c"));
    host.write("20-b.json", &single("b"));
    host.write("10-a.conf", &single("a"));
    for (file, name) in [
        ("10-a.conf", "a"),
        ("20-b.json", "b"),
        ("30-c.conflist", "c"),
    ] {
        let network = Conflist::first(&directory).unwrap();
        assert_eq!(network.name(), name);
        assert_eq!(network.path(), directory.join(file));
        std::fs::remove_file(directory.join(file)).unwrap();
    }
    for directory in [directory, host.path("nowhere")] {
        let error = Conflist::first(&directory).unwrap_err();
        assert_eq!(error.kind(), Kind::NoConfiguration);
        let words = error.to_string();
        assert!(words.contains(directory.to_str().unwrap()), "{words}");
    }
}

#[test]
fn a_first_that_is_broken_is_an_error_with_its_name() {
    let host = Host::new();
    std::fs::write(host.path("net.d/10-a.conflist"), "{").unwrap();
    host.write("20-b.conflist", &list("b"));
    let error = Conflist::first(host.path("net.d")).unwrap_err();
    assert_eq!(error.kind(), Kind::Configuration);
    assert!(error.to_string().contains("net.d/10-a.conflist"), "{error}");
}

#[test]
fn a_network_is_found_by_its_name() {
    let host = Host::new();
    let directory = host.path("net.d");
    std::fs::write(directory.join("00-broken.conflist"), "[]").unwrap();
    host.write("10-a.conf", &single("both"));
    host.write("20-b.conflist", &list("both"));
    host.write("30-c.json", &single("alone"));
    let both = Conflist::named(&directory, "both").unwrap();
    assert_eq!(both.path(), directory.join("20-b.conflist"));
    assert_eq!(
        types(&Conflist::named(&directory, "alone").unwrap()),
        ["ptp"]
    );
    let error = Conflist::named(&directory, "none").unwrap_err();
    assert_eq!(error.kind(), Kind::NoConfiguration);
    let words = error.to_string();
    for part in ["\"none\"", "\"alone\"", "net.d", "00-broken.conflist"] {
        assert!(words.contains(part), "no {part} in {words}");
    }
}

#[test]
fn the_highest_version_in_common_is_taken() {
    let host = Host::new();
    let cases = [
        (json!({"cniVersion": "0.3.0"}), Some(Version::V0_3_0)),
        (json!({"cniVersion": "0.3.1"}), Some(Version::V0_3_1)),
        (json!({"cniVersion": "0.4.0"}), Some(Version::V0_4_0)),
        (json!({"cniVersion": "1.1.0"}), Some(Version::V1_1_0)),
        (
            json!({"cniVersion": "0.2.0", "cniVersions": ["0.4.0", "0.3.1", "9.0.0"]}),
            Some(Version::V0_4_0),
        ),
        (
            json!({"cniVersion": "1.1.0", "cniVersions": ["0.4.0"]}),
            Some(Version::V1_1_0),
        ),
        (json!({"cniVersions": ["1.0.0"]}), Some(Version::V1_0_0)),
        (json!({"cniVersion": "0.1.0"}), None),
        (json!({"cniVersion": "0.2.0"}), None),
        (json!({"cniVersion": "1.2.0"}), None),
        (json!({}), None),
    ];
    for (versions, expected) in cases {
        let mut config = list("one");
        config.as_object_mut().unwrap().remove("cniVersion");
        for (key, value) in versions.as_object().unwrap() {
            config[key] = value.clone();
        }
        let loaded = Conflist::load(host.write("a.conflist", &config));
        match expected {
            Some(version) => assert_eq!(loaded.unwrap().version(), version, "{versions}"),
            None => {
                let error = loaded.unwrap_err();
                assert_eq!(error.kind(), Kind::Version, "{versions}");
                let words = error.to_string();
                assert!(
                    words.contains("a.conflist") && words.contains("0.3.0"),
                    "{words}"
                );
            }
        }
    }
}

#[test]
fn what_is_wrong_in_a_file_is_named() {
    let host = Host::new();
    let changed = |key: &str, value: Value| {
        let mut config = list("one");
        config[key] = value;
        config
    };
    let cases = [
        ("a.conflist", changed("name", json!("../x")), "`name`"),
        ("a.conflist", changed("name", json!("")), "`name`"),
        ("a.conflist", changed("name", json!(7)), "`name`"),
        (
            "a.conflist",
            json!({"cniVersion": "1.0.0", "plugins": []}),
            "`name`",
        ),
        ("a.conflist", changed("plugins", json!([])), "`plugins`"),
        ("a.conflist", changed("plugins", json!({})), "`plugins`"),
        (
            "a.conflist",
            changed("plugins", json!(["bridge"])),
            "`plugins[0]`",
        ),
        (
            "a.conflist",
            changed("plugins", json!([{"name": "x"}])),
            "`type`",
        ),
        (
            "a.conflist",
            changed("plugins", json!([{"type": "../sh"}])),
            "`type`",
        ),
        (
            "a.conflist",
            changed("plugins", json!([{"type": ".."}])),
            "`type`",
        ),
        (
            "a.conflist",
            changed("plugins", json!([{"type": ""}])),
            "`type`",
        ),
        (
            "a.conflist",
            changed("disableCheck", json!(1)),
            "`disableCheck`",
        ),
        (
            "a.conflist",
            changed("cniVersion", json!(1)),
            "`cniVersion`",
        ),
        (
            "a.conflist",
            changed("cniVersions", json!([1])),
            "`cniVersions`",
        ),
        ("a.conflist", json!([1]), "JSON object"),
        ("a.conflist", single("one"), ".conf"),
        ("a.conf", list("one"), ".conflist"),
        (
            "a.conf",
            json!({"cniVersion": "1.0.0", "name": "one"}),
            "`type`",
        ),
    ];
    for (file, config, word) in cases {
        let error = Conflist::load(host.write(file, &config)).unwrap_err();
        assert_eq!(error.kind(), Kind::Configuration, "{config}");
        let words = error.to_string();
        assert!(words.contains(word), "no {word} in {words}");
        assert!(words.contains(&format!("net.d/{file}")), "{words}");
    }
}

#[test]
fn a_file_that_is_not_there_or_too_large_is_refused() {
    let host = Host::new();
    let error = Conflist::load(host.path("net.d/none.conflist")).unwrap_err();
    assert_eq!(error.kind(), Kind::NoConfiguration);
    assert!(text_of(&error).contains("none.conflist"), "{error}");
    let mut config = list("one");
    config["filling"] = json!("x".repeat(1 << 20));
    let error = Conflist::load(host.write("a.conflist", &config)).unwrap_err();
    assert!(error.to_string().contains("1 MiB"), "{error}");
    config["filling"] = json!("x".repeat((1 << 20) - 200));
    Conflist::load(host.write("a.conflist", &config)).unwrap();
}

#[test]
fn plugins_of_a_directory_with_the_networks_name_belong_to_a_list() {
    let host = Host::new();
    let directory = host.path("net.d/one");
    let path = host.write("a.conflist", &list("one"));
    std::fs::write(&directory, "a file with that name").unwrap();
    assert_eq!(
        types(&Conflist::load(&path).unwrap()),
        ["bridge", "portmap"]
    );
    std::fs::remove_file(&directory).unwrap();
    std::fs::create_dir(&directory).unwrap();
    host.write("one/2.conf", &json!({"type": "tuning"}));
    host.write("one/1.conf", &json!({"type": "sbr"}));
    host.write("one/3.json", &json!({"type": "other"}));
    let network = Conflist::load(&path).unwrap();
    assert_eq!(types(&network), ["bridge", "portmap", "sbr", "tuning"]);
    let mut config = list("one");
    config["loadOnlyInlinedPlugins"] = json!(true);
    let path = host.write("a.conflist", &config);
    assert_eq!(
        types(&Conflist::load(&path).unwrap()),
        ["bridge", "portmap"]
    );
    let path = host.write("a.conflist", &json!({"cniVersion": "1.1.0", "name": "one"}));
    assert_eq!(types(&Conflist::load(&path).unwrap()), ["sbr", "tuning"]);
    host.write("one/1.conf", &json!({"name": "no type"}));
    let error = Conflist::load(&path).unwrap_err();
    assert!(error.to_string().contains("one/1.conf"), "{error}");
}

#[test]
fn what_a_list_says_of_itself_is_known() {
    let host = Host::new();
    for (flag, disables) in [
        (json!(true), true),
        (json!("True"), true),
        (json!(false), false),
        (json!("false"), false),
    ] {
        let mut config = list("one");
        config["disableCheck"] = flag;
        config["plugins"][1]["capabilities"] = json!({"portMappings": true, "mac": false});
        let network = Conflist::load(host.write("a.conflist", &config)).unwrap();
        assert_eq!(network.disables_check(), disables);
        assert!(network.wants("portMappings") && !network.wants("mac") && !network.wants("ips"));
        let again: Conflist =
            serde_json::from_str(&serde_json::to_string(&network).unwrap()).unwrap();
        assert_eq!(again, network);
    }
}
