//! `vmctl doctor`: can this host run guests? One line for each thing that has
//! to be right, with what to do where it is not.

use std::path::{Path, PathBuf};

use nacre_fs::Access;
use nacre_vmm::kvm;
use serde::Serialize;

use super::probe;
use crate::config::{self, Config};
use crate::sandbox::chain;
use crate::sandbox::size::meminfo_mib;
use crate::sandbox::storage::find_tool;

const HELP: &str = "\
Exit code: 0 if guests can run here (there may be warnings), 1 if something that they need is missing.";

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Args {
    /// Print JSON: an array of objects with `check`, `status` (ok, warning, failed, skipped), `found`
    /// and `advice`
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warning,
    Failed,
    Skipped,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
        }
    }
}

#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    status: Status,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Check {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn failed(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Failed,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    fn warning(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Warning,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    fn skipped(check: &'static str, why: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Skipped,
            found: why.into(),
            advice: None,
        }
    }
}

pub(super) fn doctor(args: &Args) -> anyhow::Result<u8> {
    let mut checks = kvm_checks();
    let config = match Config::load() {
        Ok(config) => {
            checks.push(Check::ok(
                "configuration",
                format!("state directory {}", config.state_dir.display()),
            ));
            config
        }
        Err(error) => {
            checks.push(Check::failed(
                "configuration",
                chain(&error),
                "correct the file",
            ));
            Config::default()
        }
    };
    let set = "make them with `cargo xtask image`, and set the configuration's path or";
    checks.push(file_check(
        "guest kernel",
        &config.kernel,
        &format!("{set} NACRE_KERNEL"),
    ));
    checks.push(file_check(
        "guest initrd",
        &config.initrd,
        &format!("{set} NACRE_INITRD"),
    ));
    checks.push(share_check(Path::new("/")));
    checks.push(tool_check("mkfs.ext4", find_tool("mkfs.ext4")));
    checks.push(network_check(nacre_net::try_out()));
    checks.push(plugins_check(&config.network));
    checks.push(cgroup_check(Path::new("/sys/fs/cgroup")));
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    checks.push(memory_check(&meminfo, config.size.default_memory.mib()));
    if args.json {
        super::say_json(&checks)?;
    } else {
        super::say(&text(&checks))?;
    }
    Ok(verdict(&checks))
}

fn verdict(checks: &[Check]) -> u8 {
    u8::from(checks.iter().any(|check| check.status == Status::Failed))
}

fn text(checks: &[Check]) -> String {
    let mut text = String::new();
    for check in checks {
        text.push_str(&format!(
            "{:<8} {:<14} {}",
            check.status.word(),
            check.check,
            check.found
        ));
        if let Some(advice) = &check.advice {
            text.push_str(&format!(" -> {advice}"));
        }
        text.push('\n');
    }
    text
}

fn kvm_checks() -> Vec<Check> {
    let mut checks = Vec::new();
    let usable = match kvm::open() {
        Ok(_) => {
            checks.push(Check::ok("/dev/kvm", "opens"));
            checks.push(Check::ok("KVM API", "version 12"));
            let count = kvm::REQUIRED.len();
            checks.push(Check::ok(
                "capabilities",
                format!("all {count} that are needed"),
            ));
            true
        }
        Err(error) => {
            checks.extend(kvm_failure(&error));
            false
        }
    };
    let backend = Backend::find(Path::new("/sys/module"));
    checks.push(backend.check());
    if !usable {
        checks.push(Check::skipped("probe guest", "needs KVM"));
        checks.push(Check::skipped("stock kernels", "needs KVM"));
        return checks;
    }
    let plain = probe::plain();
    let plain_runs = plain.is_ok();
    checks.push(match plain {
        Ok(took) => Check::ok(
            "probe guest",
            format!("ran and powered off in {:.1} ms", took.as_secs_f64() * 1e3),
        ),
        Err(error) => Check::failed(
            "probe guest",
            error,
            "see the host's kernel log (dmesg) for what KVM says",
        ),
    });
    checks.push(if plain_runs {
        match probe::extended_state() {
            Ok(_) => Check::ok("stock kernels", "a guest uses the FPU's extended state"),
            Err(error) => Check::failed("stock kernels", error, backend.stock_advice()),
        }
    } else {
        Check::skipped("stock kernels", "needs the probe guest")
    });
    checks
}

