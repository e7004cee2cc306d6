//! Memory by units of ACPI memory: all or nothing on the way up, the units that go on the way down.

use nacre_vmm::hotplug::memory::Area;

use super::*;
use crate::sandbox::fake::AREA;

fn busy(of: Plugged) -> Reply {
    match of {
        Plugged::Unit(1 | 3) => Reply::Refuses(Code::FAILED_PRECONDITION, "block 40 is in use"),
        _ => Reply::Does,
    }
}

#[tokio::test(start_paused = true)]
async fn memory_comes_and_goes_by_units_and_the_highest_go_first() {
    let vm = Vm::new(Script::good()).await;
    let up = vm.sandbox.resize_memory(512).await.unwrap();
    assert_eq!((up.before, up.now), (256, 512));
    assert_eq!(
        whats(&up),
        ["128 MiB at 0x100000000", "128 MiB at 0x108000000"]
    );
    vm.agrees();
    assert_eq!(vm.sandbox.inspect().memory.plugged_mib, 256);
    // Rounded up on both ways.
    assert_eq!(vm.sandbox.resize_memory(513).await.unwrap().now, 640);
    assert_eq!(vm.sandbox.resize_memory(641).await.unwrap().now, 768);
    assert_eq!(vm.sandbox.resize_memory(641).await.unwrap().steps, []);
    let down = vm.sandbox.resize_memory(385).await.unwrap();
    assert_eq!((down.before, down.now), (768, 512));
    assert_eq!(
        whats(&down),
        ["128 MiB at 0x118000000", "128 MiB at 0x110000000"]
    );
    vm.agrees();
    assert_eq!(vm.sandbox.resize_memory(256).await.unwrap().now, 256);
    vm.agrees();
}

/// How growing by three units from nothing fails, and what is left of it, in MiB.
struct Up {
    name: &'static str,
    script: Script,
    words: &'static [&'static str],
    takes: u64,
    left: u64,
}

