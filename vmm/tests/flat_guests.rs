//! The VMM with guests of a few instructions, on the machine's own `/dev/kvm`.

mod flat;

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flat::{AP_PAGE, CODE, Code, Output, SCRATCH, config, kernel, run, wait};
use nacre_vmm::handle::Error;
use nacre_vmm::memory::layout::{
    CMDLINE, I8042_PORT, LAPIC, PHASE_PORT, PVPANIC_PORT, RESET_VECTOR, SERIAL_PORT, START_INFO,
    window_address,
};
use nacre_vmm::virtio::net::{NetConfig, Tap};
use nacre_vmm::{DiskConfig, ExitReason, Vm};

const MAGIC: u32 = 0x7472_6976;
const BLOCK: u32 = 2;
const DEVICE_ID: u32 = 8;

fn window(index: u8) -> u32 {
    window_address(index) as u32
}

#[test]
fn text_reaches_the_console_and_the_sleep_register_powers_off() {
    let (reason, output) = run(&Code::new().print("hello from the guest\n").power_off());
    assert_eq!(reason, ExitReason::PowerOff);
    assert_eq!(output, b"hello from the guest\n");
}

#[test]
fn every_way_to_reset_is_a_reboot() {
    let by_register = Code::new().reset();
    let by_keyboard = Code::new().out8(I8042_PORT, 0xfe).halt();
    for code in [by_register, by_keyboard] {
        assert_eq!(run(&code).0, ExitReason::Reboot);
    }
}

#[test]
fn the_reset_vector_leads_to_a_reboot() {
    // Real mode is entered on a second vCPU: its code jumps to F000:FFF0.
    assert_eq!(RESET_VECTOR, 0xf_fff0);
    let far_jump = [0xea, 0xf0, 0xff, 0x00, 0xf0];
    let (reason, _) = run_two(&far_jump, Code::new().halt());
    assert_eq!(reason, ExitReason::Reboot);
}

#[test]
fn a_panic_wins_over_the_reboot_that_follows() {
    // in al, dx; then print it
    let code = Code::new()
        .port(PVPANIC_PORT)
        .bytes(&[0xec])
        .port(SERIAL_PORT)
        .bytes(&[0xee])
        .panic()
        .reset();
    let (reason, output) = run(&code);
    assert_eq!(reason, ExitReason::Panic);
    assert_eq!(output, [1], "pvpanic tells the events it knows");
}

#[test]
fn a_triple_fault_is_told() {
    // A table of no interrupts (lidt [address]), then a selector that no table has.
    let code = Code::new()
        .eax(0)
        .store(SCRATCH)
        .store(SCRATCH + 4)
        .bytes(&[0x0f, 0x01, 0x1d])
        .bytes(&SCRATCH.to_le_bytes())
        .bytes(&[0x0f, 0x01, 0x15])
        .bytes(&SCRATCH.to_le_bytes())
        .eax(0x1238)
        .bytes(&[0x8e, 0xd8])
        .power_off();
    assert_eq!(run(&code).0, ExitReason::TripleFault { vcpu: 0 });
}

#[test]
fn the_start_information_is_where_ebx_points() {
    // mov eax, ebx; then the magic, by [ebx]; then the command line's first bytes.
    let code = Code::new()
        .bytes(&[0x89, 0xd8])
        .print_eax()
        .bytes(&[0x8b, 0x03])
        .print_eax()
        .load(CMDLINE as u32)
        .print_eax()
        .power_off();
    let output = Output::default();
    let kernel = code.kernel();
    let mut config = config(&kernel, &output);
    config.cmdline = "abcdefg".to_owned();
    let vm = Vm::start(config).expect("starts");
    assert_eq!(wait(&vm), ExitReason::PowerOff);
    let mut expected = (START_INFO as u32).to_le_bytes().to_vec();
    expected.extend_from_slice(&0x336e_c578u32.to_le_bytes());
    expected.extend_from_slice(b"abcd");
    assert_eq!(output.bytes(), expected);
}

