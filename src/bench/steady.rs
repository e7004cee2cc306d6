//! Configurations that scenarios give the programs that they start: for VMs that neither grow nor shrink, and for VMs whose state is
//! elsewhere.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::variable;
use crate::config::{ByteSize, DEFAULT_PATH};

/// nacre's configuration, but for the VM's size, which stays what it is at boot: QEMU's does.
pub(super) fn steady(to: PathBuf, vcpus: u8, memory: ByteSize) -> Result<PathBuf> {
    changed(to, |text| resized(text, vcpus, memory))
}

/// nacre's configuration, but for where the state of VMs is: what is killed leaves it there.
pub(super) fn elsewhere(to: PathBuf, state_dir: &Path) -> Result<PathBuf> {
    changed(to, |text| moved(text, state_dir))
}

fn changed(to: PathBuf, change: impl FnOnce(&str) -> Result<String>) -> Result<PathBuf> {
    let given = variable("NACRE_CONFIG").filter(|path| !path.as_os_str().is_empty());
    let path = given.clone().unwrap_or_else(|| DEFAULT_PATH.into());
    let text = match std::fs::read_to_string(&path) {
        Err(error) if given.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
            String::new()
        }
        read => read.with_context(|| format!("reading {}", path.display()))?,
    };
    let text = change(&text).with_context(|| format!("reading {}", path.display()))?;
    std::fs::write(&to, text).with_context(|| format!("writing {}", to.display()))?;
    Ok(to)
}

fn moved(text: &str, state_dir: &Path) -> Result<String> {
    let mut config: toml::Table = text.parse()?;
    let state_dir = state_dir.display().to_string();
    config.insert("state_dir".to_owned(), state_dir.into());
    Ok(toml::to_string(&config)?)
}

fn resized(text: &str, vcpus: u8, memory: ByteSize) -> Result<String> {
    let mut config: toml::Table = text.parse()?;
    let mut section = |name: &str, values: Vec<(&str, toml::Value)>| {
        let section = config
            .entry(name)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()));
        if let Some(section) = section.as_table_mut() {
            section.extend(
                values
                    .into_iter()
                    .map(|(key, value)| (key.to_owned(), value)),
            );
        }
    };
    section("hotplug", vec![("enabled", false.into())]);
    let vcpus = i64::from(vcpus);
    section(
        "size",
        vec![
            ("default_vcpus", vcpus.into()),
            ("max_vcpus", vcpus.into()),
            ("default_memory", memory.to_string().into()),
            ("max_memory", memory.to_string().into()),
        ],
    );
    Ok(toml::to_string(&config)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_keeps_its_size_and_all_else_of_the_configuration() {
        let given = "kernel = \"/k\"\n[size]\nhost_memory = \"64M\"\n[hotplug]\nenabled = true\n";
        let text = resized(given, 2, ByteSize::from_mib(768)).unwrap();
        let config: toml::Table = text.parse().unwrap();
        assert_eq!(config["kernel"].as_str(), Some("/k"));
        assert_eq!(config["hotplug"]["enabled"].as_bool(), Some(false));
        assert_eq!(config["size"]["host_memory"].as_str(), Some("64M"));
        assert_eq!(config["size"]["default_memory"].as_str(), Some("768M"));
        assert_eq!(config["size"]["max_vcpus"].as_integer(), Some(2));
        let text = moved(given, Path::new("/s")).unwrap();
        let config: toml::Table = text.parse().unwrap();
        assert_eq!(config["state_dir"].as_str(), Some("/s"));
        assert_eq!(config["kernel"].as_str(), Some("/k"));
        assert!(resized("kernel = ", 1, ByteSize::from_mib(768)).is_err());
    }
}
