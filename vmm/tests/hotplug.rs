//! vCPUs that come and go, with a guest of a few instructions that does what AML and a kernel would: fetches the
//! notification, starts the processor, ejects it. A program of its own, since it counts the process's threads.

mod flat;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use flat::{AP_PAGE, CODE, Code, Output, SCRATCH, config, kernel, wait};
use nacre_vmm::config::PlugConfig;
use nacre_vmm::hotplug::State;
use nacre_vmm::hotplug::registers::{CPUS, FETCH, MEMORY, SLOT_BYTES};
use nacre_vmm::memory::layout::{HOTPLUG_BASE, LAPIC};
use nacre_vmm::{ExitReason, Vm};

/// One VM at a time, since what the process holds is counted.
static ALONE: Mutex<()> = Mutex::new(());

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).expect(directory).count()
}

/// Waits until the slots of vCPUs are as wanted.
fn settle(vm: &Vm, wanted: &[State]) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let slots = vm.vcpu_slots().expect("the VM runs");
        let states: Vec<State> = slots.iter().map(|slot| slot.state).collect();
        if states == wanted {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{states:?} instead of {wanted:?}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Prints what it fetches, starts vCPU 1, waits for its mark, prints U; ejects it when asked; again and again.
fn guest() -> tempfile::NamedTempFile {
    // mov dx, 0x3f8; mov al, 'B'; out dx, al; mov byte [0x9000] by ds = 0; cli; hlt
    let ap = [
        0xba, 0xf8, 0x03, 0xb0, b'B', 0xee, 0x31, 0xc0, 0x8e, 0xd8, 0xc6, 0x06, 0x00, 0x90, 0x01,
        0xfa, 0xf4, 0xeb, 0xfd,
    ];
    let fetch = (HOTPLUG_BASE + FETCH) as u32;
    let slot = (HOTPLUG_BASE + CPUS + SLOT_BYTES) as u32;
    let mut round = Code::new().eax(0).store(SCRATCH);
    round = round.wait_until_zero(fetch, false).print_eax();
    for command in [0x4500, 0x4600 | AP_PAGE >> 12] {
        round = round
            .eax(1 << 24)
            .store(LAPIC + 0x310)
            .eax(command)
            .store(LAPIC + 0x300);
    }
    let round = round
        .wait_until_zero(SCRATCH, false)
        .print("U")
        .wait_until_zero(fetch, false)
        .print_eax()
        .eax(1)
        .store(slot);
    let code = Code::new().repeat(1000, round).power_off();
    kernel(&[(CODE, &code.0), (AP_PAGE, &ap)])
}

#[test]
fn a_vcpu_is_used_again_and_again_and_costs_nothing_more() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Output::default();
    let kernel = guest();
    let mut config = config(&kernel, &output);
    config.plug = PlugConfig {
        max_vcpus: 2,
        ..PlugConfig::default()
    };
    let vm = Vm::start(config).expect("starts");
    let mut expected = Vec::new();
    let mut held = None;
    for round in 0..20 {
        assert_eq!(vm.plug_vcpu().expect("plugs"), 1);
        let full = vm.plug_vcpu().expect_err("two at most").to_string();
        assert!(full.contains("all 2"), "{full}");
        expected.extend([1, 1, 0, 1]);
        expected.extend(b"BU");
        output.wait_for(&expected);
        settle(&vm, &[State::Present, State::Present]);
        assert_eq!(vm.vcpus(), 2);
        vm.ask_vcpu(1).expect("there");
        settle(&vm, &[State::Present]);
        expected.extend([3, 1, 0, 1]);
        assert_eq!(vm.vcpus(), 1);
        let now = (entries("/proc/self/fd"), entries("/proc/self/task"));
        assert_eq!(
            *held.get_or_insert(now),
            now,
            "round {round}: descriptors, threads"
        );
    }
    output.wait_for(&expected);
    vm.stop();
    assert_eq!(wait(&vm), ExitReason::Stopped);
    assert!(
        vm.plug_vcpu()
            .expect_err("ended")
            .to_string()
            .contains("has ended")
    );
}

#[test]
fn a_vm_ends_while_a_vcpu_stands_still() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Output::default();
    let kernel = guest();
    let mut config = config(&kernel, &output);
    config.plug.max_vcpus = 2;
    let vm = Vm::start(config).expect("starts");
    vm.plug_vcpu().expect("plugs");
    output.wait_for(b"BU");
    vm.ask_vcpu(1).expect("there");
    settle(&vm, &[State::Present]);
    vm.stop();
    assert_eq!(wait(&vm), ExitReason::Stopped);
}

