//! Comparisons of runs that are made up: what is found, what is not, and what is refused.

use std::path::Path;

use super::judge::{Row, decide};
use super::*;
use crate::bench::document::tests::document;
use crate::bench::report::{Better, Report, Unit};

mod left;

/// Values around `mean` with a normal distribution, whose deviation is that part of it.
fn noisy(random: &mut fastrand::Rng, count: usize, mean: f64, noise: f64) -> Vec<f64> {
    let value = |_| {
        let sum: f64 = (0..12).map(|_| random.f64()).sum();
        mean * (1.0 + noise * (sum - 6.0))
    };
    (0..count).map(value).collect()
}

fn of_values(a: &[f64], b: &[f64]) -> (Document, Document) {
    let one = |values: &[f64]| document(&[("nacre", &[("up", values)])]);
    (one(a), one(b))
}

const TERMS: Terms = Terms {
    threshold: 5.0,
    ratios: false,
};

fn options() -> Options {
    Options {
        a: "a.json".into(),
        b: "b.json".into(),
        threshold: 5.0,
        ratios: false,
        fail: false,
    }
}

fn first(a: &Document, b: &Document, terms: Terms) -> Row {
    judge(a, b, terms).rows.remove(0)
}

#[test]
fn samples_of_one_distribution_are_rarely_called_changed() {
    let mut random = fastrand::Rng::with_seed(1);
    // Of so much noise that the threshold alone would call most of them changed.
    let changed = |_: &usize| {
        let (a, b) = of_values(
            &noisy(&mut random, 10, 50.0, 0.3),
            &noisy(&mut random, 10, 50.0, 0.3),
        );
        anything(&a, &b)
    };
    let changed = (0..1000).filter(changed).count();
    assert!(changed < 70, "{changed} of 1000");
    // The test is not deaf: of true nothings some look like something.
    assert!(changed > 10, "{changed} of 1000");
}

/// Whether anything is called changed.
fn anything(a: &Document, b: &Document) -> bool {
    let (pairs, _) = decide(a, b, TERMS);
    pairs.iter().any(|pair| pair.row.verdict.has_changed())
}

#[test]
fn many_rows_do_not_make_a_change_of_nothing() {
    let mut random = fastrand::Rng::with_seed(2);
    let names: Vec<String> = (0..8).map(|at| format!("row {at}")).collect();
    let mut one = |_| {
        let mut run = || {
            let values: Vec<_> = names
                .iter()
                .map(|_| noisy(&mut random, 8, 50.0, 0.3))
                .collect();
            let rows: Vec<(&str, &[f64])> = names
                .iter()
                .zip(&values)
                .map(|(name, values)| (name.as_str(), values.as_slice()))
                .collect();
            document(&[("nacre", &rows)])
        };
        let (a, b) = (run(), run());
        usize::from(anything(&a, &b))
    };
    let changed: usize = (0..200).map(&mut one).sum();
    assert!(changed < 14, "{changed} of 200");
}

#[test]
fn a_shift_of_a_fifth_is_found_always() {
    let mut random = fastrand::Rng::with_seed(3);
    for round in 0..100 {
        for (factor, verdict) in [(1.2, Verdict::Worse), (1.0 / 1.2, Verdict::Better)] {
            let (a, b) = of_values(
                &noisy(&mut random, 10, 50.0, 0.03),
                &noisy(&mut random, 10, 50.0 * factor, 0.03),
            );
            let row = first(&a, &b, TERMS);
            assert_eq!(row.verdict, verdict, "round {round}: {}", row.why);
            let (low, high) = row.interval.unwrap();
            let change = row.change.unwrap();
            assert!(low <= change && change <= high, "{low} {change} {high}");
        }
    }
}

#[test]
fn a_change_that_is_certain_but_small_is_none() {
    let values =
        |from: f64| -> Vec<f64> { (0..20).map(|at| from + f64::from(at) / 100.0).collect() };
    let (a, b) = of_values(&values(100.0), &values(103.0));
    let row = first(&a, &b, TERMS);
    assert_eq!(row.verdict, Verdict::Unchanged);
    assert!(row.why.contains("below 5 %"), "{}", row.why);
    let strict = Terms {
        threshold: 1.0,
        ..TERMS
    };
    assert_eq!(first(&a, &b, strict).verdict, Verdict::Worse);
}

#[test]
fn few_values_are_not_judged() {
    let (a, b) = of_values(&[1.0, 2.0, 3.0], &[11.0, 12.0, 13.0]);
    let row = first(&a, &b, TERMS);
    assert_eq!(row.verdict, Verdict::TooFewValues);
    assert!(row.why.contains("4 of each"), "{}", row.why);
    let (a, b) = of_values(&[1.0, 2.0, 3.0, 4.0], &[11.0, 12.0, 13.0, 14.0]);
    assert_eq!(first(&a, &b, TERMS).verdict, Verdict::Worse);
}

