//! What a guest kernel must have: the list `firmware/kernel/needed`, and configurations that are held against it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Whom options are needed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The VMM and the agent: without one of these no guest works, or not wholly.
    Guest,
    /// Containers that may use it, as on any host.
    Containers,
    /// Our own kernel alone: what makes it lean, or safe.
    Lean,
}

/// One option, and who needs it.
#[derive(Debug, PartialEq, Eq)]
pub struct KernelOption {
    /// Without `CONFIG_`.
    pub name: String,
    wanted: Wanted,
    who: String,
    scope: Scope,
}

#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// Exactly this; `n` is not set.
    Value(String),
    /// A number of at least so much.
    AtLeast(u64),
}

impl KernelOption {
    /// Whether a configuration has it so. What is a module counts as built in if `modules` says so.
    pub fn holds(&self, config: &Config, modules: bool) -> bool {
        let value = config.get(&self.name).unwrap_or("n");
        match &self.wanted {
            Wanted::Value(wanted) if wanted == "y" => value == "y" || (modules && value == "m"),
            Wanted::Value(wanted) => wanted == value,
            Wanted::AtLeast(least) => value.parse().is_ok_and(|number: u64| number >= *least),
        }
    }

    /// What is wrong with it in a configuration that does not have it so.
    pub fn complaint(&self, config: &Config) -> String {
        let wanted = match &self.wanted {
            Wanted::Value(value) if value == "n" => "not set".to_owned(),
            Wanted::Value(value) => value.clone(),
            Wanted::AtLeast(least) => format!("{least} or more"),
        };
        let (name, who) = (&self.name, &self.who);
        format!(
            "{name} is {} and must be {wanted}: {who}",
            config.show(name)
        )
    }
}

/// The list.
#[derive(Debug)]
pub struct Needed(Vec<KernelOption>);

impl Needed {
    /// Reads the list.
    ///
    /// # Errors
    /// The file cannot be read, or a line of it is not what it should be.
    pub fn read(file: &Path) -> Result<Needed> {
        let text =
            fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        Needed::parse(&text).with_context(|| format!("reading {}", file.display()))
    }

    fn parse(text: &str) -> Result<Needed> {
        let mut options: Vec<KernelOption> = Vec::new();
        let mut scope = None;
        for (number, line) in text.lines().enumerate() {
            let number = number + 1;
            let line = line.trim();
            scope = match line {
                "[guest]" => Some(Scope::Guest),
                "[containers]" => Some(Scope::Containers),
                "[lean]" => Some(Scope::Lean),
                _ => scope,
            };
            if line.is_empty() || line.starts_with('#') || line.starts_with('[') {
                if line.starts_with('[') && !matches!(line, "[guest]" | "[containers]" | "[lean]") {
                    bail!("line {number}: {line} is neither [guest] nor [containers] nor [lean]");
                }
                continue;
            }
            let Some(scope) = scope else {
                bail!("line {number} is before the first section");
            };
            let option = KernelOption::parse(line, scope).with_context(|| {
                format!("line {number} is not NAME=VALUE or NAME>=NUMBER and who needs it: {line}")
            })?;
            if options.iter().any(|other| other.name == option.name) {
                bail!("line {number}: {} is there twice", option.name);
            }
            options.push(option);
        }
        Ok(Needed(options))
    }

    /// All options.
    pub fn all(&self) -> impl Iterator<Item = &KernelOption> {
        self.0.iter()
    }

