//! What holds for whatever a guest claims and a clock does.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::{ByteSize, CpuRules, MemoryRules, MemoryWay};
use crate::hotplug::Bounds;

/// What happens to a policy. Times are in ms.
#[derive(Debug, Clone)]
enum Step<R, T> {
    Read(u64, R),
    /// What was decided came out so; None: it failed.
    Settle(Option<T>),
    Bounds(Option<T>, Option<T>),
    Pressure(u64, u64, u64),
}

fn pause() -> impl Strategy<Value = Duration> {
    prop_oneof![Just(0), 1..120_u64].prop_map(Duration::from_secs)
}

fn wild() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), 0..2_000_000_000_u64, Just(u64::MAX), Just(0)]
}

fn cpu_rules() -> impl Strategy<Value = CpuRules> {
    (
        (pause(), 0..=100_u8, 0..5_u8, 0..=100_u8, pause()),
        (0..=100_u8, 0..5_u8, pause()),
    )
        .prop_map(|(up, down)| CpuRules {
            interval: up.0,
            up_load: up.1,
            up_readings: up.2,
            up_throttled: up.3,
            up_cooldown: up.4,
            down_load: down.0,
            down_readings: down.1,
            down_cooldown: down.2,
        })
}

fn memory_rules() -> impl Strategy<Value = MemoryRules> {
    let size = || prop_oneof![Just(0), 1..2048_u64].prop_map(ByteSize::from_mib);
    (
        (pause(), size(), 0..=100_u8, size(), 0..5_u8, pause()),
        (0..=100_u8, size(), 0..5_u8, pause(), size(), size()),
    )
        .prop_map(|(up, down)| MemoryRules {
            way: MemoryWay::Auto,
            give_back: true,
            interval: up.0,
            step: up.1,
            up_used: up.2,
            up_available: up.3,
            up_readings: up.4,
            up_cooldown: up.5,
            down_used: down.0,
            down_available: down.1,
            down_readings: down.2,
            down_cooldown: down.3,
            reserve: down.4,
            burst: down.5,
        })
}

fn cpu_step() -> impl Strategy<Value = Step<CpuReading, u8>> {
    let online = prop_oneof![4 => 1..5_u8, 1 => any::<u8>()];
    let reading =
        (online, wild(), wild(), wild()).prop_map(|(online, busy, total, throttled)| CpuReading {
            online,
            busy_us: busy,
            total_us: total,
            throttled_us: throttled,
        });
    prop_oneof![
        8 => (0..60_000_u64, reading).prop_map(|(after, reading)| Step::Read(after, reading)),
        4 => proptest::option::of(1..5_u8).prop_map(Step::Settle),
        1 => any::<(Option<u8>, Option<u8>)>().prop_map(|(low, high)| Step::Bounds(low, high)),
    ]
}

fn memory_step() -> impl Strategy<Value = Step<MemoryReading, u64>> {
    let size = || prop_oneof![4 => (0..16_u64).prop_map(|steps| steps * 128), 1 => any::<u64>()];
    let reading = (size(), wild(), wild()).prop_map(|(size_mib, total, available)| MemoryReading {
        size_mib,
        total_bytes: total,
        available_bytes: available,
    });
    prop_oneof![
        8 => (0..60_000_u64, reading).prop_map(|(after, reading)| Step::Read(after, reading)),
        4 => proptest::option::of(size()).prop_map(Step::Settle),
        1 => any::<(Option<u64>, Option<u64>)>().prop_map(|(low, high)| Step::Bounds(low, high)),
        4 => (0..60_000_u64, wild(), wild())
            .prop_map(|(after, total, available)| Step::Pressure(after, total, available)),
    ]
}

/// Changes that were decided: when, and whether to grow.
#[derive(Default)]
struct Changes(Vec<(Duration, bool)>);

impl Changes {
    fn check<T: Copy + Ord + std::fmt::Debug>(
        &mut self,
        now: Duration,
        decision: Decision<T>,
        bounds: Bounds<T>,
        cooldowns: Option<(Duration, Duration)>,
    ) {
        let (to, grows) = match decision {
            Decision::Hold(_) => return,
            Decision::Up(to) => (to, true),
            Decision::Down(to) => (to, false),
        };
        assert!(bounds.hold(to), "{decision:?} is out of {bounds:?}");
        if let (Some((up, down)), Some((last, _))) = (cooldowns, self.0.last()) {
            let cooldown = if grows { up } else { down };
            assert!(now - *last >= cooldown, "{decision:?} at {now:?}");
        }
        self.0.push((now, grows));
    }
}

