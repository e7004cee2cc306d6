use super::*;

const SECOND: u64 = 1_000_000;

/// A guest whose counters run as it is told.
struct Guest {
    policy: CpuPolicy,
    now: Duration,
    reading: CpuReading,
}

impl Guest {
    fn new(rules: CpuRules, bounds: Bounds<u8>) -> Self {
        Self::with(rules, bounds, bounds.boot())
    }

    /// Which has had its first reading.
    fn with(rules: CpuRules, bounds: Bounds<u8>, online: u8) -> Self {
        let mut policy = CpuPolicy::new(rules, bounds, online);
        let reading = CpuReading {
            online,
            busy_us: 7,
            total_us: 1000,
            throttled_us: 3,
        };
        policy.step(Duration::ZERO, &reading);
        Self {
            policy,
            now: Duration::ZERO,
            reading,
        }
    }

    /// After five seconds more in which the CPUs were busy for so many thousandths of the time.
    fn reads(&mut self, load: u64) -> Decision<u8> {
        self.throttled(load, 0)
    }

    fn throttled(&mut self, load: u64, throttled: u64) -> Decision<u8> {
        let total = 5 * SECOND * u64::from(self.reading.online);
        self.now += Duration::from_secs(5);
        self.reading.total_us += total;
        self.reading.busy_us += total * load / 1000;
        self.reading.throttled_us += total * throttled / 1000;
        self.policy.step(self.now, &self.reading)
    }

    /// The same, and does what is decided.
    fn follows(&mut self, load: u64) -> Decision<u8> {
        let decision = self.reads(load);
        if let Decision::Up(to) | Decision::Down(to) = decision {
            self.reading.online = to;
            self.policy.settled(self.now, to);
        }
        decision
    }
}

fn counting(have: u8, need: u8) -> Decision<u8> {
    Decision::Hold(Hold::Counting { have, need })
}

fn cooldown(seconds: u64) -> Decision<u8> {
    Decision::Hold(Hold::Cooldown {
        left: Duration::from_secs(seconds),
    })
}

const STEADY: Decision<u8> = Decision::Hold(Hold::Steady);

#[test]
fn edges_of_the_loads() {
    use Decision::{Down, Hold as H, Up};
    let table = [
        // vCPUs, load and throttled in thousandths, readings → the last decision
        (1, 799, 0, 9, STEADY),
        (1, 800, 0, 1, counting(1, 2)),
        (1, 800, 0, 2, Up(2)),
        (1, 1000, 49, 2, Up(2)),
        (1, 1000, 50, 9, H(Hold::Throttled)),
        (1, 799, 50, 9, STEADY),
        (8, 1000, 0, 9, H(Hold::AtCeiling)),
        // One fewer of two would have twice the load, of four a third more.
        (2, 251, 0, 9, STEADY),
        (2, 250, 0, 5, counting(5, 6)),
        (2, 250, 0, 6, Down(1)),
        (4, 375, 0, 6, Down(3)),
        (4, 376, 0, 9, STEADY),
        (4, 0, 0, 6, Down(3)),
        (1, 0, 0, 20, STEADY),
    ];
    for (online, load, throttled, readings, last) in table {
        let mut guest = Guest::with(CpuRules::default(), Bounds::new(1, 8), online);
        let mut decision = H(Hold::Off);
        for reading in 1..=readings {
            decision = guest.throttled(load, throttled);
            let done = matches!(decision, Up(_) | Down(_));
            assert_eq!(done, done && reading == readings, "{online} {load}");
        }
        assert_eq!(decision, last, "{online} vCPUs, {load} of 1000");
    }
}

