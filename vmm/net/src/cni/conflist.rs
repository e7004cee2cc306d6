//! The configuration of a network: a file that names the plugins to run, one after another. The specification's section 1.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Error, Kind};

/// The largest configuration file, bytes.
const LARGEST: u64 = 1 << 20;

/// A version of the CNI specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Version {
    /// 0.3.0, where lists of plugins begin.
    #[serde(rename = "0.3.0")]
    V0_3_0,
    /// 0.3.1
    #[serde(rename = "0.3.1")]
    V0_3_1,
    /// 0.4.0, where CHECK begins, and DEL is given the result of ADD.
    #[serde(rename = "0.4.0")]
    V0_4_0,
    /// 1.0.0
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// 1.1.0
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    const ALL: [Self; 5] = [
        Self::V0_3_0,
        Self::V0_3_1,
        Self::V0_4_0,
        Self::V1_0_0,
        Self::V1_1_0,
    ];

    /// As it is written in configurations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// None if it is not supported.
    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|version| version.as_str() == text)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The configuration of one network, as it was loaded: later changes of its files do not matter to what holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Conflist {
    path: PathBuf,
    name: String,
    version: Version,
    disable_check: bool,
    plugins: Vec<Map<String, Value>>,
}

impl Conflist {
    /// Reads a file: a single plugin's configuration if its name ends in `.conf` or `.json`, a list of plugins otherwise. To
    /// a list belong the plugins in `NAME/*.conf` beside it, NAME being the network's, unless it says
    /// `loadOnlyInlinedPlugins`. No file may have more than 1 MiB.
    ///
    /// # Errors
    ///
    /// [`Kind::NoConfiguration`] if the file is not there, [`Kind::Configuration`] if something in it is wrong,
    /// [`Kind::Version`] if none of its versions is supported (0.3.0 to 1.1.0), [`Kind::Io`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let config = read(path)?;
        if path
            .extension()
            .is_some_and(|end| end == "conf" || end == "json")
        {
            Self::of_plugin(path, config)
        } else {
            Self::of_list(path, config)
        }
    }

    /// The first of a directory, which is the default network: in the order of the bytes of their names, among those that
    /// end in `.conf`, `.conflist` or `.json`. That it cannot be used is an error: the next is not taken in its place.
    ///
    /// # Errors
    ///
    /// [`Kind::NoConfiguration`] if there is none, and those of [`Conflist::load`].
    pub fn first(directory: impl AsRef<Path>) -> Result<Self, Error> {
        let directory = directory.as_ref();
        match files(directory, &["conf", "conflist", "json"])?.first() {
            Some(path) => Self::load(path),
            None => Err(none_in(directory, "there is none")),
        }
    }

    /// The one of a directory whose network has that name. Lists are looked at before configurations of single plugins.
    /// Files that cannot be used are passed over.
    ///
    /// # Errors
    ///
    /// [`Kind::NoConfiguration`] if there is none; it says what was passed over.
    pub fn named(directory: impl AsRef<Path>, name: &str) -> Result<Self, Error> {
        let directory = directory.as_ref();
        let mut paths = files(directory, &["conflist"])?;
        paths.extend(files(directory, &["conf", "json"])?);
        let mut unusable = Vec::new();
        let mut others = Vec::new();
        for path in paths {
            match Self::load(&path) {
                Ok(found) if found.name == name => return Ok(found),
                Ok(other) => others.push(format!("{:?}", other.name)),
                Err(error) => unusable.push(error),
            }
        }
        let why = match others.as_slice() {
            [] => format!("no network {name:?} is there, nor any other"),
            names => format!("no network {name:?} is there, but {}", names.join(", ")),
        };
        let none = none_in(directory, &why);
        Err(unusable.iter().fold(none, Error::and))
    }

    fn of_plugin(path: &Path, config: Map<String, Value>) -> Result<Self, Error> {
        if config.contains_key("plugins") {
            let why = "it has a list of plugins, and its name is that of a single plugin's";
            return Err(wrong(path, why).help("let its name end in .conflist"));
        }
        let name = name(path, &config)?;
        let version = version(path, &config)?;
        check_plugin(path, &config)?;
        Ok(Self {
            path: path.to_owned(),
            name,
            version,
            disable_check: false,
            plugins: vec![config],
        })
    }

    fn of_list(path: &Path, mut config: Map<String, Value>) -> Result<Self, Error> {
        let name = name(path, &config)?;
        let version = version(path, &config)?;
        let disable_check = flag(path, &config, "disableCheck")?;
        let inlined_only = flag(path, &config, "loadOnlyInlinedPlugins")?;
        let mut plugins = match config.remove("plugins") {
            None => Vec::new(),
            Some(Value::Array(plugins)) => objects(path, plugins)?,
            Some(_) => return Err(wrong(path, "`plugins` is no list")),
        };
        if !inlined_only {
            plugins.extend(beside(path, &name)?);
        }
        if plugins.is_empty() {
            let error = wrong(path, "it has no plugin");
            return Err(if config.contains_key("type") {
                error.help(
                    "put the plugin into a list `plugins`, or let the file's name end in .conf",
                )
            } else {
                error.help("name at least one in its list `plugins`")
            });
        }
        Ok(Self {
            path: path.to_owned(),
            name,
            version,
            disable_check,
            plugins,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The network's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The highest version that configuration and client have in common.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Whether CHECK must not be run.
    pub fn disables_check(&self) -> bool {
        self.disable_check
    }

    /// Whether one of the plugins wants to be told of a capability, such as `portMappings`. If none does, what is asked
    /// for reaches nobody.
    pub fn wants(&self, capability: &str) -> bool {
        self.plugins
            .iter()
            .any(|plugin| plugin_wants(plugin, capability))
    }

    /// The plugins' names, in the order of ADD.
    pub fn types(&self) -> impl Iterator<Item = &str> {
        self.plugins.iter().map(plugin_type)
    }

    pub(super) fn plugins(&self) -> &[Map<String, Value>] {
        &self.plugins
    }
}

pub(super) fn plugin_type(plugin: &Map<String, Value>) -> &str {
    plugin
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

pub(super) fn plugin_wants(plugin: &Map<String, Value>, capability: &str) -> bool {
    let capabilities = plugin.get("capabilities");
    capabilities.and_then(|all| all.get(capability)) == Some(&Value::Bool(true))
}

/// The specification's rule for names of networks and IDs of containers.
pub(super) fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '.' | '-'))
}

