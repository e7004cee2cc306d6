use super::*;
use crate::config::{ByteSize, MemoryWay};

const MIB: u64 = 1 << 20;

/// A guest that uses as much memory as it is told; all of the VM's memory is its MemTotal.
struct Guest {
    policy: MemoryPolicy,
    now: Duration,
    size: u64,
}

impl Guest {
    fn new(rules: MemoryRules, bounds: Bounds<u64>, size: u64) -> Self {
        Self {
            policy: MemoryPolicy::new(rules, bounds, size),
            now: Duration::ZERO,
            size,
        }
    }

    fn usual(size: u64) -> Self {
        Self::new(MemoryRules::default(), Bounds::new(512, 4096), size)
    }

    /// After ten seconds more, with so many bytes available.
    fn reads(&mut self, available: u64) -> Decision<u64> {
        self.now += Duration::from_secs(10);
        let reading = MemoryReading {
            size_mib: self.size,
            total_bytes: self.size * MIB,
            available_bytes: available,
        };
        self.policy.step(self.now, &reading)
    }

    /// The same, and does what is decided.
    fn follows(&mut self, available: u64) -> Decision<u64> {
        let decision = self.reads(available);
        self.obeys(decision)
    }

    fn stalls(&mut self, available: u64) -> Decision<u64> {
        let decision = self
            .policy
            .pressure(self.now, self.size * MIB, available * MIB);
        self.obeys(decision)
    }

    fn obeys(&mut self, decision: Decision<u64>) -> Decision<u64> {
        if let Decision::Up(to) | Decision::Down(to) = decision {
            self.size = to;
            self.policy.settled(self.now, to);
        }
        decision
    }
}

fn counting(have: u8, need: u8) -> Decision<u64> {
    Decision::Hold(Hold::Counting { have, need })
}

fn cooldown(seconds: u64) -> Decision<u64> {
    Decision::Hold(Hold::Cooldown {
        left: Duration::from_secs(seconds),
    })
}

const STEADY: Decision<u64> = Decision::Hold(Hold::Steady);

#[test]
fn edges_of_the_use() {
    use Decision::{Down, Hold as H, Up};
    let table = [
        // Size in MiB, bytes available, readings → the last decision
        (512, 512 * MIB * 15 / 100 + 1, 9, STEADY),
        (512, 512 * MIB * 15 / 100, 2, counting(2, 3)),
        (512, 512 * MIB * 15 / 100, 3, Up(640)),
        (512, 0, 3, Up(640)),
        // 85 % of 2 GiB are used, but there are still 128 MiB.
        (2048, 128 * MIB, 9, STEADY),
        (2048, 128 * MIB - 1, 3, Up(2176)),
        (4096, 0, 9, H(Hold::AtCeiling)),
        (4000, 0, 3, Up(4096)),
        // 40 % of 1000 MiB are 400.
        (1000, 400 * MIB, 9, STEADY),
        (1000, 400 * MIB + 1, 5, counting(5, 6)),
        (1000, 400 * MIB + 1, 6, Down(896)),
        // Less than 60 % is used, but 192 MiB must stay.
        (640, 320 * MIB, 6, Down(512)),
        (640, 320 * MIB - 1, 9, H(Hold::KeepsAvailable)),
        (576, 256 * MIB, 6, Down(512)),
        (576, 256 * MIB - 1, 9, H(Hold::KeepsAvailable)),
        (512, 512 * MIB, 9, STEADY),
    ];
    for (size, available, readings, last) in table {
        let mut guest = Guest::usual(size);
        let mut decision = H(Hold::Off);
        for reading in 1..=readings {
            decision = guest.reads(available);
            let done = matches!(decision, Up(_) | Down(_));
            assert_eq!(done, done && reading == readings, "{size} {available}");
        }
        assert_eq!(decision, last, "{size} MiB with {available} bytes");
    }
}

#[test]
fn what_must_stay_available_stays() {
    let rules = |down_available, reserve| MemoryRules {
        up_available: ByteSize(0),
        down_used: 100,
        down_readings: 1,
        down_available: ByteSize::from_mib(down_available),
        reserve: ByteSize::from_mib(reserve),
        ..MemoryRules::default()
    };
    for (rules, keeps) in [
        (rules(128, 128), 128),
        (rules(128, 0), 128),
        (rules(0, 200), 200),
        // Nothing configured: a sixteenth of what is left.
        (rules(0, 0), 64),
    ] {
        let bounds = Bounds::new(512, 4096);
        let mut guest = Guest::new(rules.clone(), bounds, 1152);
        assert_eq!(
            guest.reads((128 + keeps) * MIB - 1),
            Decision::Hold(Hold::KeepsAvailable)
        );
        assert_eq!(guest.reads((128 + keeps) * MIB), Decision::Down(1024));
    }
}

