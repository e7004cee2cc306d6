//! The OCI spec of a command given by hand: containerd's defaults for
//! namespaces, mounts, capabilities and masked paths.

use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail};
use oci_spec::runtime::Spec;
use serde_json::json;

/// The search path of a container that names none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The capabilities that containers commonly have.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A command as the user gave it.
#[derive(Debug, Clone)]
pub(super) struct Command {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: PathBuf,
    pub user: String,
    pub terminal: bool,
    pub read_only_root: bool,
    pub volumes: Vec<Volume>,
    pub hostname: String,
}

/// Something of the host in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Volume {
    source: PathBuf,
    destination: PathBuf,
    read_only: bool,
}

impl Volume {
    /// `SRC:DST[:ro|rw]`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{why}: write SRC:DST or SRC:DST:ro");
        let mut parts = text.split(':');
        let (Some(source), Some(destination)) = (parts.next(), parts.next()) else {
            return Err(wrong("it has no path in the container"));
        };
        let read_only = match (parts.next(), parts.next()) {
            (None | Some("rw"), None) => false,
            (Some("ro"), None) => true,
            _ => return Err(wrong("it ends with neither :ro nor :rw")),
        };
        if !destination.starts_with('/') {
            return Err(wrong("the path in the container is not absolute"));
        }
        let source = std::path::absolute(source)
            .map_err(|error| wrong(&format!("the path on the host: {error}")))?;
        Ok(Self {
            source,
            destination: destination.into(),
            read_only,
        })
    }

    fn mount(&self) -> serde_json::Value {
        let state = if self.read_only { "ro" } else { "rw" };
        json!({"destination": self.destination, "type": "bind", "source": self.source,
            "options": ["rbind", state]})
    }
}

impl Command {
    /// Its spec; user names are looked up in `rootfs`.
    pub(super) fn spec(&self, rootfs: &Path) -> anyhow::Result<Spec> {
        if !self.cwd.is_absolute() {
            bail!(
                "--cwd {}: it must be an absolute path in the container",
                self.cwd.display()
            );
        }
        if !rootfs.is_dir() {
            bail!("--rootfs {}: it is not a directory", rootfs.display());
        }
        let user = User::find(&self.user, rootfs)?;
        let capabilities: &[&str] = if user.uid == 0 { &CAPABILITIES } else { &[] };
        let spec = json!({
            "ociVersion": "1.1.0",
            "hostname": self.hostname,
            "process": {
                "terminal": self.terminal,
                "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
                "args": self.args,
                "env": self.environment(&user),
                "cwd": self.cwd,
                "noNewPrivileges": true,
                "capabilities": {
                    "bounding": CAPABILITIES,
                    "effective": capabilities,
                    "permitted": capabilities,
                },
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            },
            "root": {"path": "rootfs", "readonly": self.read_only_root},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                 "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
                ],
                "maskedPaths": [
                    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                    "/proc/scsi",
                ],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        });
        let mut spec = spec;
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.extend(self.volumes.iter().map(Volume::mount));
        }
        serde_json::from_value(spec).context("The command does not make an OCI spec")
    }

    fn environment(&self, user: &User) -> Vec<String> {
        let given: Vec<String> = self
            .env
            .iter()
            .filter_map(|entry| match entry.split_once('=') {
                Some(_) => Some(entry.clone()),
                None => std::env::var(entry)
                    .ok()
                    .map(|value| format!("{entry}={value}")),
            })
            .collect();
        let mut defaults = vec![PATH.to_owned(), format!("HOME={}", user.home)];
        if self.terminal {
            let term = std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned());
            defaults.push(format!("TERM={term}"));
        }
        let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
        defaults.retain(|default| !given.iter().any(|entry| name(entry) == name(default)));
        defaults.extend(given);
        defaults
    }
}

/// Who the command runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: String,
}

impl User {
    fn find(text: &str, rootfs: &Path) -> anyhow::Result<Self> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let passwd = read_below(rootfs, "etc/passwd");
        let groups = read_below(rootfs, "etc/group");
        let by_number: Option<u32> = user.parse().ok();
        let line = passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|fields| {
                fields.len() >= 6
                    && match by_number {
                        Some(uid) => fields[2].parse() == Ok(uid),
                        None => fields[0] == user,
                    }
            });
        let (name, uid, gid, home) = match (&line, by_number) {
            (Some(fields), _) => {
                let wrong = || format!("The line of {user} in the root's /etc/passwd is wrong");
                let uid = fields[2].parse().with_context(wrong)?;
                (
                    Some(fields[0]),
                    uid,
                    fields[3].parse().with_context(wrong)?,
                    fields[5].to_owned(),
                )
            }
            (None, Some(uid)) => (None, uid, 0, String::new()),
            (None, None) => bail!("--user {text}: the root's /etc/passwd has no user {user}"),
        };
        let group_lines = || {
            groups
                .lines()
                .map(|line| line.split(':').collect::<Vec<_>>())
        };
        let gid = match group.map(|group| (group, group.parse::<u32>())) {
            None => gid,
            Some((_, Ok(gid))) => gid,
            Some((group, Err(_))) => group_lines()
                .find(|fields| fields.len() >= 3 && fields[0] == group)
                .and_then(|fields| fields[2].parse().ok())
                .with_context(|| {
                    format!("--user {text}: the root's /etc/group has no group {group}")
                })?,
        };
        // Further groups are the user's own, unless a group was named.
        let further = group_lines()
            .filter(|fields| group.is_none() && fields.len() >= 4 && name.is_some())
            .filter(|fields| fields[3].split(',').any(|member| Some(member) == name))
            .filter_map(|fields| fields[2].parse().ok())
            .filter(|further| *further != gid)
            .collect();
        let home = if home.is_empty() {
            "/".to_owned()
        } else {
            home
        };
        Ok(Self {
            uid,
            gid,
            groups: further,
            home,
        })
    }
}

