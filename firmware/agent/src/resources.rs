//! The limits of the runtime specification as files of a cgroup (v2). Only
//! what they mean is here; reading and writing the files is `cgroup`'s.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use crate::error::Error;

/// A file of a cgroup, and what is to be written into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its name, e.g. `memory.max`.
    pub file: String,
    /// The new value.
    pub value: String,
}

/// Weights of `cpu.weight`, from the lowest to the highest.
const WEIGHTS: (f64, f64) = (1.0, 10_000.0);
/// Shares of the specification, from the lowest to the highest.
const SHARES: (u64, u64) = (2, 262_144);
/// Microseconds of a CPU period where none is given.
const PERIOD_US: u64 = 100_000;
/// The longest value of a file that is taken as it is.
const VALUE_BYTES: usize = 4096;

/// The limits that an update brings.
///
/// # Errors
/// `InvalidArgument` if they do not parse.
pub fn parse(json: &[u8]) -> Result<LinuxResources, Error> {
    serde_json::from_slice(json)
        .map_err(|error| invalid(format!("the resources do not parse: {error}")))
}

/// What new limits write, in this order. What is absent stays; so does a limit of 0, which has always
/// meant "not given". `current` answers with what a file of the cgroup holds now.
///
/// Device rules, network classes and the like are no files of a cgroup, and are left out.
///
/// # Errors
/// `InvalidArgument` for what contradicts itself, or has no meaning in the guest.
pub fn changes(
    resources: &LinuxResources,
    current: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Change>, Error> {
    let mut wanted = Vec::new();
    if let Some(memory) = resources.memory() {
        memory_changes(memory, &current, &mut wanted)?;
    }
    if let Some(cpu) = resources.cpu() {
        cpu_changes(cpu, &current, &mut wanted)?;
    }
    if let Some(pids) = resources.pids()
        && pids.limit() != 0
    {
        push(&mut wanted, "pids.max", number_or_max(pids.limit()));
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        let file = format!("hugetlb.{}.max", huge.page_size());
        check_file(&file)?;
        // Pages of a size that the kernel does not have are none.
        if current(&file).is_some() {
            push(&mut wanted, &file, number_or_max(huge.limit()));
        }
    }
    if let Some(io) = resources.block_io() {
        if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
            push(&mut wanted, "io.weight", format!("default {weight}"));
        }
        let of_devices = [
            io.throttle_read_bps_device(),
            io.throttle_write_bps_device(),
            io.throttle_read_iops_device(),
            io.throttle_write_iops_device(),
        ];
        if of_devices
            .into_iter()
            .flatten()
            .any(|list| !list.is_empty())
        {
            return Err(invalid(
                "blockIO limits of single devices have no meaning in the guest, whose devices are others".into(),
            ));
        }
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        check_file(file)?;
        if value.len() > VALUE_BYTES {
            return Err(invalid(format!(
                "the value of {file} is longer than 4096 bytes"
            )));
        }
        push(&mut wanted, file, value.clone());
    }
    Ok(wanted)
}

fn memory_changes(
    memory: &LinuxMemory,
    current: &impl Fn(&str) -> Option<String>,
    wanted: &mut Vec<Change>,
) -> Result<(), Error> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    let swap = memory.swap().filter(|swap| *swap != 0);
    for (name, value) in [
        ("limit", limit),
        ("swap", swap),
        ("reservation", memory.reservation()),
    ] {
        if let Some(value) = value.filter(|value| *value < -1) {
            return Err(invalid(format!(
                "memory.{name} {value}: -1 or more is possible"
            )));
        }
    }
    if let Some(limit @ 1..) = limit
        && memory.check_before_update() == Some(true)
        && let Some(used) = current("memory.current").and_then(|text| text.trim().parse().ok())
        && limit < used
    {
        return Err(Error::FailedPrecondition(format!(
            "memory.limit {limit}: {used} bytes are in use, and the update asks to check that"
        )));
    }
    match (swap, limit) {
        (Some(-1), _) | (None, Some(-1)) => push(wanted, "memory.swap.max", "max".into()),
        (Some(both), limit) => {
            // The specification counts memory and swap together; the kernel counts swap alone.
            let limit = match limit {
                Some(limit) => Some(limit),
                None => current("memory.max").and_then(|text| text.trim().parse().ok()),
            };
            match limit {
                Some(limit @ 0..) if both >= limit => {
                    push(wanted, "memory.swap.max", (both - limit).to_string());
                }
                Some(limit @ 0..) => {
                    return Err(invalid(format!(
                        "memory.swap {both} is memory and swap together, and less than the limit {limit}"
                    )));
                }
                _ => {
                    return Err(invalid(format!(
                        "memory.swap {both} is memory and swap together, and memory has no limit"
                    )));
                }
            }
        }
        (None, _) => {}
    }
    if let Some(limit) = limit {
        push(wanted, "memory.max", number_or_max(limit));
    }
    if let Some(reservation) = memory.reservation() {
        push(wanted, "memory.low", number_or_max(reservation));
    }
    Ok(())
}