#[test]
fn values_that_would_do_for_one_row_are_too_few_for_many() {
    let names: Vec<String> = (0..10).map(|at| format!("row {at}")).collect();
    let (low, high) = ([1.0, 2.0, 3.0, 4.0], [11.0, 12.0, 13.0, 14.0]);
    // So many of ten rows have changed, as far as four values can.
    let verdicts = |changed: usize| {
        let row = |at: usize| {
            (
                names[at].as_str(),
                if at < changed { &high[..] } else { &low },
            )
        };
        let a: Vec<_> = (0..10).map(|at| (names[at].as_str(), &low[..])).collect();
        let b: Vec<_> = (0..10).map(row).collect();
        let (pairs, _) = decide(
            &document(&[("nacre", &a)]),
            &document(&[("nacre", &b)]),
            TERMS,
        );
        (pairs[0].row.verdict, pairs[9].row.verdict)
    };
    let (few, unchanged) = (Verdict::TooFewValues, Verdict::Unchanged);
    for (changed, expected) in [
        (0, (few, few)),
        (1, (few, few)),
        // One that all but two share is no chance; and one more would have been found.
        (8, (Verdict::Worse, unchanged)),
    ] {
        assert_eq!(verdicts(changed), expected, "{changed}");
    }
}

#[test]
fn counts_that_never_vary_are_compared_exactly() {
    let counted = |values: &[f64], better| {
        let mut document = document(&[]);
        let mut table = Report::new("lifecycle", ["nacre"]);
        for value in values {
            table.add("nacre", "descriptors", Unit::Count, *value);
        }
        table.better("nacre", "descriptors", better);
        document.tables = vec![table];
        document
    };
    let (less, neither) = (Better::Less, Better::Neither);
    for (a, b, better, verdict) in [
        (&[3.0; 2][..], &[3.0; 2][..], less, Verdict::Unchanged),
        (&[0.0; 2], &[1.0; 2], less, Verdict::Worse),
        // Below the threshold, which is for what varies.
        (&[100.0; 2], &[101.0; 3], less, Verdict::Worse),
        // Nobody knows whether it is the same each time.
        (&[3.0], &[4.0; 5], less, Verdict::TooFewValues),
        (&[3.0; 5], &[4.0], less, Verdict::TooFewValues),
        (&[3.0], &[3.0], less, Verdict::TooFewValues),
        (&[100.0; 2], &[99.0; 2], less, Verdict::Better),
        (&[100.0; 2], &[99.0; 2], neither, Verdict::Changed),
        (&[100.0, 101.0], &[99.0; 2], less, Verdict::TooFewValues),
    ] {
        let row = first(&counted(a, better), &counted(b, better), TERMS);
        assert_eq!(row.verdict, verdict, "{a:?} to {b:?}: {}", row.why);
    }
}

/// Two sides, ours `ours` times as slow as the reference, on a machine that is `slow` times as slow.
fn on_a_machine(cpu: &str, slow: f64, ours: f64) -> Document {
    let mut random = fastrand::Rng::with_seed(4);
    let theirs = noisy(&mut random, 10, 20.0 * slow, 0.03);
    let ours = noisy(&mut random, 10, 20.0 * slow * ours, 0.03);
    let mut document = document(&[("nacre", &[("up", &ours)]), ("runc", &[("up", &theirs)])]);
    document.machine.cpu = cpu.to_owned();
    document
}

#[test]
fn on_two_machines_ratios_are_compared() {
    for (ours, verdict, words) in [
        (3.0, Verdict::Unchanged, "unchanged"),
        (4.0, Verdict::Worse, "slower"),
        (2.0, Verdict::Better, "faster"),
    ] {
        let (a, b) = (
            on_a_machine("fast", 1.0, 3.0),
            on_a_machine("slow", 5.0, ours),
        );
        let comparison = Comparison::new(a, b, &options()).unwrap();
        let rows = &comparison.judged.rows;
        assert_eq!(rows.len(), 1);
        assert_eq!(
            (rows[0].side.as_str(), rows[0].verdict),
            ("nacre/runc", verdict)
        );
        let text = comparison.text(Path::new("a"), Path::new("b"));
        for words in ["The machines differ", "CPU: fast in A, slow in B", words] {
            assert!(text.contains(words), "{words} in {text}");
        }
    }
    // On one machine, only where it is asked for.
    let (a, b) = (on_a_machine("x", 1.0, 3.0), on_a_machine("x", 5.0, 3.0));
    let plain = Comparison::new(a.clone(), b.clone(), &options()).unwrap();
    assert_eq!(plain.count(Verdict::Worse), 2);
    let ratios = Options {
        ratios: true,
        ..options()
    };
    assert_eq!(
        Comparison::new(a, b, &ratios)
            .unwrap()
            .count(Verdict::Worse),
        0
    );
}

