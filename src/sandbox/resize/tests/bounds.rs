//! Sizes that cannot be, guests that lack what it takes, and answers that cannot be true: nothing is plugged for them.

use nacre_protocol::agent::ResourcesResponse;
use nacre_vmm::hotplug::memory::Area;

use super::*;
use crate::control::Wanted;
use crate::sandbox::fake::{AREA, REGION, TIMEOUTS};

#[tokio::test(start_paused = true)]
async fn numbers_of_vcpus_that_cannot_be_are_refused() {
    let vm = Vm::new(Script::good()).await;
    for (to, all) in [
        (0, "to 0 vCPUs from 1: a VM has at least one vCPU"),
        (5, "it was started for 4 at most, of 254 that are possible"),
        (u8::MAX, "to 255 vCPUs from 1: it was started for 4 at most"),
    ] {
        has_all(&words(vm.sandbox.resize_vcpus(to).await), &[all]);
    }
    assert_eq!(vm.size(), (1, 256));
    assert_eq!(vm.guest.calls(), [""; 0]);
}

fn fake(has_mem: bool, units: u8) -> Arc<Fake> {
    Fake::with(has_mem, Area { units, ..AREA })
}

type Has = fn(&mut ResourcesResponse);

/// The machine, the way, what the guest has, the MiB asked for, and what the error says.
type Refusal = (Arc<Fake>, MemoryWay, Has, u64, &'static [&'static str]);

