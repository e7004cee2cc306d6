//! Changes that meet others: two at once, one that is given up, and the VM's end in the midst of one.

use super::*;
use crate::control::Wanted;

#[tokio::test(start_paused = true)]
async fn two_changes_at_once_are_one_after_another() {
    let vm = Vm::new(Script {
        online: |_| Reply::After(seconds(5)),
        ..Script::good()
    })
    .await;
    let (up, more) = tokio::join!(vm.sandbox.resize_vcpus(3), vm.sandbox.resize_memory(512));
    assert_eq!((up.unwrap().now, more.unwrap().now), (3, 512));
    assert_eq!(
        vm.guest.calls(),
        [
            "online Vcpu(1)",
            "online Vcpu(2)",
            "resources",
            "online Unit(0)",
            "online Unit(1)"
        ]
    );
    let (down, same) = tokio::join!(vm.sandbox.resize_vcpus(1), vm.sandbox.resize_vcpus(2));
    assert_eq!((down.unwrap().now, same.unwrap().before), (1, 1));
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn one_that_waits_too_long_for_its_turn_says_so() {
    let vm = Vm::new(Script {
        online: |_| Reply::After(seconds(25)),
        ..Script::good()
    })
    .await;
    let (long, second, third) = tokio::join!(
        vm.sandbox.resize_memory(768),
        timed(vm.sandbox.resize_vcpus(2)),
        timed(vm.sandbox.resize_memory(256)),
    );
    assert_eq!(long.unwrap().now, 768);
    for (outcome, took) in [second, third] {
        has_all(
            &words(outcome),
            &["another change of the VM's size is under way for more than 80s"],
        );
        assert_eq!(took, seconds(80));
    }
    assert_eq!(vm.size(), (1, 768));
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn where_memory_fails_the_vcpus_that_came_are_told() {
    let vm = Vm::new(Script::good()).await;
    let wanted = |vcpus, memory_mib| Wanted {
        vcpus: Some(vcpus),
        memory_mib: Some(memory_mib),
    };
    let why = vm.sandbox.resize(wanted(2, 4096)).await.unwrap_err();
    has_all(&why, &["768 MiB at most", "; the VM has 2 vCPUs now"]);
    let why = vm.sandbox.resize(wanted(5, 512)).await.unwrap_err();
    has_all(&why, &["started for 4 at most"]);
    assert_eq!(vm.size(), (2, 256));
}

/// What is under way when the VM ends: a change of a VM of 2 vCPUs and 384 MiB.
struct Case {
    name: &'static str,
    script: Script,
    vcpus: Option<u8>,
    mib: Option<u64>,
    way: MemoryWay,
}

#[tokio::test(start_paused = true)]
async fn the_vms_end_ends_a_change_at_once_with_the_reason() {
    let good = Script::good;
    let offline = || Script {
        offline: |_| Reply::Ends,
        ..good()
    };
    let online = || Script {
        online: |_| Reply::Ends,
        ..good()
    };
    let ejects = || Script {
        ejects: |_| Eject::Ends,
        ..good()
    };
    let undoing = || Script {
        online: |_| Reply::Refuses(Code::INTERNAL, "it did not start"),
        ..ejects()
    };
    let resources = Script {
        resources: Reply::Ends,
        ..good()
    };
    let (units, device) = (MemoryWay::Acpi, MemoryWay::VirtioMem);
    let vcpus = |name, script, to| Case {
        name,
        script,
        vcpus: Some(to),
        mib: None,
        way: units,
    };
    let memory = |name, script, to, way| Case {
        name,
        script,
        vcpus: None,
        mib: Some(to),
        way,
    };
    let cases = [
        vcpus("a vCPU comes online", online(), 4),
        vcpus("a vCPU is taken back", undoing(), 4),
        vcpus("a vCPU goes offline", offline(), 1),
        vcpus("a vCPU is ejected", ejects(), 1),
        memory("the guest is asked what it has", resources, 640, units),
        memory("a unit comes online", online(), 640, units),
        memory("a unit is taken back", undoing(), 640, units),
        memory("a unit goes offline", offline(), 256, units),
        memory("a unit is ejected", ejects(), 256, units),
        memory("the driver plugs", good(), 640, device),
        memory("the driver unplugs", good(), 256, device),
    ];
    for case in cases {
        let name = case.name;
        let vm = Vm::over(Fake::with_mem(true), case.way, good()).await;
        vm.sandbox.resize_vcpus(2).await.unwrap();
        if case.way == units {
            vm.sandbox.resize_memory(384).await.unwrap();
        } else {
            vm.fake.mem.send_modify(|status| {
                (status.plugged, status.requested) = (128 * MIB, 128 * MIB);
            });
            let fake = vm.fake.clone();
            tokio::spawn(async move {
                tokio::time::sleep(seconds(1)).await;
                fake.end(ExitReason::Panic);
            });
        }
        assert_eq!(vm.size(), (2, 384), "{name}");
        vm.guest.behave(case.script);
        let wanted = Wanted {
            vcpus: case.vcpus,
            memory_mib: case.mib,
        };
        let (outcome, took) = timed(vm.sandbox.resize(wanted)).await;
        let text = outcome.expect_err(name);
        let gone = format!(
            ": The VM is gone: {}; its console was silent",
            ExitReason::Panic
        );
        assert!(text.ends_with(&gone), "{name}: {text}");
        assert_eq!(text.matches("The VM is gone").count(), 1, "{name}: {text}");
        assert_eq!(took, seconds(1), "{name}");
        assert_eq!(vm.size(), (1, 256), "{name}: what it began with");
        // No size can be had any more, not even that which is there.
        for to in [1, 2] {
            let (outcome, took) = timed(vm.sandbox.resize_vcpus(to)).await;
            has_all(&words(outcome), &["The VM is gone"]);
            assert_eq!(took, Duration::ZERO, "{name}");
        }
        for to in [256, 512] {
            let (outcome, took) = timed(vm.sandbox.resize_memory(to)).await;
            has_all(&words(outcome), &["The VM is gone"]);
            assert_eq!(took, Duration::ZERO, "{name}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_vm_that_boots_ends_a_change() {
    let (sandbox, fake, _) = boot_over(Fake::new(), MemoryWay::Auto);
    let ends = async {
        tokio::time::sleep(seconds(3)).await;
        fake.end(ExitReason::Reboot);
    };
    let (up, more, ()) = tokio::join!(sandbox.resize_vcpus(2), sandbox.resize_memory(384), ends);
    has_all(&words(up), &["The VM is gone"]);
    has_all(&words(more), &["The VM is gone"]);
}

#[tokio::test(start_paused = true)]
async fn a_change_that_is_given_up_is_what_the_next_begins_with() {
    type Bad = fn() -> Script;
    let cases: [(&str, Bad); 4] = [
        ("the agent is silent", || Script {
            online: |_| Reply::Mute,
            offline: |_| Reply::Mute,
            ..Script::good()
        }),
        ("and nothing is noticed", || Script {
            notices: false,
            online: |_| Reply::Mute,
            ..Script::good()
        }),
        ("it is never ejected", || Script {
            online: |_| Reply::Refuses(Code::INTERNAL, "it did not start"),
            ejects: |_| Eject::Ignores,
            ..Script::good()
        }),
        ("the kernel is silent", || Script {
            notices: false,
            online: |_| Reply::Refuses(Code::INTERNAL, "it did not start"),
            ..Script::good()
        }),
    ];
    for (name, bad) in cases {
        for (given_up, wanted) in [
            ((3, 512), (2, 384)),
            ((1, 256), (2, 384)),
            ((1, 256), (1, 256)),
        ] {
            let vm = Vm::new(Script::good()).await;
            vm.sandbox.resize_vcpus(2).await.unwrap();
            vm.sandbox.resize_memory(384).await.unwrap();
            vm.guest.behave(bad());
            let second = seconds(1);
            let gave_up = tokio::time::timeout(second, vm.sandbox.resize_vcpus(given_up.0)).await;
            let said = gave_up.map(|outcome| outcome.map(|resized| resized.now));
            assert!(!matches!(said, Ok(Ok(_))), "{name}: {said:?}");
            let gave_up = tokio::time::timeout(second, vm.sandbox.resize_memory(given_up.1)).await;
            let said = gave_up.map(|outcome| outcome.map(|resized| resized.now));
            assert!(!matches!(said, Ok(Ok(_))), "{name}: {said:?}");
            // The guest may do meanwhile what it was asked for.
            vm.guest.behave(Script::good());
            vm.sandbox.resize_vcpus(wanted.0).await.unwrap();
            vm.sandbox.resize_memory(wanted.1).await.unwrap();
            assert_eq!(vm.size(), wanted, "{name} {given_up:?}");
            vm.agrees();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_was_given_up_is_waited_for_by_the_next() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_vcpus(2).await.unwrap();
    vm.sandbox.resize_memory(384).await.unwrap();
    vm.guest.behave(Script {
        notices: false,
        ..Script::good()
    });
    let second = seconds(1);
    let gave_up = tokio::time::timeout(second, vm.sandbox.resize_vcpus(1)).await;
    assert!(gave_up.is_err(), "{gave_up:?}");
    let gave_up = tokio::time::timeout(second, vm.sandbox.resize_memory(256)).await;
    assert!(gave_up.is_err(), "{gave_up:?}");
    for of in [Plugged::Vcpu(1), Plugged::Unit(0)] {
        assert_eq!(
            vm.sandbox.slot(of).map(|slot| slot.state),
            Some(State::Asked)
        );
    }
    let notices = async {
        tokio::time::sleep(seconds(5)).await;
        vm.guest.behave(Script::good());
    };
    let (fewer, less, ()) = tokio::join!(
        vm.sandbox.resize_vcpus(1),
        vm.sandbox.resize_memory(256),
        notices
    );
    assert_eq!((fewer.unwrap().now, less.unwrap().now), (1, 256));
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn what_the_kernel_was_not_told_of_is_told_anew_by_the_next_change() {
    let vm = Vm::new(Script {
        notices: false,
        ..Script::good()
    })
    .await;
    let wanted = Wanted {
        vcpus: Some(2),
        memory_mib: None,
    };
    let more = Wanted {
        vcpus: None,
        memory_mib: Some(384),
    };
    for (wanted, what) in [(wanted, "vCPU 1"), (more, "128 MiB at 0x100000000")] {
        let (sandbox, guest) = (vm.sandbox.clone(), vm.guest.clone());
        let stolen = tokio::spawn(async move {
            while guest.steal() == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        let why = sandbox.resize(wanted).await.unwrap_err();
        stolen.await.unwrap();
        has_all(&why, &[what, "was plugged, but", "showed no such thing"]);
    }
    // Both are still there for the host, and for nobody else.
    assert_eq!(vm.size(), (2, 384));
    vm.guest.behave(Script::good());
    let wanted = Wanted {
        vcpus: Some(3),
        memory_mib: Some(512),
    };
    vm.sandbox.resize(wanted).await.unwrap();
    assert_eq!(vm.size(), (3, 512));
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn nothing_is_plugged_before_the_guest_is_done_with_what_it_ejected() {
    let slow = |ejects| Script {
        ejects,
        ..Script::good()
    };
    // One that never says that it is done gets it later, once.
    for (script, later) in [
        (Script::good(), 0),
        (slow(|_| Eject::DoneAfter(seconds(3))), 3),
        (slow(|_| Eject::Silently), 5),
    ] {
        let vm = Vm::over(Fake::new(), MemoryWay::Acpi, script).await;
        vm.sandbox.resize_vcpus(3).await.unwrap();
        let (down, took) = timed(vm.sandbox.resize_vcpus(1)).await;
        assert_eq!((down.unwrap().now, took), (1, seconds(0)));
        let (up, took) = timed(vm.sandbox.resize_vcpus(3)).await;
        assert_eq!((up.unwrap().now, took), (3, seconds(later)));
        vm.sandbox.resize_memory(512).await.unwrap();
        vm.sandbox.resize_memory(256).await.unwrap();
        let (up, took) = timed(vm.sandbox.resize_memory(384)).await;
        assert_eq!((up.unwrap().now, took), (384, seconds(later)));
        vm.agrees();
    }
}
