//! Annotations `io.nacre.*` of an OCI specification: what one container, or the
//! VM that is started for it, has other than configured. The administrator says
//! which of them may be used; any other is refused by name.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use oci_spec::runtime::Spec;
use serde::{Serialize, Serializer};

use super::{SandboxConfig, cmdline};
use crate::config::{ByteSize, value};

/// What the names of all our annotations begin with.
const PREFIX: &str = "io.nacre.";

/// An annotation that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Annotation {
    /// vCPUs of the VM.
    Vcpus,
    /// Memory of the VM.
    Memory,
    /// Guest kernel.
    Kernel,
    /// initrd.
    Initrd,
    /// Words added to the kernel's command line, after the configuration's.
    Cmdline,
    /// As the key of that name.
    BootTimeout,
    /// As the key of that name.
    CreateTimeout,
}

impl Annotation {
    /// All that there are.
    pub const ALL: [Self; 7] = [
        Self::Vcpus,
        Self::Memory,
        Self::Kernel,
        Self::Initrd,
        Self::Cmdline,
        Self::BootTimeout,
        Self::CreateTimeout,
    ];

    /// Those that choose sizes alone.
    pub const SIZES: [Self; 2] = [Self::Vcpus, Self::Memory];

    /// Its name in a specification.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vcpus => "io.nacre.vcpus",
            Self::Memory => "io.nacre.memory",
            Self::Kernel => "io.nacre.kernel",
            Self::Initrd => "io.nacre.initrd",
            Self::Cmdline => "io.nacre.cmdline",
            Self::BootTimeout => "io.nacre.boot_timeout",
            Self::CreateTimeout => "io.nacre.create_timeout",
        }
    }
}

impl fmt::Display for Annotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Annotation {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|known| known.name() == name);
        found.ok_or_else(|| {
            format!(
                "{name:?} is no annotation that is known: these are {}",
                list(&Self::ALL)
            )
        })
    }
}

impl Serialize for Annotation {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

fn list(annotations: &[Annotation]) -> String {
    if annotations.is_empty() {
        return "none".to_owned();
    }
    let names: Vec<&str> = annotations.iter().map(|known| known.name()).collect();
    names.join(", ")
}

/// An annotation that is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// There is none of this name.
    #[error("The annotation {name} = {given:?} is not known: allowed here are {allowed}")]
    Unknown {
        /// Its name.
        name: String,
        /// Its value.
        given: String,
        /// Names.
        allowed: String,
    },
    /// The administrator does not let it be used.
    #[error(
        "The annotation {name} = {given:?} is not allowed: allowed by allowed_annotations in nacre's configuration are {allowed}"
    )]
    NotAllowed {
        /// Its name.
        name: Annotation,
        /// Its value.
        given: String,
        /// Names.
        allowed: String,
    },
    /// The value cannot be.
    #[error("The annotation {name} = {given:?} cannot be: {cause}")]
    Value {
        /// Its name.
        name: Annotation,
        /// Its value.
        given: String,
        /// What is wrong with it and what is allowed.
        cause: String,
    },
    /// It is about the VM, and that runs already.
    #[error(
        "The annotation {name} = {given:?} is about the VM, which was started {has}: only the container that a VM is started for decides, and the others may say the same"
    )]
    Late {
        /// Its name.
        name: Annotation,
        /// Its value.
        given: String,
        /// How the VM was started.
        has: String,
    },
}

/// What a specification's annotations ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    vcpus: Option<u8>,
    memory: Option<ByteSize>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: Option<String>,
    boot_timeout: Option<Duration>,
    create_timeout: Option<Duration>,
}

impl Overrides {
    /// Reads those of a specification, of which only the `allowed` ones may be there.
    ///
    /// # Errors
    /// The first annotation `io.nacre.*` by name that is not known, not allowed, or has a value that cannot be.
    pub fn of(spec: &Spec, allowed: &[Annotation]) -> Result<Self, Error> {
        let mut overrides = Self::default();
        let mut ours: Vec<(&String, &String)> = spec
            .annotations()
            .iter()
            .flatten()
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        ours.sort();
        for (name, given) in ours {
            let Ok(known) = name.parse::<Annotation>() else {
                return Err(Error::Unknown {
                    name: name.clone(),
                    given: given.clone(),
                    allowed: list(allowed),
                });
            };
            if !allowed.contains(&known) {
                return Err(Error::NotAllowed {
                    name: known,
                    given: given.clone(),
                    allowed: list(allowed),
                });
            }
            overrides.set(known, given).map_err(|cause| Error::Value {
                name: known,
                given: given.clone(),
                cause,
            })?;
        }
        Ok(overrides)
    }

