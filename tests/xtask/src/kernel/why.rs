//! Why an option of the kernel is not set: what its definitions depend on, as far as the files `Kconfig` say it in one place, and which of
//! that is not there.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::needed::Config;

/// What an option lacks, in words.
///
/// # Errors
/// The source cannot be read.
pub fn lacks(source: &Path, option: &str, asked: &Config, config: &Config) -> Result<String> {
    let mut found = Vec::new();
    search(source, option, &mut found)?;
    Ok(explain(option, &found, asked, config))
}

fn explain(option: &str, found: &[Vec<String>], asked: &Config, config: &Config) -> String {
    if found.is_empty() {
        return format!("this kernel has no option {option}");
    }
    let told: Vec<String> = found
        .iter()
        .filter_map(|terms| {
            let unmet = terms.iter().filter(|term| !Expression::holds(term, config));
            let unmet: Vec<&str> = unmet.map(String::as_str).collect();
            (!unmet.is_empty()).then(|| {
                let names = names(&unmet, config).join(", ");
                format!("it depends on {}, and {names}", unmet.join(" && "))
            })
        })
        .collect();
    match asked.get(option) {
        _ if !told.is_empty() => told.join("; or "),
        None => "the configuration does not ask for it".to_owned(),
        Some(_) => {
            "what its own file says it depends on is there: a part that it is in is off, or another option chooses it".to_owned()
        }
    }
}

/// How the options are that terms name, each once.
fn names(terms: &[&str], config: &Config) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    let words = terms
        .iter()
        .flat_map(|term| term.split(|symbol: char| !is_of_name(symbol)));
    for name in words.filter(|word| word.bytes().any(|byte| byte.is_ascii_uppercase())) {
        let told = format!("{name} is {}", config.show(name));
        if !seen.contains(&told) {
            seen.push(told);
        }
    }
    seen
}

fn is_of_name(symbol: char) -> bool {
    symbol.is_ascii_alphanumeric() || symbol == '_'
}

/// An expression of `Kconfig` that is read from its left: names, `!`, `&&`, `||`, `=`, `!=` and parentheses.
struct Expression<'a> {
    rest: &'a str,
    config: &'a Config,
}

impl<'a> Expression<'a> {
    /// Whether it is true of a configuration, modules included. What is none counts as true.
    fn holds(text: &'a str, config: &'a Config) -> bool {
        let mut expression = Expression { rest: text, config };
        let value = expression.any();
        !expression.rest.trim().is_empty() || value.unwrap_or(true)
    }

    fn takes(&mut self, sign: &str) -> bool {
        match self.rest.trim_start().strip_prefix(sign) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn any(&mut self) -> Option<bool> {
        let mut value = self.all()?;
        while self.takes("||") {
            value |= self.all()?;
        }
        Some(value)
    }

    fn all(&mut self) -> Option<bool> {
        let mut value = self.one()?;
        while self.takes("&&") {
            value &= self.one()?;
        }
        Some(value)
    }

    fn one(&mut self) -> Option<bool> {
        if self.takes("!") {
            return Some(!self.one()?);
        }
        if self.takes("(") {
            let value = self.any()?;
            return self.takes(")").then_some(value);
        }
        let left = self.value()?;
        if self.takes("!=") {
            return Some(left != self.value()?);
        }
        if self.takes("=") {
            return Some(left == self.value()?);
        }
        Some(left != "n")
    }

    /// A name's value, or a constant.
    fn value(&mut self) -> Option<&'a str> {
        let rest = self.rest.trim_start();
        let end = rest
            .find(|symbol| !is_of_name(symbol))
            .unwrap_or(rest.len());
        let (word, rest) = rest.split_at(end);
        self.rest = rest;
        match word {
            "" => None,
            "y" | "m" | "n" => Some(word),
            name => Some(self.config.get(name).unwrap_or("n")),
        }
    }
}

/// Looks through every `Kconfig` file below a folder.
fn search(folder: &Path, option: &str, found: &mut Vec<Vec<String>>) -> Result<()> {
    let reading = || format!("reading {}", folder.display());
    let mut entries: Vec<_> = fs::read_dir(folder)
        .and_then(Iterator::collect::<std::io::Result<_>>)
        .with_context(reading)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type().with_context(reading)?;
        let (path, name) = (entry.path(), entry.file_name());
        // Tests of the tools, and machines of others.
        let others = ["scripts", "Documentation", "tools"];
        if kind.is_dir() && !others.iter().any(|other| name == *other) {
            if folder.ends_with("arch") && name != "x86" {
                continue;
            }
            search(&path, option, found)?;
        } else if kind.is_file() && name.to_string_lossy().starts_with("Kconfig") {
            let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            found.extend(definitions(&String::from_utf8_lossy(&text), option));
        }
    }
    Ok(())
}

/// A block of a `Kconfig` file that what is in it depends on.
enum Block {
    If(String),
    /// A menu or a choice.
    Menu(Vec<String>),
}

