//! The reference of the configuration, a TOML file in which every key stands
//! with its default and the doc comment of its field.

use std::fmt::Write as _;

use documented::DocumentedFields;
use toml::{Table, Value};

use super::{Config, Rootfs, Size};

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

/// A table of the configuration: its name, its doc comment, and its keys with their doc comments.
pub(super) struct Section {
    /// Empty: the keys before any table.
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
        section::<Rootfs>("rootfs"),
    ]
}

/// The reference, as it is in `docs/nacre.toml`.
pub fn reference() -> String {
    // What is serialized has been deserialized; it has nothing that TOML has not.
    let defaults = Table::try_from(Config::default()).unwrap_or_default();
    let sections = sections();
    let is_table = |name: &str| sections.iter().any(|section| section.name == name);
    let mut text = HEAD.to_owned();
    for section in &sections {
        let mut values = &defaults;
        if !section.name.is_empty() {
            let doc = sections[0]
                .keys
                .iter()
                .find(|(name, _)| *name == section.name)
                .map_or("", |(_, doc)| doc);
            text.push('\n');
            comment(&mut text, doc);
            let _ = writeln!(text, "[{}]", section.name);
            if let Some(Value::Table(inner)) = defaults.get(section.name) {
                values = inner;
            }
        }
        for (name, doc) in section.keys.iter().filter(|(name, _)| !is_table(name)) {
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
