//! `vmctl top`: what each VM costs on the host.

use std::path::Path;

use comfy_table::{Table, presets};

use super::list;
use crate::config::Config;
use crate::control::{self, Client, Usage};

const HELP: &str = "\
What is shown is the VM's process, not what its containers use of the VM: that is `ctr tasks metrics`.
  VCPUS     vCPUs that the VM has, and the most that it may have
  MEMORY    guest memory, the most that the guest can use now
  PLUGGED   of that, what the VM did not begin with
  USED      what the guest's kernel says it uses; - if it did not say
  GIVEN     what the guest has given back when it was free, since it began; used and given back again it counts again
  RSS, PSS  host memory that the process has: guest memory that was touched, and the VMM's own
  VCPU      CPU time of the vCPU threads, in steps of the kernel's clock tick
  OTHER     CPU time of the process's other threads: devices, streams, calls
  EXITS     exits of the vCPUs to the VMM; --json has them by reason, and so has one VM shown alone
  UPTIME    since the VM was asked for
Times and sizes in JSON have their unit in their names. Exit code: 0; 1 if a VM could not be asked.";

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Args {
    /// One VM alone: its id, or NAMESPACE/ID where two namespaces have the same id [default: all]
    id: Option<String>,
    /// Print JSON: an array with an object for each VM
    #[arg(long)]
    json: bool,
}

pub(super) async fn top(config: &Config, args: &Args) -> anyhow::Result<u8> {
    let mut failed = false;
    let directories = match &args.id {
        Some(id) => vec![list::one(config, id).await?.0],
        None => {
            let entries = list::entries(config).await?;
            for entry in &entries {
                if let Some(error) = &entry.error {
                    failed = true;
                    eprintln!("vmctl: {}: {error}", entry.directory.display());
                }
            }
            let living = entries.into_iter().filter(|entry| entry.vm.is_some());
            living.map(|entry| entry.directory).collect()
        }
    };
    let mut usages = Vec::new();
    for directory in &directories {
        match ask(directory).await {
            Ok(usage) => usages.push(usage),
            // It may have ended since it was listed.
            Err(error) => {
                failed = true;
                eprintln!("vmctl: {}", crate::sandbox::chain(&error));
            }
        }
    }
    if args.json {
        super::say_json(&usages)?;
    } else {
        super::say(&table(&usages))?;
        if let (Some(_), [one]) = (&args.id, usages.as_slice()) {
            super::say(&details(one))?;
        }
    }
    Ok(u8::from(failed))
}

async fn ask(directory: &Path) -> Result<Usage, control::Error> {
    Client::connect(directory).await?.usage().await
}

fn table(usages: &[Usage]) -> String {
    if usages.is_empty() {
        return "No VMs.\n".to_owned();
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "NAMESPACE",
        "ID",
        "PID",
        "VCPUS",
        "MEMORY",
        "PLUGGED",
        "USED",
        "GIVEN",
        "RSS",
        "PSS",
        "VCPU",
        "OTHER",
        "EXITS",
        "UPTIME",
        "CONTAINERS",
    ]);
    for usage in usages {
        let mib = |kib: u64| format!("{} MiB", kib.div_ceil(1024));
        let seconds = |ms: u64| format!("{}.{:02} s", ms / 1000, ms % 1000 / 10);
        table.add_row([
            usage.namespace.clone(),
            usage.id.clone(),
            usage.pid.to_string(),
            format!("{}/{}", usage.vcpus, usage.max_vcpus),
            format!("{} MiB", usage.memory_mib),
            format!("{} MiB", usage.memory.plugged_mib),
            usage
                .used_mib
                .map_or_else(|| "-".to_owned(), |mib| format!("{mib} MiB")),
            format!("{} MiB", usage.memory.given_back_mib),
            mib(usage.rss_kib),
            mib(usage.pss_kib),
            seconds(usage.vcpu_cpu_ms),
            seconds(usage.other_cpu_ms),
            usage.exits.values().sum::<u64>().to_string(),
            format!("{} s", usage.uptime_ms / 1000),
            usage.containers.len().to_string(),
        ]);
    }
    format!("{table}\n")
}

/// What the table has no room for.
fn details(usage: &Usage) -> String {
    let mut text = format!(
        "memory at boot         {} MiB\nmost memory            {} MiB\n",
        usage.memory.boot_mib, usage.memory.max_mib
    );
    for (reason, count) in usage.exits.iter().filter(|(_, count)| **count > 0) {
        text.push_str(&format!("exits by {reason:<14} {count}\n"));
    }
    if usage.unasked_ejects > 0 {
        text.push_str(&format!(
            "unasked ejects         {}\n",
            usage.unasked_ejects
        ));
    }
    if let Some(clock) = usage.clock {
        text.push_str(&format!(
            "guest's clock          {:+.3} ms (to {:.3} ms)\n",
            clock.offset_us as f64 / 1e3,
            clock.round_trip_us as f64 / 2e3
        ));
    }
    for container in &usage.containers {
        text.push_str(&format!("container {container}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Memory;
    use crate::sandbox::clock::ClockReading;

    #[test]
    fn the_table_has_a_line_for_each_vm_and_units() {
        let usage = Usage {
            id: "web".to_owned(),
            namespace: "default".to_owned(),
            pid: 7,
            vcpus: 2,
            max_vcpus: 6,
            memory_mib: 512,
            memory: Memory {
                boot_mib: 384,
                plugged_mib: 128,
                max_mib: 1024,
                given_back_mib: 77,
            },
            used_mib: Some(99),
            rss_kib: 2049,
            pss_kib: 1024,
            vcpu_cpu_ms: 12_340,
            other_cpu_ms: 50,
            exits: [("halt".to_owned(), 0), ("port-write".to_owned(), 40)].into(),
            unasked_ejects: 5,
            uptime_ms: 61_000,
            clock: Some(ClockReading {
                offset_us: -1500,
                round_trip_us: 400,
            }),
            containers: vec!["web".to_owned()],
        };
        let text = table(&[usage.clone(), usage.clone()]);
        assert_eq!(text.lines().count(), 3, "{text}");
        for word in [
            "2/6", "512 MiB", "128 MiB", "99 MiB", "77 MiB", "3 MiB", "1 MiB", "12.34 s", "0.05 s",
            "40", "61 s",
        ] {
            assert!(text.contains(word), "{word} is not in {text}");
        }
        let silent = Usage {
            used_mib: None,
            ..usage.clone()
        };
        assert!(table(&[silent]).contains(" - "));
        let text = details(&usage);
        assert!(
            text.contains("384 MiB") && text.contains("1024 MiB"),
            "{text}"
        );
        assert!(
            text.contains("port-write") && !text.contains("halt"),
            "{text}"
        );
        assert!(text.contains("unasked ejects         5\n"), "{text}");
        assert!(
            text.contains("guest's clock          -1.500 ms (to 0.200 ms)\n"),
            "{text}"
        );
        assert_eq!(table(&[]), "No VMs.\n");
    }
}