#[test]
fn growing_waits_thirty_seconds_and_shrinking_sixty_after_any_change() {
    let rules = MemoryRules {
        up_readings: 1,
        down_readings: 1,
        ..MemoryRules::default()
    };
    let mut guest = Guest::new(rules, Bounds::new(512, 4096), 512);
    assert_eq!(guest.follows(0), Decision::Up(640));
    assert_eq!(guest.follows(0), cooldown(20));
    assert_eq!(guest.follows(0), cooldown(10));
    assert_eq!(guest.follows(0), Decision::Up(768));
    for left in [50, 40, 30, 20, 10] {
        assert_eq!(guest.follows(600 * MIB), cooldown(left));
    }
    assert_eq!(guest.follows(600 * MIB), Decision::Down(640));
    assert_eq!(guest.follows(0), cooldown(20));
    assert_eq!(guest.follows(0), cooldown(10));
    assert_eq!(guest.follows(0), Decision::Up(768));
}

#[test]
fn sizes_between_steps_go_to_whole_steps_from_the_boot_size() {
    // What a guest gives back is not always all that it was asked for.
    for (boot, size, up, down) in [
        (512, 640, 768, 512),
        (512, 580, 768, 512),
        (512, 700, 896, 640),
        (300, 428, 556, 300),
        (300, 300, 428, 300),
    ] {
        let policy = MemoryPolicy::new(MemoryRules::default(), Bounds::new(boot, 4096), size);
        assert_eq!(
            (policy.above(128), policy.below()),
            (up, down),
            "{boot} {size}"
        );
    }
}

#[test]
fn a_size_out_of_bounds_is_brought_back_if_the_guest_can_spare_it() {
    let mut guest = Guest::usual(2048);
    guest.policy.set_bounds(Bounds::new(512, 1024));
    assert_eq!(
        guest.follows(1216 * MIB - 1),
        Decision::Hold(Hold::KeepsAvailable)
    );
    assert_eq!(guest.follows(1216 * MIB), Decision::Down(1024));
    guest
        .policy
        .set_bounds(Bounds::new(512, 4096).moved(Some(1500), None));
    assert_eq!(guest.follows(900 * MIB), cooldown(20));
    assert_eq!(guest.follows(900 * MIB), cooldown(10));
    assert_eq!(guest.follows(900 * MIB), Decision::Up(1500));
}

#[test]
fn the_vms_size_wins_over_what_was_believed() {
    let mut guest = Guest::usual(512);
    guest.reads(0);
    guest.reads(0);
    guest.size = 1024;
    assert_eq!(guest.reads(0), Decision::Hold(Hold::Adopted));
    assert_eq!(guest.policy.current(), 1024);
    guest.reads(0);
    guest.reads(0);
    assert_eq!(guest.reads(0), Decision::Up(1152));
}

#[test]
fn memory_that_is_not_given_back_does_not_keep_more_from_coming() {
    let mut guest = Guest::usual(1024);
    let mut attempts = Vec::new();
    for _ in 0..100 {
        if let Decision::Down(896) = guest.reads(900 * MIB) {
            attempts.push(guest.now.as_secs());
            guest.policy.settled(guest.now, 1024);
        }
    }
    let waits: Vec<u64> = attempts.windows(2).map(|two| two[1] - two[0]).collect();
    // The sixty seconds of the cooldown are longer than the first pauses.
    assert_eq!(waits, [60, 60, 60, 80, 160, 320]);
    assert_eq!(guest.stalls(0), Decision::Up(2048));
}

#[test]
fn a_stall_plugs_at_once_and_more_each_time() {
    let mut guest = Guest::usual(512);
    guest.reads(200 * MIB);
    // No readings, no cooldown.
    assert_eq!(guest.stalls(180), Decision::Up(768));
    assert_eq!(guest.stalls(180), Decision::Up(1792));
    let mut guest = Guest::usual(512);
    assert_eq!(guest.stalls(100), Decision::Up(768));
    assert_eq!(guest.stalls(320), Decision::Hold(Hold::Available));
    guest.now += Duration::from_secs(29);
    assert_eq!(guest.stalls(100), Decision::Up(1280));
    guest.now += Duration::from_secs(29);
    assert_eq!(guest.stalls(100), Decision::Up(2304));
    guest.now += Duration::from_secs(29);
    assert_eq!(guest.stalls(100), Decision::Up(3328));
    guest.now += Duration::from_secs(29);
    assert_eq!(guest.stalls(100), Decision::Up(4096));
    assert_eq!(guest.stalls(100), Decision::Hold(Hold::AtCeiling));
    // The cooldown of the readings has started.
    guest.policy.set_bounds(Bounds::new(512, 8192));
    guest.reads(0);
    guest.reads(0);
    assert_eq!(guest.reads(0), Decision::Up(4224));

    let mut guest = Guest::usual(512);
    guest.stalls(100);
    guest.now += Duration::from_secs(30);
    assert_eq!(guest.stalls(100), Decision::Up(1024), "a stall long after");
}