#[test]
fn ports_that_are_not_there_read_all_ones_in_every_size() {
    let code = Code::new()
        .port(0x1235)
        .eax(0)
        .bytes(&[0xec])
        .print_eax()
        .port(0x1235)
        .eax(0)
        .bytes(&[0x66, 0xed])
        .print_eax()
        .port(0x1235)
        .eax(0)
        .bytes(&[0xed])
        .print_eax()
        // Writes of each size, also over the end of devices and at their odd places.
        .port(0x1235)
        .bytes(&[0xee, 0x66, 0xef, 0xef])
        .port(SERIAL_PORT + 7)
        .bytes(&[0xef, 0xed])
        .port(PHASE_PORT)
        .bytes(&[0x66, 0xef, 0xef, 0xed])
        .port(PVPANIC_PORT)
        .bytes(&[0x66, 0xef, 0xef])
        .power_off();
    let output = Output::default();
    let kernel = code.kernel();
    let vm = Vm::start(config(&kernel, &output)).expect("starts");
    assert_eq!(wait(&vm), ExitReason::PowerOff);
    let expected = [0xff, 0, 0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff];
    assert_eq!(output.bytes(), expected);
    let counters = vm.counters();
    assert_eq!(counters.unknown_ports, 3 + 3 + 2 + 3 + 2);
    assert!(counters.exits["port-write"] > 0 && counters.exits["port-read"] > 0);
    assert_eq!(vm.phases().marks, []);
}

#[test]
fn string_output_is_one_byte_after_another() {
    // mov esi, address; mov ecx, 5; cld; rep outsb
    let text = CODE + 0x100;
    let mut code = Code::new()
        .port(SERIAL_PORT)
        .bytes(&[0xbe])
        .bytes(&text.to_le_bytes())
        .bytes(&[0xb9, 5, 0, 0, 0, 0xfc, 0xf3, 0x6e])
        .power_off();
    code.0.resize(0x100, 0x90);
    let (reason, output) = run(&code.bytes(b"bytes"));
    assert_eq!(reason, ExitReason::PowerOff);
    assert_eq!(output, b"bytes");
}

#[test]
fn device_memory_that_is_not_there_reads_all_ones_at_any_alignment() {
    let empty = 0xd020_0000u32;
    let mut code = Code::new();
    // Within a page, and over the end of one, which KVM splits into odd pieces.
    for address in [
        empty,
        empty + 1,
        empty + 0xffd,
        empty + 0xffe,
        empty + 0xfff,
    ] {
        code = code.load(address).print_eax().store(address);
    }
    // Over the end of the last window and from one window into the next.
    code = code
        .load(window(1) + 0xffe)
        .store(window(1) + 0xffe)
        .load(window(0) + 0xffe)
        .store(window(0) + 0xffe);
    // Single bytes and words: mov al, [address]; mov [address], al; the same with ax.
    for address in [empty + 3, window(0) + 1, window(0) + 0xfff] {
        let at = address.to_le_bytes();
        code = code
            .bytes(&[0xa0])
            .bytes(&at)
            .bytes(&[0xa2])
            .bytes(&at)
            .bytes(&[0x66, 0xa1])
            .bytes(&at)
            .bytes(&[0x66, 0xa3])
            .bytes(&at);
    }
    let output = Output::default();
    let kernel = code.power_off().kernel();
    let vm = Vm::start(config(&kernel, &output)).expect("starts");
    assert_eq!(wait(&vm), ExitReason::PowerOff);
    assert_eq!(output.bytes(), [0xff; 20]);
    assert!(vm.counters().unknown_mmio >= 10);
}

/// Register reads do not leave KVM either, and show at once what was written.
#[test]
fn registers_are_read_without_an_exit_and_are_up_to_date() {
    let status = window(0) + 0x70;
    let mut code = Code::new();
    for register in [0, 4, 8] {
        code = code.load(window(0) + register).print_eax();
    }
    code = code.load(window(1) + 8).print_eax();
    for value in [1, 3, 7, 0] {
        code = code.eax(value).store(status).load(status).print_eax();
    }
    // The queue selected, and no such queue.
    for queue in [0, 9] {
        code = code.eax(queue).store(window(0) + 0x30);
        code = code.load(window(0) + 0x34).print_eax();
    }
    let again = Code::new().load(status).load(window(0) + 0x60);
    let output = Output::default();
    let kernel = code.repeat(1000, again).power_off().kernel();
    let mut config = config(&kernel, &output);
    config.rng = true;
    let vm = Vm::start(config).expect("starts");
    assert_eq!(wait(&vm), ExitReason::PowerOff);
    let words: Vec<u32> = output
        .bytes()
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")))
        .collect();
    let magic = u32::from_le_bytes(*b"virt");
    assert_eq!(words[..8], [magic, 2, 4, 0, 1, 3, 3, 0]);
    assert!(words[8] > 0 && words[8].is_power_of_two(), "{words:?}");
    assert_eq!(words[9..], [0]);
    let exits = vm.counters().exits;
    assert_eq!((exits["mmio-read"], exits["mmio-write"]), (0, 6));
}

