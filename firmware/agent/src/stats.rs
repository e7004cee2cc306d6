//! What a container uses, read from its cgroup's files as they are. A file that
//! the kernel does not have reads as nothing used and no limit.

use std::collections::HashMap;

use nacre_protocol::agent::{IoStats, StatsResponse};

/// The most entries of a map, and the most devices.
const ENTRIES: usize = 128;
/// The longest key.
const KEY_BYTES: usize = 64;

/// The readings of a cgroup; `read` answers with what one of its files holds.
pub fn stats(read: impl Fn(&str) -> Option<String>) -> StatsResponse {
    let text = |file: &str| read(file).unwrap_or_default();
    let current = |file: &str| text(file).trim().parse().unwrap_or(0);
    let limit = |file: &str| text(file).trim().parse().unwrap_or(u64::MAX);
    StatsResponse {
        cpu: flat(&text("cpu.stat")),
        memory: flat(&text("memory.stat")),
        memory_events: flat(&text("memory.events")),
        memory_current: current("memory.current"),
        memory_max: limit("memory.max"),
        swap_current: current("memory.swap.current"),
        swap_max: limit("memory.swap.max"),
        pids_current: current("pids.current"),
        pids_max: limit("pids.max"),
        io: io(&text("io.stat")),
        ..Default::default()
    }
}

/// Lines of a key and a number.
fn flat(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(key, _)| key.len() <= KEY_BYTES)
        .filter_map(|(key, value)| Some((key.to_owned(), value.trim().parse().ok()?)))
        .take(ENTRIES)
        .collect()
}

/// Lines of a device and pairs of name and number.
fn io(text: &str) -> Vec<IoStats> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut stats = IoStats {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..Default::default()
        };
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match name {
                "rbytes" => stats.rbytes = value,
                "wbytes" => stats.wbytes = value,
                "rios" => stats.rios = value,
                "wios" => stats.wios = value,
                _ => {}
            }
        }
        Some(stats)
    };
    text.lines().filter_map(line).take(ENTRIES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_are_taken_as_the_kernel_writes_them() {
        let stats = stats(|file| {
            let text = match file {
                "cpu.stat" => "usage_usec 12\nnr_throttled 3\n",
                "memory.stat" => "anon 4096\nbad line here\nfile x\n",
                "memory.events" => "oom 1\noom_kill 2\n",
                "memory.current" => "8192\n",
                "memory.max" => "max\n",
                "memory.swap.max" => "0\n",
                "pids.current" => "4\n",
                "pids.max" => "50\n",
                "io.stat" => "254:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=9\n7:0 \nx\n",
                _ => return None,
            };
            Some(text.to_owned())
        });
        assert_eq!(
            (stats.cpu["usage_usec"], stats.cpu["nr_throttled"]),
            (12, 3)
        );
        assert_eq!((stats.memory.len(), stats.memory["anon"]), (1, 4096));
        assert_eq!(stats.memory_events["oom_kill"], 2);
        assert_eq!((stats.memory_current, stats.memory_max), (8192, u64::MAX));
        assert_eq!((stats.swap_current, stats.swap_max), (0, 0));
        assert_eq!((stats.pids_current, stats.pids_max), (4, 50));
        let first = &stats.io[0];
        assert_eq!((first.major, first.minor), (254, 16));
        assert_eq!(
            (first.rbytes, first.wbytes, first.rios, first.wios),
            (1, 2, 3, 4)
        );
        assert_eq!((stats.io.len(), stats.io[1].rbytes), (2, 0));
    }

    #[test]
    fn maps_and_lists_have_an_end() {
        let long: String = (0..1000).map(|n| format!("key{n} {n}\n")).collect();
        assert_eq!(flat(&long).len(), ENTRIES);
        assert!(flat(&format!("{} 1", "k".repeat(65))).is_empty());
        let long: String = (0..1000).map(|n| format!("{n}:0 rbytes=1\n")).collect();
        assert_eq!(io(&long).len(), ENTRIES);
    }
}
