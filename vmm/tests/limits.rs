//! A host that cannot map the guest's memory says so. A program of its own, since the limit is the
//! process's.

mod flat;

use flat::{Code, Output, config};
use nacre_vmm::Vm;

#[test]
fn memory_that_the_host_cannot_map_is_told_with_its_size() {
    let kernel = Code::new().power_off().kernel();
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place to write to.
    let read = unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) };
    assert_eq!(read, 0);
    limit.rlim_cur = 4 << 30;
    // SAFETY: `limit` is a valid limit; it only makes mappings fail.
    let written = unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
    assert_eq!(written, 0);
    let mut config = config(&kernel, &Output::default());
    config.memory_mib = 8192;
    let error = Vm::start(config).expect_err("does not fit");
    assert!(error.to_string().contains("cannot map"), "{error}");
    assert!(error.to_string().contains("MiB"), "{error}");
}
