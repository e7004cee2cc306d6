//! What a run leaves: every value that was measured, with where, of what and by
//! which build. All scenarios write it in this one shape, as JSON; `page` and
//! `compare` read it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::guest::GuestKernel;
use super::report::{Report, Unit};

/// Of the shape below. Another number is another shape.
pub(super) const FORMAT: u32 = 1;
/// Why there are fewer values than were asked for while a run goes on.
const GOES_ON: &str = "not all rounds are done";

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Document {
    pub format: u32,
    pub scenario: String,
    /// nacre-bench's version and build.
    pub build: String,
    pub machine: Machine,
    pub guest_kernel: Option<GuestKernel>,
    /// The options that what was measured depends on.
    pub settings: BTreeMap<String, Value>,
    /// What was measured, by side or role.
    pub programs: BTreeMap<String, String>,
    /// Whether all of it was measured.
    pub complete: bool,
    /// Why not, if so.
    pub ended_by: Option<String>,
    pub tables: Vec<Report>,
    pub notes: Vec<String>,
}

/// Where it was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Machine {
    /// Model of the CPU as it says itself.
    pub cpu: String,
    /// CPUs that the program may run on.
    pub cpus: usize,
    pub memory_mib: u64,
    /// `uname -r`.
    pub kernel: String,
    /// Whether it is the testbed of `cargo xtask`, in which every instruction is emulated.
    pub emulated: bool,
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
        let name = nix::sys::utsname::uname();
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".into()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: field(&read("/proc/meminfo"), "MemTotal")
                .and_then(|text| text.strip_suffix(" kB")?.parse::<u64>().ok())
                .map_or(0, |kib| kib / 1024),
            kernel: name
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            emulated: std::env::var_os("NACRE_TESTBED").is_some(),
        }
    }
}

/// The value of the first line `name : value`.
fn field(text: &str, name: &str) -> Option<String> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(known, _)| known.trim() == name)?;
    Some(value.trim().to_owned())
}

/// For people.
impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            cpu,
            cpus,
            memory_mib,
            kernel,
            emulated,
        } = self;
        let plural = if *cpus == 1 { "" } else { "s" };
        write!(
            f,
            "Linux {kernel}, {cpus} CPU{plural} ({cpu}), {memory_mib} MiB"
        )?;
        if *emulated {
            f.write_str(
                "; the machine is emulated: ratios and counts mean something, times do not",
            )?;
        }
        Ok(())
    }
}

impl Document {
    /// Nothing is measured yet. `settings` is an object.
    pub fn new(scenario: &str, settings: Value) -> Self {
        let settings = match settings {
            Value::Object(settings) => settings.into_iter().collect(),
            other => BTreeMap::from([("settings".to_owned(), other)]),
        };
        Self {
            format: FORMAT,
            scenario: scenario.to_owned(),
            build: crate::BUILD_ID.to_owned(),
            machine: Machine::this(),
            guest_kernel: None,
            settings,
            programs: BTreeMap::new(),
            complete: false,
            ended_by: Some(GOES_ON.to_owned()),
            tables: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Names what was measured.
    pub fn program(&mut self, name: &str, program: &Path) {
        let program = program.display().to_string();
        self.programs.insert(name.to_owned(), program);
    }

    /// The table of that title.
    pub fn table(&mut self, title: &str) -> Option<&mut Report> {
        self.tables.iter_mut().find(|table| table.title == title)
    }

    /// Adds a value to a row of a side in a table; where there is no such table or side, it is not wanted.
    pub fn add(&mut self, title: &str, side: &str, row: &str, unit: Unit, value: f64) {
        if let Some(table) = self.table(title) {
            table.add(side, row, unit, value);
        }
    }

    /// Adds a sentence for people, once.
    pub fn note(&mut self, text: &str) {
        if !self.notes.iter().any(|known| known == text) {
            self.notes.push(text.to_owned());
        }
    }

    /// Nothing more comes; why, if that was not to be.
    pub fn end(&mut self, error: Option<&anyhow::Error>) {
        self.complete = error.is_none();
        self.ended_by = error.map(|error| format!("{error:#}"));
    }

    /// For people: where it was measured, the tables, and what is to be known of them.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.machine);
        if let Some(kernel) = &self.guest_kernel {
            text.push_str(&format!("Guest: {kernel}\n"));
        }
        for table in &self.tables {
            text.push_str(&format!("\n{}\n", table.table()));
        }
        if !self.notes.is_empty() {
            text.push_str(&format!("\n{}\n", self.notes.join("\n")));
        }
        if let Some(why) = &self.ended_by {
            text.push_str(&format!("\nNot all of it: {why}\n"));
        }
        text
    }

    /// Writes it in place of what is in the file; never a half of it.
    pub fn save(&self, file: &Path) -> Result<()> {
        replace(file, &serde_json::to_vec_pretty(self)?)
    }

    /// Reads what a run has left.
    ///
    /// # Errors
    /// The file cannot be read, is no such JSON, or is of another format.
    pub fn load(file: &Path) -> Result<Self> {
        let bytes = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        Self::parse(&bytes)
            .with_context(|| format!("{} cannot be read as values of nacre-bench", file.display()))
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| {
            if error.is_eof() {
                anyhow!("it ends too early ({error}): is all of it there?")
            } else {
                anyhow!("it is no JSON ({error})")
            }
        })?;
        let format = value.get("format").with_context(|| {
            "it does not say its format: it is another program's, or of a nacre-bench before format 1. Measure anew"
        })?;
        ensure!(
            *format == FORMAT,
            "it is of format {format}, and this nacre-bench ({}) knows {FORMAT}",
            crate::BUILD_ID
        );
        serde_json::from_value(value)
            .map_err(|error| anyhow!("what it has is not of format {FORMAT}: {error}"))
    }
}