fn wrong(path: &Path, why: impl Into<String>) -> Error {
    let doing = format!("Cannot use the CNI configuration {}", path.display());
    Error::new(Kind::Configuration, doing, why)
}

fn none_in(directory: &Path, why: &str) -> Error {
    let doing = format!("Found no CNI configuration in {}", directory.display());
    Error::new(Kind::NoConfiguration, doing, why).help(
        "put a network's configuration there as NAME.conflist, or name the directory or network that is meant",
    )
}

fn cannot_read(path: &Path, source: io::Error) -> Error {
    let gone = source.kind() == io::ErrorKind::NotFound;
    let (kind, why) = if gone {
        (Kind::NoConfiguration, "it is not there")
    } else {
        (Kind::Io, "it cannot be read")
    };
    let doing = format!("Cannot use the CNI configuration {}", path.display());
    Error::new(kind, doing, why).caused_by(source)
}

fn read(path: &Path) -> Result<Map<String, Value>, Error> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LARGEST + 1).read_to_end(&mut text))
        .map_err(|error| cannot_read(path, error))?;
    if text.len() as u64 > LARGEST {
        return Err(wrong(path, "it has more than 1 MiB"));
    }
    serde_json::from_slice(&text)
        .map_err(|error| wrong(path, format!("it is no JSON object: {error}")))
}

/// Those of a directory with such ends of their names, by name. Empty if it is not there.
fn files(directory: &Path, ends: &[&str]) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| cannot_read(directory, error))?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| cannot_read(directory, error))?;
        let path = entry.path();
        let wanted = path
            .extension()
            .is_some_and(|end| ends.iter().any(|wanted| end == *wanted));
        if wanted && !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// The plugins of a network that have files of their own.
