//! Policies with a guest under a load that is a function of time.

use std::time::Duration;

use super::*;
use crate::config::{CpuRules, MemoryRules};
use crate::hotplug::Bounds;

/// A change that a policy made: when, in seconds, and to which size.
type Change<T> = (u64, T);

fn done<T>(now: u64, decision: Decision<T>) -> Option<Change<T>> {
    match decision {
        Decision::Hold(_) => None,
        Decision::Up(to) | Decision::Down(to) => Some((now, to)),
    }
}

/// The count of vCPUs as a guest runs whose containers would use so many CPUs at each second; and the changes.
fn run_cpus(bounds: Bounds<u8>, seconds: u64, wants: impl Fn(u64) -> f64) -> (u8, Vec<Change<u8>>) {
    let mut policy = CpuPolicy::new(CpuRules::default(), bounds, bounds.boot());
    let mut reading = CpuReading {
        online: bounds.boot(),
        busy_us: 0,
        total_us: 0,
        throttled_us: 0,
    };
    let mut changes = Vec::new();
    for now in 0..seconds {
        if now % 5 == 0 {
            let at = Duration::from_secs(now);
            if let Some((now, to)) = done(now, policy.step(at, &reading)) {
                reading.online = to;
                policy.settled(at, to);
                changes.push((now, to));
            }
        }
        let online = f64::from(reading.online);
        reading.total_us += u64::from(reading.online) * 1_000_000;
        reading.busy_us += (wants(now).min(online) * 1e6) as u64;
    }
    (reading.online, changes)
}

/// Noise from -1 to 1, the same each time.
fn noise(seed: u64) -> f64 {
    let mixed = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((mixed >> 32) as f64) / f64::from(u32::MAX) * 2.0 - 1.0
}

const HOUR: u64 = 3600;

#[test]
fn a_day_of_cpu_load_is_followed_without_flapping() {
    // Quiet by night, a peak of six CPUs at noon, noise of half a CPU.
    let day = |now: u64| {
        let hour = now as f64 / HOUR as f64;
        let curve = (1.0 - ((hour - 12.0) / 12.0 * std::f64::consts::PI).cos().abs()).min(1.0);
        let busy = if (6.0..18.0).contains(&hour) {
            6.0 * (1.0 - curve)
        } else {
            0.1
        };
        (busy + 0.5 * noise(now)).max(0.0)
    };
    let (last, changes) = run_cpus(Bounds::new(1, 8), 24 * HOUR, day);
    let most = changes.iter().map(|(_, to)| *to).max().unwrap();
    assert!((6..=8).contains(&most), "{changes:?}");
    assert_eq!(last, 1);
    // Up and down again is one change each way for each vCPU; twice that at most.
    let count = changes.len();
    assert!((10..=4 * 7).contains(&count), "{count}: {changes:?}");
    // Where it turns, the cooldown of the new direction has passed.
    for three in changes.windows(3) {
        let grew = three[1].1 > three[0].1;
        let grows = three[2].1 > three[1].1;
        let rest = if grows { 10 } else { 30 };
        assert!(
            grew == grows || three[2].0 - three[1].0 >= rest,
            "{three:?}"
        );
    }
}

#[test]
fn any_even_load_comes_to_rest_with_room_to_spare() {
    for hundredths in 0..=800_u32 {
        let wants = f64::from(hundredths) / 100.0;
        let (last, changes) = run_cpus(Bounds::new(1, 8), HOUR, |_| wants);
        let settled = changes.last().map_or(0, |(at, _)| *at);
        assert!(settled <= 100, "{wants}: {changes:?}");
        assert!(changes.windows(2).all(|two| two[1].1 > two[0].1));
        assert!(f64::from(last) * 0.8 > wants || last == 8, "{wants}");
    }
}

#[test]
fn load_that_comes_and_goes_every_minute_moves_no_more_than_the_cooldowns_let_it() {
    let (_, changes) = run_cpus(Bounds::new(1, 8), HOUR, |now| {
        if now / 60 % 2 == 0 { 8.0 } else { 0.0 }
    });
    // Each minute of load brings a vCPU in ten seconds at most, each minute without takes one in thirty.
    assert!(changes.len() <= 30 * (6 + 2), "{}", changes.len());
    let (_, changes) = run_cpus(Bounds::new(1, 8), HOUR, |now| {
        if now / 5 % 2 == 0 { 1.0 } else { 0.0 }
    });
    assert_eq!(changes, [], "bursts of five seconds");
}

#[test]
fn a_load_that_rises_at_once_is_served_in_two_readings_a_vcpu() {
    let (_, changes) = run_cpus(Bounds::new(1, 4), 600, |now| {
        if (100..300).contains(&now) { 4.0 } else { 0.0 }
    });
    assert_eq!(
        changes,
        [(110, 2), (120, 3), (130, 4), (330, 3), (360, 2), (390, 1)]
    );
}