/// What a file's definitions of an option depend on: for each the terms, its own and those around it.
fn definitions(text: &str, option: &str) -> Vec<Vec<String>> {
    let mut found: Vec<Vec<String>> = Vec::new();
    let mut blocks: Vec<Block> = Vec::new();
    // Whether lines belong to the option, to another one, or to the innermost block.
    let (mut ours, mut in_entry) = (false, false);
    let mut help = Help::None;
    let joined = text.replace("\\\n", " ");
    for line in joined.lines() {
        if help.has(line) {
            continue;
        }
        let line = line.split(" #").next().unwrap_or_default().trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match word {
            "config" | "menuconfig" => {
                (ours, in_entry) = (rest == option, true);
                if ours {
                    let around = blocks.iter().flat_map(|block| match block {
                        Block::If(term) => vec![term.clone()],
                        Block::Menu(terms) => terms.clone(),
                    });
                    found.push(around.collect());
                }
            }
            "menu" | "choice" => {
                (ours, in_entry) = (false, false);
                blocks.push(Block::Menu(Vec::new()));
            }
            "if" => {
                (ours, in_entry) = (false, true);
                blocks.push(Block::If(rest.to_owned()));
            }
            "endif" | "endmenu" | "endchoice" => {
                (ours, in_entry) = (false, true);
                blocks.pop();
            }
            "comment" | "source" => (ours, in_entry) = (false, true),
            "depends" => {
                let term = rest.strip_prefix("on").unwrap_or(rest).trim().to_owned();
                if ours && let Some(terms) = found.last_mut() {
                    terms.push(term);
                } else if !in_entry && let Some(Block::Menu(terms)) = blocks.last_mut() {
                    terms.push(term);
                }
            }
            "help" if rest.is_empty() => help = Help::Begins,
            _ => {}
        }
    }
    found
}

/// Whether lines are of a help text, which ends where one is indented less than its first.
enum Help {
    None,
    Begins,
    Indented(usize),
}

impl Help {
    fn has(&mut self, line: &str) -> bool {
        if line.trim().is_empty() {
            return true;
        }
        let indent = line
            .chars()
            .take_while(|symbol| symbol.is_whitespace())
            .fold(0, |column, symbol| match symbol {
                '\t' => column / 8 * 8 + 8,
                _ => column + 1,
            });
        match *self {
            Help::None => false,
            Help::Begins if indent > 0 => {
                *self = Help::Indented(indent);
                true
            }
            Help::Indented(first) if indent >= first => true,
            _ => {
                *self = Help::None;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KCONFIG: &str = "menu \"Things\"\n\tdepends on BUS\n\nconfig OTHER\n\tbool \"x\"\n\tdepends on NOTHING\n\nif NET\n\n\
config THING\n\ttristate \"A thing\"\n\tdepends on INET && \\\n\t\t(IPV6 || !IPV6_OFF) # note\n\tdepends on !SMALL\n\thelp\n\t  Its help says\n\t  \
depends on nothing\n\n\t  if in doubt, say N\n\nconfig LATER\n\tbool\n\nendif # NET\nendmenu\n\nconfig THING\n\tbool\n";

    #[test]
    fn a_definition_has_its_own_terms_and_those_around_it() {
        let found = definitions(KCONFIG, "THING");
        assert_eq!(found.len(), 2);
        let tidy: Vec<String> = found[0]
            .iter()
            .map(|term| term.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(
            tidy,
            ["BUS", "NET", "INET && (IPV6 || !IPV6_OFF)", "!SMALL"]
        );
        assert!(found[1].is_empty());
        assert_eq!(definitions(KCONFIG, "LATER"), [["BUS", "NET"]]);
        assert!(definitions(KCONFIG, "THIN").is_empty());
    }

    #[test]
    fn what_is_lacking_is_named() {
        let config = Config::parse("CONFIG_BUS=y\nCONFIG_NET=y\nCONFIG_SMALL=y\nCONFIG_IPV6=m\n");
        let asked = Config::parse("CONFIG_THING=y\n");
        let found = definitions(KCONFIG, "THING");
        let why = explain("THING", &found[..1], &asked, &config);
        for words in ["INET is not set", "SMALL is y", "&& !SMALL, and"] {
            assert!(why.contains(words), "{words} in {why}");
        }
        assert!(!why.contains("BUS") && !why.contains("NET is y"), "{why}");
        let words = |option: &str, found: &[Vec<String>]| explain(option, found, &asked, &config);
        assert!(words("NONE", &[]).contains("no option NONE"));
        let met = definitions(KCONFIG, "LATER");
        assert!(words("LATER", &met).contains("does not ask"));
        assert!(words("THING", &met).contains("another option chooses it"));
    }

    #[test]
    fn expressions_are_true_or_not_as_kconfig_has_them() {
        let config = Config::parse("CONFIG_A=y\nCONFIG_M=m\n");
        for (text, holds) in [
            ("A", true),
            ("B", false),
            ("!B", true),
            ("A && B", false),
            ("A || B", true),
            ("B || !B", true),
            ("B && A || A", true),
            ("!(A && M)", false),
            ("(B || M) && A", true),
            ("M = m", true),
            ("M!=y && A=y", true),
            ("B != n", false),
            // None: nothing is said of it.
            ("$(cc-option,-mfoo)", true),
        ] {
            assert_eq!(Expression::holds(text, &config), holds, "{text}");
        }
    }

    #[test]
    fn a_source_is_searched_without_what_is_of_other_machines() {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("net/Kconfig", "config A\n\tdepends on NET\n"),
            ("arch/x86/Kconfig.cpu", "config A\n\tdepends on CPU\n"),
            ("arch/arm/Kconfig", "config A\n\tdepends on ARM\n"),
            ("net/Makefile", "config A\n"),
        ] {
            let file = folder.path().join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        let why = lacks(folder.path(), "A", &Config::parse(""), &Config::parse("")).unwrap();
        assert!(why.contains("CPU is not set") && why.contains("NET is not set"));
        assert!(!why.contains("ARM"), "{why}");
    }
}
