use std::time::Duration;

use tokio::time::sleep;

use super::*;
use crate::config::{ByteSize, CpuRules, MemoryRules};
use crate::hotplug::{FailureKind, Readings};

mod failing;
mod fake;

use fake::{Call, Vm};

const MIB: u64 = 1 << 20;

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn room() -> Room {
    Room {
        vcpus: Bounds::new(1, 4),
        memory_mib: Bounds::new(512, 4096),
    }
}

fn no_room() -> Room {
    Room {
        vcpus: Bounds::new(2, 2),
        memory_mib: Bounds::new(512, 512),
    }
}

/// Only vCPUs by themselves.
fn cpu_only() -> Hotplug {
    Hotplug {
        memory: MemoryRules {
            interval: Duration::ZERO,
            ..MemoryRules::default()
        },
        ..Hotplug::default()
    }
}

fn start(vm: &Vm, rules: &Hotplug, room: Room) -> Controller {
    vm.boot(room.vcpus.boot(), room.memory_mib.boot());
    Controller::start(rules, room, vm.clone())
}

fn stall(available_mib: u64) -> Pressure {
    Pressure {
        total_bytes: 500 * MIB,
        available_bytes: available_mib * MIB,
    }
}

fn vcpus(size: u8) -> Change {
    Change {
        vcpus: Wish {
            size: Some(size),
            ..Wish::default()
        },
        ..Change::default()
    }
}

fn memory(size: u64) -> Change {
    Change {
        memory_mib: Wish {
            size: Some(size),
            ..Wish::default()
        },
        ..Change::default()
    }
}

#[tokio::test(start_paused = true)]
async fn vcpus_follow_the_load_at_the_documented_times() {
    let vm = Vm::default();
    let controller = start(&vm, &cpu_only(), room());
    vm.change(|state| state.load = 1.0);
    sleep(seconds(300)).await;
    assert_eq!(controller.sizes().vcpus, 4);
    vm.change(|state| state.load = 0.0);
    sleep(seconds(300)).await;
    assert_eq!(controller.sizes().vcpus, 1);
    assert_eq!(
        vm.resizes(),
        [
            (10, Call::Vcpus(2)),
            (20, Call::Vcpus(3)),
            (30, Call::Vcpus(4)),
            (330, Call::Vcpus(3)),
            (360, Call::Vcpus(2)),
            (390, Call::Vcpus(1)),
        ]
    );
    // No more readings than there are intervals.
    assert!((120..=121).contains(&vm.count(&Call::Read)));
}

#[tokio::test(start_paused = true)]
async fn slow_plugs_delay_readings_and_are_not_caught_up() {
    let vm = Vm::default();
    vm.change(|state| {
        state.load = 1.0;
        state.latency = seconds(12);
    });
    let controller = start(&vm, &cpu_only(), room());
    sleep(seconds(600)).await;
    assert_eq!(controller.sizes().vcpus, 4);
    let starts: Vec<u64> = vm.resizes().iter().map(|(at, _)| *at).collect();
    for two in starts.windows(2) {
        assert!(two[1] - two[0] >= 12, "{starts:?}");
    }
    assert!(vm.count(&Call::Read) <= 600 / 5, "{:?}", vm.calls());
}

#[tokio::test(start_paused = true)]
async fn one_reading_serves_both_and_memory_comes_first() {
    let vm = Vm::default();
    vm.change(|state| {
        state.load = 1.0;
        state.used = 480.0;
    });
    let rules = Hotplug {
        memory: MemoryRules {
            up_readings: 2,
            ..MemoryRules::default()
        },
        ..Hotplug::default()
    };
    let _controller = start(&vm, &rules, room());
    sleep(Duration::from_millis(10_500)).await;
    assert_eq!(
        vm.resizes(),
        [(10, Call::Memory(640)), (10, Call::Vcpus(2))]
    );
    assert_eq!(vm.count(&Call::Read), 3, "at 0, 5 and 10 s");
}

