//! Engines by themselves: what they leave behind when they are dropped.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::*;
use crate::config::{DiskCache, DiskConfig};
use crate::event_loop::EventLoop;
use crate::virtio::block::Block;

const DEPTH: u16 = 8;

fn disk(bytes: u64, cache: DiskCache) -> (NamedTempFile, Arc<Disk>) {
    // Not /tmp, which may be a tmpfs without O_DIRECT.
    let file = NamedTempFile::new_in("/var/tmp").expect("an image");
    file.as_file().set_len(bytes).expect("a length");
    let config = DiskConfig {
        cache,
        ..DiskConfig::file(file.path(), false, "")
    };
    let disk = Disk::open(&config).expect("a disk");
    (file, Arc::new(disk))
}

fn vector(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

fn operation(action: Action) -> Operation {
    Operation {
        image: 0,
        direct: false,
        action,
    }
}

/// Waits by epoll only, so that a completion that wakes no one is found out.
fn wait(engine: &mut dyn Engine, count: usize) -> Vec<Completion> {
    let epoll = Epoll::new().expect("an epoll");
    for descriptor in engine.descriptors() {
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, descriptor, event)
            .expect("added");
    }
    let start = Instant::now();
    let mut completions = Vec::new();
    while completions.len() < count {
        assert!(start.elapsed() < Duration::from_secs(20), "{completions:?}");
        let _ = epoll.wait(1000, &mut [EpollEvent::default(); 4]);
        engine.completions(&mut completions);
    }
    completions
}

#[test]
fn the_automatic_choice_is_io_uring_where_the_host_has_it() {
    let (_file, disk) = disk(4096, DiskCache::Host);
    let forced = choose(DiskIo::IoUring, &disk, DEPTH);
    let automatic = choose(DiskIo::Auto, &disk, DEPTH).expect("there is always one");
    let expected = match io_uring::IoUring::new(2) {
        Ok(_) => "io_uring",
        Err(_) => "threads",
    };
    assert_eq!(automatic.name(), expected);
    assert_eq!(forced.is_ok(), expected == "io_uring");
    let threads = choose(DiskIo::Threads, &disk, DEPTH).expect("threads");
    assert_eq!(threads.name(), "threads");
}

/// As O_DIRECT wants it.
#[repr(align(4096))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page([u8; 4096]);

#[test]
fn each_kind_of_operation_is_done_and_wakes_the_waiter() {
    for io in [DiskIo::Auto, DiskIo::Threads] {
        for cache in [DiskCache::Host, DiskCache::Direct] {
            each_kind(io, cache);
        }
    }
}

fn each_kind(io: DiskIo, cache: DiskCache) {
    let (file, disk) = disk(1 << 20, cache);
    let mut engine = choose(io, &disk, DEPTH).expect("an engine");
    let mut pages = [Page([9; 4096]); 2];
    let table = pages.each_mut().map(|page| vector(&mut page.0));
    let vectors = Vectors {
        first: table.as_ptr(),
        count: table.len(),
    };
    let mut run = |action| {
        let operation = Operation {
            direct: cache == DiskCache::Direct,
            ..operation(action)
        };
        // SAFETY: `pages` and `table` outlive the engine's use of them: it is waited for.
        unsafe { engine.start(3, operation) }.expect("started");
        engine.submit().expect("submitted");
        let mut completions = wait(&mut *engine, 1);
        let Completion { token, result } = completions.remove(0);
        assert_eq!(token, 3);
        result
    };
    let offset = 4096;
    let moved = run(Action::Write { offset, vectors });
    assert_eq!(moved.expect("written"), 8192);
    assert_eq!(run(Action::Sync).expect("synced"), 0);
    let zero = Action::Zero {
        offset: 8192,
        len: 4096,
        unmap: true,
    };
    run(zero).expect("zeroed");
    let moved = run(Action::Read { offset, vectors });
    assert_eq!(moved.expect("read"), 8192);
    let discard = Action::Discard {
        offset: 0,
        len: 1 << 20,
    };
    run(discard).expect("discarded");
    let past = Action::Read {
        offset: 1 << 20,
        vectors,
    };
    assert_eq!(run(past).expect("at the end"), 0);
    let wrong = Action::Read {
        offset: u64::MAX - 4095,
        vectors,
    };
    assert!(run(wrong).is_err());
    drop(engine);
    assert_eq!(pages, [Page([9; 4096]), Page([0; 4096])]);
    assert_eq!(file.as_file().metadata().expect("metadata").len(), 1 << 20);
}

