//! The reference of the configuration, a TOML file in which every key stands
//! with its default and the doc comment of its field.

use std::fmt::Write as _;

use documented::DocumentedFields;
use toml::{Table, Value};

use super::{Config, CpuRules, Hotplug, MemoryRules, Network, Share, Size};

/// Columns of a line of text.
const COLUMNS: usize = 110;

const HEAD: &str = "\
# nacre's configuration: /etc/nacre/config.toml, or the file that NACRE_CONFIG names. The file is optional and so is
# every key. Each key stands here with its default, commented out. `vmctl config` prints this reference,
# `vmctl config --check FILE` judges a file.
#
# Sizes are numbers with K, M, G or T (powers of 1024). NACRE_KERNEL and NACRE_INITRD in the environment override
# kernel and initrd.
";

/// A table of the configuration: its name, and its keys with their doc comments. A table in it is a key too.
pub(super) struct Section {
    /// With those of the tables that it is in: `hotplug.cpu`. Empty: the keys before any table.
    pub name: &'static str,
    pub keys: Vec<(&'static str, &'static str)>,
}

/// All tables, in the order of the fields.
pub(super) fn sections() -> Vec<Section> {
    fn section<T: DocumentedFields>(name: &'static str) -> Section {
        let docs = T::FIELD_DOCS.iter().copied();
        Section {
            name,
            keys: T::FIELD_NAMES.iter().copied().zip(docs).collect(),
        }
    }
    vec![
        section::<Config>(""),
        section::<Size>("size"),
        section::<Hotplug>("hotplug"),
        section::<CpuRules>("hotplug.cpu"),
        section::<MemoryRules>("hotplug.memory"),
        section::<Share>("share"),
        section::<Network>("network"),
    ]
}

/// The name of a key with those of the tables that it is in: `hotplug.cpu.interval`.
pub(super) fn path(table: &str, key: &str) -> String {
    match table {
        "" => key.to_owned(),
        table => format!("{table}.{key}"),
    }
}

/// The reference, as it is in `docs/nacre.toml`.
pub fn reference() -> String {
    // What is serialized has been deserialized; it has nothing that TOML has not.
    let defaults = Table::try_from(Config::default()).unwrap_or_default();
    let sections = sections();
    let is_table = |path: &str| sections.iter().any(|section| section.name == path);
    let mut text = HEAD.to_owned();
    for section in &sections {
        let mut values = &defaults;
        if !section.name.is_empty() {
            let doc = sections
                .iter()
                .flat_map(|outer| {
                    outer
                        .keys
                        .iter()
                        .map(|(key, doc)| (path(outer.name, key), doc))
                })
                .find_map(|(path, doc)| (path == section.name).then_some(*doc));
            text.push('\n');
            comment(&mut text, doc.unwrap_or_default());
            let _ = writeln!(text, "[{}]", section.name);
            for name in section.name.split('.') {
                if let Some(Value::Table(inner)) = values.get(name) {
                    values = inner;
                }
            }
        }
        for (name, doc) in &section.keys {
            if is_table(&path(section.name, name)) {
                continue;
            }
            text.push('\n');
            comment(&mut text, doc);
            if let Some(value) = values.get(*name) {
                let _ = writeln!(text, "#{name} = {value}");
            }
        }
    }
    text
}

/// A doc comment in lines of its own.
fn comment(text: &mut String, doc: &str) {
    let mut line = String::from("#");
    for word in doc.split_whitespace() {
        if line.len() + 1 + word.len() > COLUMNS {
            let _ = writeln!(text, "{line}");
            "#".clone_into(&mut line);
        }
        line.push(' ');
        line.push_str(word);
    }
    let _ = writeln!(text, "{line}");
}
