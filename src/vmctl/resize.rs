//! `vmctl resize`: another size for a VM that runs; and the options by which
//! `vmctl run` and `vmctl boot` say how large one may become.

use std::time::Duration;

use anyhow::bail;

use super::list;
use crate::config::{ByteSize, Config};
use crate::control::{Client, Wanted};
use crate::hotplug::{Host, Room};
use crate::sandbox::resize::Resized;
use crate::sandbox::size::{self, BootSize, Limits};
use crate::sandbox::{MemoryWay, PlugConfig, SandboxConfig};

const HELP: &str = "\
A change is done when the guest has made it; else it is undone, and the error says why. vCPU 0 and the memory that the VM began \
with stay. What was plugged is shown step by step, with the time in milliseconds:
  HOST      the host's part: KVM and mappings; on the way down from the request to eject until all is given back
  NOTICED   by the guest: until its kernel showed what was plugged
  ONLINE    by the guest: until it was online, or offline
  TOTAL     until all of it was acknowledged
How large a VM may become is fixed when it starts: by the configuration, or --max-vcpus and --max-memory of `vmctl run` and \
`vmctl boot`.
Exit code: 0; 1 if the size is not as asked for.";

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Args {
    /// The VM: its id, or NAMESPACE/ID where two namespaces have the same id
    id: String,
    /// vCPUs, 1 to 254
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=254), required_unless_present = "memory")]
    cpus: Option<u8>,
    /// Memory of the VM in all, such as 768M or 2G
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Longest time that all of it may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
    /// Print JSON: an object with `vcpus` and `memory`, each with `before`, `now` and `steps`
    #[arg(long)]
    json: bool,
}

pub(super) async fn resize(config: &Config, args: &Args) -> anyhow::Result<u8> {
    let (directory, vm) = list::one(config, &args.id).await?;
    if args.memory.is_some_and(|memory| memory.mib() == 0) {
        bail!(
            "Cannot bring the VM to less than a MiB of memory: it began with {} MiB, and only what was plugged can be unplugged",
            vm.memory.boot_mib
        );
    }
    let wanted = Wanted {
        vcpus: args.cpus,
        memory_mib: args.memory.map(ByteSize::mib),
    };
    let client = Client::connect(&directory).await?;
    let changed = client
        .resize(wanted, Duration::from_secs(args.timeout))
        .await?;
    if args.json {
        super::say_json(&changed)?;
    } else {
        let mut text = String::new();
        if let Some(vcpus) = &changed.vcpus {
            text.push_str(&described("vCPUs", vcpus));
        }
        if let Some(memory) = &changed.memory {
            text.push_str(&described("MiB", memory));
        }
        super::say(&text)?;
    }
    Ok(0)
}

fn described(unit: &str, resized: &Resized) -> String {
    let mut text = if resized.before == resized.now {
        format!("{} {unit}, as before\n", resized.now)
    } else {
        format!("{} {unit}, before {}\n", resized.now, resized.before)
    };
    if resized.steps.is_empty() {
        return text;
    }
    text.push_str(&format!(
        "  {:<28} {:>10} {:>10} {:>10} {:>10}\n",
        "STEP", "HOST", "NOTICED", "ONLINE", "TOTAL"
    ));
    let ms = |us: u64| us as f64 / 1000.0;
    for step in &resized.steps {
        text.push_str(&format!(
            "  {:<28} {:>10.3} {:>10.3} {:>10.3} {:>10.3}\n",
            step.what,
            ms(step.host_us),
            ms(step.noticed_us),
            ms(step.online_us),
            ms(step.total_us)
        ));
    }
    text
}

/// How large a VM of vmctl may become.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct Most {
    /// Most vCPUs that `vmctl resize` may give the VM, 1 to 254 [default: from the configuration]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=254))]
    max_vcpus: Option<u8>,
    /// Most memory that `vmctl resize` may give the VM, such as 4G [default: from the configuration]
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<ByteSize>,
    /// How memory comes and goes: virtio-mem; acpi; or auto, which is virtio-mem if the guest has its driver [default: from the
    /// configuration]
    #[arg(long, value_name = "WAY", value_enum)]
    memory_way: Option<MemoryWay>,
}

impl Most {
    /// Prepares a VM, whose size at boot is set, for becoming so large.
    pub(super) fn apply(&self, config: &Config, vm: &mut SandboxConfig) -> anyhow::Result<()> {
        let boot = BootSize {
            vcpus: vm.vcpus,
            memory_mib: vm.memory_mib,
        };
        if let Some(max) = self.max_vcpus.filter(|max| *max < boot.vcpus) {
            bail!(
                "--max-vcpus {max} is less than the {} vCPUs that the VM begins with",
                boot.vcpus
            );
        }
        if let Some(max) = self.max_memory.filter(|max| max.mib() < boot.memory_mib) {
            bail!(
                "--max-memory {} MiB is less than the {} MiB that the VM begins with",
                max.mib(),
                boot.memory_mib
            );
        }
        let host = Room::ceiling(&Limits::default(), &config.size, Host::read());
        let most = BootSize {
            vcpus: self.max_vcpus.unwrap_or(host.vcpus),
            memory_mib: self.max_memory.map_or(host.memory_mib, ByteSize::mib),
        };
        vm.memory_way = self.memory_way.unwrap_or(config.hotplug.memory.way);
        vm.plug = PlugConfig {
            balloon: vm.plug.balloon,
            ..size::plug(boot, most, vm.memory_way)
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::resize::Step;

    #[test]
    fn each_step_has_its_line_and_its_times() {
        let step = Step {
            what: "vCPU 1".to_owned(),
            host_us: 1500,
            noticed_us: 20,
            online_us: 30_000,
            total_us: 40_250,
        };
        let text = described(
            "vCPUs",
            &Resized {
                before: 1,
                now: 2,
                steps: vec![step],
            },
        );
        for words in [
            "2 vCPUs, before 1",
            "vCPU 1",
            "1.500",
            "0.020",
            "30.000",
            "40.250",
        ] {
            assert!(text.contains(words), "{text}");
        }
        let same = Resized {
            before: 2,
            now: 2,
            steps: Vec::new(),
        };
        assert_eq!(described("MiB", &same), "2 MiB, as before\n");
    }
}