#[test]
fn acknowledging_a_queues_interrupt_does_not_leave_kvm() {
    let acknowledge = window(0) + 0x64;
    let writes = |value: u32, count: u32| {
        let body = Code::new().eax(value).store(acknowledge);
        let output = Output::default();
        let kernel = Code::new().repeat(count, body).power_off().kernel();
        let mut config = config(&kernel, &output);
        config.rng = true;
        let vm = Vm::start(config).expect("starts");
        assert_eq!(wait(&vm), ExitReason::PowerOff);
        vm.counters().exits["mmio-write"]
    };
    assert_eq!(writes(1, 1000), 0);
    // With a change of the configuration it must arrive.
    assert_eq!(writes(2, 10), 10);
    assert_eq!(writes(3, 10), 10);
}

#[test]
fn a_flood_of_the_phase_port_leaves_one_mark_of_each_value() {
    // out dx, al; inc al
    let code = Code::new()
        .eax(0)
        .port(PHASE_PORT)
        .repeat(5000, Code::new().bytes(&[0xee, 0xfe, 0xc0]))
        .power_off();
    let kernel = code.kernel();
    let vm = Vm::start(config(&kernel, &Output::default())).expect("starts");
    assert_eq!(wait(&vm), ExitReason::PowerOff);
    let phases = vm.phases();
    let marks: Vec<u8> = phases.marks.iter().map(|mark| mark.0).collect();
    assert_eq!(marks, (0..=255).collect::<Vec<u8>>());
    let mut times = vec![
        Some(phases.start_ns),
        phases.kvm_ns,
        phases.loaded_ns,
        phases.first_run_ns,
        phases.first_exit_ns,
    ];
    times.extend(phases.marks.iter().map(|mark| Some(mark.1)));
    assert!(times.is_sorted() && times.iter().all(Option::is_some));
}

#[test]
fn an_endless_loop_is_stopped() {
    let kernel = Code::new().print("x").spin().kernel();
    let output = Output::default();
    let vm = Vm::start(config(&kernel, &output)).expect("starts");
    output.wait_for(b"x");
    assert_eq!(vm.exit_reason(), None);
    let before = Instant::now();
    vm.stop();
    vm.stop();
    assert_eq!(vm.wait(), ExitReason::Stopped);
    assert!(before.elapsed() < Duration::from_secs(5));
    assert!(matches!(
        vm.unplug(0),
        Err(Error::Ended(ExitReason::Stopped))
    ));
}

#[test]
fn a_halted_guest_goes_on_until_it_is_stopped() {
    let kernel = Code::new().print("x").halt().kernel();
    let output = Output::default();
    let vm = Vm::start(config(&kernel, &output)).expect("starts");
    output.wait_for(b"x");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vm.exit_reason(), None);
    vm.stop();
    assert_eq!(vm.wait(), ExitReason::Stopped);
}

