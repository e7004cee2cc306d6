//! Whether two samples differ by more than chance: the rank-sum test of Mann and
//! Whitney, the correction of Benjamini and Hochberg for many tests, and an
//! interval of a change by the bootstrap. Nothing here knows what is compared.

use crate::bench::report::quantile;

/// Up to so many values together the test is exact, beyond by the normal distribution.
const EXACT: usize = 40;
/// Samples of the bootstrap, and values of a side that it takes at most.
const RESAMPLES: usize = 1000;
const MOST: usize = 500;
/// The same interval each time.
const SEED: u64 = 0x6e61_6372_6521;

/// How likely ranks as unequal as these are if both samples are of one distribution; two-sided. 1 if one is empty.
pub(super) fn p_value(a: &[f64], b: &[f64]) -> f64 {
    if a.is_empty() || b.is_empty() {
        return 1.0;
    }
    let (ranks, ties) = ranks(a, b);
    let count = ranks.len();
    let (first, second) = (a.len() as f64, b.len() as f64);
    // All ranks are doubled, so that those of ties are whole.
    let sum: usize = ranks[..a.len()].iter().sum();
    let expected = a.len() * (count + 1);
    let off = sum.abs_diff(expected);
    if count <= EXACT {
        return exact(&ranks, a.len(), expected, off);
    }
    let all = count as f64;
    let variance = first * second / 12.0 * (all + 1.0 - ties / (all * (all - 1.0)));
    if variance <= 0.0 {
        return 1.0;
    }
    // U is off by half of the doubled ranks; a half is for its steps.
    let z = (off as f64 / 2.0 - 0.5).max(0.0) / variance.sqrt();
    libm::erfc(z / std::f64::consts::SQRT_2).min(1.0)
}

/// The smallest value that the test can have with so many values: no value of one sample is between two of the other.
pub(super) fn least_p(a: usize, b: usize) -> f64 {
    // 2 of all ways to choose which ranks are the first sample's.
    let ways = (1..=a).fold(1.0, |ways, at| ways * (b + at) as f64 / at as f64);
    (2.0 / ways).min(1.0)
}

/// The doubled ranks of all values, the first sample's in front, equal values with their mean rank; and the sum of t³ − t over all
/// groups of t equal values.
fn ranks(a: &[f64], b: &[f64]) -> (Vec<usize>, f64) {
    let all: Vec<f64> = a.iter().chain(b).copied().collect();
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by(|one, other| all[*one].total_cmp(&all[*other]));
    let mut ranks = vec![0; all.len()];
    let (mut before, mut ties) = (0, 0.0);
    for equal in order.chunk_by(|one, other| all[*one] == all[*other]) {
        for at in equal {
            ranks[*at] = 2 * before + equal.len() + 1;
        }
        before += equal.len();
        let size = equal.len() as f64;
        ties += size.powi(3) - size;
    }
    (ranks, ties)
}

/// The part of all ways to choose as many of these ranks whose sum is at least as far off.
fn exact(ranks: &[usize], chosen: usize, expected: usize, off: usize) -> f64 {
    let most: usize = ranks.iter().sum();
    // Ways to choose so many ranks with this sum.
    let mut ways = vec![vec![0.0; most + 1]; chosen + 1];
    ways[0][0] = 1.0;
    for rank in ranks {
        for count in (0..chosen).rev() {
            for sum in 0..=most - rank {
                ways[count + 1][sum + rank] += ways[count][sum];
            }
        }
    }
    let all: f64 = ways[chosen].iter().sum();
    let sums = ways[chosen].iter().enumerate();
    let far: f64 = sums
        .filter(|(sum, _)| sum.abs_diff(expected) >= off)
        .map(|(_, ways)| ways)
        .sum();
    far / all
}

/// What each value of many tests becomes when the expected part of false ones among all that are called changed is to be what a
/// single test would have (Benjamini and Hochberg).
pub(super) fn corrected(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|one, other| values[*other].total_cmp(&values[*one]));
    let mut corrected = vec![1.0; values.len()];
    let mut least: f64 = 1.0;
    for (place, at) in order.iter().enumerate() {
        let rank = values.len() - place;
        least = least.min(values[*at] * values.len() as f64 / rank as f64);
        corrected[*at] = least;
    }
    corrected
}

/// By how many percent the median may have changed: what 95 of 100 samples drawn anew from both say. None where the first median
/// is not above 0.
pub(super) fn interval(a: &[f64], b: &[f64]) -> Option<(f64, f64)> {
    if a.is_empty() || b.is_empty() || quantile(a, 50.0) <= 0.0 {
        return None;
    }
    let (a, b) = (thinned(a), thinned(b));
    let mut random = fastrand::Rng::with_seed(SEED);
    let mut median = |all: &[f64]| {
        let drawn: Vec<f64> = all.iter().map(|_| all[random.usize(..all.len())]).collect();
        quantile(&drawn, 50.0)
    };
    let changes: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| percent(median(&a), median(&b)))
        .collect();
    let (low, high) = (quantile(&changes, 2.5), quantile(&changes, 97.5));
    (!changes.is_empty()).then_some((low, high))
}

