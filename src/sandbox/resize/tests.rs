//! Changes of size against a machine in memory and a guest of our own making,
//! which does what each case says. Time is paused: a deadline that passes costs nothing.

mod bounds;
mod guest;
mod requested;
mod together;
mod units;
mod vcpus;

use std::sync::Arc;
use std::time::Duration;

use nacre_vmm::ExitReason;
use nacre_vmm::hotplug::State;
use ttrpc::Code;

use super::*;
use crate::sandbox::fake::{self, Fake, boot_over};
use crate::sandbox::machine::{Machine, Plug};
use guest::{Eject, Guest, Reply, Script};

const MIB: u64 = 1 << 20;

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// A VM whose guest does as its script says.
struct Vm {
    sandbox: Sandbox,
    fake: Arc<Fake>,
    guest: Guest,
    _agent: fake::Guest,
}

impl Vm {
    /// One of 1 vCPU and 256 MiB; four of the one and four units of 128 MiB of the other are possible.
    async fn new(script: Script) -> Self {
        Self::over(Fake::new(), MemoryWay::Auto, script).await
    }

    async fn over(fake: Arc<Fake>, way: MemoryWay, script: Script) -> Self {
        let (sandbox, fake, _) = boot_over(fake, way);
        let guest = Guest::new(&fake, script);
        let agent = fake::agent(&fake, guest.clone()).await;
        sandbox.ready().await.unwrap();
        Self {
            sandbox,
            fake,
            guest,
            _agent: agent,
        }
    }

    /// vCPUs and MiB, by the host.
    fn size(&self) -> (u8, u64) {
        (self.sandbox.vcpus(), self.sandbox.memory_mib())
    }

    /// What is plugged, by the host, is what the guest has online.
    #[track_caller]
    fn agrees(&self) {
        let vcpus = self.fake.vcpu_slots().into_iter().skip(1);
        let vcpus = vcpus.map(|slot| Plugged::Vcpu(slot.index));
        let units = self.fake.memory_units().into_iter();
        let units = units.map(|unit| Plugged::Unit(unit.slot.index));
        assert_eq!(vcpus.chain(units).collect::<Vec<_>>(), self.guest.online());
    }
}

/// What a change said, and how long it took.
async fn timed<T>(change: impl Future<Output = T>) -> (T, Duration) {
    let began = Instant::now();
    let outcome = change.await;
    (outcome, began.elapsed())
}

/// The words of a failed change.
#[track_caller]
fn words(outcome: Result<Resized, Error>) -> String {
    let error = outcome.expect_err("a change that cannot be");
    assert!(matches!(error, Error::Resize { .. }), "{error:?}");
    error.to_string()
}

#[track_caller]
fn has_all(text: &str, all: &[&str]) {
    for words in all {
        assert!(text.contains(words), "{words:?} is not in: {text}");
    }
}

/// What each step changed.
fn whats(resized: &Resized) -> Vec<&str> {
    resized.steps.iter().map(|step| &*step.what).collect()
}