#[tokio::test(start_paused = true)]
async fn memory_that_cannot_be_is_refused_by_what_is_lacking() {
    let units = || fake(false, 4);
    let undriven = || {
        let fake = fake(true, 4);
        fake.mem.send_modify(|status| status.driver = false);
        fake
    };
    let as_is: Has = |_| {};
    let driver: Has = |has| has.virtio_mem = true;
    let lacks: Has = |has| has.lacks = vec!["the virtio_mem driver".to_owned()];
    let no_blocks: Has = |has| {
        has.memory_block_bytes = 0;
        has.lacks = vec!["memory\u{1b}[31m hotplug".to_owned(); 100];
    };
    let large_blocks: Has = |has| has.memory_block_bytes = 2 << 30;
    let full: Has = |has| {
        has.memory_available_bytes = 13 << 20;
        has.virtio_mem = true;
    };
    let much: Has = |has| has.memory_available_bytes = u64::MAX;
    let (auto, acpi, virtio) = (MemoryWay::Auto, MemoryWay::Acpi, MemoryWay::VirtioMem);
    #[rustfmt::skip]
    let cases: Vec<Refusal> = vec![
        (units(), auto, as_is, 255, &["to 255 MiB of memory from 256: it began with 256 MiB, and only what was plugged"]),
        (units(), auto, as_is, 0, &["it began with 256 MiB"]),
        (units(), auto, as_is, 769, &["it was started for 768 MiB at most"]),
        (units(), acpi, much, u64::MAX, &["it was started for 768 MiB at most"]),
        (fake(true, 4), auto, much, u64::MAX, &["it was started for 1280 MiB at most"]),
        (fake(true, 4), auto, as_is, 1280, &["cannot plug 1024 MiB: 4 of 4 ACPI memory units"]),
        (fake(false, 4), virtio, as_is, 384, &["the VM was started without a virtio-mem device"]),
        (fake(true, 0), acpi, as_is, 384, &["the VM was started without units of ACPI memory"]),
        (fake(false, 0), auto, as_is, 384, &["without a virtio-mem device or units of ACPI memory"]),
        (fake(true, 0), auto, lacks, 384, &["the VM was started without units of ACPI memory; the guest lacks the virtio_mem"]),
        (undriven(), virtio, lacks, 384, &["no driver has taken the virtio-mem device up; the guest lacks the virtio_mem driver"]),
        (undriven(), virtio, driver, 384, &["in 20s no driver has taken the device up; it is back at 0 MiB"]),
        (units(), acpi, no_blocks, 384, &["the guest's kernel takes no memory while it runs; the guest lacks memory"]),
        (units(), acpi, large_blocks, 384, &["units of memory have 128 MiB", "takes multiples of 2048 MiB"]),
        (units(), acpi, full, 640, &["for 384 MiB more", "needs 6 MiB for page structures (1.56 %)", "has 13 MiB available"]),
        (fake(true, 4), auto, full, 640, &["for 384 MiB more", "8 MiB to spare, and has 13 MiB available"]),
    ];
    for (fake, way, has, to, all) in cases {
        let script = Script {
            has,
            ..Script::good()
        };
        let vm = Vm::over(fake, way, script).await;
        let text = words(vm.sandbox.resize_memory(to).await);
        has_all(&text, all);
        assert!(!text.contains('\u{1b}') && text.len() < 2048, "{text}");
        assert_eq!(vm.size(), (1, 256), "{text}");
        assert_eq!(vm.fake.mem.borrow().requested, 0, "{text}");
        assert!(
            vm.guest.calls().iter().all(|call| call == "resources"),
            "{text}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_say_what_it_has_gets_no_memory() {
    for (reply, all, takes) in [
        (
            Reply::Mute,
            "The guest's agent did not answer reading the guest's resources within 10s",
            10,
        ),
        (
            Reply::Refuses(Code::INTERNAL, "no /proc"),
            "The guest failed: no /proc",
            0,
        ),
    ] {
        let vm = Vm::new(Script {
            resources: reply,
            ..Script::good()
        })
        .await;
        let (outcome, took) = timed(vm.sandbox.resize_memory(512)).await;
        has_all(&words(outcome), &[all]);
        assert_eq!((took, vm.size()), (seconds(takes), (1, 256)));
    }
}

#[tokio::test(start_paused = true)]
async fn absurd_answers_change_nothing_on_the_host() {
    let vm = Vm::new(Script {
        absurd: Some(20_000),
        has: |has| {
            has.online_uids = vec![u32::MAX; 10_000];
            has.memory_total_bytes = u64::MAX;
            has.memory_available_bytes = u64::MAX;
            has.movable_bytes = u64::MAX;
            has.kernel_bytes = u64::MAX;
            has.cpu_busy_us = u64::MAX;
            has.memory_block_bytes = 1;
        },
        ..Script::good()
    })
    .await;
    for (vcpus, mib) in [(4, 768), (2, 384), (1, 256)] {
        let wanted = Wanted {
            vcpus: Some(vcpus),
            memory_mib: Some(mib),
        };
        let changed = vm.sandbox.resize(wanted).await.unwrap();
        assert_eq!(vm.size(), (vcpus, mib));
        vm.agrees();
        let (vcpus, memory) = (changed.vcpus.unwrap(), changed.memory.unwrap());
        for step in vcpus.steps.iter().chain(&memory.steps) {
            assert!(step.noticed_us <= step.online_us && step.online_us <= step.total_us);
            assert!(step.total_us < 60_000_000, "{step:?}");
        }
    }
    assert_eq!(vm.sandbox.memory_used().await, Some(0));
    assert_eq!(vm.fake.memory_units(), []);
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_more_blocks_than_memory_has_costs_the_guest_its_connection() {
    let vm = Vm::new(Script {
        absurd: Some(100_000),
        ..Script::good()
    })
    .await;
    let text = words(vm.sandbox.resize_memory(384).await);
    has_all(
        &text,
        &[
            "128 MiB at 0x100000000 was plugged, but The guest's agent broke off",
            "; it was unplugged again",
        ],
    );
    assert_eq!(vm.size(), (1, 256));
    let (outcome, took) = timed(vm.sandbox.resize_vcpus(2)).await;
    has_all(&words(outcome), &["broke off", "; it was unplugged again"]);
    assert_eq!(vm.size(), (1, 256));
    assert!(took < seconds(3), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_plug_during_early_boot_waits_for_readiness() {
    let (sandbox, fake, _) = boot_over(Fake::new(), MemoryWay::Auto);
    let guest = Guest::new(&fake, Script::good());
    let early = tokio::spawn({
        let sandbox = sandbox.clone();
        async move {
            let wanted = Wanted {
                vcpus: Some(3),
                memory_mib: Some(512),
            };
            sandbox.resize(wanted).await
        }
    });
    tokio::time::sleep(seconds(50)).await;
    assert_eq!((sandbox.vcpus(), sandbox.memory_mib()), (1, 256));
    let _agent = fake::agent(&fake, guest.clone()).await;
    let changed = early.await.unwrap().unwrap();
    assert_eq!(changed.vcpus.unwrap().now, 3);
    assert_eq!(changed.memory.unwrap().now, 512);
    assert_eq!(guest.online().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_never_ready_gets_nothing_plugged() {
    let (sandbox, fake, _) = boot_over(Fake::new(), MemoryWay::Auto);
    let (outcome, took) = timed(sandbox.resize_vcpus(3)).await;
    has_all(&words(outcome), &["was not ready within 60s"]);
    assert_eq!(took, TIMEOUTS.boot);
    let (outcome, took) = timed(sandbox.resize_memory(512)).await;
    has_all(&words(outcome), &["was not ready within 60s"]);
    assert_eq!(took, Duration::ZERO);
    assert_eq!((fake.vcpu_slots().len(), fake.memory_units().len()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn the_most_is_what_the_way_can_have() {
    for (way, has_mem, units, most) in [
        (MemoryWay::Auto, true, 4, 256 + REGION / MIB),
        (MemoryWay::Auto, true, 0, 256 + REGION / MIB),
        (MemoryWay::Auto, false, 4, 768),
        (MemoryWay::Acpi, true, 2, 512),
        (MemoryWay::VirtioMem, true, 4, 256 + REGION / MIB),
        (MemoryWay::VirtioMem, false, 4, 256),
    ] {
        let (sandbox, ..) = boot_over(fake(has_mem, units), way);
        assert_eq!(sandbox.max_memory_mib(), most, "{way:?} {has_mem} {units}");
    }
}

#[test]
fn a_guest_is_short_of_memory_only_if_that_is_clear() {
    let table = [
        (100, 128, false),
        (87, 128, true),
        (196, 512, true),
        (470, 512, false),
        // Of much memory the kernel keeps much in reserve, and has page structures of it.
        (15_900, 16_384, false),
        (15_000, 16_384, true),
        (u64::MAX / MIB, 512, false),
    ];
    for (available, goes, short) in table {
        let seen = super::super::units::is_short(available * MIB, goes * MIB);
        assert_eq!(seen, short, "{available} of {goes} MiB");
    }
}
