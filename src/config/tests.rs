use super::reference::{path, sections};
use super::*;
use crate::hotplug::{CpuPolicy, Host, MemoryPolicy, Room};
use crate::network::{Cni, List};
use crate::sandbox::annotations::Overrides;
use crate::sandbox::cgroup::Wish;
use crate::sandbox::{SandboxConfig, size};
use crate::shim::settings::Patience;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(Path::new("/c.toml"), text).map_err(|error| error.to_string())
}

/// A value that is not the default, and values that cannot be, with words of what is allowed.
struct Key {
    table: &'static str,
    name: &'static str,
    other: &'static str,
    bad: &'static [(&'static str, &'static str)],
}

const DURATIONS: &[(&str, &str)] = &[
    ("\"10\"", "such as 10s"),
    ("\"0s\"", "above 0"),
    ("\"-1s\"", "above 0"),
    ("\"525601m\"", "at most 525600m"),
    ("\"1h\"", "ms, s or m"),
    ("10", "a string with a duration"),
    ("[]", "a string with a duration"),
];
const PAUSES: &[(&str, &str)] = &[
    ("\"10\"", "such as 10s"),
    ("\"-1s\"", "write 0, or a number"),
    ("\"525601m\"", "at most 525600m"),
    ("10", "a string with a duration: 0, or"),
];
const INTERVALS: &[(&str, &str)] = &[
    ("\"99ms\"", "0 or a duration from 100ms to 525600m"),
    ("\"5\"", "0 or a duration from 100ms to 525600m"),
    ("5", "0 or a duration from 100ms to 525600m"),
    ("\"525601m\"", "0 or a duration from 100ms to 525600m"),
];
const PERCENT: &[(&str, &str)] = &[
    ("101", "percent from 0 to 100"),
    ("-1", "percent from 0 to 100"),
    ("0.8", "percent from 0 to 100"),
    ("\"80%\"", "percent from 0 to 100"),
];
const READINGS: &[(&str, &str)] = &[
    ("256", "a whole number from 0 to 255"),
    ("-1", "a whole number from 0 to 255"),
    ("\"2\"", "a whole number from 0 to 255"),
];
const BYTES: &[(&str, &str)] = &[("\"1T\"", "up to 1023G"), ("128", "up to 1023G")];
const FILES: &[(&str, &str)] = &[
    ("3", "absolute path"),
    ("\"\"", "absolute path"),
    ("\"vmlinux\"", "absolute path"),
    ("\"./vmlinux\"", "absolute path"),
    ("\"/a\\u0000b\"", "absolute path"),
];
const MEMORY: &[(&str, &str)] = &[
    ("\"1X\"", "512M"),
    ("\"95M\"", "96M to 1023G"),
    ("\"1T\"", "96M to 1023G"),
    ("\"99999999999T\"", "512M"),
    ("512", "96M to 1023G"),
    ("true", "96M to 1023G"),
];

const fn key(
    table: &'static str,
    name: &'static str,
    other: &'static str,
    bad: &'static [(&'static str, &'static str)],
) -> Key {
    Key {
        table,
        name,
        other,
        bad,
    }
}

