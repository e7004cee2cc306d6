//! VMs that fail, answer other sizes than asked for, and end.

use super::fake::Whim;
use super::*;
use crate::hotplug::controller::failures::{Doing, Failures};

#[tokio::test(start_paused = true)]
async fn vcpus_that_never_come_are_tried_less_and_less() {
    let vm = Vm::default();
    vm.change(|state| {
        state.load = 1.0;
        state.always = Some(Whim::Fail(FailureKind::Timeout));
    });
    let controller = start(&vm, &cpu_only(), room());
    sleep(seconds(3600)).await;
    let attempts = vm.resizes().len();
    assert!((8..=12).contains(&attempts), "{:?}", vm.resizes());
    assert_eq!(controller.sizes().vcpus, 1);
    vm.change(|state| state.always = None);
    sleep(seconds(700)).await;
    assert_eq!(controller.sizes().vcpus, 4);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_move_is_tried_less_and_less_too() {
    let vm = Vm::default();
    vm.change(|state| {
        state.used = 500.0;
        state.always = Some(Whim::Answer(512));
    });
    let _controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(3600)).await;
    let attempts = vm.resizes().len();
    assert!((6..=12).contains(&attempts), "{:?}", vm.resizes());
}

#[tokio::test(start_paused = true)]
async fn containers_run_free_while_no_memory_comes() {
    let vm = Vm::default();
    let controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(1)).await;
    vm.change(|state| state.always = Some(Whim::Fail(FailureKind::Refused)));
    for _ in 0..40 {
        controller.pressure(stall(0));
        sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(vm.resizes().len(), 1);
    assert_eq!(vm.watched(), 0);
    vm.change(|state| state.always = None);
    // The pause of ten seconds ends at 11 s, the reading after it is at 20 s.
    sleep(seconds(12)).await;
    assert_eq!(vm.watched(), 320 * MIB);
    controller.pressure(stall(0));
    sleep(seconds(1)).await;
    assert_ne!(controller.sizes().memory_mib, 512);
}