/// What a guest of a kernel and an agent keeps for itself, in MiB.
const KERNEL: f64 = 50.0;
/// Of the VM's memory is not in MemTotal, in MiB.
const HIDDEN: f64 = 42.0;

/// A guest whose containers take memory, in MiB, with the kernel's way of slowing them.
struct Guest {
    policy: MemoryPolicy,
    size: f64,
    containers: f64,
    /// `memory.high`; None: never.
    high: Option<f64>,
    changes: Vec<Change<u64>>,
}

impl Guest {
    fn new(bounds: Bounds<u64>) -> Self {
        let boot = bounds.boot();
        let mut guest = Self {
            policy: MemoryPolicy::new(MemoryRules::default(), bounds, boot),
            size: boot as f64,
            containers: 0.0,
            high: None,
            changes: Vec::new(),
        };
        guest.rearm(Duration::ZERO);
        guest
    }

    fn total(&self) -> f64 {
        self.size - HIDDEN
    }

    fn available(&self) -> f64 {
        self.total() - KERNEL - self.containers
    }

    fn rearm(&mut self, now: Duration) {
        let high = self.policy.high_bytes(now, bytes(self.total()));
        self.high = (high > 0).then_some(high as f64 / f64::from(1 << 20));
    }

    fn read(&mut self, now: Duration) -> Decision<u64> {
        let reading = MemoryReading {
            size_mib: self.size as u64,
            total_bytes: bytes(self.total()),
            available_bytes: bytes(self.available()),
        };
        self.policy.step(now, &reading)
    }

    fn settle(&mut self, now: Duration, to: u64) {
        self.size = to as f64;
        self.policy.settled(now, to);
        self.changes.push((now.as_secs(), to));
        self.rearm(now);
    }

    /// MiB that a process of several may take in `seconds`, as the kernel delays it in proportion to the square of how
    /// far its group is over: `mem_cgroup_handle_over_high` of Linux 6, at 250 ticks a second, for every 64 pages.
    fn slowed(&self, wanted: f64, seconds: f64, processes: f64) -> f64 {
        let Some(high) = self.high.filter(|high| self.containers > *high) else {
            return wanted;
        };
        let over = (self.containers - high) / high * f64::from(1 << 20);
        let ticks = over * over * 250.0 / f64::from(1 << 20) / f64::from(1 << 14);
        let delay = (ticks / 250.0).min(2.0);
        if delay < 0.01 {
            return wanted;
        }
        wanted.min(processes * 0.25 / delay * seconds)
    }
}

fn bytes(mib: f64) -> u64 {
    (mib.max(0.0) * f64::from(1 << 20)) as u64
}

/// Containers allocate without a rest until they have `until` MiB, and each plug takes `latency_ms`. Answers when they
/// had it, how little was ever available, and the sizes.
fn allocate(
    rate: f64,
    until: f64,
    latency_ms: u64,
    processes: f64,
    from_ms: u64,
) -> (u64, f64, Vec<Change<u64>>) {
    const TICK_MS: u64 = 10;
    let mut guest = Guest::new(Bounds::new(512, 4096));
    let mut least = f64::MAX;
    // A plug in flight: when it is done, and what it brings.
    let mut flight: Option<(u64, u64)> = None;
    let mut told_at: Option<u64> = None;
    for now_ms in (0..).step_by(TICK_MS as usize) {
        assert!(now_ms < 600_000, "the containers never get what they want");
        let now = Duration::from_millis(now_ms);
        if let Some((_, to)) = flight.take_if(|(at, _)| *at <= now_ms) {
            guest.settle(now, to);
        }
        if flight.is_none() {
            let stalls = guest.high.is_some_and(|high| guest.containers > high)
                && told_at.is_none_or(|at| now_ms - at >= 200);
            let mut decision = Decision::Hold(Hold::Steady);
            if stalls {
                told_at = Some(now_ms);
                let (total, available) = (bytes(guest.total()), bytes(guest.available()));
                decision = guest.policy.pressure(now, total, available);
            } else if now_ms % 10_000 == 0 {
                decision = guest.read(now);
            }
            flight = match decision {
                Decision::Up(to) => Some((now_ms + latency_ms, to)),
                Decision::Down(to) => panic!("shrinks to {to} while memory is taken"),
                Decision::Hold(_) => None,
            };
        }
        if now_ms >= from_ms {
            let seconds = TICK_MS as f64 / 1000.0;
            guest.containers += guest.slowed(rate * seconds, seconds, processes);
            if guest.containers >= until {
                return (now_ms - from_ms, least, guest.changes);
            }
        }
        least = least.min(guest.available());
    }
    unreachable!()
}