fn beside(path: &Path, name: &str) -> Result<Vec<Map<String, Value>>, Error> {
    let directory = path.parent().unwrap_or(Path::new("/")).join(name);
    let plugin = |path: PathBuf| {
        let plugin = read(&path)?;
        check_plugin(&path, &plugin)?;
        Ok(plugin)
    };
    let paths = match files(&directory, &["conf"]) {
        // Another file has the network's name.
        Err(_) if !directory.is_dir() => Vec::new(),
        paths => paths?,
    };
    paths.into_iter().map(plugin).collect()
}

fn objects(path: &Path, plugins: Vec<Value>) -> Result<Vec<Map<String, Value>>, Error> {
    let object = |(index, plugin)| match plugin {
        Value::Object(plugin) => {
            check_plugin(path, &plugin)?;
            Ok(plugin)
        }
        _ => Err(wrong(path, format!("`plugins[{index}]` is no object"))),
    };
    plugins.into_iter().enumerate().map(object).collect()
}

fn check_plugin(path: &Path, plugin: &Map<String, Value>) -> Result<(), Error> {
    match plugin.get("type") {
        Some(Value::String(name)) if is_file_name(name) => Ok(()),
        Some(other) => {
            let why = format!("the plugin's `type` {other} is not the name of a program's file");
            Err(wrong(path, why).help("give the name alone, such as \"bridge\""))
        }
        None => {
            let error = wrong(path, "a plugin has no `type`");
            Err(error.help("name the plugin's program there, such as \"bridge\""))
        }
    }
}

fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', '\0'])
}

fn name(path: &Path, config: &Map<String, Value>) -> Result<String, Error> {
    match config.get("name") {
        Some(Value::String(name)) if is_name(name) => Ok(name.clone()),
        Some(other) => {
            let why = format!("its `name` {other} is none that CNI allows");
            Err(wrong(path, why).help(
                "begin with an ASCII letter or digit, go on with letters, digits, `_`, `.` and `-`",
            ))
        }
        None => Err(wrong(path, "it has no `name`").help("give the network one")),
    }
}

/// A flag is also taken as a string, as libcni does.
fn flag(path: &Path, config: &Map<String, Value>, key: &str) -> Result<bool, Error> {
    match config.get(key) {
        None => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => Err(wrong(
            path,
            format!("its `{key}` is {other}, which is neither true nor false"),
        )),
    }
}

/// The highest of `cniVersion` and `cniVersions` that is supported.
fn version(path: &Path, config: &Map<String, Value>) -> Result<Version, Error> {
    let mut given = Vec::new();
    for (key, value) in [
        ("cniVersion", config.get("cniVersion")),
        ("cniVersions", config.get("cniVersions")),
    ] {
        match value {
            None => {}
            Some(Value::String(version)) if key == "cniVersion" => given.push(version.as_str()),
            Some(Value::Array(versions)) if key == "cniVersions" => {
                let no_text = || wrong(path, "its `cniVersions` is no list of strings");
                for version in versions {
                    given.push(version.as_str().ok_or_else(no_text)?);
                }
            }
            Some(other) => {
                return Err(wrong(path, format!("its `{key}` {other} is no version")));
            }
        }
    }
    let best = given.iter().filter_map(|text| Version::parse(text)).max();
    best.ok_or_else(|| {
        let why = match given.as_slice() {
            [] => "it has no `cniVersion`, which means 0.1.0, and that is not supported".to_owned(),
            given => format!("its version {} is not supported", given.join(", ")),
        };
        let doing = format!("Cannot use the CNI configuration {}", path.display());
        Error::new(Kind::Version, doing, why).help(
            "set its `cniVersion` to one of 0.3.0, 0.3.1, 0.4.0, 1.0.0 and 1.1.0 that its plugins support; plugins that know 0.1.0 and 0.2.0 alone must be renewed",
        )
    })
}