#[test]
fn a_reading_that_says_otherwise_begins_the_row_anew() {
    let mut guest = Guest::new(CpuRules::default(), Bounds::new(1, 8));
    for load in [800, 799, 800] {
        guest.reads(load);
    }
    assert_eq!(guest.throttled(900, 50), Decision::Hold(Hold::Throttled));
    assert_eq!(guest.reads(800), counting(1, 2));
    assert_eq!(guest.reads(800), Decision::Up(2));

    let mut guest = Guest::with(CpuRules::default(), Bounds::new(1, 8), 4);
    for _ in 0..5 {
        guest.reads(0);
    }
    assert_eq!(guest.reads(500), STEADY);
    assert_eq!(guest.reads(0), counting(1, 6));
    assert_eq!(guest.reads(900), counting(1, 2));
    assert_eq!(guest.reads(0), counting(1, 6));
}

#[test]
fn growing_waits_ten_seconds_and_shrinking_thirty_after_any_change() {
    let mut guest = Guest::new(CpuRules::default(), Bounds::new(1, 4));
    let grown: Vec<_> = (0..6).map(|_| guest.follows(1000)).collect();
    assert_eq!(
        grown,
        [
            counting(1, 2),
            Decision::Up(2),
            counting(1, 2),
            Decision::Up(3),
            counting(1, 2),
            Decision::Up(4),
        ]
    );
    let rules = CpuRules {
        up_readings: 1,
        down_readings: 1,
        ..CpuRules::default()
    };
    let mut guest = Guest::new(rules, Bounds::new(1, 4));
    assert_eq!(guest.follows(1000), Decision::Up(2));
    assert_eq!(guest.follows(1000), cooldown(5));
    assert_eq!(guest.follows(1000), Decision::Up(3));
    for left in [25, 20, 15, 10, 5] {
        assert_eq!(guest.follows(0), cooldown(left));
    }
    assert_eq!(guest.follows(0), Decision::Down(2));
    // Load that comes back waits for the short one.
    assert_eq!(guest.follows(1000), cooldown(5));
    assert_eq!(guest.follows(1000), Decision::Up(3));
}

#[test]
fn the_floor_and_the_ceiling_hold() {
    let mut guest = Guest::with(CpuRules::default(), Bounds::new(2, 3), 3);
    for _ in 0..5 {
        guest.follows(0);
    }
    assert_eq!(guest.follows(0), Decision::Down(2));
    for _ in 0..20 {
        assert_eq!(guest.follows(0), STEADY);
    }
    guest.follows(1000);
    assert_eq!(guest.follows(1000), Decision::Up(3));
    for _ in 0..20 {
        assert!(matches!(guest.follows(1000), Decision::Hold(_)));
    }
    assert_eq!(guest.follows(1000), Decision::Hold(Hold::AtCeiling));
    // A floor that Update set.
    let bounds = guest.policy.bounds().moved(Some(3), Some(4));
    guest.policy.set_bounds(bounds);
    for _ in 0..20 {
        assert_eq!(guest.follows(0), STEADY);
    }
}

#[test]
fn a_count_out_of_bounds_is_brought_back_whatever_the_load() {
    let mut guest = Guest::with(CpuRules::default(), Bounds::new(1, 8), 6);
    guest.policy.set_bounds(Bounds::new(1, 4));
    assert_eq!(guest.follows(1000), Decision::Down(4));
    guest
        .policy
        .set_bounds(Bounds::new(1, 8).moved(Some(6), None));
    assert_eq!(guest.follows(0), cooldown(5));
    assert_eq!(guest.follows(0), Decision::Up(6));
}

#[test]
fn the_guests_count_wins_over_what_was_believed() {
    let mut guest = Guest::new(CpuRules::default(), Bounds::new(1, 8));
    guest.reads(1000);
    guest.reading.online = 3;
    assert_eq!(guest.reads(1000), Decision::Hold(Hold::Adopted));
    assert_eq!(guest.policy.current(), 3);
    assert_eq!(guest.reads(1000), counting(1, 2));
    assert_eq!(guest.reads(1000), Decision::Up(4));
    // The caller could not say what became of it.
    guest.policy.failed(guest.now);
    guest.reading.online = 4;
    assert_eq!(guest.reads(1000), Decision::Hold(Hold::Adopted));
    assert_eq!(guest.policy.current(), 4);
}