#[tokio::test(start_paused = true)]
async fn without_room_or_switched_off_the_vm_is_never_disturbed() {
    let off = Hotplug {
        enabled: false,
        ..Hotplug::default()
    };
    let no_interval = Hotplug {
        cpu: CpuRules {
            interval: Duration::ZERO,
            ..CpuRules::default()
        },
        ..cpu_only()
    };
    for (rules, room) in [
        (Hotplug::default(), no_room()),
        (off, room()),
        (no_interval, room()),
    ] {
        let vm = Vm::default();
        vm.change(|state| state.load = 1.0);
        let controller = start(&vm, &rules, room);
        for _ in 0..100 {
            controller.pressure(stall(0));
            sleep(seconds(600)).await;
        }
        assert_eq!(vm.calls(), []);
        assert_eq!(controller.set(memory(512)).await.unwrap().memory_mib, 512);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stall_plugs_at_once_and_the_guest_watches_the_new_size() {
    let vm = Vm::default();
    vm.change(|state| state.used = 400.0);
    let controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(1)).await;
    assert_eq!(vm.watched(), 320 * MIB);
    controller.pressure(stall(100));
    sleep(Duration::from_millis(1)).await;
    assert_eq!(vm.resizes(), [(1, Call::Memory(768))]);
    assert_eq!(controller.sizes().memory_mib, 768);
    assert_eq!(vm.watched(), (500 + 256 - 192) * MIB, "before a reading");
    sleep(seconds(10)).await;
    assert_eq!(vm.watched(), (768 - 192) * MIB, "by the guest's figure");
    // At the ceiling nothing could come.
    controller
        .set(Change {
            memory_mib: Wish {
                ceiling: Some(768),
                ..Wish::default()
            },
            ..Change::default()
        })
        .await
        .unwrap();
    assert_eq!(vm.watched(), 0);
}

#[tokio::test(start_paused = true)]
async fn stalls_during_a_plug_are_of_a_size_that_is_no_more() {
    let vm = Vm::default();
    vm.change(|state| {
        state.latency = seconds(3);
        state.used = 400.0;
    });
    let controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(1)).await;
    for _ in 0..14 {
        controller.pressure(stall(100));
        sleep(Duration::from_millis(200)).await;
    }
    sleep(seconds(5)).await;
    assert_eq!(vm.resizes(), [(1, Call::Memory(768))]);
    controller.pressure(stall(100));
    sleep(seconds(5)).await;
    assert_eq!(controller.sizes().memory_mib, 1280, "twice as much");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_stalls_all_the_time_gets_no_more_than_it_may_and_keeps_nobody_waiting() {
    let vm = Vm::default();
    let controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(1)).await;
    for _ in 0..20_000 {
        controller.pressure(stall(0));
        tokio::task::yield_now().await;
    }
    assert_eq!(controller.sizes().memory_mib, 4096);
    let resizes = vm.resizes().len();
    assert!(resizes <= 6, "{:?}", vm.resizes());
    let flood = async {
        loop {
            controller.pressure(stall(0));
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = flood => unreachable!(),
        set = controller.set(vcpus(2)) => assert_eq!(set.unwrap().vcpus, 2),
    }
    assert!(
        vm.calls().len() < 30,
        "each stall is a call: {:?}",
        vm.calls()
    );
}

#[tokio::test(start_paused = true)]
async fn a_set_size_is_there_when_it_is_answered_and_starts_the_cooldowns() {
    let vm = Vm::default();
    vm.change(|state| state.latency = seconds(2));
    let controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(1)).await;
    let change = Change {
        vcpus: vcpus(3).vcpus,
        memory_mib: memory(1024).memory_mib,
    };
    let sizes = controller.set(change).await.unwrap();
    assert_eq!(
        sizes,
        Sizes {
            vcpus: 3,
            memory_mib: 1024
        }
    );
    assert_eq!(vm.sizes(), (3, 1024));
    assert_eq!(controller.sizes(), sizes);
    // Nobody uses it: one less after the cooldown, which ran from the end of the change at 5 s.
    sleep(seconds(40)).await;
    let next = vm.resizes()[2];
    assert_eq!(next, (35, Call::Vcpus(2)));
}