    /// Those of a section.
    pub fn of(&self, scope: Scope) -> impl Iterator<Item = &KernelOption> {
        self.0.iter().filter(move |option| option.scope == scope)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl KernelOption {
    fn parse(line: &str, scope: Scope) -> Option<KernelOption> {
        let (setting, who) = line.split_once(char::is_whitespace)?;
        let (name, wanted) = match setting.split_once(">=") {
            Some((name, least)) => (name, Wanted::AtLeast(least.parse().ok()?)),
            None => {
                let (name, value) = setting.split_once('=')?;
                (name, Wanted::Value(value.to_owned()))
            }
        };
        let named = !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
        (named && !name.starts_with("CONFIG_")).then(|| KernelOption {
            name: name.to_owned(),
            wanted,
            who: who.trim().to_owned(),
            scope,
        })
    }
}

/// A kernel's configuration, or a part of one: `CONFIG_NAME=VALUE` by name, without what is not set.
#[derive(Debug)]
pub struct Config(BTreeMap<String, String>);

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(file: &Path) -> Result<Config> {
        let text =
            fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        Ok(Config::parse(&text))
    }

    /// Takes every line `CONFIG_NAME=VALUE`.
    pub fn parse(text: &str) -> Config {
        let options = text.lines().filter_map(|line| {
            let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        });
        Config(options.collect())
    }

    /// No option is set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of what is set.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The value, in words where there is none.
    pub fn show(&self, name: &str) -> &str {
        self.get(name).unwrap_or("not set")
    }

    /// What this sets that the other has otherwise.
    pub fn differing<'a>(&'a self, other: &Config) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().filter_map(move |(name, value)| {
            let same = other.get(name).unwrap_or("n") == value;
            (!same).then_some((name.as_str(), value.as_str()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "# who needs what\n[guest]\nPVH=y  the VMM: it enters there\nNR_CPUS>=254 vCPUs\n\n\
                        [containers]\nVETH=y networks of containers\n[lean]\nMODULES=n nothing is loaded\nHZ=250  ticks\n";

    #[test]
    fn a_configuration_is_held_against_the_list() {
        let needed = Needed::parse(LIST).unwrap();
        let lacking = |text: &str, modules| -> Vec<String> {
            let config = Config::parse(text);
            let wrong = needed
                .all()
                .filter(|option| !option.holds(&config, modules));
            wrong.map(|option| option.complaint(&config)).collect()
        };
        let good = "CONFIG_PVH=y\nCONFIG_NR_CPUS=256\nCONFIG_VETH=y\n# CONFIG_MODULES is not set\nCONFIG_HZ=250\n";
        assert_eq!(lacking(good, false), Vec::<String>::new());
        let module = good.replace("VETH=y", "VETH=m");
        assert_eq!(lacking(&module, true), Vec::<String>::new());
        assert_eq!(
            lacking(&module, false),
            ["VETH is m and must be y: networks of containers"]
        );
        assert_eq!(
            lacking(
                "CONFIG_NR_CPUS=64\nCONFIG_MODULES=y\nCONFIG_VETH=y\nCONFIG_HZ=100",
                false
            ),
            [
                "PVH is not set and must be y: the VMM: it enters there",
                "NR_CPUS is 64 and must be 254 or more: vCPUs",
                "MODULES is y and must be not set: nothing is loaded",
                "HZ is 100 and must be 250: ticks",
            ]
        );
        let of_guest: Vec<&str> = needed
            .of(Scope::Guest)
            .map(|option| option.name.as_str())
            .collect();
        assert_eq!(of_guest, ["PVH", "NR_CPUS"]);
    }

    #[test]
    fn lines_that_are_no_options_are_refused() {
        for (text, words) in [
            ("PVH=y the VMM", "before the first section"),
            ("[guest]\nPVH=y", "line 2"),
            ("[guest]\nPVH the VMM", "line 2"),
            ("[guest]\nCONFIG_PVH=y the VMM", "line 2"),
            ("[guest]\nNR_CPUS>=many vCPUs", "line 2"),
            ("[guest]\nPVH=y a\nPVH=y b", "twice"),
            ("[hosts]\n", "[hosts]"),
        ] {
            let error = format!("{:#}", Needed::parse(text).unwrap_err());
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn what_came_out_otherwise_is_told() {
        let asked = Config::parse("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=\"x\"\nCONFIG_D=n\n");
        let resolved = Config::parse("CONFIG_A=y\nCONFIG_C=\"y\"\n# CONFIG_D is not set\n");
        let differing: Vec<_> = asked.differing(&resolved).collect();
        assert_eq!(differing, [("B", "y"), ("C", "\"x\"")]);
    }
}
