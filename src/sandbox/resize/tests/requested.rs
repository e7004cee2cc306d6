//! Memory by the virtio-mem device, whose driver is a task that changes the device's status.

use std::cmp::Ordering;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use nacre_protocol::agent::ResourcesResponse;
use nacre_vmm::virtio::mem::MemStatus;

use super::*;

/// A driver that makes one move at a time: from what is plugged and what is requested to what is plugged then.
type Move = fn(&MemStatus) -> Option<u64>;

/// Goes straight to what is requested, by at most `most` bytes.
fn towards(status: &MemStatus, most: u64) -> Option<u64> {
    let (at, to) = (status.plugged, status.requested);
    match at.abs_diff(to).min(most) {
        0 => None,
        step if at < to => Some(at + step),
        step => Some(at - step),
    }
}

fn at_once(status: &MemStatus) -> Option<u64> {
    towards(status, u64::MAX)
}

struct Driven {
    vm: Vm,
    driver: tokio::task::JoinHandle<()>,
}

impl Driven {
    async fn new(step: Move, each: Duration) -> Self {
        Self::over(MemoryWay::Auto, step, each).await
    }

    async fn over(way: MemoryWay, step: Move, each: Duration) -> Self {
        let has: fn(&mut ResourcesResponse) = |has| has.virtio_mem = true;
        let script = Script {
            has,
            ..Script::good()
        };
        let vm = Vm::over(Fake::with_mem(true), way, script).await;
        let driver = drive(&vm.fake, step, each);
        Self { vm, driver }
    }

    /// Another driver takes the device up.
    fn replace(&mut self, step: Move, each: Duration) {
        self.driver.abort();
        self.driver = drive(&self.vm.fake, step, each);
    }

    /// What is requested and plugged, in MiB.
    fn device(&self) -> (u64, u64) {
        let status = self.vm.fake.mem.borrow();
        (status.requested / MIB, status.plugged / MIB)
    }

    async fn to(&self, mib: u64) -> (Result<Resized, Error>, Duration) {
        timed(self.vm.sandbox.resize_memory(mib)).await
    }
}

fn drive(fake: &Arc<Fake>, step: Move, each: Duration) -> tokio::task::JoinHandle<()> {
    let fake = fake.clone();
    tokio::spawn(async move {
        let mut status = fake.mem.subscribe();
        loop {
            let seen = *status.borrow_and_update();
            match step(&seen) {
                Some(plugged) => {
                    tokio::time::sleep(each).await;
                    fake.mem.send_modify(|status| status.plugged = plugged);
                }
                None => status.changed().await.unwrap(),
            }
        }
    })
}