/// A read that nothing ends by itself: dropping the ring cancels it, and the kernel has forgotten
/// its memory then.
#[test]
fn a_dropped_ring_has_cancelled_what_was_under_way() {
    let Ok(_) = io_uring::IoUring::new(2) else {
        // Then there is no ring to be dropped, and the first test has said so.
        return;
    };
    let (_file, disk) = disk(4096, DiskCache::Host);
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let pool = Pool::new(&disk, 1).expect("a pool");
    let descriptors = [reader.as_raw_fd()];
    let mut ring = Ring::over(&descriptors, vec![(0, 0)], pool, DEPTH).expect("a ring");
    let mut bytes = vec![1; 4096];
    let table = [vector(&mut bytes)];
    for token in 0..usize::from(DEPTH) {
        let action = Action::Read {
            offset: 0,
            vectors: Vectors {
                first: table.as_ptr(),
                count: 1,
            },
        };
        // SAFETY: `bytes` and `table` outlive the ring.
        unsafe { ring.start(token, operation(action)) }.expect("started");
    }
    ring.submit().expect("submitted");
    let start = Instant::now();
    drop(ring);
    assert!(start.elapsed() < Duration::from_secs(10));
    writer.write_all(&[2; 100]).expect("written");
    let mut heard = [0; 100];
    let mut reader = reader;
    reader.read_exact(&mut heard).expect("no one else read it");
    assert_eq!((heard, &bytes[..]), ([2; 100], &[1; 4096][..]));
}

#[test]
fn dropped_threads_have_ended_and_what_waited_for_them_is_forgotten() {
    let (_file, disk) = disk(1 << 20, DiskCache::Host);
    let mut pool = Pool::new(&disk, 1).expect("a pool");
    for token in 0..usize::from(DEPTH) {
        let zero = Action::Zero {
            offset: 0,
            len: 1 << 20,
            unmap: false,
        };
        // SAFETY: there is no memory in it.
        unsafe { pool.start(token, operation(zero)) }.expect("started");
    }
    let start = Instant::now();
    drop(pool);
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(Arc::strong_count(&disk), 1, "no thread is left");
}

/// Takes io_uring away from this thread, as the seccomp profile of a container does.
fn refuse_io_uring() {
    let instruction = |code: u32, jf, k| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let mut filter = [
        // The number of the system call is the first word.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the calls take integers and a program of that length, which lives for them; they
    // change what this thread may do and nothing else.
    let results = unsafe {
        [
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program),
        ]
    };
    assert_eq!(results, [0, 0], "{}", io::Error::last_os_error());
}

#[test]
fn where_io_uring_is_refused_threads_do_it_and_asking_for_it_is_an_error() {
    let (file, disk) = disk(4096, DiskCache::Host);
    let test = move || {
        refuse_io_uring();
        let engine = choose(DiskIo::Auto, &disk, DEPTH).expect("there is always one");
        assert_eq!(engine.name(), "threads");
        drop((engine, disk));
        let config = DiskConfig {
            io: DiskIo::IoUring,
            ..DiskConfig::file(file.path(), true, "")
        };
        let (_events, handle) = EventLoop::start("test-loop", |_| {}).expect("an event loop");
        let error = Block::new(&config, handle).err().expect("refused");
        let text = error.to_string();
        let path = file.path().to_string_lossy();
        assert!(text.contains("io_uring") && text.contains(&*path), "{text}");
    };
    std::thread::spawn(test).join().expect("the test's thread");
}