/// The text of a small file of the root, without following a link out of it; empty if there is none.
fn read_below(rootfs: &Path, path: &str) -> String {
    let path = rootfs.join(path);
    let inside = |path: &Path| {
        let (Ok(root), Ok(real)) = (rootfs.canonicalize(), path.canonicalize()) else {
            return false;
        };
        real.starts_with(root) && !real.components().any(|part| part == Component::ParentDir)
    };
    let small = std::fs::metadata(&path)
        .is_ok_and(|metadata| metadata.is_file() && metadata.len() < 1 << 20);
    if small && inside(&path) {
        std::fs::read_to_string(path).unwrap_or_default()
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::spec::for_guest;

    fn rootfs() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/var/www:/bin/sh\nbad:x\n";
        std::fs::write(root.path().join("etc/passwd"), passwd).unwrap();
        let group = "root:x:0:\nweb:x:34:\nlog:x:50:root,web\nother:x:51:root\n";
        std::fs::write(root.path().join("etc/group"), group).unwrap();
        root
    }

    fn command() -> Command {
        Command {
            args: vec!["true".to_owned()],
            env: vec![],
            cwd: "/".into(),
            user: "0".to_owned(),
            terminal: false,
            read_only_root: false,
            volumes: vec![],
            hostname: "h".to_owned(),
        }
    }

    #[test]
    fn volumes_are_bind_mounts() {
        let root = rootfs();
        let mut with = command();
        with.volumes = ["/srv/a:/data:ro", "/srv/b:/b", "/srv/c:/c:rw"]
            .map(|text| Volume::parse(text).unwrap())
            .to_vec();
        let guest = for_guest(&with.spec(root.path()).unwrap(), "c", "1").unwrap();
        let binds: Vec<_> = guest
            .binds
            .iter()
            .map(|bind| (bind.source.to_str().unwrap(), bind.read_only))
            .collect();
        assert_eq!(
            binds,
            [("/srv/a", true), ("/srv/b", false), ("/srv/c", false)]
        );
        for text in ["/srv", "/srv:data", "/srv:/data:rx", "/srv:/data:ro:x"] {
            assert!(Volume::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn users_by_number_and_name() {
        let root = rootfs();
        let find = |text: &str| User::find(text, root.path());
        let user = |uid, gid, groups: &[u32], home: &str| User {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.to_owned(),
        };
        assert_eq!(find("0").unwrap(), user(0, 0, &[50, 51], "/root"));
        assert_eq!(find("web").unwrap(), user(33, 34, &[50], "/var/www"));
        assert_eq!(find("web:51").unwrap(), user(33, 51, &[], "/var/www"));
        assert_eq!(find("web:log").unwrap(), user(33, 50, &[], "/var/www"));
        assert_eq!(find("1234:5").unwrap(), user(1234, 5, &[], "/"));
        assert_eq!(find("1234").unwrap(), user(1234, 0, &[], "/"));
        for (text, what) in [
            ("nobody", "no user nobody"),
            ("0:nogroup", "no group nogroup"),
            ("bad", "no user"),
        ] {
            let error = find(text).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn a_passwd_that_links_out_of_the_root_is_not_read() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.path().join("etc/passwd")).unwrap();
        assert_eq!(read_below(root.path(), "etc/passwd"), "");
    }

    #[test]
    fn the_environment_has_defaults_that_are_overridden() {
        let root = rootfs();
        let user = User::find("web", root.path()).unwrap();
        let mut command = command();
        assert_eq!(command.environment(&user), [PATH, "HOME=/var/www"]);
        command.env = vec![
            "PATH=/x".to_owned(),
            "A=b=c".to_owned(),
            "NACRE_TEST_UNSET".to_owned(),
        ];
        command.terminal = true;
        let environment = command.environment(&user);
        assert!(
            environment.contains(&"A=b=c".to_owned())
                && environment.contains(&"PATH=/x".to_owned())
        );
        assert!(!environment.contains(&PATH.to_owned()));
        assert!(environment.iter().any(|entry| entry.starts_with("TERM=")));
        assert!(
            !environment
                .iter()
                .any(|entry| entry.starts_with("NACRE_TEST_UNSET"))
        );
    }

    #[test]
    fn the_spec_is_one_that_the_guest_takes() {
        let root = rootfs();
        let spec = command().spec(root.path()).unwrap();
        let guest = for_guest(&spec, "c", "1").unwrap();
        assert_eq!(guest.warnings, Vec::<String>::new());
        let mut relative = command();
        relative.cwd = "tmp".into();
        assert!(
            relative
                .spec(root.path())
                .unwrap_err()
                .to_string()
                .contains("--cwd tmp")
        );
        assert!(
            command()
                .spec(&root.path().join("none"))
                .unwrap_err()
                .to_string()
                .contains("--rootfs")
        );
    }
}