fn cpu_changes(
    cpu: &LinuxCpu,
    current: &impl Fn(&str) -> Option<String>,
    wanted: &mut Vec<Change>,
) -> Result<(), Error> {
    if cpu.realtime_runtime().unwrap_or(0) > 0 || cpu.realtime_period().unwrap_or(0) > 0 {
        return Err(invalid(
            "cpu.realtimeRuntime and cpu.realtimePeriod: the guest's cgroups know no real-time limits".into(),
        ));
    }
    if let Some(idle) = cpu.idle() {
        push(wanted, "cpu.idle", idle.to_string());
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        push(wanted, "cpu.weight", weight(shares).to_string());
    }
    let period = cpu.period().filter(|period| *period != 0);
    if cpu.quota().is_some() || period.is_some() {
        let now = current("cpu.max").unwrap_or_default();
        let mut now = now.split_whitespace();
        let (old_quota, old_period) = (now.next(), now.next());
        let quota = match cpu.quota() {
            Some(quota @ 1..) => quota.to_string(),
            Some(_) => "max".into(),
            None => old_quota.unwrap_or("max").into(),
        };
        let period = period
            .or_else(|| old_period.and_then(|text| text.parse().ok()))
            .unwrap_or(PERIOD_US);
        push(wanted, "cpu.max", format!("{quota} {period}"));
    }
    if let Some(burst) = cpu.burst() {
        push(wanted, "cpu.max.burst", burst.to_string());
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        let Some(list) = list.as_ref().filter(|list| !list.is_empty()) else {
            continue;
        };
        let plain = |byte: u8| byte.is_ascii_digit() || byte == b',' || byte == b'-';
        if list.len() > VALUE_BYTES || !list.bytes().all(plain) {
            return Err(invalid(format!(
                "{file} `{}` is no list like 0-2,4",
                list.escape_debug().take(80).collect::<String>()
            )));
        }
        push(wanted, file, list.clone());
    }
    Ok(())
}

/// Shares as a weight: on a logarithmic scale a curve through lowest, default and highest of both, as other
/// runtimes have it.
fn weight(shares: u64) -> u64 {
    if shares <= SHARES.0 {
        return WEIGHTS.0 as u64;
    }
    if shares >= SHARES.1 {
        return WEIGHTS.1 as u64;
    }
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    10_f64.powf(exponent).ceil().clamp(WEIGHTS.0, WEIGHTS.1) as u64
}

fn number_or_max(value: i64) -> String {
    match value {
        0.. => value.to_string(),
        _ => "max".into(),
    }
}

/// Refuses names that are no controller's file.
fn check_file(file: &str) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.';
    let controller = file
        .split_once('.')
        .map_or("", |(controller, _)| controller);
    if file.len() > 128
        || controller.is_empty()
        || controller == "cgroup"
        || file.contains("..")
        || !file.bytes().all(plain)
    {
        return Err(invalid(format!(
            "`{}` is no file of a controller",
            file.escape_debug().take(80).collect::<String>()
        )));
    }
    Ok(())
}

fn push(wanted: &mut Vec<Change>, file: &str, value: String) {
    wanted.push(Change {
        file: file.into(),
        value,
    });
}