proptest! {
    #[test]
    fn vcpus_stay_within_the_bounds_and_the_cooldowns(
        rules in cpu_rules(),
        boot in 1..4_u8,
        ceiling in any::<u8>(),
        steps in proptest::collection::vec(cpu_step(), 1..200),
    ) {
        let cooldowns = (rules.up_cooldown, rules.down_cooldown);
        let mut policy = CpuPolicy::new(rules, Bounds::new(boot, ceiling), boot);
        let mut now = Duration::ZERO;
        let mut changes = Changes::default();
        for step in steps {
            match step {
                Step::Read(after, reading) => {
                    now += Duration::from_millis(after);
                    let decision = policy.step(now, &reading);
                    if let Decision::Up(to) = decision {
                        prop_assert!(to > reading.online);
                    }
                    if let Decision::Down(to) = decision {
                        prop_assert!(to < reading.online && to > 0);
                    }
                    changes.check(now, decision, policy.bounds(), Some(cooldowns));
                }
                Step::Settle(Some(actual)) => policy.settled(now, actual),
                Step::Settle(None) => policy.failed(now),
                Step::Bounds(floor, ceiling) => {
                    policy.set_bounds(policy.bounds().moved(floor, ceiling));
                }
                Step::Pressure(..) => {}
            }
        }
    }

    #[test]
    fn memory_stays_within_the_bounds_and_the_cooldowns(
        rules in memory_rules(),
        boot in 96..1024_u64,
        ceiling in 0..4096_u64,
        steps in proptest::collection::vec(memory_step(), 1..200),
    ) {
        let cooldowns = (rules.up_cooldown, rules.down_cooldown);
        let mut policy = MemoryPolicy::new(rules, Bounds::new(boot, ceiling), boot);
        let mut now = Duration::ZERO;
        let mut changes = Changes::default();
        for step in steps {
            match step {
                Step::Read(after, reading) => {
                    now += Duration::from_millis(after);
                    let decision = policy.step(now, &reading);
                    if let Decision::Up(to) = decision {
                        prop_assert!(to > reading.size_mib);
                    }
                    if let Decision::Down(to) = decision {
                        prop_assert!(to < reading.size_mib);
                    }
                    changes.check(now, decision, policy.bounds(), Some(cooldowns));
                }
                Step::Settle(Some(actual)) => policy.settled(now, actual),
                Step::Settle(None) => policy.failed(now),
                Step::Bounds(floor, ceiling) => {
                    policy.set_bounds(policy.bounds().moved(floor, ceiling));
                }
                Step::Pressure(after, total, available) => {
                    now += Duration::from_millis(after);
                    let before = policy.current();
                    let decision = policy.pressure(now, total, available);
                    prop_assert!(!matches!(decision, Decision::Down(_)));
                    if let Decision::Up(to) = decision {
                        prop_assert!(to > before);
                    }
                    changes.check(now, decision, policy.bounds(), None);
                    let high = policy.high_bytes(now, total);
                    prop_assert!(high <= total.max(1 << 20));
                }
            }
        }
    }

    #[test]
    fn no_clock_and_no_guest_makes_a_policy_panic(
        cpu in proptest::collection::vec((any::<u64>(), cpu_step()), 1..50),
        memory in proptest::collection::vec((any::<u64>(), memory_step()), 1..50),
    ) {
        let mut policy = CpuPolicy::new(CpuRules::default(), Bounds::new(1, 8), 1);
        for (at, step) in cpu {
            if let Step::Read(_, reading) = step {
                let decision = policy.step(Duration::from_secs(at), &reading);
                Changes::default().check(Duration::ZERO, decision, policy.bounds(), None);
            }
        }
        let mut policy = MemoryPolicy::new(MemoryRules::default(), Bounds::new(512, 4096), 512);
        for (at, step) in memory {
            let now = Duration::from_secs(at);
            let decision = match step {
                Step::Read(_, reading) => policy.step(now, &reading),
                Step::Pressure(_, total, available) => policy.pressure(now, total, available),
                _ => continue,
            };
            Changes::default().check(Duration::ZERO, decision, policy.bounds(), None);
            policy.failed(now);
        }
    }
}