#[test]
fn a_console_flood_that_is_refused_neither_blocks_nor_grows() {
    struct Refuses;
    impl Write for Refuses {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::WouldBlock.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let code = Code::new()
        .port(SERIAL_PORT)
        .repeat(5000, Code::new().bytes(&[0xee]))
        .power_off();
    let kernel = code.kernel();
    let mut config = config(&kernel, &Output::default());
    config.console.output = Box::new(Refuses);
    let vm = Vm::start(config).expect("starts");
    assert_eq!(wait(&vm), ExitReason::PowerOff);
    assert_eq!(vm.counters().console_lost, 5000);
}

#[test]
fn console_input_reaches_the_guest() {
    // Waits for LSR's data bit, reads a byte and prints it, 100 times: more than the FIFO holds.
    let echo = Code::new()
        .port(SERIAL_PORT + 5)
        .bytes(&[0xec, 0xa8, 1, 0x74, 0xfb])
        .port(SERIAL_PORT)
        .bytes(&[0xec, 0xee]);
    let kernel = Code::new().repeat(100, echo).power_off().kernel();
    let output = Output::default();
    let mut config = config(&kernel, &output);
    let (reader, mut writer) = std::io::pipe().expect("pipe");
    config.console.input = Some(std::os::fd::OwnedFd::from(reader).into());
    let vm = Vm::start(config).expect("starts");
    let text: Vec<u8> = (0..100).collect();
    writer.write_all(&text).expect("write");
    assert_eq!(wait(&vm), ExitReason::PowerOff);
    assert_eq!(output.bytes(), text);
}

/// Runs `boot` after it has sent INIT and SIPI to a second vCPU, which runs `ap` in real mode.
fn run_two(ap: &[u8], boot: Code) -> (ExitReason, Vec<u8>) {
    let icr_high = LAPIC + 0x310;
    let icr_low = LAPIC + 0x300;
    let mut code = Code::new().eax(0).store(SCRATCH);
    for command in [0x4500, 0x4600 | AP_PAGE >> 12] {
        code = code
            .eax(1 << 24)
            .store(icr_high)
            .eax(command)
            .store(icr_low);
    }
    let code = code.bytes(&boot.0);
    let kernel = kernel(&[(CODE, &code.0), (AP_PAGE, ap)]);
    let output = Output::default();
    let mut config = config(&kernel, &output);
    config.vcpus = 2;
    let vm = Vm::start(config).expect("starts");
    assert_eq!(vm.vcpus(), 2);
    (wait(&vm), output.bytes())
}

#[test]
fn a_second_vcpu_starts_by_sipi_in_real_mode() {
    // mov dx, 0x3f8; mov al, 'B'; out dx, al; mov byte [0x9000] by ds = 0; cli; hlt
    let ap = [
        0xba, 0xf8, 0x03, 0xb0, b'B', 0xee, 0x31, 0xc0, 0x8e, 0xd8, 0xc6, 0x06, 0x00, 0x90, 0x01,
        0xfa, 0xf4, 0xeb, 0xfd,
    ];
    let boot = Code::new()
        .wait_until_zero(SCRATCH, false)
        .print("A")
        .power_off();
    let (reason, output) = run_two(&ap, boot);
    assert_eq!(reason, ExitReason::PowerOff);
    assert_eq!(output, b"BA");
}

#[test]
fn a_vcpu_that_nobody_starts_does_not_hold_the_end_up() {
    let kernel = Code::new().power_off().kernel();
    let mut config = config(&kernel, &Output::default());
    config.vcpus = 8;
    let vm = Vm::start(config).expect("starts");
    assert_eq!(wait(&vm), ExitReason::PowerOff);
}

fn disk() -> (tempfile::NamedTempFile, DiskConfig) {
    let file = tempfile::NamedTempFile::new().expect("file");
    file.as_file().set_len(1 << 20).expect("length");
    let config = DiskConfig::file(file.path(), false, "disk");
    (file, config)
}

#[test]
fn a_disk_comes_and_goes_in_a_spare_window() {
    let id = window(0) + DEVICE_ID;
    let code = Code::new()
        .load(window(0))
        .print_eax()
        .load(id)
        .print_eax()
        .wait_until_zero(id, false)
        .print_eax()
        .print("P")
        .wait_until_zero(id, true)
        .print("U")
        .wait_until_zero(id, false)
        .power_off();
    let kernel = code.kernel();
    let output = Output::default();
    let vm = Vm::start(config(&kernel, &output)).expect("starts");
    let mut expected = MAGIC.to_le_bytes().to_vec();
    expected.extend_from_slice(&0u32.to_le_bytes());
    output.wait_for(&expected);

    let (_file, first) = disk();
    let (_other_file, second) = disk();
    assert!(matches!(vm.unplug(0), Err(Error::EmptyWindow(0))));
    assert!(matches!(
        vm.unplug(2),
        Err(Error::UnknownWindow {
            window: 2,
            windows: 2
        })
    ));
    assert_eq!(vm.plug_disk(first.clone()).expect("plugs"), 0);
    output.wait_for(b"P");
    assert_eq!(vm.plug_disk(second).expect("plugs"), 1);
    let (_third_file, third) = disk();
    let error = vm.plug_disk(third.clone()).expect_err("no window");
    assert!(error.to_string().contains("all 2"), "{error}");
    // A network device comes and goes likewise, and gives its window back.
    vm.unplug(1).expect("unplugs");
    for _ in 0..3 {
        let (window, _) = vm.plug_net(nic(), frames()).expect("plugs");
        assert_eq!(window, 1);
        vm.unplug(1).expect("unplugs");
    }
    vm.unplug(0).expect("unplugs");
    output.wait_for(b"U");
    assert_eq!(vm.plug_disk(first).expect("plugs again"), 0);
    assert_eq!(wait(&vm), ExitReason::PowerOff);
    expected.extend_from_slice(&BLOCK.to_le_bytes());
    expected.extend_from_slice(b"PU");
    assert_eq!(output.bytes(), expected);
    assert!(matches!(vm.plug_disk(third), Err(Error::Ended(_))));
}

fn nic() -> NetConfig {
    NetConfig {
        name: "eth0".to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        link: true,
    }
}

/// An interface whose other end is gone.
fn frames() -> Tap {
    let (ours, _) = std::os::unix::net::UnixDatagram::pair().expect("a pair");
    Tap::of_frames(ours.into())
}

#[test]
fn devices_are_in_their_windows_from_the_start() {
    let (_file, first) = disk();
    let (_other_file, second) = disk();
    let mut code = Code::new();
    for index in 0..5 {
        code = code.load(window(index) + DEVICE_ID).print_eax();
    }
    let kernel = code.power_off().kernel();
    let output = Output::default();
    let mut config = config(&kernel, &output);
    (config.vsock, config.rng, config.windows) = (true, true, 18);
    config.disks = vec![first, second];
    let vm = Vm::start(config).expect("starts");
    assert!(vm.vsock().is_some());
    assert!(matches!(
        vm.unplug(0),
        Err(Error::NotUnpluggable { window: 0, .. }) | Err(Error::Ended(_))
    ));
    assert_eq!(wait(&vm), ExitReason::PowerOff);
    // vsock, rng, two disks, spare.
    let ids: Vec<u8> = output.bytes().chunks(4).map(|id| id[0]).collect();
    assert_eq!(ids, [19, 4, 2, 2, 0]);
}

#[test]
fn a_panic_in_the_console_writer_is_an_internal_error() {
    struct Panics;
    impl Write for Panics {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            panic!("on purpose");
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let kernel = Code::new().print("x").spin().kernel();
    let mut config = config(&kernel, &Output::default());
    config.console.output = Box::new(Panics);
    let vm = Vm::start(config).expect("starts");
    match wait(&vm) {
        ExitReason::Internal { message } => assert!(message.contains("on purpose"), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_future_completes_with_the_end() {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let kernel = Code::new().print("x").spin().kernel();
    let output = Output::default();
    let vm = Vm::start(config(&kernel, &output)).expect("starts");
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    let mut ended = std::pin::pin!(vm.ended());
    assert!(ended.as_mut().poll(&mut context).is_pending());
    output.wait_for(b"x");
    vm.stop();
    let reason = loop {
        match ended.as_mut().poll(&mut context) {
            std::task::Poll::Ready(reason) => break reason,
            std::task::Poll::Pending => std::thread::park_timeout(Duration::from_secs(30)),
        }
    };
    assert_eq!(reason, ExitReason::Stopped);
}

#[test]
fn what_cannot_be_started_says_why() {
    let output = Output::default();
    let good = Code::new().power_off().kernel();
    let refused = |change: &dyn Fn(&mut nacre_vmm::VmConfig)| {
        let mut config = config(&good, &output);
        change(&mut config);
        let error = Vm::start(config).expect_err("refused");
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    };
    let missing = refused(&|config| config.kernel = "/nonexistent/vmlinux".into());
    assert!(
        missing.contains("/nonexistent/vmlinux") && missing.contains("kernel"),
        "{missing}"
    );
    let missing = refused(&|config| config.initrd = Some("/nonexistent/initrd".into()));
    assert!(
        missing.contains("/nonexistent/initrd") && missing.contains("initrd"),
        "{missing}"
    );
    let small = refused(&|config| config.memory_mib = 16);
    assert!(
        small.contains("16 MiB") && small.contains("at least"),
        "{small}"
    );
    let disk = refused(&|config| {
        config.disks = vec![DiskConfig::file("/nonexistent/disk", true, "")];
    });
    assert!(disk.contains("/nonexistent/disk"), "{disk}");
    let script = {
        let mut file = tempfile::NamedTempFile::new().expect("file");
        file.write_all(b"#!/bin/sh\n").expect("write");
        file
    };
    let format = refused(&|config| config.kernel = script.path().to_owned());
    assert!(format.contains("neither"), "{format}");
}