fn kvm_failure(error: &kvm::Error) -> Vec<Check> {
    let found = chain(error);
    match error {
        kvm::Error::Missing(_) => vec![Check::failed(
            "/dev/kvm",
            found,
            "enable virtualization in the firmware or the hypervisor below, and load kvm_intel or kvm_amd",
        )],
        kvm::Error::Permission(_) => vec![Check::failed(
            "/dev/kvm",
            found,
            "run as root or join the group kvm",
        )],
        kvm::Error::Version { .. } => {
            vec![
                Check::ok("/dev/kvm", "opens"),
                Check::failed("KVM API", found, "use the kernel's own KVM"),
            ]
        }
        kvm::Error::Capabilities(_) => vec![
            Check::ok("/dev/kvm", "opens"),
            Check::ok("KVM API", "version 12"),
            Check::failed(
                "capabilities",
                found,
                "use a kernel of 5.10 or newer with its own KVM",
            ),
        ],
        kvm::Error::Open { .. } | kvm::Error::Setup { .. } => {
            vec![Check::failed(
                "/dev/kvm",
                found,
                "see the host's kernel log (dmesg)",
            )]
        }
    }
}

/// What runs guests below KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    Intel,
    Amd,
    Pvm,
    Unknown,
}

impl Backend {
    fn find(modules: &Path) -> Self {
        // kvm_pvm first: where it is in use the CPU's own extension is not.
        [
            ("kvm_pvm", Self::Pvm),
            ("kvm_intel", Self::Intel),
            ("kvm_amd", Self::Amd),
        ]
        .into_iter()
        .find(|(module, _)| modules.join(module).is_dir())
        .map_or(Self::Unknown, |(_, backend)| backend)
    }

    fn check(self) -> Check {
        match self {
            Self::Intel => Check::ok("backend", "kvm_intel (VMX)"),
            Self::Amd => Check::ok("backend", "kvm_amd (SVM)"),
            Self::Pvm => Check::warning(
                "backend",
                "kvm_pvm (no hardware virtualization)",
                "a stock kernel does not boot on it: use a host with VMX or SVM, or the nested testbed \
                 (`cargo xtask demo` decides by itself)",
            ),
            Self::Unknown => Check::warning(
                "backend",
                "none of kvm_intel, kvm_amd and kvm_pvm is loaded",
                "load one",
            ),
        }
    }

    fn stock_advice(self) -> &'static str {
        match self {
            Self::Pvm => {
                "as expected with kvm_pvm, which emulates such instructions: use a host with VMX or SVM"
            }
            Self::Intel | Self::Amd | Self::Unknown => {
                "see the host's kernel log (dmesg) for what KVM says"
            }
        }
    }
}

fn file_check(check: &'static str, path: &Path, advice: &str) -> Check {
    match std::fs::File::open(path).and_then(|file| file.metadata()) {
        Ok(metadata) if metadata.is_file() => Check::ok(
            check,
            format!("{} ({} KiB)", path.display(), metadata.len() / 1024),
        ),
        Ok(_) => Check::failed(check, format!("{} is not a file", path.display()), advice),
        Err(error) => Check::failed(check, format!("{}: {error}", path.display()), advice),
    }
}

fn tool_check(tool: &'static str, path: Option<PathBuf>) -> Check {
    match path {
        Some(path) => Check::ok("e2fsprogs", path.display().to_string()),
        None => Check::warning(
            "e2fsprogs",
            format!("no {tool}"),
            "install the package e2fsprogs: roots whose scratch disk is to be made (mkfs/ext4) need it",
        ),
    }
}

/// Whether directories of the host can be shared as they are to be.
fn share_check(path: &Path) -> Check {
    match nacre_fs::open_export(path, Access::ReadOnly, true) {
        Ok(_) => Check::ok("shared files", "detached mounts can be made"),
        Err(error) => Check::failed(
            "shared files",
            chain(&error),
            "run as root, on Linux 5.12 or newer",
        ),
    }
}

/// Whether a network namespace can be a guest's.
fn network_check(tried: Result<(), nacre_net::Error>) -> Check {
    match tried {
        Ok(()) => Check::ok(
            "network",
            "TAP interfaces and redirects between interfaces work",
        ),
        Err(error) => Check::warning(
            "network",
            chain(&error),
            "guests have loopback only: run as root, and load the modules tun, sch_ingress, cls_u32 and act_mirred",
        ),
    }
}

/// Where the plugins are by which `vmctl run --net` and plain `ctr run` get a network.
fn plugins_check(config: &config::Network) -> Check {
    const CHECK: &str = "CNI plugins";
    let mut found = config.cni_bin_dirs.iter();
    match found.find(|directory| directory.join("bridge").is_file()) {
        Some(directory) => Check::ok(CHECK, directory.display().to_string()),
        None => {
            let directories: Vec<_> = config
                .cni_bin_dirs
                .iter()
                .map(|directory| directory.display().to_string())
                .collect();
            Check::warning(
                CHECK,
                format!("no bridge in {}", directories.join(", ")),
                "install the package containernetworking-plugins, or set network.cni_bin_dirs: `vmctl run --net` needs them",
            )
        }
    }
}