    fn set(&mut self, name: Annotation, given: &str) -> Result<(), String> {
        match name {
            Annotation::Vcpus => self.vcpus = Some(value::parse_vcpus(given)?),
            Annotation::Memory => self.memory = Some(value::parse_memory(given)?),
            Annotation::Kernel => self.kernel = Some(value::parse_file(given)?),
            Annotation::Initrd => self.initrd = Some(value::parse_file(given)?),
            Annotation::Cmdline => self.cmdline = Some(value::parse_cmdline(given)?),
            Annotation::BootTimeout => self.boot_timeout = Some(value::parse_duration(given)?),
            Annotation::CreateTimeout => self.create_timeout = Some(value::parse_duration(given)?),
        }
        Ok(())
    }

    /// The value of one that is about the VM, written in one way only.
    fn of_vm(&self, name: Annotation) -> Option<String> {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        match name {
            Annotation::Vcpus => self.vcpus.map(|count| count.to_string()),
            Annotation::Memory => self.memory.map(|size| size.to_string()),
            Annotation::Kernel => path(&self.kernel),
            Annotation::Initrd => path(&self.initrd),
            Annotation::Cmdline => self.cmdline.clone(),
            Annotation::BootTimeout => self.boot_timeout.map(value::show_duration),
            Annotation::CreateTimeout => self.create_timeout.map(value::show_duration),
        }
    }

    /// Whether a container with these can be in the VM that was started with `boot`.
    ///
    /// # Errors
    /// [`Error::Late`] with the first that asks for another VM.
    pub fn fits(&self, boot: &Self) -> Result<(), Error> {
        for name in Annotation::ALL {
            let (given, has) = (self.of_vm(name), boot.of_vm(name));
            if let Some(given) = given
                && has.as_ref() != Some(&given)
            {
                return Err(Error::Late {
                    name,
                    given,
                    has: has.map_or_else(|| "without it".to_owned(), |has| format!("with {has:?}")),
                });
            }
        }
        Ok(())
    }