#[test]
fn a_size_that_somebody_set_starts_the_cooldowns() {
    let rules = CpuRules {
        up_readings: 0,
        ..CpuRules::default()
    };
    let mut guest = Guest::new(rules, Bounds::new(1, 8));
    guest.policy.set(guest.now, 2);
    guest.reading.online = 2;
    assert_eq!(guest.follows(1000), cooldown(5));
    assert_eq!(guest.follows(1000), Decision::Up(3));
}

#[test]
fn failures_are_left_alone_for_longer_each_time_in_their_own_direction() {
    let mut guest = Guest::with(CpuRules::default(), Bounds::new(1, 8), 2);
    let mut attempts = Vec::new();
    for _ in 0..400 {
        if let Decision::Up(3) = guest.reads(1000) {
            attempts.push(guest.now.as_secs());
            guest.policy.settled(guest.now, 2);
        }
    }
    let waits: Vec<u64> = attempts.windows(2).map(|two| two[1] - two[0]).collect();
    assert_eq!(waits, [10, 20, 40, 80, 160, 320, 600, 600]);
    for _ in 0..5 {
        guest.reads(0);
    }
    assert_eq!(guest.reads(0), Decision::Down(1));
    guest.policy.settled(guest.now, 1);
    guest.reading.online = 1;
    // What worked forgives.
    guest.reads(1000);
    assert_eq!(guest.reads(1000), Decision::Up(2));
}

#[test]
fn every_number_may_be_zero() {
    let zero = |change: fn(&mut CpuRules)| {
        let mut rules = CpuRules::default();
        change(&mut rules);
        Guest::with(rules, Bounds::new(1, 8), 2)
    };
    let mut guest = zero(|rules| rules.interval = Duration::ZERO);
    assert_eq!(guest.policy.interval(), None);
    assert_eq!(guest.reads(1000), Decision::Hold(Hold::Off));

    let mut guest = zero(|rules| rules.up_load = 0);
    guest.reads(0);
    assert_eq!(guest.reads(0), Decision::Up(3));

    let mut guest = zero(|rules| rules.up_readings = 0);
    assert_eq!(guest.reads(1000), Decision::Up(3));

    let mut guest = zero(|rules| rules.up_throttled = 0);
    guest.throttled(1000, 1000);
    assert_eq!(guest.throttled(1000, 1000), Decision::Up(3));

    let mut guest = zero(|rules| rules.up_cooldown = Duration::ZERO);
    guest.follows(1000);
    assert_eq!(guest.follows(1000), Decision::Up(3));
    guest.follows(1000);
    assert_eq!(guest.follows(1000), Decision::Up(4));

    let mut guest = zero(|rules| rules.down_load = 0);
    for _ in 0..9 {
        assert_eq!(guest.reads(1), STEADY);
    }
    for _ in 0..5 {
        guest.reads(0);
    }
    assert_eq!(guest.reads(0), Decision::Down(1));

    let mut guest = zero(|rules| rules.down_readings = 0);
    assert_eq!(guest.reads(0), Decision::Down(1));

    let mut guest = zero(|rules| {
        rules.down_readings = 1;
        rules.down_cooldown = Duration::ZERO;
        rules.up_readings = 1;
    });
    assert_eq!(guest.follows(1000), Decision::Up(3));
    assert_eq!(guest.follows(0), Decision::Down(2));

    let all = CpuRules {
        interval: Duration::from_secs(1),
        up_load: 0,
        up_readings: 0,
        up_throttled: 0,
        up_cooldown: Duration::ZERO,
        down_load: 0,
        down_readings: 0,
        down_cooldown: Duration::ZERO,
    };
    let mut guest = Guest::new(all, Bounds::new(1, 3));
    let decisions: Vec<_> = (0..3).map(|_| guest.follows(0)).collect();
    let up = Decision::Up;
    assert_eq!(decisions, [up(2), up(3), Decision::Hold(Hold::AtCeiling)]);
}