const KEYS: &[Key] = &[
    key("", "kernel", "\"/k\"", FILES),
    key("", "initrd", "\"/i\"", FILES),
    key(
        "",
        "cmdline",
        "\"debug\"",
        &[("1", "a string of"), ("\"a\\nb\"", "one line")],
    ),
    key(
        "",
        "base_cmdline",
        "\"console=ttyS0\"",
        &[("1", "a string of"), ("\"a\\nb\"", "one line")],
    ),
    key(
        "",
        "state_dir",
        "\"/s\"",
        &[
            ("false", "absolute path"),
            ("\"s\"", "absolute path"),
            (
                "\"/0123456789012345678901234567890123456789012345678901234567\"",
                "56 bytes",
            ),
        ],
    ),
    key(
        "",
        "cgroup_parent",
        "\"/machine\"",
        &[("1", "absolute path"), ("\"machine\"", "absolute path")],
    ),
    key(
        "",
        "cgroup_required",
        "false",
        &[("1", "a boolean"), ("\"no\"", "a boolean")],
    ),
    key("", "boot_timeout", "\"61s\"", DURATIONS),
    key("", "agent_timeout", "\"11s\"", DURATIONS),
    key("", "create_timeout", "\"1ms\"", DURATIONS),
    key("", "stdio_timeout", "\"2m\"", DURATIONS),
    key("", "resize_timeout", "\"21s\"", DURATIONS),
    key("", "idle_timeout", "\"525600m\"", DURATIONS),
    key("", "reader_timeout", "\"1s\"", DURATIONS),
    key(
        "",
        "allowed_annotations",
        "[]",
        &[
            ("1", "a list of annotations' names"),
            ("\"io.nacre.vcpus\"", "a list of annotations' names"),
            ("[1]", "a string"),
            ("[\"io.nacre.vcpu\"]", "io.nacre.vcpus"),
            ("[\"vcpus\"]", "io.nacre.vcpus"),
        ],
    ),
    key(
        "size",
        "default_vcpus",
        "254",
        &[
            ("0", "1 to 254"),
            ("255", "1 to 254"),
            ("-1", "1 to 254"),
            ("1.5", "1 to 254"),
            ("\"2\"", "1 to 254"),
        ],
    ),
    key("size", "default_memory", "\"1023G\"", MEMORY),
    key(
        "size",
        "max_vcpus",
        "2",
        &[
            ("255", "from 0 to 254"),
            ("-1", "from 0 to 254"),
            ("\"2\"", "from 0 to 254"),
        ],
    ),
    key(
        "size",
        "max_memory",
        "\"1G\"",
        &[
            ("\"95M\"", "96M to 1023G, such as 512M, or 0"),
            ("\"1T\"", "96M to 1023G, such as 512M, or 0"),
            ("\"much\"", "or 0"),
            ("0", "0 or a size from 96M to 1023G"),
        ],
    ),
    key("size", "minimum_memory", "\"96M\"", MEMORY),
    key("size", "guest_memory", "\"0\"", BYTES),
    key("size", "host_memory", "\"1G\"", BYTES),
    key(
        "hotplug",
        "enabled",
        "false",
        &[("1", "a boolean"), ("\"no\"", "a boolean")],
    ),
    key("hotplug.cpu", "interval", "\"0\"", INTERVALS),
    key("hotplug.cpu", "up_load", "0", PERCENT),
    key("hotplug.cpu", "up_readings", "0", READINGS),
    key("hotplug.cpu", "up_throttled", "100", PERCENT),
    key("hotplug.cpu", "up_cooldown", "\"0s\"", PAUSES),
    key("hotplug.cpu", "down_load", "0", PERCENT),
    key("hotplug.cpu", "down_readings", "255", READINGS),
    key("hotplug.cpu", "down_cooldown", "\"0m\"", PAUSES),
    key(
        "hotplug.memory",
        "way",
        "\"acpi\"",
        &[("1", "string"), ("\"dimm\"", "virtio-mem")],
    ),
    key(
        "hotplug.memory",
        "give_back",
        "false",
        &[("1", "a boolean"), ("\"no\"", "a boolean")],
    ),
    key("hotplug.memory", "interval", "\"100ms\"", INTERVALS),
    key(
        "hotplug.memory",
        "step",
        "\"2M\"",
        &[
            ("\"1M\"", "a multiple of 2M"),
            ("\"1T\"", "up to 1023G"),
            ("128", "a multiple of 2M up to 1023G"),
        ],
    ),
    key("hotplug.memory", "up_used", "100", PERCENT),
    key("hotplug.memory", "up_available", "\"0\"", BYTES),
    key("hotplug.memory", "up_readings", "1", READINGS),
    key("hotplug.memory", "up_cooldown", "\"525600m\"", PAUSES),
    key("hotplug.memory", "down_used", "0", PERCENT),
    key("hotplug.memory", "down_available", "\"1G\"", BYTES),
    key("hotplug.memory", "down_readings", "1", READINGS),
    key("hotplug.memory", "down_cooldown", "\"0ms\"", PAUSES),
    key("hotplug.memory", "reserve", "\"0\"", BYTES),
    key("hotplug.memory", "burst", "\"0\"", BYTES),
    key(
        "share",
        "workers",
        "64",
        &[("0", "1 to 64"), ("65", "1 to 64"), ("\"2\"", "1 to 64")],
    ),
    key("share", "cache", "\"0\"", PAUSES),
    key(
        "network",
        "cni_conf_dir",
        "\"/n\"",
        &[("1", "absolute path"), ("\"net.d\"", "absolute path")],
    ),
    key(
        "network",
        "cni_bin_dirs",
        "[]",
        &[
            ("\"/opt/cni/bin\"", "a list of absolute paths"),
            ("[1]", "a string"),
            ("[\"bin\"]", "absolute path"),
        ],
    ),
    key("network", "cni_timeout", "\"1s\"", DURATIONS),
];