#[test]
fn containers_that_take_128_mib_a_second_never_get_to_the_limit() {
    for latency_ms in [0, 50, 500, 1000, 2000, 3000] {
        for processes in [1.0, 4.0, 16.0] {
            for from_ms in [100, 4_000, 9_900, 35_000] {
                let (took_ms, least, sizes) =
                    allocate(128.0, 1536.0 - 60.0, latency_ms, processes, from_ms);
                let case = format!(
                    "{latency_ms} ms a plug, {processes} processes from {from_ms} ms: \
                     took {took_ms} ms, least {least:.0} MiB, {sizes:?}"
                );
                assert!(least > 48.0, "{case}");
                // Three plugs at most, and no wait but for them.
                assert!(sizes.len() <= 3, "{case}");
                let plugs = sizes.len() as u64 * latency_ms;
                assert!(took_ms <= 11_600 + plugs + 700, "{case}");
            }
        }
    }
}

#[test]
fn slow_growth_needs_no_more_than_it_uses_and_comes_back() {
    // 1 MiB a second up to 2 GiB in some 34 minutes, then back at once, then eight hours of rest.
    let mut guest = Guest::new(Bounds::new(512, 4096));
    let mut told = 0;
    for now in 0..10 * HOUR {
        guest.containers = if now < 2048 { now as f64 } else { 20.0 };
        let at = Duration::from_secs(now);
        let stalls = guest.high.is_some_and(|high| guest.containers > high);
        let mut decision = Decision::Hold(Hold::Steady);
        if stalls {
            told += 1;
            let (total, available) = (bytes(guest.total()), bytes(guest.available()));
            decision = guest.policy.pressure(at, total, available);
        } else if now % 10 == 0 {
            decision = guest.read(at);
        }
        if let Some((_, to)) = done(now, decision) {
            guest.settle(at, to);
        }
        assert!(guest.available() > 60.0, "{now}: {}", guest.available());
        assert!(guest.total() < guest.containers + 50.0 + 512.0 || now >= 2048);
    }
    assert_eq!(guest.size, 512.0);
    let ups = guest.changes.windows(2).filter(|two| two[1].1 > two[0].1);
    assert!(ups.count() <= 8, "{:?}", guest.changes);
    assert!(told <= 9, "{told}");
}

#[test]
fn a_day_of_memory_is_followed_without_flapping() {
    let mut guest = Guest::new(Bounds::new(512, 4096));
    for now in 0..24 * HOUR {
        // Three long jobs of 1 to 2 GiB, with noise of 30 MiB.
        let job = match now / HOUR {
            3..6 => 1000.0,
            9..13 => 2000.0,
            18..20 => 1500.0,
            _ => 100.0,
        };
        let wanted = job + 30.0 * noise(now / 7);
        // Jobs take up to 50 MiB a second, and give it back at once.
        let more = guest.slowed((wanted - guest.containers).min(50.0), 1.0, 1.0);
        guest.containers += more;
        let at = Duration::from_secs(now);
        let mut decision = Decision::Hold(Hold::Steady);
        if guest.high.is_some_and(|high| guest.containers > high) {
            let (total, available) = (bytes(guest.total()), bytes(guest.available()));
            decision = guest.policy.pressure(at, total, available);
        } else if now % 10 == 0 {
            decision = guest.read(at);
        }
        if let Some((_, to)) = done(now, decision) {
            guest.settle(at, to);
        }
        assert!(guest.available() > 16.0, "{now}: {}", guest.available());
    }
    assert_eq!(guest.size, 512.0);
    let count = guest.changes.len();
    assert!(count <= 60, "{count}: {:?}", guest.changes);
    // Between the end of a job's start and its end the size rests.
    let rests = |from: u64, to: u64| !guest.changes.iter().any(|(at, _)| (from..to).contains(at));
    for (from, to) in [(4, 6), (10, 13), (19, 20), (23, 24)] {
        assert!(rests(from * HOUR, to * HOUR), "{:?}", guest.changes);
    }
}

#[test]
fn any_even_use_of_memory_comes_to_rest() {
    for used in (0..3000).step_by(10) {
        let mut guest = Guest::new(Bounds::new(512, 4096));
        for now in 0..2 * HOUR {
            let wanted = f64::from(used);
            guest.containers += guest.slowed((wanted - guest.containers).min(100.0), 1.0, 1.0);
            let at = Duration::from_secs(now);
            let mut decision = Decision::Hold(Hold::Steady);
            if guest.high.is_some_and(|high| guest.containers > high) {
                let (total, available) = (bytes(guest.total()), bytes(guest.available()));
                decision = guest.policy.pressure(at, total, available);
            } else if now % 10 == 0 {
                decision = guest.read(at);
            }
            if let Some((_, to)) = done(now, decision) {
                guest.settle(at, to);
            }
        }
        assert!(
            guest.changes.iter().all(|(at, _)| *at < HOUR),
            "{used} MiB: {:?}",
            guest.changes
        );
        assert!(guest.available() >= 192.0 - KERNEL - 4.0, "{used}");
    }
}
