//! vCPUs come and go, by a guest that does it and by guests that do not.

use super::*;

const FIRST: Plugged = Plugged::Vcpu(1);

#[tokio::test(start_paused = true)]
async fn vcpus_come_and_go_one_after_another_and_the_highest_go_first() {
    let vm = Vm::new(Script::good()).await;
    let up = vm.sandbox.resize_vcpus(4).await.unwrap();
    assert_eq!((up.before, up.now), (1, 4));
    assert_eq!(whats(&up), ["vCPU 1", "vCPU 2", "vCPU 3"]);
    vm.agrees();
    let same = vm.sandbox.resize_vcpus(4).await.unwrap();
    assert_eq!((same.now, same.steps.len()), (4, 0));
    let down = vm.sandbox.resize_vcpus(1).await.unwrap();
    assert_eq!((down.before, down.now), (4, 1));
    assert_eq!(whats(&down), ["vCPU 3", "vCPU 2", "vCPU 1"]);
    vm.agrees();
    assert_eq!(
        vm.guest.calls(),
        ["online Vcpu(1)", "online Vcpu(2)", "online Vcpu(3)"]
            .into_iter()
            .chain(["resources"])
            .chain(["offline Vcpu(3)", "offline Vcpu(2)", "offline Vcpu(1)"])
            .collect::<Vec<_>>()
    );
    assert_eq!(vm.size(), (1, 256));
}

/// How a change fails.
struct Case {
    name: &'static str,
    script: Script,
    words: &'static [&'static str],
    /// Seconds that it takes.
    takes: u64,
    /// vCPUs after it, and where vCPU 1's slot is then.
    after: (u8, State),
}