fn invalid(what: String) -> Error {
    Error::InvalidArgument(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(file: &str) -> Option<String> {
        match file {
            "memory.max" => Some("1000\n".into()),
            "memory.current" => Some("500\n".into()),
            "hugetlb.2MB.max" => Some("max\n".into()),
            "cpu.max" => Some("25000 50000\n".into()),
            _ => None,
        }
    }

    fn written(json: &str) -> Result<Vec<(String, String)>, Error> {
        let list = changes(&parse(json.as_bytes())?, now)?;
        Ok(list
            .into_iter()
            .map(|change| (change.file, change.value))
            .collect())
    }

    #[test]
    fn each_limit_becomes_its_file() {
        let table: &[(&str, &[(&str, &str)])] = &[
            ("{}", &[]),
            (
                r#"{"memory":{"limit":0},"cpu":{"shares":0,"period":0},"pids":{"limit":0}}"#,
                &[],
            ),
            (r#"{"memory":{"limit":2000}}"#, &[("memory.max", "2000")]),
            (
                r#"{"memory":{"limit":2000,"swap":3000,"reservation":100}}"#,
                &[
                    ("memory.swap.max", "1000"),
                    ("memory.max", "2000"),
                    ("memory.low", "100"),
                ],
            ),
            (r#"{"memory":{"swap":1500}}"#, &[("memory.swap.max", "500")]),
            (
                r#"{"memory":{"limit":-1}}"#,
                &[("memory.swap.max", "max"), ("memory.max", "max")],
            ),
            (r#"{"memory":{"swap":-1}}"#, &[("memory.swap.max", "max")]),
            (
                r#"{"cpu":{"quota":10000,"period":20000}}"#,
                &[("cpu.max", "10000 20000")],
            ),
            (r#"{"cpu":{"quota":10000}}"#, &[("cpu.max", "10000 50000")]),
            (r#"{"cpu":{"period":40000}}"#, &[("cpu.max", "25000 40000")]),
            (r#"{"cpu":{"quota":-1}}"#, &[("cpu.max", "max 50000")]),
            (
                r#"{"cpu":{"shares":1024,"cpus":"0-1,3","mems":"0"}}"#,
                &[
                    ("cpu.weight", "100"),
                    ("cpuset.cpus", "0-1,3"),
                    ("cpuset.mems", "0"),
                ],
            ),
            (r#"{"pids":{"limit":7}}"#, &[("pids.max", "7")]),
            (
                r#"{"hugepageLimits":[{"pageSize":"2MB","limit":9},{"pageSize":"1GB","limit":9}]}"#,
                &[("hugetlb.2MB.max", "9")],
            ),
            (r#"{"pids":{"limit":-1}}"#, &[("pids.max", "max")]),
            (
                r#"{"unified":{"memory.high":"5","cpu.idle":"1"},"devices":[{"allow":false}]}"#,
                &[("cpu.idle", "1"), ("memory.high", "5")],
            ),
        ];
        for (json, expected) in table {
            let got = written(json).unwrap();
            let got: Vec<(&str, &str)> = got
                .iter()
                .map(|(file, value)| (file.as_str(), value.as_str()))
                .collect();
            assert_eq!(got, *expected, "{json}");
        }
    }

    #[test]
    fn what_cannot_hold_is_refused() {
        for json in [
            "{",
            r#"{"memory":{"limit":-2}}"#,
            r#"{"memory":{"limit":2000,"swap":1999}}"#,
            r#"{"memory":{"swap":999}}"#,
            r#"{"memory":{"limit":400,"checkBeforeUpdate":true}}"#,
            r#"{"cpu":{"realtimeRuntime":5}}"#,
            r#"{"cpu":{"cpus":"0\n1"}}"#,
            r#"{"unified":{"cgroup.kill":"1"}}"#,
            r#"{"unified":{"../x.y":"1"}}"#,
            r#"{"unified":{"a/b.c":"1"}}"#,
            r#"{"unified":{"memory":"1"}}"#,
            r#"{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}]}}"#,
        ] {
            assert!(written(json).is_err(), "{json}");
        }
        let unlimited = parse(br#"{"memory":{"swap":5}}"#)
            .and_then(|swap| changes(&swap, |_| Some("max\n".into())));
        assert!(unlimited.is_err(), "swap of memory without a limit");
    }

    #[test]
    fn weights_meet_shares_at_their_ends_and_default() {
        let table = [
            (0, 1),
            (2, 1),
            (1024, 100),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ];
        for (shares, expected) in table {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }
}