/// Writes a file in place of what is there; never a half of it.
pub(super) fn replace(file: &Path, bytes: &[u8]) -> Result<()> {
    let mut partial = file.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, bytes)
        .and_then(|()| std::fs::rename(&partial, file))
        .with_context(|| format!("writing {}", file.display()))
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A row of a side, and its values.
    pub type Row<'r> = (&'r str, &'r [f64]);

    /// A document of one table, whose rows have these values on each of its sides.
    pub fn document(sides: &[(&str, &[Row<'_>])]) -> Document {
        let mut document = Document::new("lifecycle", json!({ "rounds": 3 }));
        let mut table = Report::new("lifecycle", sides.iter().map(|(side, _)| *side));
        for (side, rows) in sides {
            for (row, values) in *rows {
                for value in *values {
                    table.add(side, row, Unit::Ms, *value);
                }
            }
        }
        document.tables.push(table);
        document.end(None);
        document
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.json");
        let mut written = document(&[("nacre", &[("up", &[1.0, 0.25])]), ("runc", &[])]);
        written.guest_kernel = Some(GuestKernel::of(Path::new("/nowhere/vmlinux"), None));
        written.program("nacre", Path::new("/bin/shim"));
        written.save(&file).unwrap();
        assert_eq!(Document::load(&file).unwrap(), written);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_ours_is_refused_and_why() {
        let whole = serde_json::to_string(&document(&[("nacre", &[("up", &[1.0])])])).unwrap();
        let other = |from: &str, to: &str| whole.replacen(from, to, 1);
        for (text, words) in [
            (whole[..whole.len() / 2].to_owned(), "ends too early"),
            (String::new(), "ends too early"),
            ("<html>".to_owned(), "no JSON"),
            ("{}".to_owned(), "does not say its format"),
            ("[1]".to_owned(), "does not say its format"),
            (
                r#"{"scenario":"exec","shims":[]}"#.to_owned(),
                "before format 1",
            ),
            (other("\"format\":1", "\"format\":2"), "of format 2"),
            (other("\"unit\":\"ms\"", "\"unit\":\"ells\""), "ells"),
            (other("\"tables\"", "\"chairs\""), "tables"),
            (other("[1.0]", "[null]"), "null"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("a.json");
            std::fs::write(&file, &text).unwrap();
            let error = format!("{:#}", Document::load(&file).unwrap_err());
            assert!(error.contains(words), "{words} in {error}");
            assert!(error.contains("a.json"), "{error}");
        }
    }

    #[test]
    fn a_run_is_complete_once_it_has_ended_well() {
        let mut document = Document::new("exec", json!({}));
        assert!(!document.complete && document.text().contains(GOES_ON));
        document.end(Some(&anyhow!("interrupted")));
        assert!(!document.complete);
        assert!(document.text().contains("Not all of it: interrupted"));
        document.end(None);
        assert!(document.complete && !document.text().contains("Not all"));
    }

    #[test]
    fn notes_are_there_once() {
        let mut document = Document::new("exec", json!({}));
        document.note("a");
        document.note("a");
        assert_eq!(document.notes, ["a"]);
    }

    #[test]
    fn values_go_to_the_table_that_is_wanted() {
        let mut document = document(&[("nacre", &[])]);
        document.add("lifecycle", "nacre", "up", Unit::Ms, 2.0);
        document.add("elsewhere", "nacre", "up", Unit::Ms, 3.0);
        assert_eq!(document.tables[0].values("nacre", "up"), [2.0]);
    }

    #[test]
    fn this_machine_says_what_it_is() {
        let machine = Machine::this();
        assert!(machine.cpus > 0 && machine.memory_mib > 0);
        assert!(machine.to_string().contains(&machine.kernel));
        let text = "model name\t: A B\nMemTotal:  2048 kB\n";
        assert_eq!(field(text, "MemTotal").as_deref(), Some("2048 kB"));
        assert_eq!(field(text, "model name").as_deref(), Some("A B"));
        assert_eq!(field(text, "model"), None);
    }
}