#[test]
fn without_a_reference_times_of_two_machines_are_not_compared_but_memory_is() {
    let mut a = document(&[("nacre", &[("up", &[1.0])])]);
    let mut b = a.clone();
    b.machine.cpus += 1;
    let error = Comparison::new(a.clone(), b.clone(), &options());
    let error = error.map(|_| ()).unwrap_err();
    for (document, kib) in [(&mut a, 100.0), (&mut b, 300.0)] {
        for more in [0.0, 1.0, 2.0, 3.0] {
            document.add("lifecycle", "nacre", "RSS", Unit::Kib, kib + more);
        }
    }
    let judged = Comparison::new(a, b, &options()).unwrap().judged;
    assert_eq!(judged.rows.len(), 1);
    assert_eq!(judged.rows[0].verdict, Verdict::Worse);
    let notes = judged.left.notes;
    assert!(notes[0].contains("up, nacre"), "{notes:?}");
    assert!(
        error.to_string().contains("Nothing to relate it to"),
        "{error}"
    );
}

#[test]
fn what_differs_around_the_runs_is_named_before_the_figures() {
    let a = document(&[("nacre", &[("up", &[1.0])])]);
    let same = Comparison::new(a.clone(), a.clone(), &options()).unwrap();
    let text = same.text(Path::new("a"), Path::new("b"));
    assert!(text.contains("settings are the same"), "{text}");
    let mut b = a.clone();
    b.settings.insert("mib".into(), 20.into());
    b.machine.kernel = "9.9".into();
    b.guest_kernel = Some(GuestKernel {
        file: "/k".into(),
        release: Some("6.12".into()),
        sha256: None,
        initrd: None,
    });
    b.program("nacre", Path::new("/bin/shim"));
    b.end(Some(&anyhow::anyhow!("interrupted")));
    b.tables[0].add("nacre", "down", Unit::Ms, 1.0);
    let comparison = Comparison::new(a, b, &options()).unwrap();
    let text = comparison.text(Path::new("a"), Path::new("b"));
    let table = text.find("| up ").unwrap();
    for words in [
        "setting mib: none in A, 20 in B",
        "host's kernel: ",
        "guest's kernel: unknown in A, 6.12 in B",
        "program of nacre: none in A, /bin/shim in B",
        "B is not complete: interrupted",
    ] {
        assert!(text[..table].contains(words), "{words} in {text}");
    }
    assert!(
        text[table..].contains("Only in B: lifecycle, down, nacre"),
        "{text}"
    );
    let value = comparison.json(Path::new("a"), Path::new("b"));
    assert_eq!(value["rows"][0]["verdict"], "too-few-values");
    assert_eq!(value["differences"].as_array().unwrap().len(), 4);
}

#[test]
fn what_has_changed_stands_in_front_the_worst_first() {
    let (low, high) = ([1.0, 1.1, 1.2, 1.3, 1.4], [9.0, 9.1, 9.2, 9.3, 9.4]);
    let far = high.map(|value| value * 10.0);
    let a = document(&[(
        "nacre",
        &[
            ("same", &low),
            ("faster", &high),
            ("slower", &low),
            ("slowest", &low),
        ],
    )]);
    let b = document(&[(
        "nacre",
        &[
            ("same", &low),
            ("faster", &low),
            ("slower", &high),
            ("slowest", &far),
        ],
    )]);
    let rows = judge(&a, &b, TERMS).rows;
    let names: Vec<_> = rows.iter().map(|row| row.row.as_str()).collect();
    assert_eq!(names, ["slowest", "slower", "faster", "same"]);
}

#[test]
fn only_runs_of_one_scenario_are_compared_and_worse_fails_where_asked() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, document: &Document| {
        let file = folder.path().join(name);
        document.save(&file).unwrap();
        file
    };
    let values = [1.0, 2.0, 3.0, 4.0, 5.0];
    let (a, b) = of_values(&values, &values.map(|value| value + 50.0));
    let (fast, slow) = (write("a.json", &a), write("b.json", &b));
    let json = folder.path().join("c.json");
    let setting = Setting {
        json: Some(json.clone()),
        ..Setting::default()
    };
    for (from, to, fail, code) in [
        (&fast, &slow, false, ExitCode::SUCCESS),
        (&fast, &slow, true, ExitCode::FAILURE),
        (&slow, &fast, true, ExitCode::SUCCESS),
    ] {
        let options = Options {
            a: from.clone(),
            b: to.clone(),
            fail,
            ..options()
        };
        let ended = run(&options, &setting).unwrap();
        assert_eq!(format!("{ended:?}"), format!("{code:?}"));
    }
    let text = std::fs::read_to_string(json).unwrap();
    assert!(text.contains("\"better\"") && text.contains("\"compared\": \"lifecycle\""));
    let other = Document {
        scenario: "exec".into(),
        ..b
    };
    let options = Options {
        a: fast,
        b: write("other.json", &other),
        ..options()
    };
    let error = run(&options, &setting).unwrap_err().to_string();
    assert!(
        error.contains("lifecycle") && error.contains("exec"),
        "{error}"
    );
}