#[test]
fn a_stall_brings_what_is_used_in_four_seconds() {
    // 100 MiB a second since the last reading.
    let mut guest = Guest::usual(1024);
    guest.reads(800 * MIB);
    guest.now += Duration::from_secs(7);
    assert_eq!(guest.stalls(100), Decision::Up(1024 + 512));
    // Of what came within a second it is not known how it goes on.
    let mut guest = Guest::usual(1024);
    guest.reads(180 * MIB);
    guest.now += Duration::from_millis(10);
    assert_eq!(guest.stalls(100), Decision::Up(1024 + 384));
    // Rates that cannot be are capped as all is.
    let mut guest = Guest::usual(1024);
    guest.reads(1024 * MIB);
    assert_eq!(guest.stalls(0), Decision::Up(2048));
}

#[test]
fn a_stall_while_enough_is_available_is_a_containers_own() {
    for (available, plugs) in [(320, false), (319, true)] {
        let mut guest = Guest::usual(1024);
        let decision = guest.stalls(available);
        assert_eq!(matches!(decision, Decision::Up(_)), plugs, "{decision:?}");
    }
}

#[test]
fn a_stall_after_a_failure_is_left_alone_for_a_while_and_containers_run_free() {
    let mut guest = Guest::usual(512);
    let total = 512 * MIB;
    assert_eq!(guest.policy.high_bytes(guest.now, total), 320 * MIB);
    assert!(matches!(
        guest.policy.pressure(guest.now, total, 0),
        Decision::Up(_)
    ));
    guest.policy.failed(guest.now);
    assert_eq!(
        guest.stalls(0),
        Decision::Hold(Hold::BackingOff {
            left: Duration::from_secs(10)
        })
    );
    assert_eq!(guest.policy.high_bytes(guest.now, total), 0);
    guest.now += Duration::from_secs(10);
    assert_eq!(guest.policy.high_bytes(guest.now, total), 320 * MIB);
    assert!(matches!(guest.stalls(0), Decision::Up(_)));
}

#[test]
fn bytes_that_containers_may_use() {
    let table = [
        // Total and reserve in MiB → MiB
        (512, 128, 384),
        (512, 0, 480),
        (4096, 128, 3840),
        (128, 128, 64),
        (128, u64::MAX >> 20, 64),
        (0, 128, 1),
        (1, 0, 1),
    ];
    for (total, reserve, high) in table {
        assert_eq!(
            high_bytes(total * MIB, reserve * MIB),
            high * MIB,
            "{total} {reserve}"
        );
    }
    assert_eq!(high_bytes(512 * MIB - 1, 128 * MIB), 383 * MIB);
    assert!(high_bytes(u64::MAX, u64::MAX) >= u64::MAX / 4);

    let high = |guest: &Guest| guest.policy.high_bytes(guest.now, 512 * MIB);
    assert_eq!(high(&Guest::usual(512)), 320 * MIB);
    assert_eq!(high(&Guest::usual(4096)), 0, "at the ceiling");
    assert_eq!(Guest::usual(512).policy.high_bytes(Duration::ZERO, 0), 0);
    for off in [
        |rules: &mut MemoryRules| rules.interval = Duration::ZERO,
        |rules: &mut MemoryRules| rules.burst = ByteSize(0),
        |rules: &mut MemoryRules| rules.step = ByteSize(0),
    ] {
        let mut rules = MemoryRules::default();
        off(&mut rules);
        assert_eq!(high(&Guest::new(rules, Bounds::new(512, 4096), 512)), 0);
    }
}

