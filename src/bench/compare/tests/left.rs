//! What one of the runs lacks, and guests that were built anew.

use super::*;
use crate::bench::guest::Initrd;

#[test]
fn guests_of_one_release_that_were_built_anew_are_told_apart() {
    let run = |kernel: Option<&str>, initrd: &str| {
        let mut document = document(&[("nacre", &[("up", &[1.0])])]);
        document.guest_kernel = Some(GuestKernel {
            file: "/k".into(),
            release: Some("6.12".into()),
            sha256: kernel.map(str::to_owned),
            initrd: Some(Initrd {
                file: "/i".into(),
                sha256: Some(initrd.into()),
            }),
        });
        document
    };
    for (a, b, words) in [
        (run(Some("ab"), "1"), run(Some("ab"), "1"), None),
        // Files of before have none.
        (run(None, "1"), run(Some("ab"), "1"), None),
        (
            run(Some("ab"), "1"),
            run(Some("cd"), "1"),
            Some("SHA-256 cd"),
        ),
        (
            run(Some("ab"), "1"),
            run(Some("ab"), "2"),
            Some("initrd: 1 in A, 2 in B"),
        ),
    ] {
        let differences = differences(&a, &b).join("; ");
        match words {
            Some(words) => assert!(differences.contains(words), "{differences}"),
            None => assert_eq!(differences, ""),
        }
    }
}

#[test]
fn what_b_lacks_fails_with_words_and_what_a_lacks_does_not() {
    let rows = |rows: &[(&str, &[f64])]| document(&[("nacre", rows)]);
    let values = [1.0, 2.0, 3.0, 4.0, 5.0];
    let whole = rows(&[("up", &values), ("down", &values)]);
    let mut stopped = whole.clone();
    stopped.end(Some(&anyhow::anyhow!("interrupted")));
    let mut counted = whole.clone();
    counted.tables[0].better("nacre", "down", Better::Neither);
    let mut tableless = whole.clone();
    let other = Report::new("exec", ["nacre"]);
    tableless.tables.push(other);
    let part = rows(&[("up", &values)]);
    for (a, b, words) in [
        (&whole, &whole, None),
        (&part, &whole, None),
        (&stopped, &whole, None),
        (&whole, &part, Some("A has and B has not")),
        (&whole, &counted, Some("not in the same unit: 1")),
        (&tableless, &whole, Some("B has not")),
        (&whole, &stopped, Some("B is not complete: interrupted")),
    ] {
        let comparison = Comparison::new(a.clone(), b.clone(), &options()).unwrap();
        let failures = comparison.failures().join("; ");
        match words {
            Some(words) => assert!(failures.contains(words), "{words} in {failures}"),
            None => assert_eq!(failures, ""),
        }
    }
}

#[test]
fn ratios_are_of_one_round_and_of_nothing_there_is_none() {
    // In round 1 one side has failed; the beginning is 0 for all.
    let run = |missing: &str| {
        let mut table = Report::new("boot", ["nacre", "qemu"]);
        for round in 0..6 {
            table.round = round;
            for (side, factor) in [("nacre", 2.0), ("qemu", 1.0)] {
                table.add(side, "begin", Unit::Ms, 0.0);
                if side != missing || round != 1 {
                    let value = factor * 10.0_f64.powi(round as i32);
                    table.add(side, "init", Unit::Ms, value);
                }
            }
        }
        table.add("qemu", "zero", Unit::Ms, 0.0);
        table.add("nacre", "zero", Unit::Ms, 1.0);
        let mut document = document(&[]);
        document.tables = vec![table];
        document
    };
    let terms = Terms {
        ratios: true,
        ..TERMS
    };
    let (pairs, left) = decide(&run("nacre"), &run("qemu"), terms);
    let rows: Vec<_> = pairs
        .iter()
        .map(|pair| {
            (
                pair.row.row.as_str(),
                pair.row.a,
                pair.row.b,
                pair.row.counts,
            )
        })
        .collect();
    assert_eq!(rows, [("init", 2.0, 2.0, (5, 5))]);
    assert!(left.all().join(" ").contains("boot, zero, nacre"));
    // Neither is a beginning that is always 0 one more test of the others.
    assert!(
        decide(&run(""), &run(""), TERMS)
            .0
            .iter()
            .all(|pair| pair.row.row != "begin")
    );
}
