//! `vmctl inspect`: one VM, as its control socket tells.

use super::list;
use crate::config::Config;
use crate::control::{Inspection, Timings, Traffic, ms};
use crate::sandbox::BootPhases;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM: its id, or NAMESPACE/ID where two namespaces have the same id
    id: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn inspect(config: &Config, args: &Args) -> anyhow::Result<u8> {
    let (_, vm) = list::one(config, &args.id).await?;
    if args.json {
        super::say_json(&vm)?;
    } else {
        super::say(&text(&vm))?;
    }
    Ok(0)
}

fn text(vm: &Inspection) -> String {
    let mut text = format!(
        "id          {}\nnamespace   {}\nstate       {}\npid         {}\nsize        {} vCPU{} (at most {}), {} MiB (at boot {}, at most {})\nkernel      {}{}\ninitrd      {}\n",
        vm.id,
        vm.namespace,
        vm.state.as_str(),
        vm.pid,
        vm.vcpus,
        if vm.vcpus == 1 { "" } else { "s" },
        vm.max_vcpus,
        vm.memory_mib,
        vm.memory.boot_mib,
        vm.memory.max_mib,
        vm.kernel,
        if vm.kernel_release.is_empty() {
            String::new()
        } else {
            format!(" ({})", vm.kernel_release)
        },
        vm.initrd,
    );
    if !vm.agent_build.is_empty() {
        text.push_str(&format!("agent       {}\n", vm.agent_build));
    }
    for container in &vm.containers {
        text.push_str(&format!("container   {container}\n"));
    }
    for device in &vm.devices {
        match device.window {
            Some(window) => text.push_str(&format!(
                "device      window {window}: {} {}\n",
                device.kind, device.detail
            )),
            None => text.push_str(&format!("{:<11} {}\n", device.kind, device.detail)),
        }
        if let Some(traffic) = &device.traffic {
            text.push_str(&traffic_text(traffic));
        }
    }
    if !vm.exits.is_empty() {
        let exits: Vec<String> = vm
            .exits
            .iter()
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        text.push_str(&format!("exits       {}\n", exits.join(", ")));
    }
    if vm.unasked_ejects > 0 {
        text.push_str(&format!("ejects      {} unasked\n", vm.unasked_ejects));
    }
    text.push_str("boot\n");
    text.push_str(&phases_text(&vm.phases));
    for timings in &vm.timings {
        text.push_str(&timings_text(timings));
    }
    text
}

/// What has gone through a network device, as the line below it.
fn traffic_text(traffic: &Traffic) -> String {
    format!(
        "            link {}; received {} frames, {} bytes, {} dropped; sent {} frames, {} bytes, {} dropped\n",
        if traffic.link_up { "up" } else { "down" },
        traffic.received,
        traffic.received_bytes,
        traffic.receive_dropped,
        traffic.sent,
        traffic.sent_bytes,
        traffic.send_dropped
    )
}

/// The phases of a container's life as lines.
fn timings_text(timings: &Timings) -> String {
    let deleted = if timings.deleted { " (deleted)" } else { "" };
    let mut text = format!("life of {}{deleted}\n", timings.container);
    for (name, phase) in timings.reached() {
        text.push_str(&format!("  {name:<16} {:>10.3} ms\n", ms(phase.took_ns)));
    }
    for (name, series) in timings.repeated() {
        text.push_str(&format!(
            "  {name:<16} {:>10.3} ms, {} times, {:.3} to {:.3} ms\n",
            ms(series.last_ns),
            series.count,
            ms(series.min_ns),
            ms(series.max_ns)
        ));
    }
    text
}

/// The phases as lines: milliseconds since the first, and since the one before.
pub(super) fn phases_text(phases: &BootPhases) -> String {
    let reached = phases.reached();
    let Some(&(_, first)) = reached.first() else {
        return String::new();
    };
    let mut before = first;
    let mut text = String::new();
    for (name, ns) in reached {
        let since = |from: u64| (ns - from) as f64 / 1e6;
        text.push_str(&format!(
            "  {name:<16} {:>10.3} ms  +{:.3} ms\n",
            since(first),
            since(before)
        ));
        before = ns;
    }
    if phases.process_ns.is_some() {
        text.push_str("  (process start is known to 10 ms, by the kernel's clock ticks)\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Device, Phase};

    #[test]
    fn a_life_is_told_in_milliseconds() {
        let mut timings = Timings::of("c");
        timings.start = Some(Phase::between(1_000_000, 3_500_000));
        timings.kill.add(2_000_000);
        timings.kill.add(1_000_000);
        let text = timings_text(&timings);
        assert!(
            text.contains("2.500 ms") && !text.contains("create"),
            "{text}"
        );
        assert!(
            text.contains("1.000 ms, 2 times, 1.000 to 2.000 ms"),
            "{text}"
        );
    }

    #[test]
    fn ejects_that_nobody_asked_for_are_told_where_there_are_some() {
        let mut vm = Inspection::default();
        assert!(!text(&vm).contains("unasked"));
        vm.unasked_ejects = 3;
        assert!(text(&vm).contains("ejects      3 unasked\n"));
    }

    #[test]
    fn a_network_device_is_told_with_what_went_through_it() {
        let mut vm = Inspection::default();
        let traffic = Traffic {
            received: 3,
            received_bytes: 180,
            receive_dropped: 1,
            ..Traffic::default()
        };
        vm.devices.push(Device {
            window: Some(2),
            kind: "net".to_owned(),
            detail: "eth0".to_owned(),
            traffic: Some(traffic),
        });
        let text = text(&vm);
        let wanted = "device      window 2: net eth0\n            link down; received 3 frames, 180 bytes, 1 dropped; sent 0 frames, 0 bytes, 0 dropped\n";
        assert!(text.contains(wanted), "{text}");
    }

    #[test]
    fn phases_are_told_from_the_first() {
        let phases = BootPhases {
            main_ns: Some(1_000_000),
            start_ns: 2_000_000,
            ready_ns: Some(12_500_000),
            ..BootPhases::default()
        };
        let text = phases_text(&phases);
        let last = text.lines().last().unwrap();
        assert!(
            last.contains("agent ready") && last.contains("11.500 ms") && last.contains("+10.500"),
            "{text}"
        );
        assert_eq!(phases_text(&BootPhases::default()), "");
    }
}