    /// Makes a VM what they ask for.
    pub fn apply(&self, sandbox: &mut SandboxConfig) {
        let Self {
            vcpus,
            memory,
            kernel,
            initrd,
            cmdline: words,
            boot_timeout,
            create_timeout,
        } = self;
        if let Some(vcpus) = vcpus {
            sandbox.vcpus = *vcpus;
        }
        if let Some(memory) = memory {
            sandbox.memory_mib = memory.mib();
        }
        if let Some(kernel) = kernel {
            sandbox.kernel.clone_from(kernel);
        }
        if let Some(initrd) = initrd {
            sandbox.initrd = Some(initrd.clone());
        }
        if let Some(words) = words {
            sandbox.cmdline = cmdline(&sandbox.cmdline, words);
        }
        if let Some(limit) = boot_timeout {
            sandbox.timeouts.boot = *limit;
        }
        if let Some(limit) = create_timeout {
            sandbox.timeouts.create = *limit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(annotations: &[(&str, &str)]) -> Spec {
        let annotations: std::collections::HashMap<_, _> = annotations.iter().copied().collect();
        let json = serde_json::json!({ "ociVersion": "1.1.0", "annotations": annotations });
        serde_json::from_value(json).unwrap()
    }

    fn of(annotations: &[(&str, &str)]) -> Result<Overrides, Error> {
        Overrides::of(&spec(annotations), &Annotation::ALL)
    }

    const GOOD: [(&str, &str); 7] = [
        ("io.nacre.vcpus", "2"),
        ("io.nacre.memory", "768M"),
        ("io.nacre.kernel", "/k"),
        ("io.nacre.initrd", "/i"),
        ("io.nacre.cmdline", "debug"),
        ("io.nacre.boot_timeout", "90s"),
        ("io.nacre.create_timeout", "5s"),
    ];

    fn sandbox(overrides: &Overrides) -> String {
        let config = crate::config::Config::default();
        let mut sandbox = SandboxConfig::new(&config, "n", "i", PathBuf::new());
        overrides.apply(&mut sandbox);
        format!("{sandbox:?}")
    }

    #[test]
    fn each_changes_what_it_is_about_and_nothing_is_left_out() {
        let names: Vec<&str> = GOOD.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, Annotation::ALL.map(Annotation::name));
        let usual = sandbox(&Overrides::default());
        for one in GOOD {
            assert_ne!(sandbox(&of(&[one]).unwrap()), usual, "{one:?}");
        }
        let all = sandbox(&of(&GOOD).unwrap());
        for word in [
            "vcpus: 2",
            "memory_mib: 768",
            "\"/k\"",
            "\"/i\"",
            " debug\"",
            "boot: 90s",
            "create: 5s",
        ] {
            assert!(all.contains(word), "{word} is not in {all}");
        }
        let others = [("io.containerd.x", "1"), ("io.nacreous.y", "2")];
        assert_eq!(of(&others).unwrap(), Overrides::default());
    }

    #[test]
    fn what_is_unknown_or_not_allowed_is_refused_with_the_allowed_ones() {
        for (name, given) in [
            ("io.nacre.vcpu", "2"),
            ("io.nacre.", ""),
            ("io.nacre.VCPUS", "2"),
        ] {
            let error = of(&[(name, given)]).unwrap_err().to_string();
            for word in [name, &format!("{given:?}"), "not known", "io.nacre.vcpus"] {
                assert!(error.contains(word), "{word} is not in {error}");
            }
        }
        let some = spec(&[("io.nacre.kernel", "/k")]);
        let error = Overrides::of(&some, &Annotation::SIZES)
            .unwrap_err()
            .to_string();
        for word in [
            "io.nacre.kernel",
            "\"/k\"",
            "not allowed",
            "allowed_annotations",
            "io.nacre.vcpus, io.nacre.memory",
        ] {
            assert!(error.contains(word), "{word} is not in {error}");
        }
        let error = Overrides::of(&some, &[]).unwrap_err().to_string();
        assert!(error.ends_with("are none"), "{error}");
    }

    #[test]
    fn values_that_cannot_be_are_refused_with_what_can() {
        for (name, given, right) in [
            ("io.nacre.vcpus", "0", "1 to 254"),
            ("io.nacre.vcpus", "255", "1 to 254"),
            ("io.nacre.vcpus", "two", "1 to 254"),
            ("io.nacre.memory", "95M", "96M to 1023G"),
            ("io.nacre.memory", "lots", "512M"),
            ("io.nacre.kernel", "vmlinux", "absolute path"),
            ("io.nacre.initrd", "", "absolute path"),
            ("io.nacre.cmdline", "a\nb", "one line"),
            ("io.nacre.boot_timeout", "0s", "above 0"),
            ("io.nacre.create_timeout", "5", "such as 10s"),
        ] {
            let error = of(&[(name, given)]).unwrap_err().to_string();
            for word in [name, &format!("{given:?}"), right] {
                assert!(error.contains(word), "{word} is not in {error}");
            }
        }
    }

    #[test]
    fn a_later_container_may_only_ask_for_the_vm_that_is_there() {
        let boot = of(&[("io.nacre.memory", "1G"), ("io.nacre.vcpus", "2")]).unwrap();
        for fits in [
            vec![],
            vec![("io.nacre.memory", "1024M")],
            vec![("io.nacre.vcpus", "2")],
        ] {
            of(&fits).unwrap().fits(&boot).unwrap();
        }
        for (late, has) in [
            (("io.nacre.memory", "2G"), "with \"1G\""),
            (("io.nacre.kernel", "/k"), "without it"),
        ] {
            let error = of(&[late]).unwrap().fits(&boot).unwrap_err().to_string();
            for word in [late.0, late.1, has] {
                assert!(error.contains(word), "{word} is not in {error}");
            }
        }
    }
}
