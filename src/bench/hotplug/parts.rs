//! What one plug or unplug is made of: the library's account of its steps,
//! split into parts that follow one another and add up to what the caller
//! waited for. All in milliseconds.

use crate::sandbox::resize::Step;

/// The whole of it, by the caller's clock; the last of [`Parts`].
pub(super) const TOTAL: &str = "= total";
/// Until the guest's kernel has reported success by `_OST`, without what our agent did in between.
pub(super) const REPORTED: &str = "= reported";

/// What those of each kind are, one after another.
pub(super) const PLUGGED: [&str; 4] = ["host call", "noticed", "online", "acknowledged"];
pub(super) const UNPLUGGED: [&str; 3] = ["offline", "ejected", "acknowledged"];
pub(super) const REQUESTED: [&str; 4] = ["host call", "first block", "last block", "acknowledged"];

/// Named times, in the order in which they are shown.
pub(super) type Parts = Vec<(&'static str, f64)>;

/// Microseconds as milliseconds.
fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}

fn sum(steps: &[Step], of: impl Fn(&Step) -> u64) -> u64 {
    steps.iter().map(of).fold(0, u64::saturating_add)
}

/// With what is left of the total as the last part, so that the parts add up. Their clocks are two, the guest's and ours: what
/// is left is not below 0.
fn with_rest(mut parts: Parts, rest: &'static str, total_us: u64) -> Parts {
    let known: f64 = parts.iter().map(|(_, ms)| ms).sum();
    parts.push((rest, (ms(total_us) - known).max(0.0)));
    parts.push((TOTAL, ms(total_us)));
    parts
}

/// vCPUs or units of ACPI memory that came; `reported_us`: until the guest's kernel had reported them, if it has.
pub(super) fn plugged(steps: &[Step], total_us: u64, reported_us: Option<u64>) -> Parts {
    let noticed = sum(steps, |step| step.noticed_us);
    let online = sum(steps, |step| step.online_us.saturating_sub(step.noticed_us));
    let parts = vec![
        ("host call", ms(sum(steps, |step| step.host_us))),
        ("noticed", ms(noticed)),
        ("online", ms(online)),
    ];
    let mut parts = with_rest(parts, "acknowledged", total_us);
    parts.extend(reported_us.map(|us| (REPORTED, ms(us))));
    parts
}

/// vCPUs or units of ACPI memory that went. The host's part is what the library counts from the request to eject until all is
/// given back.
pub(super) fn unplugged(steps: &[Step], total_us: u64) -> Parts {
    let parts = vec![
        ("offline", ms(sum(steps, |step| step.online_us))),
        ("ejected", ms(sum(steps, |step| step.host_us))),
    ];
    with_rest(parts, "acknowledged", total_us)
}

/// Memory that virtio-mem plugged or unplugged; the library's times of its one step are all from the request on.
pub(super) fn requested(steps: &[Step], total_us: u64) -> Parts {
    let host = sum(steps, |step| step.host_us);
    let noticed = sum(steps, |step| step.noticed_us.saturating_sub(step.host_us));
    let rest = sum(steps, |step| step.online_us.saturating_sub(step.noticed_us));
    let parts = vec![
        ("host call", ms(host)),
        ("first block", ms(noticed)),
        ("last block", ms(rest)),
    ];
    with_rest(parts, "acknowledged", total_us)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(host_us: u64, noticed_us: u64, online_us: u64) -> Step {
        Step {
            what: "a step".to_owned(),
            host_us,
            noticed_us,
            online_us,
            total_us: 0,
        }
    }

    /// All but the sums add up to the total, and are the ones that are told.
    fn adds_up(parts: &Parts, names: &[&str]) -> bool {
        let phases = parts.iter().map(|(name, _)| *name);
        let phases: Vec<_> = phases.filter(|name| !name.starts_with('=')).collect();
        assert_eq!(phases, names);
        let total = parts.iter().find(|(name, _)| *name == TOTAL).unwrap().1;
        let parts = parts.iter().filter(|(name, _)| !name.starts_with('='));
        (parts.map(|(_, ms)| ms).sum::<f64>() - total).abs() < 1e-6
    }

    #[test]
    fn parts_follow_one_another_and_add_up() {
        let steps = [step(1000, 20_000, 50_000), step(2000, 0, 10_000)];
        let parts = plugged(&steps, 70_000, Some(25_000));
        let expected = [
            ("host call", 3.0),
            ("noticed", 20.0),
            ("online", 40.0),
            ("acknowledged", 7.0),
            (TOTAL, 70.0),
            (REPORTED, 25.0),
        ];
        assert_eq!(parts, expected);
        assert!(adds_up(&parts, &PLUGGED));
        let parts = unplugged(&steps, 70_000);
        assert_eq!(parts[0], ("offline", 60.0));
        assert_eq!(parts[1], ("ejected", 3.0));
        assert!(adds_up(&parts, &UNPLUGGED));
    }

    #[test]
    fn what_the_driver_of_virtio_mem_does_is_split_at_its_first_block() {
        let parts = requested(&[step(500, 2500, 12_500)], 13_000);
        let expected = [
            ("host call", 0.5),
            ("first block", 2.0),
            ("last block", 10.0),
            ("acknowledged", 0.5),
            (TOTAL, 13.0),
        ];
        assert_eq!(parts, expected);
        assert!(adds_up(&parts, &REQUESTED));
    }

    #[test]
    fn a_guest_whose_clock_is_fast_makes_no_part_negative() {
        let parts = plugged(&[step(0, 10, u64::MAX), step(0, 10, u64::MAX)], 1000, None);
        assert!(parts.iter().all(|(_, ms)| *ms >= 0.0), "{parts:?}");
        assert!(
            requested(&[step(9, 3, 1)], 9)
                .iter()
                .all(|(_, ms)| *ms >= 0.0)
        );
    }
}