#[test]
fn every_number_may_be_zero() {
    let zero = |change: fn(&mut MemoryRules)| {
        let mut rules = MemoryRules::default();
        change(&mut rules);
        Guest::new(rules, Bounds::new(512, 4096), 1024)
    };
    for off in [
        (|rules| rules.interval = Duration::ZERO) as fn(&mut MemoryRules),
        |rules| rules.step = ByteSize(0),
    ] {
        let mut guest = zero(off);
        assert_eq!(guest.policy.interval(), None);
        assert_eq!(guest.reads(0), Decision::Hold(Hold::Off));
        assert_eq!(guest.stalls(0), Decision::Hold(Hold::Off));
    }
    let mut guest = zero(|rules| rules.up_used = 0);
    guest.reads(127 * MIB);
    guest.reads(127 * MIB);
    assert_eq!(guest.reads(127 * MIB), Decision::Up(1152));

    let mut guest = zero(|rules| rules.up_available = ByteSize(0));
    for _ in 0..9 {
        assert_eq!(guest.reads(0), STEADY);
    }

    let mut guest = zero(|rules| rules.up_readings = 0);
    assert_eq!(guest.reads(0), Decision::Up(1152));

    let mut guest = zero(|rules| {
        rules.up_readings = 1;
        rules.up_cooldown = Duration::ZERO;
    });
    assert_eq!(guest.follows(0), Decision::Up(1152));
    assert_eq!(guest.follows(0), Decision::Up(1280));

    let mut guest = zero(|rules| rules.down_used = 0);
    for _ in 0..9 {
        assert_eq!(guest.reads(1024 * MIB), STEADY);
    }

    let mut guest = zero(|rules| {
        rules.down_readings = 0;
        rules.down_cooldown = Duration::ZERO;
        rules.down_available = ByteSize(0);
        rules.reserve = ByteSize(0);
    });
    assert_eq!(guest.follows(1000 * MIB), Decision::Down(896));
    assert_eq!(guest.follows(800 * MIB), Decision::Down(768));

    let mut guest = zero(|rules| rules.burst = ByteSize(0));
    assert_eq!(guest.stalls(0), Decision::Hold(Hold::Off));

    let all = MemoryRules {
        way: MemoryWay::Auto,
        give_back: true,
        interval: Duration::from_secs(1),
        step: ByteSize::from_mib(2),
        up_used: 0,
        up_available: ByteSize(0),
        up_readings: 0,
        up_cooldown: Duration::ZERO,
        down_used: 0,
        down_available: ByteSize(0),
        down_readings: 0,
        down_cooldown: Duration::ZERO,
        reserve: ByteSize(0),
        burst: ByteSize(0),
    };
    let mut guest = Guest::new(all, Bounds::new(512, 4096), 1024);
    for available in [0, 512, 1024] {
        assert_eq!(guest.follows(available * MIB), STEADY);
    }
}

#[test]
fn without_room_there_is_no_interval_until_the_bounds_move() {
    let mut policy = MemoryPolicy::new(MemoryRules::default(), Bounds::new(512, 512), 512);
    assert_eq!(policy.interval(), None);
    assert_eq!(
        policy.pressure(Duration::ZERO, 512 * MIB, 0),
        Decision::Hold(Hold::AtCeiling)
    );
    policy.set_bounds(Bounds::new(512, 512).moved(None, Some(1024)));
    assert_eq!(policy.interval(), Some(Duration::from_secs(10)));
}

#[test]
fn what_cannot_be_is_no_reading() {
    let table = [
        (512, 0, 0),
        (512, 100 * MIB, 100 * MIB + 1),
        (512, 512 * MIB + 1, 0),
        (512, u64::MAX, 0),
        (512, u64::MAX, u64::MAX),
        (0, 1, 0),
    ];
    for (size_mib, total_bytes, available_bytes) in table {
        let mut policy = MemoryPolicy::new(MemoryRules::default(), Bounds::new(512, 4096), 512);
        let reading = MemoryReading {
            size_mib,
            total_bytes,
            available_bytes,
        };
        assert_eq!(
            policy.step(Duration::ZERO, &reading),
            Decision::Hold(Hold::Implausible),
            "{reading:?}"
        );
        assert_eq!(policy.current(), 512);
        if size_mib == 512 {
            assert_eq!(
                policy.pressure(Duration::ZERO, total_bytes, available_bytes),
                Decision::Hold(Hold::Implausible),
                "{reading:?}"
            );
        }
    }
}

#[test]
fn a_clock_that_stands_or_goes_back_counts_no_readings() {
    let mut guest = Guest::usual(512);
    guest.reads(0);
    guest.reads(0);
    guest.now -= Duration::from_secs(10);
    assert_eq!(guest.reads(0), Decision::Hold(Hold::ClockStopped));
    assert_eq!(guest.follows(0), Decision::Up(640));
    guest.now = Duration::ZERO;
    let _ = guest.reads(0);
    guest.reads(0);
    guest.reads(0);
    assert_eq!(guest.reads(0), Decision::Up(768));
    // Stalls in one moment, and at the end of time.
    guest.now = Duration::MAX;
    for _ in 0..3 {
        guest.stalls(0);
    }
    assert_eq!(guest.size, 640 + 256 + 1024 + 1024);
    guest.policy.failed(guest.now);
}