#[tokio::test(start_paused = true)]
async fn a_driver_goes_where_it_is_asked_to() {
    for way in [MemoryWay::Auto, MemoryWay::VirtioMem] {
        let driven = Driven::over(way, at_once, seconds(1)).await;
        let (up, took) = driven.to(1280).await;
        let up = up.unwrap();
        assert_eq!((up.before, up.now, took), (256, 1280, seconds(1)));
        assert_eq!(whats(&up), ["virtio-mem to 1024 MiB"]);
        assert_eq!(up.steps[0].noticed_us, 1_000_000);
        assert_eq!(driven.vm.fake.memory_units(), []);
        // In steps of 2 MiB.
        assert_eq!(driven.to(299).await.0.unwrap().now, 300);
        assert_eq!(driven.to(299).await.0.unwrap().now, 300);
        assert_eq!(driven.to(256).await.0.unwrap().now, 256);
        assert_eq!(driven.device(), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn each_bit_of_progress_gives_a_slow_driver_more_time() {
    let slowly: Move = |status| towards(status, 128 * MIB);
    let driven = Driven::new(slowly, seconds(19)).await;
    let (up, took) = driven.to(768).await;
    assert_eq!((up.unwrap().now, took), (768, seconds(76)));
    let (down, took) = driven.to(256).await;
    assert_eq!((down.unwrap().now, took), (256, seconds(76)));
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_creeps_has_as_much_time_as_units_would() {
    let creeps: Move = |status| towards(status, 2 * MIB);
    let driven = Driven::new(creeps, seconds(9)).await;
    // 6 units of 128 MiB, 20 s each; then back, of which it has the way to go that it had begun.
    let (outcome, took) = driven.to(1024).await;
    has_all(
        &words(outcome),
        &[
            "virtio-mem driver stopped at 26 MiB of 768 asked for: it was too slow, 120s are over",
            "; asked to go back to 0 MiB it is at 26: it did not get on for 20s",
        ],
    );
    assert_eq!(took, seconds(140));
}

/// How growing by 512 MiB with 128 plugged fails; afterwards the driver does as it is asked.
struct Case {
    name: &'static str,
    step: Move,
    each: Duration,
    words: &'static [&'static str],
    takes: u64,
    /// Requested and plugged after it, in MiB.
    after: (u64, u64),
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_does_not_get_there_is_asked_back() {
    let cases = [
        Case {
            name: "does nothing",
            step: |_| None,
            each: seconds(1),
            words: &[
                "stopped at 128 MiB of 640 asked for: it did not get on for 20s; it is back at 128 MiB",
            ],
            takes: 20,
            after: (128, 128),
        },
        Case {
            name: "stops half way",
            step: |status| {
                let to = status.requested.min(384 * MIB);
                (status.plugged != to).then_some(to)
            },
            each: seconds(1),
            words: &[
                "stopped at 384 MiB of 640 asked for: it did not get on for 20s; it is back at 128 MiB",
            ],
            takes: 22,
            after: (128, 128),
        },
        Case {
            name: "stops half way and does not come back: both are told",
            step: |status| (status.plugged < 384 * MIB).then_some(384 * MIB),
            each: seconds(1),
            words: &[
                "stopped at 384 MiB of 640 asked for: it did not get on for 20s",
                "; asked to go back to 128 MiB it is at 384: it did not get on for 20s",
            ],
            takes: 41,
            after: (128, 384),
        },
        Case {
            name: "overshoots",
            step: |status| {
                let to = if status.requested > 128 * MIB {
                    status.requested + 128 * MIB
                } else {
                    status.requested
                };
                (status.plugged != to).then_some(to)
            },
            each: seconds(1),
            words: &[
                "stopped at 768 MiB of 640 asked for: it did not get on for 20s; it is back at 128 MiB",
            ],
            takes: 22,
            after: (128, 128),
        },
        Case {
            name: "plugs more than the region",
            step: |status| (status.plugged != u64::MAX - MIB + 1).then_some(u64::MAX - MIB + 1),
            each: seconds(1),
            words: &[
                "of 640 asked for: it did not get on for 20s; asked to go back to 128 MiB it is at 17592186044415",
            ],
            takes: 40,
            after: (128, u64::MAX / MIB),
        },
        Case {
            name: "goes to and fro",
            step: |status| {
                Some(if status.plugged == 256 * MIB {
                    384 * MIB
                } else {
                    256 * MIB
                })
            },
            each: seconds(1),
            words: &[
                "of 640 asked for: it did not get on for 20s; asked to go back to 128 MiB it is at",
            ],
            takes: 43,
            after: (128, 256),
        },
    ];
    for case in cases {
        let name = case.name;
        let mut driven = Driven::new(at_once, Duration::ZERO).await;
        driven.to(384).await.0.unwrap();
        driven.replace(case.step, case.each);
        let (outcome, took) = driven.to(896).await;
        let text = words(outcome);
        assert!(
            text.contains("to 896 MiB of memory from 384: the guest's"),
            "{text}"
        );
        for words in case.words {
            assert!(text.contains(words), "{name}: {words:?} is not in: {text}");
        }
        let (least, most) = (seconds(case.takes - 1), seconds(case.takes));
        assert!(took >= least && took <= most, "{name}: {took:?}: {text}");
        driven.driver.abort();
        assert_eq!(driven.device(), case.after, "{name}: {text}");
        // A device that reports more than it has is not the machine's: it is set right here.
        driven
            .vm
            .fake
            .mem
            .send_modify(|status| status.plugged = status.plugged.min(384 * MIB));
        driven.replace(at_once, Duration::ZERO);
        for size in [512, 256] {
            assert_eq!(driven.to(size).await.0.unwrap().now, size, "{name}");
            assert_eq!(driven.device(), (size - 256, size - 256), "{name}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_never_rests_holds_nobody_beyond_the_deadline() {
    let mut driven = Driven::new(at_once, Duration::ZERO).await;
    driven.replace(|_| None, Duration::ZERO);
    let fake = driven.vm.fake.clone();
    // Whenever the host looks, there is a change.
    let flood = tokio::spawn(async move {
        for round in 0..2000 {
            let plugged = (round % 2) * 128 * MIB;
            fake.mem.send_modify(|status| status.plugged = plugged);
            tokio::time::advance(Duration::from_millis(100)).await;
        }
    });
    let (outcome, took) = driven.to(768).await;
    has_all(&words(outcome), &["it did not get on for 20s"]);
    assert!(took < seconds(45), "{took:?}");
    flood.abort();
}

#[tokio::test(start_paused = true)]
async fn a_device_that_stopped_elsewhere_is_to_stay_there() {
    let mut driven = Driven::new(at_once, Duration::ZERO).await;
    driven.to(768).await.0.unwrap();
    // It gives half of it back, and does not take it again.
    driven.replace(
        |status| {
            let less = status.requested < status.plugged && status.plugged > 384 * MIB;
            less.then_some(384 * MIB)
        },
        Duration::ZERO,
    );
    words(driven.to(256).await.0);
    assert_eq!(driven.device(), (512, 384));
    let same = driven.to(640).await.0.unwrap();
    assert_eq!((same.before, same.now), (640, 640));
    assert_eq!(driven.device(), (384, 384));
}

#[tokio::test(start_paused = true)]
async fn a_shrink_that_failed_is_told_when_the_guest_has_all_again() {
    static ASKED: AtomicU64 = AtomicU64::new(0);
    static UNTIL: AtomicU64 = AtomicU64::new(0);
    let mut driven = Driven::new(at_once, Duration::ZERO).await;
    driven.to(768).await.0.unwrap();
    // It takes back what it gave, and its kernel has that online some time later.
    driven.replace(
        |status| match status.plugged.cmp(&status.requested) {
            Ordering::Greater => (status.plugged > 384 * MIB).then_some(384 * MIB),
            Ordering::Less => Some(status.requested),
            Ordering::Equal => None,
        },
        Duration::ZERO,
    );
    driven.vm.guest.behave(Script {
        has: |has| {
            has.virtio_mem = true;
            let asked = ASKED.fetch_add(1, Relaxed);
            if (1..UNTIL.load(Relaxed)).contains(&asked) {
                has.memory_total_bytes -= 128 * MIB;
            }
        },
        ..Script::good()
    });
    for (until, late) in [(7, false), (u64::MAX, true)] {
        ASKED.store(0, Relaxed);
        UNTIL.store(until, Relaxed);
        let why = words(driven.to(256).await.0);
        has_all(&why, &["it did not get on for 20s; it is back at 512 MiB"]);
        let said = "the guest's kernel has 640 MiB online of 768";
        assert_eq!(why.contains(said), late, "{why}");
        assert!(ASKED.load(Relaxed) > 7, "{why}");
        assert_eq!(driven.device(), (512, 512));
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_without_room_is_not_asked() {
    let driven = Driven::new(at_once, Duration::ZERO).await;
    driven.to(768).await.0.unwrap();
    driven.vm.guest.behave(Script {
        has: |has| {
            has.virtio_mem = true;
            has.memory_available_bytes = 100 * MIB;
        },
        ..Script::good()
    });
    let why = words(driven.to(256).await.0);
    let said =
        "512 MiB were to go by virtio-mem: not tried, since the guest has only 100 MiB available";
    has_all(&why, &[said]);
    assert_eq!(driven.device(), (512, 512));
    // What the kernel says is an estimate.
    driven.to(640).await.0.unwrap();
    assert_eq!(driven.device(), (384, 384));
}

/// As Linux' driver, which waits for a minute after a failure unless it is told of a change.
#[tokio::test(start_paused = true)]
async fn a_driver_that_waits_after_a_failure_is_told_again() {
    static TOLD: AtomicU64 = AtomicU64::new(0);
    let driven = Driven::new(
        |status| {
            let tells = TOLD.fetch_add(1, Relaxed);
            (tells >= 3 && status.plugged != status.requested).then_some(status.requested)
        },
        Duration::ZERO,
    )
    .await;
    driven.vm.guest.behave(Script::good());
    assert_eq!(driven.to(512).await.0.unwrap().now, 512);
}

#[tokio::test(start_paused = true)]
async fn a_guest_whose_driver_comes_late_gives_both_back() {
    let driven = Driven::new(at_once, Duration::ZERO).await;
    driven.vm.guest.behave(Script::good());
    assert_eq!(driven.to(512).await.0.unwrap().now, 512);
    assert_eq!(driven.vm.fake.memory_units().len(), 2);
    driven.vm.guest.behave(Script {
        has: |has| has.virtio_mem = true,
        ..Script::good()
    });
    assert_eq!(driven.to(640).await.0.unwrap().now, 640);
    assert_eq!(driven.device(), (128, 128));
    // Together they are no more than what the VM was started for.
    has_all(
        &words(driven.to(1281).await.0),
        &["it was started for 1280 MiB at most"],
    );
    let down = driven.to(384).await.0.unwrap();
    assert_eq!((down.before, down.now), (640, 384));
    assert_eq!(
        whats(&down),
        ["virtio-mem to 0 MiB", "128 MiB at 0x108000000"]
    );
    assert_eq!(driven.to(256).await.0.unwrap().now, 256);
    driven.vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn where_units_do_not_go_the_device_takes_its_part_again() {
    let driven = Driven::new(at_once, Duration::ZERO).await;
    driven.vm.guest.behave(Script::good());
    driven.to(512).await.0.unwrap();
    driven.vm.guest.behave(Script {
        has: |has| has.virtio_mem = true,
        offline: |_| Reply::Refuses(Code::FAILED_PRECONDITION, "in use"),
        ..Script::good()
    });
    driven.to(640).await.0.unwrap();
    let text = words(driven.to(256).await.0);
    has_all(
        &text,
        &[
            "0 of 256 MiB can be unplugged",
            "; what the virtio-mem device gave back is plugged again",
        ],
    );
    assert_eq!(driven.vm.size(), (1, 640));
    // Without a driver only the units could go.
    driven
        .vm
        .fake
        .mem
        .send_modify(|status| status.driver = false);
    let text = words(driven.to(256).await.0);
    has_all(&text, &["has 128 MiB plugged, and no driver runs it"]);
    driven.vm.guest.behave(Script::good());
    assert_eq!(driven.to(512).await.0.unwrap().now, 512);
    assert_eq!(driven.device(), (128, 128));
}