fn file(key: &Key, value: &str) -> (String, usize) {
    let table = match key.table {
        "" => String::new(),
        table => format!("[{table}]\n"),
    };
    let text = format!("# First.\n{table}{} = {value}\n", key.name);
    let line = text.lines().count();
    (text, line)
}

/// What the program makes of a configuration, by the functions that it uses itself.
fn effect(config: &Config) -> String {
    let limits = size::Limits {
        memory: Some(1 << 20),
        ..size::Limits::default()
    };
    let large = size::Limits {
        memory: Some(1 << 30),
        ..size::Limits::default()
    };
    let annotated =
        serde_json::json!({ "ociVersion": "1.1.0", "annotations": { "io.nacre.vcpus": "2" } });
    let annotated = serde_json::from_value(annotated).unwrap();
    let host = Host {
        cpus: 8,
        memory_mib: 65_536,
    };
    let room = Room::of(
        size::boot_size(&size::Limits::default(), &config.size, 1000),
        &size::Limits::default(),
        &config.size,
        host,
    );
    let hotplug = &config.hotplug;
    let controllers = (
        room,
        hotplug.enabled,
        CpuPolicy::new(hotplug.cpu.clone(), room.vcpus, 1),
        MemoryPolicy::new(hotplug.memory.clone(), room.memory_mib, 512),
    );
    format!(
        "{:?}",
        (
            controllers,
            SandboxConfig::new(config, "n", "i", PathBuf::new()),
            size::boot_size(&limits, &config.size, 1000),
            size::boot_size(&large, &config.size, 1000),
            size::boot_size(&size::Limits::default(), &config.size, 1000),
            config.vm_dir("n", "i"),
            Patience::of(config),
            Wish::of(config, "n-i", &annotated, 512),
            Overrides::of(&annotated, &config.allowed_annotations).is_ok(),
            Cni::of(&config.network, "c".to_owned(), "/n".into()),
            Cni::new(
                List::First("/d".into()),
                &config.network,
                "c".to_owned(),
                "/n".into(),
            ),
        )
    )
}