#[test]
fn a_vcpu_that_the_guest_never_looked_at_is_taken_back() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let kernel = Code::new().print("x").spin().kernel();
    let output = Output::default();
    let mut config = config(&kernel, &output);
    config.plug.max_vcpus = 3;
    let vm = Vm::start(config).expect("starts");
    output.wait_for(b"x");
    for _ in 0..3 {
        assert_eq!(vm.plug_vcpu().expect("plugs"), 1);
        assert_eq!(vm.plug_vcpu().expect("plugs"), 2);
        assert_eq!(vm.vcpus(), 3);
        vm.withdraw_vcpu(1).expect("not noticed");
        vm.withdraw_vcpu(2).expect("not noticed");
        assert_eq!(vm.vcpus(), 1);
    }
    drop(vm);
}

/// Tables of four-level paging, by address, the root first: what is below 1 GiB and from 3 GiB on as it is, and plugged memory (from 4 GiB on) at 1 GiB.
fn page_tables() -> [(u32, Vec<u8>); 5] {
    const ROOT: u32 = 0xe000;
    const POINTERS: u32 = 0xa000;
    const TABLES: [(u32, u64); 3] = [(0xb000, 0), (0xc000, 4 << 30), (0xd000, 3 << 30)];
    // Present, writable, 2 MiB.
    let table = |start: u64| -> Vec<u8> {
        let entry = |place: u64| ((start + (place << 21)) | 0x83).to_le_bytes();
        (0..512).flat_map(entry).collect()
    };
    let [low, plugged, high] = TABLES;
    let pointers = [low.0, plugged.0, 0, high.0];
    let pointer = |at: u32| u64::from(if at == 0 { 0 } else { at | 3 }).to_le_bytes();
    [
        (ROOT, pointer(POINTERS).to_vec()),
        (POINTERS, pointers.into_iter().flat_map(pointer).collect()),
        (low.0, table(low.1)),
        (plugged.0, table(plugged.1)),
        (high.0, table(high.1)),
    ]
}

#[test]
fn memory_that_has_gone_reads_all_ones_takes_no_writes_and_runs_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    const PLUGGED: u32 = 1 << 30;
    let fetch = (HOTPLUG_BASE + FETCH) as u32;
    let slot = (HOTPLUG_BASE + MEMORY) as u32;
    // mov eax, cr4; or eax, PAE; mov cr4, eax; mov eax, root; mov cr3, eax; mov ecx, EFER; mov eax, LME; xor edx, edx; wrmsr;
    // mov eax, cr0; or eax, PG; mov cr0, eax: long mode, whose segments of 32 bits go on.
    let paging = [
        0x0f, 0x20, 0xe0, 0x83, 0xc8, 0x20, 0x0f, 0x22, 0xe0, 0xb8, 0x00, 0xe0, 0x00, 0x00, 0x0f,
        0x22, 0xd8, 0xb9, 0x80, 0x00, 0x00, 0xc0, 0xb8, 0x00, 0x01, 0x00, 0x00, 0x31, 0xd2, 0x0f,
        0x30, 0x0f, 0x20, 0xc0, 0x0d, 0x00, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0,
    ];
    let code = Code::new()
        .bytes(&paging)
        .wait_until_zero(fetch, false)
        .print_eax()
        .eax(0x1122_3344)
        .store(PLUGGED)
        .load(PLUGGED)
        .print_eax()
        .wait_until_zero(fetch, false)
        .print_eax()
        .eax(1)
        .store(slot)
        .load(PLUGGED)
        .print_eax()
        .store(PLUGGED)
        .print("X")
        // mov eax, PLUGGED; jmp eax
        .eax(PLUGGED)
        .bytes(&[0xff, 0xe0]);
    let tables = page_tables();
    let mut segments: Vec<(u32, &[u8])> = vec![(CODE, &code.0)];
    segments.extend(tables.iter().map(|(at, bytes)| (*at, &bytes[..])));
    let kernel = kernel(&segments);
    let output = Output::default();
    let mut config = config(&kernel, &output);
    config.plug.acpi_units = 2;
    config.plug.acpi_unit_mib = 128;
    let vm = Vm::start(config).expect("starts");
    let before = vm.memory_mib();
    let units = vm.plug_memory(128 << 20).expect("plugs");
    assert_eq!((units.len(), units[0].base), (1, 4 << 30));
    assert_eq!(vm.memory_mib(), before + 128);
    let mut expected = vec![1, 0, 0, 2, 0x44, 0x33, 0x22, 0x11];
    output.wait_for(&expected);
    vm.ask_memory(0).expect("there");
    expected.extend([3, 0, 0, 2, 0xff, 0xff, 0xff, 0xff, b'X']);
    output.wait_for(&expected);
    let reason = wait(&vm);
    let ExitReason::KvmError { vcpu: 0, message } = &reason else {
        panic!("{reason:?}");
    };
    assert!(message.contains("where there is no memory"), "{message}");
    // The read and the write of what has gone.
    assert!(vm.counters().unknown_mmio >= 2, "{:?}", vm.counters());
}