fn cgroup_check(root: &Path) -> Check {
    if root.join("cgroup.controllers").is_file() {
        return Check::ok("cgroups", "version 2");
    }
    if root.join("memory/cgroup.procs").is_file() {
        return Check::ok("cgroups", "version 1");
    }
    Check::warning(
        "cgroups",
        "no memory controller",
        "a container whose specification has a cgroupsPath is refused: mount cgroup2 at /sys/fs/cgroup, or set cgroup_required = false",
    )
}

fn memory_check(meminfo: &str, wanted_mib: u64) -> Check {
    let available = meminfo_mib(meminfo, "MemAvailable");
    match available {
        None => Check::warning(
            "memory",
            "/proc/meminfo does not say what is available",
            "is /proc mounted?",
        ),
        Some(mib) if mib >= wanted_mib => Check::ok(
            "memory",
            format!("{mib} MiB available, a VM without limits takes {wanted_mib} MiB"),
        ),
        Some(mib) => Check::warning(
            "memory",
            format!("{mib} MiB available, a VM without limits may take {wanted_mib} MiB"),
            "set a smaller size.default_memory in the configuration",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugins_are_where_one_is() {
        let root = tempfile::tempdir().unwrap();
        let config = config::Network {
            cni_bin_dirs: vec!["/nowhere".into(), root.path().to_owned()],
            ..config::Network::default()
        };
        let check = plugins_check(&config);
        assert_eq!(check.status, Status::Warning);
        assert!(check.found.contains("/nowhere"), "{}", check.found);
        std::fs::write(root.path().join("bridge"), "").unwrap();
        let check = plugins_check(&config);
        assert_eq!(check.status, Status::Ok);
        assert_eq!(check.found, root.path().display().to_string());
    }

    #[test]
    fn the_backend_is_told_by_its_module() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(Backend::find(root.path()), Backend::Unknown);
        std::fs::create_dir(root.path().join("kvm_amd")).unwrap();
        assert_eq!(Backend::find(root.path()), Backend::Amd);
        std::fs::create_dir(root.path().join("kvm_pvm")).unwrap();
        assert_eq!(Backend::find(root.path()), Backend::Pvm);
        assert_eq!(Backend::Pvm.check().status, Status::Warning);
    }

    #[test]
    fn a_missing_file_fails_and_says_what_to_set() {
        let check = file_check(
            "guest kernel",
            Path::new("/nonexistent/vmlinux"),
            "set NACRE_KERNEL",
        );
        assert_eq!(check.status, Status::Failed);
        let text = text(&[check]);
        assert!(
            text.contains("/nonexistent/vmlinux") && text.contains("-> set NACRE_KERNEL"),
            "{text}"
        );
    }

    #[test]
    fn warnings_do_not_fail_the_host() {
        assert_eq!(
            verdict(&[Check::ok("a", ""), Check::warning("b", "", "")]),
            0
        );
        assert_eq!(
            verdict(&[Check::ok("a", ""), Check::failed("b", "", "")]),
            1
        );
    }

    #[test]
    fn cgroups_of_either_version_will_do() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(cgroup_check(root.path()).status, Status::Warning);
        std::fs::create_dir(root.path().join("memory")).unwrap();
        std::fs::write(root.path().join("memory/cgroup.procs"), "").unwrap();
        assert_eq!(cgroup_check(root.path()).status, Status::Ok);
        std::fs::write(root.path().join("cgroup.controllers"), "memory").unwrap();
        assert_eq!(cgroup_check(root.path()).found, "version 2");
    }

    #[test]
    fn memory_is_compared_with_the_default_vm() {
        assert_eq!(
            memory_check("MemAvailable:  1048576 kB\n", 512).status,
            Status::Ok
        );
        assert_eq!(
            memory_check("MemAvailable:  1024 kB\n", 512).status,
            Status::Warning
        );
        assert_eq!(memory_check("", 512).status, Status::Warning);
    }

    #[test]
    fn what_cannot_be_shared_fails_with_the_path() {
        let check = share_check(Path::new("/does/not/exist"));
        assert_eq!(check.status, Status::Failed);
        assert!(check.found.contains("/does/not/exist"), "{}", check.found);
    }

    #[test]
    fn a_missing_tool_names_the_package() {
        let check = tool_check("mkfs.ext4", None);
        assert_eq!(check.status, Status::Warning);
        assert!(check.found.contains("mkfs.ext4"));
        assert!(check.advice.unwrap().contains("e2fsprogs"));
    }
}