#[tokio::test(start_paused = true)]
async fn units_come_all_or_not_at_all() {
    let good = Script::good;
    let second_fails = |of| match of {
        Plugged::Unit(1) => Reply::Refuses(Code::INTERNAL, "no room for block 33"),
        _ => Reply::Does,
    };
    let cases = [
        Up {
            name: "none is noticed",
            script: Script {
                notices: false,
                ..good()
            },
            words: &[
                "128 MiB at 0x100000000 was plugged, but",
                "no such thing; it was unplugged",
            ],
            takes: 20,
            left: 0,
        },
        Up {
            name: "the second does not come online",
            script: Script {
                online: second_fails,
                ..good()
            },
            words: &[
                "128 MiB at 0x108000000 was plugged, but The guest failed: no room for block 33; it was unplugged again",
            ],
            takes: 0,
            left: 0,
        },
        Up {
            name: "and the kernel says why",
            script: Script {
                online: second_fails,
                reports: Some((1, 0x82)),
                ..good()
            },
            words: &[
                "block 33; its kernel reports: _OST event 0x1, status 0x82: inserting is not supported",
            ],
            takes: 0,
            left: 0,
        },
        Up {
            name: "the agent does not answer",
            script: Script {
                online: |_| Reply::Mute,
                ..good()
            },
            words: &[
                "did not answer bringing 128 MiB at 0x100000000 online within 30s; it was unplugged again",
            ],
            takes: 30,
            left: 0,
        },
        Up {
            name: "the first does not go again: both are told",
            script: Script {
                online: second_fails,
                offline: |_| Reply::Refuses(Code::FAILED_PRECONDITION, "block 32 is in use"),
                ..good()
            },
            words: &[
                "no room for block 33; it could not all be unplugged again; 128 MiB at 0x100000000: ",
                "block 32 is in use",
            ],
            takes: 0,
            left: 128,
        },
        Up {
            name: "all are busy",
            script: Script {
                online: |_| Reply::Refuses(Code::INTERNAL, "no zone"),
                ejects: |_| Eject::Says(0x103, 0x82),
                ..good()
            },
            words: &[
                "no zone; it could not all be unplugged again",
                "0x110000000: the guest does not eject it: _OST event 0x103",
            ],
            takes: 0,
            left: 384,
        },
        Up {
            name: "neither agent nor kernel answer: one is waited for",
            script: Script {
                online: |_| Reply::Mute,
                ejects: |_| Eject::Ignores,
                ..good()
            },
            words: &[
                "0x100000000: the guest does not eject it: after 20s it is being ejected",
                "0x110000000: it stays, since the guest does not answer",
            ],
            takes: 50,
            left: 384,
        },
    ];
    for Up {
        name,
        script,
        words: all,
        takes,
        left,
    } in cases
    {
        let vm = Vm::new(script).await;
        let (outcome, took) = timed(vm.sandbox.resize_memory(640)).await;
        let text = words(outcome);
        for words in all {
            assert!(text.contains(words), "{name}: {words:?} is not in: {text}");
        }
        assert_eq!(took, seconds(takes), "{name}: {text}");
        assert_eq!(vm.size(), (1, 256 + left), "{name}: {text}");
        // What is left is not taken for what the guest has.
        vm.guest.behave(Script::good());
        for size in [256 + left, 768, 256, 384, 256] {
            let resized = vm.sandbox.resize_memory(size).await;
            let resized = resized.unwrap_or_else(|error| panic!("{name}: to {size}: {error}"));
            assert_eq!(resized.now, size, "{name}");
            vm.agrees();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn units_that_are_busy_stay_and_others_go() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_memory(768).await.unwrap();
    vm.guest.behave(Script {
        offline: busy,
        ..Script::good()
    });
    let down = vm.sandbox.resize_memory(512).await.unwrap();
    assert_eq!((down.before, down.now), (768, 512));
    assert_eq!(
        whats(&down),
        ["128 MiB at 0x110000000", "128 MiB at 0x100000000"]
    );
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn too_few_units_that_go_come_back() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_memory(768).await.unwrap();
    vm.guest.behave(Script {
        offline: busy,
        ..Script::good()
    });
    let text = words(vm.sandbox.resize_memory(384).await);
    has_all(
        &text,
        &[
            "to 384 MiB of memory from 768: 256 of 384 MiB can be unplugged; 128 MiB at 0x118000000: ",
            "The guest failed: block 40 is in use; 128 MiB at 0x108000000: ",
            "; what went is plugged again",
        ],
    );
    assert_eq!(vm.size(), (1, 768));
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn too_few_units_that_go_and_do_not_come_back_are_told() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_memory(768).await.unwrap();
    vm.guest.behave(Script {
        offline: busy,
        online: |_| Reply::Refuses(Code::INTERNAL, "no room for page structures"),
        ..Script::good()
    });
    let text = words(vm.sandbox.resize_memory(384).await);
    has_all(
        &text,
        &[
            "256 of 384 MiB can be unplugged",
            "; what went could not be plugged again: 128 MiB at",
            "no room for page structures; it was unplugged again",
        ],
    );
    assert_eq!(vm.size(), (1, 512));
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn units_that_are_not_ejected_are_online_again() {
    let good = Script::good;
    let cases = [
        (
            "busy",
            Script {
                ejects: |_| Eject::Says(3, 0x82),
                ..good()
            },
            "128 MiB at 0x100000000: the guest does not eject it: _OST event 0x3, status 0x82: the device is busy; it is online again",
            0,
        ),
        (
            "not noticed",
            Script {
                notices: false,
                ..good()
            },
            "not yet noticed by the guest; the request is taken back; it is online again; 1 more were not tried",
            20,
        ),
        (
            "never answered",
            Script {
                ejects: |_| Eject::Ignores,
                ..good()
            },
            "it goes when the guest gets to it; it is online again; 1 more were not tried",
            20,
        ),
        (
            "the agent does not answer",
            Script {
                offline: |_| Reply::Mute,
                ..good()
            },
            "did not answer taking 256 MiB at 0x100000000 offline within 30s; 1 more were not tried",
            30,
        ),
        (
            "not offline",
            Script {
                offline: |_| Reply::Refuses(Code::FAILED_PRECONDITION, "not in time"),
                ..good()
            },
            "0x100000000: The guest failed: not in time",
            0,
        ),
    ];
    for (name, script, all, takes) in cases {
        let vm = Vm::new(Script::good()).await;
        vm.sandbox.resize_memory(512).await.unwrap();
        vm.guest.behave(script);
        let (outcome, took) = timed(vm.sandbox.resize_memory(256)).await;
        let text = words(outcome);
        has_all(&text, &["0 of 256 MiB can be unplugged; ", all]);
        assert_eq!(took, seconds(takes), "{name}: {text}");
        assert_eq!(vm.size(), (1, 512), "{name}");
        vm.agrees();
        vm.guest.behave(Script::good());
        assert_eq!(vm.sandbox.resize_memory(256).await.unwrap().now, 256);
        vm.agrees();
    }
}

#[tokio::test(start_paused = true)]
async fn units_that_leave_late_count_for_the_next_change() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_memory(768).await.unwrap();
    vm.guest.behave(Script {
        ejects: |_| Eject::After(seconds(25)),
        offline: |_| Reply::After(seconds(10)),
        ..Script::good()
    });
    words(vm.sandbox.resize_memory(640).await);
    assert_eq!(vm.size(), (1, 768));
    // The unit goes while it is taken offline anew: that is all that was wanted.
    let down = vm.sandbox.resize_memory(640).await.unwrap();
    assert_eq!((down.before, down.now), (768, 640));
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_takes_its_time_to_refuse_is_not_asked_for_every_unit() {
    let fake = Fake::with(false, Area { units: 12, ..AREA });
    let vm = Vm::over(fake, MemoryWay::Auto, Script::good()).await;
    let most = vm.sandbox.max_memory_mib();
    vm.sandbox.resize_memory(most).await.unwrap();
    vm.guest.behave(Script {
        offline: |_| Reply::After(seconds(25)),
        ejects: |_| Eject::Says(3, 0x82),
        ..Script::good()
    });
    let (outcome, took) = timed(vm.sandbox.resize_memory(256)).await;
    has_all(
        &words(outcome),
        &["0 of 1536 MiB can be unplugged", "; 9 more were not tried"],
    );
    assert_eq!(took, seconds(100));
    vm.guest.behave(Script {
        offline: |_| Reply::Refuses(Code::FAILED_PRECONDITION, "in use"),
        ..Script::good()
    });
    let text = words(vm.sandbox.resize_memory(256).await);
    has_all(&text, &["; and 8 more stay"]);
    assert_eq!(text.matches("in use").count(), 4, "{text}");
    assert_eq!(vm.size(), (1, most));
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn units_that_follow_one_another_go_offline_together() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_memory(768).await.unwrap();
    vm.guest.calls();
    let down = vm.sandbox.resize_memory(512).await.unwrap();
    assert_eq!(
        whats(&down),
        ["128 MiB at 0x118000000", "128 MiB at 0x110000000"]
    );
    let calls = [
        "resources",
        "offline Unit(2), Unit(3)",
        "offline Unit(3)",
        "offline Unit(2)",
    ];
    assert_eq!(vm.guest.calls(), calls);
    vm.agrees();
    // One has no company.
    vm.sandbox.resize_memory(384).await.unwrap();
    assert_eq!(vm.guest.calls(), ["resources", "offline Unit(1)"]);
    // One that stays after all is online again, whoever went in its place.
    vm.sandbox.resize_memory(768).await.unwrap();
    vm.guest.behave(Script {
        offline: |_| Reply::After(seconds(2)),
        ..Script::good()
    });
    let guest = vm.guest.clone();
    tokio::spawn(async move {
        tokio::time::sleep(seconds(1)).await;
        guest.eject(Plugged::Unit(0));
    });
    let down = vm.sandbox.resize_memory(512).await.unwrap();
    assert_eq!(
        (down.now, whats(&down)),
        (512, vec!["128 MiB at 0x118000000"])
    );
    let units = [Plugged::Unit(1), Plugged::Unit(2)];
    assert_eq!(vm.guest.online(), units);
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn a_guest_without_room_is_not_tried_unit_by_unit() {
    let vm = Vm::new(Script::good()).await;
    vm.sandbox.resize_memory(768).await.unwrap();
    let full = || Script {
        offline: |_| Reply::Refuses(Code::FAILED_PRECONDITION, "it is in use"),
        has: |has| has.memory_available_bytes = 100 << 20,
        ..Script::good()
    };
    vm.guest.behave(full());
    vm.guest.calls();
    let text = words(vm.sandbox.resize_memory(256).await);
    has_all(
        &text,
        &[
            "0 of 512 MiB can be unplugged",
            "128 MiB at 0x118000000: not tried, since the guest has only 100 MiB available",
            "128 MiB at 0x100000000: not tried",
        ],
    );
    assert_eq!(vm.guest.calls(), ["resources"]);
    // What the kernel says is an estimate, for one at least.
    let text = words(vm.sandbox.resize_memory(640).await);
    has_all(
        &text,
        &[
            "0 of 128 MiB can be unplugged",
            "128 MiB at 0x118000000: The guest failed",
            "it is in use",
            "128 MiB at 0x100000000: not tried, since the guest has only 100 MiB available",
        ],
    );
    let calls = ["resources", "offline Unit(3)", "resources"];
    assert_eq!(vm.guest.calls(), calls);
    // With room each is tried.
    vm.guest.behave(Script {
        has: |_| {},
        ..full()
    });
    let text = words(vm.sandbox.resize_memory(256).await);
    assert_eq!(text.matches("it is in use").count(), 4, "{text}");
    vm.guest.behave(Script::good());
    assert_eq!(vm.sandbox.resize_memory(256).await.unwrap().now, 256);
    vm.agrees();
}

#[tokio::test(start_paused = true)]
async fn a_unit_that_the_guest_ejects_while_others_come_is_missed() {
    let vm = Vm::new(Script {
        online: |_| Reply::After(seconds(1)),
        ..Script::good()
    })
    .await;
    let guest = vm.guest.clone();
    let ejects = tokio::spawn(async move {
        while guest.online().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        guest.eject(Plugged::Unit(0));
    });
    let text = words(vm.sandbox.resize_memory(512).await);
    ejects.await.unwrap();
    has_all(
        &text,
        &[
            "128 MiB at 0x100000000 was online, but the guest has ejected it, unasked",
            "it was unplugged again",
        ],
    );
    assert_eq!(vm.size(), (1, 256));
    assert_eq!(vm.sandbox.inspect().unasked_ejects, 1);
    // What it ejected by itself comes with the next change.
    vm.guest.behave(Script::good());
    assert_eq!(vm.sandbox.resize_memory(512).await.unwrap().now, 512);
    vm.guest.eject(Plugged::Unit(1));
    assert_eq!(vm.size(), (1, 384));
    assert_eq!(vm.sandbox.resize_memory(512).await.unwrap().now, 512);
    vm.agrees();
}