#[tokio::test(start_paused = true)]
async fn limits_that_move_wake_the_controller_and_bring_the_size_within() {
    let vm = Vm::default();
    vm.change(|state| state.load = 1.0);
    let controller = start(&vm, &Hotplug::default(), no_room());
    sleep(seconds(60)).await;
    assert_eq!(vm.calls(), []);
    let limits = |vcpus, memory| Change {
        vcpus: Wish {
            ceiling: Some(vcpus),
            ..Wish::default()
        },
        memory_mib: Wish {
            ceiling: Some(memory),
            ..Wish::default()
        },
    };
    let sizes = controller.set(limits(4, 1024)).await.unwrap();
    assert_eq!((sizes.vcpus, sizes.memory_mib), (2, 512));
    // Not at the moment of a reading.
    sleep(seconds(65)).await;
    assert_eq!(controller.sizes().vcpus, 4);
    controller.pressure(stall(0));
    sleep(seconds(1)).await;
    assert_eq!(controller.sizes().memory_mib, 896);
    // And back: at once, and to sleep.
    let sizes = controller.set(limits(1, 1)).await.unwrap();
    assert_eq!((sizes.vcpus, sizes.memory_mib), (2, 512));
    assert_eq!(vm.sizes(), (2, 512));
    assert_eq!(vm.watched(), 0);
    let calls = vm.calls().len();
    sleep(seconds(3600)).await;
    assert_eq!(vm.calls().len(), calls);
    // A floor is kept however idle the VM is.
    vm.change(|state| state.load = 0.0);
    let mut floor = limits(4, 1024);
    floor.vcpus.floor = Some(3);
    assert_eq!(controller.set(floor).await.unwrap().vcpus, 3);
    sleep(seconds(3600)).await;
    assert_eq!(controller.sizes().vcpus, 3);
}