#[test]
fn empty_is_the_default() {
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn the_table_of_these_tests_has_every_key() {
    let sections = sections();
    let mut keys: Vec<(&str, &str)> = sections
        .iter()
        .flat_map(|section| section.keys.iter().map(|(name, _)| (section.name, *name)))
        .collect();
    keys.retain(|(table, name)| !sections.iter().any(|s| s.name == path(table, name)));
    let tested: Vec<(&str, &str)> = KEYS.iter().map(|key| (key.table, key.name)).collect();
    assert_eq!(keys, tested);
}

#[test]
fn every_key_changes_what_the_program_does() {
    let usual = effect(&Config::default());
    for key in KEYS {
        let (text, _) = file(key, key.other);
        let config = parse(&text).unwrap();
        assert_ne!(config, Config::default(), "{}", key.name);
        assert_ne!(effect(&config), usual, "{}", key.name);
    }
}

#[test]
fn every_key_refuses_what_cannot_be_with_file_line_key_and_what_is_allowed() {
    for key in KEYS {
        for (value, allowed) in key.bad {
            let (text, line) = file(key, value);
            let error = parse(&text).expect_err(&text);
            let name = match key.table {
                "" => format!("`{}`", key.name),
                table => format!("`{table}.{}`", key.name),
            };
            for part in ["/c.toml", &format!("line {line}:"), &name, *allowed] {
                assert!(error.contains(part), "{text}: {part:?} is not in {error}");
            }
        }
    }
}

#[test]
fn every_table_refuses_an_unknown_key_and_names_those_that_it_has() {
    for section in sections() {
        let key = Key {
            table: section.name,
            name: "memroy",
            other: "",
            bad: &[],
        };
        let (text, line) = file(&key, "1");
        let error = parse(&text).unwrap_err();
        for part in [
            "/c.toml",
            &format!("line {line}:"),
            "unknown key `memroy`",
            &format!("`{}`", section.keys[0].0),
        ] {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
    }
    for (text, part) in [
        ("size = 1", "a table, [size]"),
        ("[sizes]\n", "unknown key `sizes`"),
        ("hotplug = 1", "a table, [hotplug]"),
        ("[hotplug]\ncpu = 1", "`hotplug.cpu`"),
        ("[hotplug]\ncpu = 1", "line 2"),
        ("hotplug.memory.step = 1", "`hotplug.memory.step`"),
        ("a", "line 1"),
        ("kernel = /k", "`kernel`"),
        (
            "kernel = \"/k\"\nkernel = \"/k\"",
            "line 2: `kernel`: duplicate",
        ),
        ("size.default_vcpus = 0", "`size.default_vcpus`"),
        (
            "size = { guest_memory = \"0\", default_vcpus = 0 }",
            "`size.default_vcpus`",
        ),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

#[test]
fn the_reference_in_the_documentation_is_the_programs() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/nacre.toml");
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        kept == reference(),
        "docs/nacre.toml is not what the doc comments say: make it anew with\n  \
         cargo run --bin vmctl -- config >docs/nacre.toml"
    );
}

#[test]
fn the_reference_has_the_defaults() {
    let keys: String = reference()
        .lines()
        .map(|line| match line.strip_prefix('#') {
            // A key that is commented out.
            Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    assert_eq!(parse(&keys).unwrap(), Config::default());
    for key in KEYS {
        assert!(keys.contains(&format!("\n{} = ", key.name)), "{}", key.name);
    }
    for section in sections() {
        for (name, doc) in section.keys {
            assert!(!doc.is_empty(), "{name} has no doc comment");
        }
    }
    assert_eq!(parse(&reference()).unwrap(), Config::default());
    let text = reference().replace("\n# ", " ");
    for annotation in Annotation::ALL {
        assert!(
            text.contains(&format!(" {annotation}")),
            "{annotation} is not there"
        );
    }
}

#[test]
fn vm_directories_fit_a_socket_path_whatever_the_names() {
    let config = Config::default();
    assert_eq!(
        config.vm_dir("default", "a"),
        Path::new("/run/nacre/vms/default-a")
    );
    for id in ["x".repeat(200), "../../etc".to_owned(), "a/b".to_owned()] {
        let directory = config.vm_dir("ns", &id);
        assert_eq!(directory.parent(), Some(Path::new("/run/nacre/vms")));
        assert!(directory.join(crate::control::SOCKET).as_os_str().len() <= 107);
        assert_ne!(directory, config.vm_dir("ns", "other/"));
    }
}

#[test]
fn no_two_vms_share_a_directory() {
    let config = Config::default();
    let mut seen = std::collections::HashSet::new();
    for (namespace, id) in [
        ("a", "b-c"),
        ("a-b", "c"),
        ("a", "-b-c"),
        ("a-", "b-c"),
        ("a--b", "c"),
        ("a-b", "-c"),
        ("a-b/", "c"),
        ("a", "b/-c"),
    ] {
        assert!(
            seen.insert(config.vm_dir(namespace, id)),
            "{namespace} {id}"
        );
    }
}
