//! What runs have left as one page: HTML that needs no other file and no script.
//! Here are its text and tables; `bars` and `lines` are its pictures.

mod bars;
mod lines;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use super::Setting;
use super::document::{Document, replace};
use super::report::{QUANTILES, Report, shown};

const STYLE: &str = include_str!("style.css");

/// Options of `nacre-bench page`.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Files that --json has written; the page has them one below another
    #[arg(value_name = "FILE.json", required = true)]
    files: Vec<PathBuf>,
}

/// Makes the page of all files.
pub(super) fn run(options: &Options, setting: &Setting) -> Result<()> {
    ensure!(
        setting.json.is_none(),
        "A page is made of files that are there: --json is for what measures, and for nacre-bench compare"
    );
    let to = setting.html.as_ref();
    let to = to.context("A page needs a file to be written to: --html FILE names it")?;
    let documents = options.files.iter().map(|file| Document::load(file));
    let documents = documents.collect::<Result<Vec<_>>>()?;
    replace(to, page(&documents)?.as_bytes())
}

/// The page's text.
pub(super) fn page(documents: &[Document]) -> Result<String> {
    let names: Vec<_> = documents.iter().map(|one| one.scenario.as_str()).collect();
    let sections = documents.iter().map(section).collect::<Result<Vec<_>>>()?;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "nacre-bench: " (names.join(", ")) }
                style { (PreEscaped(STYLE)) }
            }
            body { @for section in &sections { (section) } }
        }
    };
    Ok(page.into_string())
}

fn section(document: &Document) -> Result<Markup> {
    let tables = document
        .tables
        .iter()
        .map(table)
        .collect::<Result<Vec<_>>>()?;
    Ok(html! {
        section {
            h1 { "nacre-bench " (document.scenario) }
            @if let Some(why) = &document.ended_by { p.warning { "Not all of it was measured: " (why) } }
            (facts(document))
            @for table in &tables { (table) }
            @for note in &document.notes { p { (note) } }
        }
    })
}

/// Where, of what, and by which build.
fn facts(document: &Document) -> Markup {
    html! {
        dl {
            dt { "Build" } dd { (document.build) }
            dt { "Machine" } dd { (document.machine) }
            @if let Some(kernel) = &document.guest_kernel { dt { "Guest" } dd { (kernel) } }
            @if !document.settings.is_empty() {
                dt { "Settings" }
                dd { ul { @for (name, value) in &document.settings { li { (name) ": " (plain(value)) } } } }
            }
            @if !document.programs.is_empty() {
                dt { "Programs" }
                dd { ul { @for (name, program) in &document.programs { li { (name) ": " (program) } } } }
            }
        }
    }
}

/// A value of a setting as people read it.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn table(table: &Report) -> Result<Markup> {
    let pictures = lines::pictures(table)?;
    Ok(html! {
        h2 { (table.title) }
        (figures(table))
        @for note in &table.notes { p { (note) } }
        @if let Some(bars) = bars::bars(table) { (bars) }
        @for picture in &pictures { (picture) }
    })
}