#[tokio::test(start_paused = true)]
async fn a_size_out_of_bounds_is_refused_with_what_is_allowed_and_changes_nothing() {
    let vm = Vm::default();
    let controller = start(&vm, &Hotplug::default(), no_room());
    for (change, words) in [
        (
            vcpus(3),
            "Cannot resize the VM to 3 vCPUs: it may have from 2 to 2",
        ),
        (
            memory(256),
            "to 256 MiB of memory: it may have from 512 to 512",
        ),
    ] {
        // Bounds are not moved either.
        let mut both = change;
        both.vcpus.ceiling = Some(2);
        both.memory_mib.ceiling = Some(512);
        let error = controller.set(both).await.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    assert_eq!(vm.calls(), []);
}

#[tokio::test(start_paused = true)]
async fn changes_from_all_sides_never_meet() {
    let vm = Vm::default();
    vm.change(|state| {
        state.latency = Duration::from_millis(700);
        state.load = 1.0;
        state.used = 500.0;
    });
    let controller = start(&vm, &Hotplug::default(), room());
    let sets = async {
        for round in 0..60_u64 {
            let vcpus = vcpus(1 + u8::try_from(round % 4).unwrap());
            let memory = memory(512 + 128 * (round % 7));
            let (a, b) = tokio::join!(controller.set(vcpus), controller.set(memory));
            a.unwrap();
            b.unwrap();
            sleep(Duration::from_millis(300)).await;
        }
    };
    let stalls = async {
        loop {
            controller.pressure(stall(10));
            sleep(Duration::from_millis(150)).await;
        }
    };
    tokio::select! {
        () = sets => {}
        () = stalls => unreachable!(),
    }
    assert_eq!(vm.most_in_flight(), 1);
    let sizes = controller.sizes();
    assert_eq!(vm.sizes(), (sizes.vcpus, sizes.memory_mib));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_gives_up_does_not_undo_its_change() {
    let vm = Vm::default();
    vm.change(|state| state.latency = seconds(5));
    let controller = start(&vm, &Hotplug::default(), room());
    let waited = tokio::time::timeout(seconds(1), controller.set(vcpus(2))).await;
    waited.unwrap_err();
    sleep(seconds(6)).await;
    assert_eq!(vm.sizes(), (2, 512));
}

#[tokio::test(start_paused = true)]
async fn a_pause_leaves_the_vm_alone_but_for_what_is_set() {
    let vm = Vm::default();
    vm.change(|state| state.load = 1.0);
    let controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(1)).await;
    assert_ne!(vm.watched(), 0);
    controller.pause().await;
    assert_eq!(vm.watched(), 0, "containers run free");
    let calls = vm.calls().len();
    controller.pressure(stall(0));
    sleep(seconds(600)).await;
    assert_eq!(vm.calls().len(), calls);
    assert_eq!(controller.set(memory(1024)).await.unwrap().memory_mib, 1024);
    assert_eq!(vm.watched(), 0);
    controller.resume().await;
    sleep(seconds(60)).await;
    assert_eq!(controller.sizes().vcpus, 4);
    assert_ne!(vm.watched(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_pause_waits_for_the_change_in_flight() {
    let vm = Vm::default();
    vm.change(|state| state.latency = seconds(3));
    let controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(1)).await;
    controller.pressure(stall(0));
    sleep(Duration::from_millis(1)).await;
    assert_eq!(vm.in_flight(), 1);
    controller.pause().await;
    assert_eq!(vm.in_flight(), 0);
    assert_ne!(vm.sizes().1, 512);
}

#[tokio::test(start_paused = true)]
async fn a_stop_gives_up_what_is_in_flight_and_nothing_begins_after_it() {
    let vm = Vm::default();
    vm.change(|state| state.latency = seconds(1_000_000));
    let controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(1)).await;
    controller.pressure(stall(0));
    sleep(seconds(1)).await;
    assert_eq!(vm.in_flight(), 1);
    let begun = tokio::time::Instant::now();
    let (set, (), ()) = tokio::join!(
        controller.set(vcpus(2)),
        controller.stop(),
        controller.stop()
    );
    assert_eq!(set.unwrap_err(), SetError::Stopped);
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(vm.in_flight(), 0);
    let calls = vm.calls().len();
    controller.pressure(stall(0));
    controller.pause().await;
    controller.resume().await;
    let error = controller.set(vcpus(2)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "Cannot resize the VM: it is being stopped"
    );
    controller.stop().await;
    sleep(seconds(600)).await;
    assert_eq!(vm.calls().len(), calls);
}

#[tokio::test(start_paused = true)]
async fn a_handle_that_is_dropped_ends_the_task() {
    let vm = Vm::default();
    vm.boot(1, 512);
    let (controller, task) = Controller::new(&Hotplug::default(), room(), vm.clone());
    let task = tokio::spawn(task);
    sleep(seconds(20)).await;
    assert!(!task.is_finished());
    drop(controller);
    tokio::time::timeout(seconds(1), task)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_smallest_step_and_the_shortest_interval_do_not_spin() {
    let vm = Vm::default();
    vm.change(|state| {
        state.load = 1.0;
        state.used = 4096.0;
    });
    let rules = Hotplug {
        enabled: true,
        cpu: CpuRules {
            interval: Duration::from_millis(100),
            up_load: 0,
            up_readings: 0,
            up_throttled: 0,
            up_cooldown: Duration::ZERO,
            down_load: 0,
            down_readings: 0,
            down_cooldown: Duration::ZERO,
        },
        memory: MemoryRules {
            interval: Duration::from_millis(100),
            step: ByteSize::from_mib(2),
            up_readings: 0,
            up_cooldown: Duration::ZERO,
            down_cooldown: Duration::ZERO,
            reserve: ByteSize(0),
            burst: ByteSize::from_mib(2),
            ..MemoryRules::default()
        },
    };
    let _controller = start(&vm, &rules, room());
    sleep(seconds(60)).await;
    assert!(
        vm.count(&Call::Read) <= 601,
        "{} readings",
        vm.count(&Call::Read)
    );
    assert_eq!(vm.sizes().0, 4);
    assert!(vm.sizes().1 <= 512 + 2 * 601);
}