/// Every so many of the values, where there are more than need be.
fn thinned(values: &[f64]) -> Vec<f64> {
    let step = values.len().div_ceil(MOST).max(1);
    values.iter().copied().step_by(step).collect()
}

/// From one value to another, in percent of the first; None from 0, unless it stays.
pub(super) fn percent(from: f64, to: f64) -> Option<f64> {
    if from == to {
        Some(0.0)
    } else {
        (from != 0.0).then(|| (to - from) / from.abs() * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(value: f64, expected: f64) -> bool {
        (value - expected).abs() < 1e-9
    }

    #[test]
    fn the_test_has_the_values_that_are_known() {
        // What others compute for the same samples.
        let (male, female) = ([19.0, 22.0, 16.0, 29.0, 24.0], [20.0, 11.0, 17.0, 12.0]);
        assert!(close(p_value(&male, &female), 1.0 / 9.0));
        assert!(close(p_value(&female, &male), 1.0 / 9.0));
        let counted = |count: usize, from: usize| -> Vec<f64> {
            (from..from + count).map(|value| value as f64).collect()
        };
        for (count, ways) in [(2, 6.0), (3, 20.0), (4, 70.0), (5, 252.0), (10, 184_756.0)] {
            let p = p_value(&counted(count, 0), &counted(count, 100));
            assert!(close(p, 2.0 / ways), "{count}: {p}");
            assert!(close(p, least_p(count, count)), "{count}: {p}");
        }
        assert!(close(least_p(1, 4), 0.4));
        assert_eq!(least_p(1, 1), 1.0);
        assert_eq!(p_value(&[3.0, 3.0], &[3.0, 3.0]), 1.0);
        assert_eq!(p_value(&[], &[3.0]), 1.0);
    }

    #[test]
    fn many_values_are_judged_as_few_are() {
        // The same samples, once below the limit of the exact test and once above.
        let sample = |count: usize, shift: f64| -> Vec<f64> {
            (0..count)
                .map(|at| (at * 7 % count) as f64 / count as f64 + shift)
                .collect()
        };
        let exact = p_value(&sample(20, 0.0), &sample(20, 0.12));
        let normal = {
            let (a, b) = (sample(20, 0.0), sample(20, 0.12));
            let (ranks, ties) = ranks(&a, &b);
            let sum: usize = ranks[..20].iter().sum();
            let off = sum.abs_diff(20 * 41) as f64;
            let variance = 400.0 / 12.0 * (41.0 - ties / (40.0 * 39.0));
            libm::erfc((off / 2.0 - 0.5) / variance.sqrt() / std::f64::consts::SQRT_2)
        };
        assert!((exact - normal).abs() < 0.01, "{exact} and {normal}");
        assert!(p_value(&sample(400, 0.0), &sample(400, 0.5)) < 1e-6);
        assert_eq!(p_value(&[2.0; 50], &[2.0; 50]), 1.0);
    }

    #[test]
    fn equal_values_share_their_rank() {
        let (ranks, ties) = ranks(&[1.0, 2.0], &[2.0, 3.0]);
        assert_eq!((ranks, ties), (vec![2, 5, 5, 8], 6.0));
    }

    #[test]
    fn many_tests_are_corrected_for() {
        let corrected = corrected(&[0.01, 0.04, 0.03, 0.005]);
        for (value, expected) in corrected.iter().zip([0.02, 0.04, 0.04, 0.02]) {
            assert!(close(*value, expected), "{corrected:?}");
        }
        assert!(super::corrected(&[]).is_empty());
    }

    #[test]
    fn a_change_is_in_its_interval_and_the_same_each_time() {
        let a: Vec<f64> = (0..20).map(|at| 100.0 + f64::from(at % 5)).collect();
        let b: Vec<f64> = a.iter().map(|value| value * 1.2).collect();
        let (low, high) = interval(&a, &b).unwrap();
        assert!(low < 20.0 && 20.0 < high && low > 10.0 && high < 30.0);
        assert_eq!(interval(&a, &b), Some((low, high)));
        assert_eq!(interval(&[0.0], &[1.0]), None);
    }

    #[test]
    fn a_change_is_relative_to_what_was() {
        for (from, to, expected) in [
            (10.0, 12.0, Some(20.0)),
            (10.0, 5.0, Some(-50.0)),
            (-4.0, 4.0, Some(200.0)),
            (0.0, 0.0, Some(0.0)),
            (0.0, 3.0, None),
        ] {
            assert_eq!(percent(from, to), expected, "{from} to {to}");
        }
    }
}