/// The same figures as in the text.
fn figures(table: &Report) -> Markup {
    let ratios = table.ratios();
    html! {
        div.wide { table {
            thead { tr {
                th { } th { } th { "n" }
                @for side in &table.sides { @for (what, _) in QUANTILES { th { (side.name) " " (what) } } }
                @for ratio in &ratios { th { (ratio) } }
            } }
            tbody { @for row in table.rows() { tr {
                th scope="row" { (row.name) }
                td.unit { (row.unit.label()) }
                td { (row.counts()) }
                @for values in &row.values { @for (_, percent) in QUANTILES { td { (shown(values, percent)) } } }
                @for other in 1..table.sides.len() {
                    td { @if let Some(ratio) = row.ratio(other) { (format!("{ratio:.2}")) } }
                }
            } } }
        } }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::document::tests::document;
    use super::super::report::Unit;
    use super::*;

    const HOSTILE: &str = "<script>&\"'</style>";

    /// The page as XML, which its text is but for two lines: so that every tag is closed and all text is escaped.
    fn strict(page: &str) -> String {
        let body = page.strip_prefix("<!DOCTYPE html>").unwrap();
        let mut text = String::new();
        for piece in body.split_inclusive('>') {
            if let Some((before, meta)) = piece.split_once("<meta ") {
                text.push_str(&format!("{before}<meta {}/>", meta.trim_end_matches('>')));
            } else {
                text.push_str(piece);
            }
        }
        text
    }

    fn sample() -> Document {
        let rows: [(&str, &[f64]); 2] = [("create", &[3.0, 1.0, 2.0]), ("start", &[9.0, 7.0, 8.0])];
        let mut document = document(&[("nacre", &rows), (HOSTILE, &rows)]);
        document.tables[0].phases(&["create", "start"]);
        document
    }

    #[test]
    fn a_page_is_well_formed_and_holds_what_was_measured() {
        let mut document = sample();
        document.settings.insert("mib".into(), json!(20));
        document.program("nacre", std::path::Path::new("/bin/shim"));
        let page = page(std::slice::from_ref(&document)).unwrap();
        let text = strict(&page);
        let xml = roxmltree::Document::parse(&text).unwrap();
        let count = |tag: &str| {
            xml.descendants()
                .filter(|node| node.has_tag_name(tag))
                .count()
        };
        assert_eq!(count("table"), 1);
        assert_eq!(count("script"), 0);
        // Bars with two colours in their legend, and lines.
        let svg = |node: &roxmltree::Node<'_, '_>| node.tag_name().name() == "svg";
        assert_eq!(xml.descendants().filter(svg).count(), 4);
        let words: String = xml.descendants().filter_map(|node| node.text()).collect();
        let build = document.build.clone();
        for expected in [
            "lifecycle",
            &build,
            "mib: 20",
            "nacre: /bin/shim",
            "8.00",
            "1.00",
        ] {
            assert!(words.contains(expected), "{expected} in {words}");
        }
    }

    #[test]
    fn all_that_comes_from_a_file_is_escaped() {
        let mut document = sample();
        document.scenario = HOSTILE.into();
        document.build = HOSTILE.into();
        document.machine.cpu = HOSTILE.into();
        document.settings.insert(HOSTILE.into(), json!(HOSTILE));
        document.programs.insert(HOSTILE.into(), HOSTILE.into());
        document.note(HOSTILE);
        document.ended_by = Some(HOSTILE.into());
        let table = &mut document.tables[0];
        table.title = HOSTILE.into();
        table.note(HOSTILE.into());
        for value in [1.0, 2.0, 3.0] {
            table.add("nacre", HOSTILE, Unit::Us, value);
        }
        let page = page(&[document]).unwrap();
        assert!(!page.contains("<script"));
        let text = strict(&page);
        let xml = roxmltree::Document::parse(&text).unwrap();
        let whole =
            |node: &roxmltree::Node<'_, '_>| node.text().is_some_and(|text| text.contains(HOSTILE));
        assert!(xml.descendants().filter(whole).count() >= 10);
    }

    #[test]
    fn a_page_needs_nothing_from_elsewhere() {
        let page = page(&[sample(), sample()]).unwrap();
        for words in ["href", "src=", "url(", "@import", "<script", "<link"] {
            assert!(!page.contains(words), "{words}");
        }
        assert!(page.contains("prefers-color-scheme") && page.contains("color-scheme: light dark"));
    }

    #[test]
    fn a_run_that_has_not_measured_anything_has_a_page_that_says_so() {
        let mut document = document(&[("nacre", &[])]);
        document.end(Some(&anyhow::anyhow!("interrupted")));
        let page = page(&[document]).unwrap();
        roxmltree::Document::parse(&strict(&page)).unwrap();
        assert!(page.contains("Not all of it was measured: interrupted"));
        assert!(!page.contains("<svg"));
    }

    #[test]
    fn page_reads_files_and_wants_to_know_where_to() {
        let folder = tempfile::tempdir().unwrap();
        let (json, html) = (folder.path().join("a.json"), folder.path().join("a.html"));
        sample().save(&json).unwrap();
        let options = Options {
            files: vec![json.clone(), json],
        };
        let error = run(&options, &Setting::default()).unwrap_err();
        assert!(error.to_string().contains("--html"));
        let error = {
            let setting = Setting {
                json: Some(html.clone()),
                html: Some(html.clone()),
                ..Setting::default()
            };
            run(&options, &setting).unwrap_err()
        };
        assert!(error.to_string().contains("--json"));
        let setting = Setting {
            html: Some(html.clone()),
            ..Setting::default()
        };
        run(&options, &setting).unwrap();
        let page = std::fs::read_to_string(html).unwrap();
        assert_eq!(page.matches("<section>").count(), 2);
    }
}