#[tokio::test(start_paused = true)]
async fn readings_that_fail_are_taken_once_a_minute_at_most_and_resume() {
    let vm = Vm::default();
    vm.change(|state| {
        state.load = 1.0;
        state.reading_fails = Some(FailureKind::Timeout);
    });
    let controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(3600)).await;
    let readings = vm.count(&Call::Read);
    // Each of the two has its own.
    assert!((60..=130).contains(&readings), "{readings}");
    vm.change(|state| state.reading_fails = None);
    sleep(seconds(120)).await;
    assert_eq!(controller.sizes().vcpus, 4);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_has_ended_is_left_alone() {
    let vm = Vm::default();
    let controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(1)).await;
    vm.change(|state| {
        state.reading_fails = Some(FailureKind::Gone);
        state.always = Some(Whim::Fail(FailureKind::Gone));
    });
    sleep(seconds(10)).await;
    let calls = vm.calls().len();
    for _ in 0..100 {
        controller.pressure(stall(0));
        sleep(seconds(60)).await;
    }
    assert_eq!(vm.calls().len(), calls);
    let error = controller.set(vcpus(2)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "Cannot resize the VM to 2 vCPUs: the guest does not want to"
    );
    controller.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_change_that_fails_says_why_and_the_other_is_made() {
    let vm = Vm::default();
    let controller = start(&vm, &Hotplug::default(), room());
    vm.change(|state| state.whims.push_back(Whim::Fail(FailureKind::Unsupported)));
    let change = Change {
        vcpus: vcpus(2).vcpus,
        memory_mib: memory(1024).memory_mib,
    };
    let error = controller.set(change).await.unwrap_err();
    assert!(
        matches!(&error, SetError::Failed { asked, source }
            if asked == "1024 MiB of memory" && source.kind == FailureKind::Unsupported),
        "{error:?}"
    );
    assert_eq!(vm.sizes(), (2, 512));
    let sizes = controller.sizes();
    assert_eq!((sizes.vcpus, sizes.memory_mib), (2, 512));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_gives_back_less_than_asked_is_believed() {
    let vm = Vm::default();
    let controller = start(&vm, &Hotplug::default(), room());
    controller.set(memory(2048)).await.unwrap();
    vm.change(|state| state.whims.push_back(Whim::Answer(1500)));
    let sizes = controller.set(memory(1024)).await.unwrap();
    assert_eq!(sizes.memory_mib, 1500);
    assert_eq!(controller.sizes().memory_mib, 1500);
}

#[tokio::test(start_paused = true)]
async fn a_size_that_the_guest_takes_by_itself_is_adopted() {
    let vm = Vm::default();
    let controller = start(&vm, &cpu_only(), room());
    sleep(seconds(11)).await;
    vm.change(|state| state.vcpus = 3);
    sleep(seconds(5)).await;
    assert_eq!(controller.sizes().vcpus, 3);
    sleep(seconds(60)).await;
    assert!(controller.sizes().vcpus < 3);
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_fails_is_tried_again_with_the_next_reading() {
    let vm = Vm::default();
    vm.change(|state| state.watch_fails = Some(FailureKind::Timeout));
    let _controller = start(&vm, &Hotplug::default(), room());
    sleep(seconds(95)).await;
    assert_eq!(vm.count(&Call::Watch(320 * MIB)), 10);
    vm.change(|state| state.watch_fails = None);
    sleep(seconds(60)).await;
    assert_eq!(vm.watched(), 320 * MIB);
    assert_eq!(vm.count(&Call::Watch(320 * MIB)), 11);
}

#[tokio::test(start_paused = true)]
async fn a_bug_in_the_actuator_is_a_controller_that_has_stopped() {
    let vm = Vm::default();
    let controller = start(&vm, &Hotplug::default(), room());
    vm.change(|state| state.always = Some(Whim::Panic));
    let error = controller.set(vcpus(2)).await.unwrap_err();
    assert_eq!(error, SetError::Stopped);
    controller.stop().await;
    assert_eq!(vm.in_flight(), 0);
}

#[test]
fn each_kind_of_failure_is_told_once_until_it_works_again() {
    let mut failures = Failures::default();
    let failure = |kind| Failure {
        kind,
        message: String::new(),
    };
    let (timeout, refused) = (failure(FailureKind::Timeout), failure(FailureKind::Refused));
    let told = [
        (Doing::Vcpus, &timeout, true),
        (Doing::Vcpus, &timeout, false),
        (Doing::Vcpus, &refused, true),
        (Doing::Memory, &timeout, true),
        (Doing::Vcpus, &timeout, false),
        (Doing::Vcpus, &refused, false),
    ];
    for (doing, failure, first) in told {
        assert_eq!(
            failures.failed(doing, "do it", failure),
            first,
            "{doing:?} {failure:?}"
        );
    }
    failures.worked(Doing::Vcpus);
    assert!(failures.failed(Doing::Vcpus, "do it", &timeout));
    assert!(!failures.failed(Doing::Memory, "do it", &timeout));
}

/// Answers whatever it is told to.
#[derive(Clone, Copy)]
struct Liar(Readings);

impl Actuator for Liar {
    async fn read(&self) -> Result<Readings, Failure> {
        Ok(self.0)
    }

    async fn resize_vcpus(&self, _to: u8) -> Result<u8, Failure> {
        Ok(self.0.vcpus_online)
    }

    async fn resize_memory(&self, _to_mib: u64) -> Result<u64, Failure> {
        Ok(self.0.memory_mib)
    }

    async fn watch_memory(&self, _high_bytes: u64) -> Result<(), Failure> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_a_guest_claims_the_controller_goes_on() {
    for wild in [0, 1, u64::MAX / 2, u64::MAX] {
        for vcpus_online in [0, 1, u8::MAX] {
            for available in [0, wild, u64::MAX] {
                let liar = Liar(Readings {
                    vcpus_online,
                    cpu_busy_us: wild,
                    cpu_total_us: wild,
                    throttled_us: wild,
                    memory_mib: wild,
                    memory_total_bytes: wild,
                    memory_available_bytes: available,
                });
                let controller = Controller::start(&Hotplug::default(), room(), liar);
                for _ in 0..10 {
                    controller.pressure(Pressure {
                        total_bytes: wild,
                        available_bytes: available,
                    });
                    sleep(seconds(30)).await;
                }
                let sizes = controller.set(vcpus(2)).await.unwrap();
                assert_eq!(sizes.vcpus, vcpus_online);
                controller.stop().await;
            }
        }
    }
}