#[test]
fn thresholds_that_overlap_do_not_shrink_what_would_grow_again() {
    let rules = CpuRules {
        up_load: 40,
        down_load: 100,
        ..CpuRules::default()
    };
    let mut guest = Guest::with(rules, Bounds::new(1, 8), 2);
    for _ in 0..50 {
        // 20 % of two are 40 % of one.
        assert_eq!(guest.reads(200), STEADY);
    }
    for _ in 0..5 {
        guest.reads(199);
    }
    assert_eq!(guest.reads(199), Decision::Down(1));
}

#[test]
fn without_room_there_is_no_interval_until_the_bounds_move() {
    let mut policy = CpuPolicy::new(CpuRules::default(), Bounds::new(2, 2), 2);
    assert_eq!(policy.interval(), None);
    policy.set_bounds(Bounds::new(2, 2).moved(None, Some(3)));
    assert_eq!(policy.interval(), Some(Duration::from_secs(5)));
    // A count that has to be brought back is room.
    let policy = CpuPolicy::new(CpuRules::default(), Bounds::new(2, 2), 3);
    assert_eq!(policy.interval(), Some(Duration::from_secs(5)));
}

#[test]
fn what_cannot_be_is_no_reading() {
    let usual = CpuReading {
        online: 2,
        busy_us: 4 * SECOND,
        total_us: 10 * SECOND,
        throttled_us: SECOND,
    };
    let table = [
        CpuReading { online: 0, ..usual },
        CpuReading {
            busy_us: 0,
            ..usual
        },
        CpuReading {
            total_us: SECOND,
            ..usual
        },
        CpuReading {
            throttled_us: 0,
            ..usual
        },
        // No time has passed.
        usual,
        CpuReading {
            busy_us: u64::MAX,
            ..usual
        },
    ];
    for reading in table {
        let rules = CpuRules {
            up_readings: 1,
            ..CpuRules::default()
        };
        let mut policy = CpuPolicy::new(rules, Bounds::new(1, 8), 2);
        policy.step(Duration::ZERO, &usual);
        assert_eq!(
            policy.step(Duration::from_secs(5), &reading),
            Decision::Hold(Hold::Implausible),
            "{reading:?}"
        );
    }
    // Counters at their end are counters.
    let end = CpuReading {
        online: 2,
        busy_us: u64::MAX,
        total_us: u64::MAX,
        throttled_us: 0,
    };
    let start = CpuReading {
        online: 2,
        busy_us: 0,
        total_us: 0,
        throttled_us: 0,
    };
    let mut policy = CpuPolicy::new(CpuRules::default(), Bounds::new(1, 8), 2);
    policy.step(Duration::ZERO, &start);
    assert_eq!(policy.step(Duration::from_secs(5), &end), counting(1, 2));
}

#[test]
fn busier_than_the_time_allows_is_busy_all_the_time() {
    let mut guest = Guest::new(CpuRules::default(), Bounds::new(1, 8));
    guest.reads(1010);
    assert_eq!(guest.reads(1010), Decision::Up(2));
}

#[test]
fn a_clock_that_stands_or_goes_back_counts_no_readings() {
    let mut guest = Guest::new(CpuRules::default(), Bounds::new(1, 8));
    guest.reads(1000);
    guest.now -= Duration::from_secs(5);
    assert_eq!(guest.reads(1000), Decision::Hold(Hold::ClockStopped));
    assert_eq!(guest.reads(1000), Decision::Up(2));
    guest.reading.online = 2;
    guest.policy.settled(guest.now, 2);
    // Back by a lot: the cooldown lasts ten seconds from there, and no longer.
    guest.now = Duration::ZERO;
    guest.policy.step(guest.now, &guest.reading);
    assert_eq!(guest.reads(1000), counting(1, 2));
    assert_eq!(guest.reads(1000), Decision::Up(3));
    // Ahead by a lot: cooldowns are over.
    guest.reading.online = 3;
    guest.policy.settled(guest.now, 3);
    guest.now = Duration::MAX - Duration::from_secs(10);
    guest.reads(1000);
    assert_eq!(guest.reads(1000), Decision::Up(4));
    guest.policy.failed(guest.now);
}
