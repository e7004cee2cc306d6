//! `vmctl inspect`: one VM, as its control socket tells.

use anyhow::bail;

use super::list::entries;
use crate::config::Config;
use crate::control::Inspection;
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
    let mut found = entries(config).await?;
    found.retain(|entry| {
        args.id == entry.id || args.id == format!("{}/{}", entry.namespace, entry.id)
    });
    let mut found = found.into_iter();
    let entry = match (found.next(), found.next()) {
        (None, _) => bail!(
            "There is no VM {}: `vmctl list` shows those that are",
            args.id
        ),
        (Some(one), None) => one,
        (Some(one), Some(two)) => bail!(
            "{} is ambiguous: {}/{} or {}/{}?",
            args.id,
            one.namespace,
            one.id,
            two.namespace,
            two.id
        ),
    };
    let Some(vm) = entry.vm else {
        let why = entry
            .error
            .unwrap_or_else(|| "its process is gone; `vmctl list --prune` frees it".to_owned());
        bail!("The VM {} is {}: {why}", args.id, entry.state);
    };
    if args.json {
        super::say_json(&vm)?;
    } else {
        super::say(&text(&vm))?;
    }
    Ok(0)
}

fn text(vm: &Inspection) -> String {
    let mut text = format!(
        "id          {}\nnamespace   {}\nstate       {}\npid         {}\nsize        {} vCPU{}, {} MiB\nkernel      {}{}\ninitrd      {}\n",
        vm.id,
        vm.namespace,
        vm.state.as_str(),
        vm.pid,
        vm.vcpus,
        if vm.vcpus == 1 { "" } else { "s" },
        vm.memory_mib,
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
        let window = device
            .window
            .map_or_else(|| "?".to_owned(), |window| window.to_string());
        text.push_str(&format!(
            "device      window {window}: {} {}\n",
            device.kind, device.detail
        ));
    }
    if !vm.exits.is_empty() {
        let exits: Vec<String> = vm
            .exits
            .iter()
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        text.push_str(&format!("exits       {}\n", exits.join(", ")));
    }
    text.push_str("boot\n");
    text.push_str(&phases_text(&vm.phases));
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