/// Runs the cases from `from` to `to`; afterwards the guest is good, and every size can be had.
async fn run(cases: Vec<Case>, from: u8, to: u8) {
    for case in cases {
        let name = case.name;
        let vm = Vm::new(Script::good()).await;
        vm.sandbox.resize_vcpus(from).await.unwrap();
        vm.guest.behave(case.script);
        let (outcome, took) = timed(vm.sandbox.resize_vcpus(to)).await;
        let text = words(outcome);
        let doing = format!("Cannot bring the VM to {to} vCPUs from {from}: ");
        assert!(text.starts_with(&doing), "{name}: {text}");
        for words in case.words {
            assert!(text.contains(words), "{name}: {words:?} is not in: {text}");
        }
        assert_eq!(took, seconds(case.takes), "{name}: {text}");
        let slot = vm.sandbox.slot(FIRST);
        let state = slot.map_or(State::Empty, |slot| slot.state);
        assert_eq!((vm.sandbox.vcpus(), state), case.after, "{name}: {text}");
        assert_eq!(vm.fake.exit_reason(), None, "{name}");
        vm.guest.behave(Script::good());
        for size in [2, 1, 4, 2, 3, 1] {
            let resized = vm.sandbox.resize_vcpus(size).await;
            let resized = resized.unwrap_or_else(|error| panic!("{name}: to {size}: {error}"));
            assert_eq!(resized.now, u64::from(size), "{name}");
            vm.agrees();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_vcpu_that_does_not_come_online_is_unplugged_again() {
    let did_not_start = |_| Reply::Refuses(Code::INTERNAL, "it did not start");
    let good = Script::good;
    let cases = vec![
        Case {
            name: "never noticed: the plug is withdrawn",
            script: Script {
                notices: false,
                ..good()
            },
            words: &[
                "vCPU 1 was plugged, but",
                "no such thing",
                "; it was unplugged again",
            ],
            takes: 20,
            after: (1, State::Empty),
        },
        Case {
            name: "noticed and not online: it is ejected",
            script: Script {
                online: did_not_start,
                ..good()
            },
            words: &["The guest failed: it did not start; it was unplugged again"],
            takes: 0,
            after: (1, State::Empty),
        },
        Case {
            name: "the kernel's report is in the words",
            script: Script {
                reports: Some((1, 0x81)),
                online: did_not_start,
                ..good()
            },
            words: &[
                "it did not start; its kernel reports: _OST event 0x1, status 0x81: its driver",
                "; it was unplugged again",
            ],
            takes: 0,
            after: (1, State::Empty),
        },
        Case {
            name: "the agent does not answer",
            script: Script {
                online: |_| Reply::Mute,
                ..good()
            },
            words: &["did not answer bringing vCPU 1 online within 30s; it was unplugged again"],
            takes: 30,
            after: (1, State::Empty),
        },
        Case {
            name: "neither kernel nor agent answer",
            script: Script {
                notices: false,
                online: |_| Reply::Mute,
                ..good()
            },
            words: &["did not answer", "; it was unplugged again"],
            takes: 30,
            after: (1, State::Empty),
        },
        Case {
            name: "and it is not ejected either: both are told",
            script: Script {
                online: did_not_start,
                ejects: |_| Eject::Says(3, 0x82),
                ..good()
            },
            words: &[
                "it did not start; it could not be unplugged again: the guest does not eject it",
                "_OST event 0x3, status 0x82: the device is busy",
            ],
            takes: 0,
            after: (2, State::Present),
        },
        Case {
            name: "and the request to eject it is never answered",
            script: Script {
                online: did_not_start,
                ejects: |_| Eject::Ignores,
                ..good()
            },
            words: &[
                "it did not start; it could not be unplugged again",
                "after 20s it is being ejected by the guest; it goes when the guest gets to it",
            ],
            takes: 20,
            after: (2, State::Leaving),
        },
    ];
    run(cases, 1, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_vcpu_that_does_not_go_is_online_again() {
    let good = Script::good;
    let cases = vec![
        Case {
            name: "not offline",
            script: Script {
                offline: |_| Reply::Refuses(Code::FAILED_PRECONDITION, "the kernel keeps it"),
                ..good()
            },
            words: &["vCPU 1 did not go offline: The guest failed: the kernel keeps it"],
            takes: 0,
            after: (2, State::Present),
        },
        Case {
            name: "offline is not answered: it is brought online, since it may go late",
            script: Script {
                offline: |_| Reply::Mute,
                ..good()
            },
            words: &["did not answer taking vCPU 1 offline within 20s; it is online again"],
            takes: 20,
            after: (2, State::Present),
        },
        Case {
            name: "nothing is answered",
            script: Script {
                offline: |_| Reply::Mute,
                online: |_| Reply::Mute,
                ..good()
            },
            words: &["offline within 20s; it could not be brought online again: The guest's"],
            takes: 50,
            after: (2, State::Present),
        },
        Case {
            name: "busy",
            script: Script {
                ejects: |_| Eject::Says(3, 0x82),
                ..good()
            },
            words: &[
                "vCPU 1 is offline, but the guest does not eject it: _OST event 0x3, status 0x82",
                ": the device is busy; it is online again",
            ],
            takes: 0,
            after: (2, State::Present),
        },
        Case {
            name: "the request is not noticed, and withdrawn",
            script: Script {
                notices: false,
                ..good()
            },
            words: &[
                "after 20s it is to be ejected, not yet noticed by the guest; the request is taken back",
                "; it is online again",
            ],
            takes: 20,
            after: (2, State::Present),
        },
        Case {
            name: "the request is never answered, and stands",
            script: Script {
                ejects: |_| Eject::Ignores,
                ..good()
            },
            words: &["it goes when the guest gets to it; it is online again"],
            takes: 20,
            after: (2, State::Leaving),
        },
        Case {
            name: "that it goes on is no answer",
            script: Script {
                ejects: |_| Eject::Says(3, 0x84),
                ..good()
            },
            words: &["_OST event 0x3, status 0x84: ejecting goes on; it goes when"],
            takes: 20,
            after: (2, State::Leaving),
        },
        Case {
            name: "a report of what was plugged is no answer",
            script: Script {
                ejects: |_| Eject::Says(1, 0x81),
                ..good()
            },
            words: &[
                "_OST event 0x1, status 0x81: its driver could not be loaded or failed; it goes",
            ],
            takes: 20,
            after: (2, State::Leaving),
        },
        Case {
            name: "and it does not come online again: both are told",
            script: Script {
                ejects: |_| Eject::Says(3, 1),
                online: |_| Reply::Refuses(Code::INTERNAL, "it did not start"),
                ..good()
            },
            words: &[
                "a failure that it does not name; it could not be brought online again: ",
                "it did not start",
            ],
            takes: 0,
            after: (2, State::Present),
        },
    ];
    run(cases, 2, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_guest_is_waited_for() {
    let script = Script {
        online: |_| Reply::After(seconds(19)),
        offline: |_| Reply::After(seconds(19)),
        ejects: |_| Eject::After(seconds(19)),
        ..Script::good()
    };
    let vm = Vm::new(script).await;
    let (up, took) = timed(vm.sandbox.resize_vcpus(4)).await;
    assert_eq!((up.unwrap().now, took), (4, seconds(57)));
    let (down, took) = timed(vm.sandbox.resize_vcpus(1)).await;
    let down = down.unwrap();
    assert_eq!((down.now, took), (1, seconds(114)));
    assert_eq!(down.steps[0].host_us, 19_000_000);
    assert_eq!(down.steps[0].total_us, 38_000_000);
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn a_vcpu_that_leaves_after_its_time_is_one_less_then() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_vcpus(2).await.unwrap();
    vm.guest.behave(Script {
        ejects: |_| Eject::After(seconds(25)),
        ..Script::good()
    });
    words(vm.sandbox.resize_vcpus(1).await);
    assert_eq!(vm.sandbox.vcpus(), 2);
    tokio::time::sleep(seconds(6)).await;
    assert_eq!(vm.sandbox.vcpus(), 1);
    vm.agrees();
    vm.guest.behave(Script::good());
    assert_eq!(vm.sandbox.resize_vcpus(2).await.unwrap().now, 2);
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn a_vcpu_that_leaves_while_it_is_asked_for_again_has_left() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_vcpus(3).await.unwrap();
    let leaves_late = || Script {
        ejects: |_| Eject::After(seconds(25)),
        offline: |_| Reply::After(seconds(10)),
        ..Script::good()
    };
    vm.guest.behave(leaves_late());
    words(vm.sandbox.resize_vcpus(2).await);
    // Its eject comes while the agent takes it offline anew.
    let resized = vm.sandbox.resize_vcpus(2).await.unwrap();
    assert_eq!((resized.before, resized.now), (3, 2));
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn a_failed_plug_is_not_taken_for_done_by_the_next() {
    let vm = Vm::new(Script {
        online: |_| Reply::Refuses(Code::INTERNAL, "it did not start"),
        ejects: |_| Eject::Says(3, 0x82),
        ..Script::good()
    })
    .await;
    words(vm.sandbox.resize_vcpus(2).await);
    assert_eq!(vm.sandbox.vcpus(), 2);
    let text = words(vm.sandbox.resize_vcpus(2).await);
    has_all(
        &text,
        &["vCPU 1 was plugged earlier, but", "it did not start"],
    );
    vm.guest.behave(Script::good());
    assert_eq!(
        whats(&vm.sandbox.resize_vcpus(2).await.unwrap()),
        ["vCPU 1"]
    );
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn a_vcpu_that_the_guest_took_offline_by_itself_is_online_after_the_next_change() {
    let vm = Vm::new(Script::good()).await;
    for (from, to, steps) in [
        (2, 2, &["vCPU 1"][..]),
        (2, 3, &["vCPU 1", "vCPU 2"]),
        (3, 1, &["vCPU 2", "vCPU 1"]),
    ] {
        vm.sandbox.resize_vcpus(from).await.unwrap();
        vm.guest.loses(FIRST);
        let resized = vm.sandbox.resize_vcpus(to).await.unwrap();
        assert_eq!(whats(&resized), steps, "from {from} to {to}");
        vm.agrees();
    }
}

#[tokio::test(start_paused = true)]
async fn a_vcpu_that_the_guest_ejected_by_itself_comes_again() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_vcpus(3).await.unwrap();
    vm.guest.eject(FIRST);
    assert_eq!(vm.sandbox.vcpus(), 2);
    assert_eq!(vm.sandbox.inspect().unasked_ejects, 1);
    let resized = vm.sandbox.resize_vcpus(3).await.unwrap();
    assert_eq!((resized.before, whats(&resized)), (2, vec!["vCPU 1"]));
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ejects_whatever_it_is_given_gets_no_end_of_it() {
    let vm = Vm::new(Script::good()).await;
    let guest = vm.guest.clone();
    let ejects = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(1)).await;
            for of in guest.online() {
                guest.eject(of);
            }
        }
    });
    vm.guest.behave(Script {
        online: |_| Reply::After(seconds(1)),
        ..Script::good()
    });
    let text = words(vm.sandbox.resize_vcpus(3).await);
    has_all(&text, &["the guest ejects what it is given"]);
    ejects.abort();
    vm.guest.behave(Script::good());
    assert_eq!(vm.sandbox.resize_vcpus(3).await.unwrap().now, 3);
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn a_vcpu_that_the_kernel_does_not_know_is_ejected_all_the_same() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_vcpus(2).await.unwrap();
    vm.guest.behave(Script {
        offline: |_| Reply::Refuses(Code::NOT_FOUND, "there is none"),
        ..Script::good()
    });
    assert_eq!(vm.sandbox.resize_vcpus(1).await.unwrap().now, 1);
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn where_a_later_step_fails_the_earlier_are_undone() {
    let third = |of| match of {
        Plugged::Vcpu(3) => Reply::Refuses(Code::INTERNAL, "the third fails"),
        _ => Reply::Does,
    };
    let vm = Vm::new(Script {
        online: third,
        ..Script::good()
    })
    .await;
    let text = words(vm.sandbox.resize_vcpus(4).await);
    has_all(
        &text,
        &[
            "vCPU 3 was plugged, but",
            "the third fails",
            "; it is back at 1 vCPUs",
        ],
    );
    assert_eq!(vm.size(), (1, 256));
    vm.agrees();

    vm.guest.behave(Script::good());
    vm.sandbox.resize_vcpus(4).await.unwrap();
    vm.guest.behave(Script {
        ejects: |of| match of {
            Plugged::Vcpu(2) => Eject::Says(3, 0x81),
            _ => Eject::Does,
        },
        ..Script::good()
    });
    let text = words(vm.sandbox.resize_vcpus(1).await);
    has_all(
        &text,
        &[
            "vCPU 2 is offline, but",
            "in use",
            "; it is back at 4 vCPUs",
        ],
    );
    assert_eq!(vm.sandbox.vcpus(), 4);
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn where_undoing_fails_too_both_are_told() {
    let vm = Vm::new(Script {
        online: |of| match of {
            Plugged::Vcpu(2) => Reply::Refuses(Code::INTERNAL, "the second fails"),
            _ => Reply::Does,
        },
        offline: |_| Reply::Refuses(Code::FAILED_PRECONDITION, "the kernel keeps it"),
        ..Script::good()
    })
    .await;
    let text = words(vm.sandbox.resize_vcpus(4).await);
    has_all(
        &text,
        &[
            "the second fails; it was unplugged again",
            "; it could not go back to 1 vCPUs either and has 2: vCPU 1 did not go offline",
            "the kernel keeps it",
        ],
    );
    assert_eq!(vm.sandbox.vcpus(), 2);
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn reports_without_end_hold_nobody_beyond_the_deadline() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_vcpus(2).await.unwrap();
    vm.guest.behave(Script {
        ejects: |_| Eject::Ignores,
        ..Script::good()
    });
    // Whenever the host looks, there is a change.
    let guest = vm.guest.clone();
    let flood = tokio::spawn(async move {
        for _ in 0..2000 {
            guest.report(FIRST, 3, 0x84);
            tokio::time::advance(Duration::from_millis(100)).await;
        }
    });
    let (outcome, took) = timed(vm.sandbox.resize_vcpus(1)).await;
    has_all(&words(outcome), &["ejecting goes on; it goes when"]);
    assert!(took < seconds(22), "{took:?}");
    flood.abort();
}
