//! Body of a fuzz target: changes of size, several at once and some given up,
//! while the agent answers with anything or not at all, the guest does
//! anything with the slots' registers, and the virtio-mem driver goes anywhere.
//! See [`crate::fuzzing`].

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use async_trait::async_trait;
use nacre_protocol::agent as wire;
use nacre_protocol::agent_ttrpc::Agent;
use nacre_vmm::ExitReason;
use nacre_vmm::bus::BusDevice;
use nacre_vmm::hotplug::registers::{
    CPUS, FETCH, KIND_CPU, LENGTH, MEMORY, OST_EVENT, OST_STATUS, SLOT_BYTES, STATUS,
};
use nacre_vmm::virtio::mem::BLOCK_BYTES;
use protobuf::Message;
use tokio::task::JoinSet;
use ttrpc::asynchronous::TtrpcContext;

use super::{MemoryWay, Resized, Step};
use crate::control::Wanted;
use crate::sandbox::Sandbox;
use crate::sandbox::console::TAIL_BYTES;
use crate::sandbox::fake::{AREA, Fake, MAX_VCPUS, REGION, agent, boot_over};
use crate::sandbox::fuzz::on_stage;
use crate::sandbox::machine::Plug;

/// Changes under way at once.
const CALLS: usize = 4;
/// Longer than so many changes take one after another, whatever the guest does.
const ALL_ENDED: Duration = Duration::from_secs(3600);
const BOOT_MIB: u64 = 256;

/// What the agent does when it is asked something.
enum Answer {
    /// Answers with these bytes, if they are a message of the kind, else with an empty one.
    Bytes(Vec<u8>),
    /// Refuses with a code and a message.
    Refusal(u8, Vec<u8>),
    /// Answers with an empty message after this time.
    Late(Duration),
    Nothing,
}

/// The agent: answers in the order in which it was told to, then with empty messages; or behaves.
#[derive(Clone, Default)]
struct Liar {
    answers: Arc<Mutex<VecDeque<Answer>>>,
    behaves: Arc<AtomicBool>,
}

impl Liar {
    async fn answer<M: Message>(&self, good: M) -> ttrpc::Result<M> {
        if self.behaves.load(Ordering::Relaxed) {
            return Ok(good);
        }
        let next = self.answers.lock().expect("the answers").pop_front();
        match next {
            None => Ok(M::new()),
            Some(Answer::Bytes(bytes)) => Ok(M::parse_from_bytes(&bytes).unwrap_or_default()),
            Some(Answer::Late(time)) => {
                tokio::time::sleep(time).await;
                Ok(M::new())
            }
            Some(Answer::Refusal(code, message)) => {
                let mut status = ttrpc::proto::Status::new();
                status.code = protobuf::EnumOrUnknown::from_i32(code.into());
                status.message = String::from_utf8_lossy(&message).into_owned();
                Err(ttrpc::Error::RpcStatus(status))
            }
            Some(Answer::Nothing) => std::future::pending().await,
        }
    }
}

#[async_trait]
impl Agent for Liar {
    async fn online_cpu(
        &self,
        _context: &TtrpcContext,
        _request: wire::OnlineCpuRequest,
    ) -> ttrpc::Result<wire::OnlineCpuResponse> {
        self.answer(wire::OnlineCpuResponse::new()).await
    }

    async fn offline_cpu(
        &self,
        _context: &TtrpcContext,
        _request: wire::OfflineCpuRequest,
    ) -> ttrpc::Result<wire::OfflineCpuResponse> {
        self.answer(wire::OfflineCpuResponse::new()).await
    }

    async fn online_memory(
        &self,
        _context: &TtrpcContext,
        _request: wire::OnlineMemoryRequest,
    ) -> ttrpc::Result<wire::OnlineMemoryResponse> {
        self.answer(wire::OnlineMemoryResponse::new()).await
    }

    async fn offline_memory(
        &self,
        _context: &TtrpcContext,
        _request: wire::OfflineMemoryRequest,
    ) -> ttrpc::Result<wire::OfflineMemoryResponse> {
        self.answer(wire::OfflineMemoryResponse::new()).await
    }

    async fn resources(
        &self,
        _context: &TtrpcContext,
        _request: wire::ResourcesRequest,
    ) -> ttrpc::Result<wire::ResourcesResponse> {
        self.answer(plenty(true)).await
    }
}

/// A guest that can take all that there may be.
fn plenty(virtio_mem: bool) -> wire::ResourcesResponse {
    let mut has = wire::ResourcesResponse::new();
    // Whatever is plugged is there.
    has.memory_total_bytes = u64::MAX;
    has.memory_available_bytes = REGION;
    has.memory_block_bytes = AREA.unit;
    has.virtio_mem = virtio_mem;
    has
}

/// The VM, and what its guest does.
struct Stage {
    sandbox: Sandbox,
    fake: Arc<Fake>,
    liar: Liar,
    calls: JoinSet<()>,
}

pub(crate) fn run(data: &[u8]) {
    on_stage(async {
        let mut input = Unstructured::new(data);
        let first = input.arbitrary::<u8>().unwrap_or(0);
        let ways = [MemoryWay::Auto, MemoryWay::Acpi, MemoryWay::VirtioMem];
        let way = ways[usize::from(first % 3)];
        let (sandbox, fake, _tail) = boot_over(Fake::with_mem(first < 192), way);
        let liar = Liar::default();
        let _guest = agent(&fake, liar.clone()).await;
        let mut stage = Stage {
            sandbox,
            fake,
            liar,
            calls: JoinSet::new(),
        };
        while !input.is_empty() && stage.step(&mut input).await.is_ok() {
            stage.check();
        }
        stage.close().await;
    });
}

impl Stage {
    async fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match input.arbitrary::<u8>()? % 16 {
            0..=3 => {
                let wanted = wanted(input)?;
                if self.calls.len() < CALLS {
                    let sandbox = self.sandbox.clone();
                    self.calls
                        .spawn(async move { change(&sandbox, wanted).await });
                }
            }
            // Whoever asked goes away.
            4 => self.calls.abort_all(),
            5..=8 => {
                let answer = answer(input)?;
                let mut answers = self.liar.answers.lock().expect("the answers");
                if answers.len() < 64 {
                    answers.push_back(answer);
                }
            }
            9 | 10 => self.touch(input)?,
            11 => look(&self.fake),
            12 => {
                let plugged = u64::from(input.arbitrary::<u16>()?) % (REGION / BLOCK_BYTES + 1);
                let driver = input.arbitrary::<u8>()? < 224;
                self.fake.mem.send_modify(|status| {
                    (status.plugged, status.driver) = (plugged * BLOCK_BYTES, driver);
                });
            }
            13 => {
                if input.arbitrary::<u8>()? == 0 {
                    self.fake.end(ExitReason::Panic);
                }
            }
            _ => {
                let ms = u64::from(input.arbitrary::<u16>()?);
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
        }
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// The guest reads or writes a register.
    fn touch(&self, input: &mut Unstructured<'_>) -> Result<()> {
        let registers = self.fake.plugs.registers();
        let (what, slot): (u8, u8) = input.arbitrary()?;
        let base = if slot & 0x80 == 0 { CPUS } else { MEMORY };
        let at = base + u64::from(slot & 7) * SLOT_BYTES;
        let word = |register, value: u32| registers.write(at + register, &value.to_le_bytes());
        match what % 8 {
            0 => registers.read(FETCH, &mut [0; 4]),
            1 | 2 => word(STATUS, 1),
            3..=5 => {
                word(
                    OST_EVENT,
                    [0, 1, 3, 0x103, 0x200][usize::from(what / 8 % 5)],
                );
                word(OST_STATUS, u32::from(input.arbitrary::<u8>()?));
            }
            6 => word(OST_STATUS, input.arbitrary()?),
            _ => {
                let at = u64::from(input.arbitrary::<u16>()?) % (LENGTH + SLOT_BYTES);
                let len = usize::from(slot % 9);
                if what & 0x80 == 0 {
                    registers.read(at, &mut [0; 9][..len]);
                } else {
                    registers.write(at, &[1, 0, 0, 0, 0, 0, 0, 0, 0][..len]);
                }
            }
        }
        Ok(())
    }

    /// What the host counts is what there is.
    fn check(&self) {
        let (vcpus, mib) = (self.sandbox.vcpus(), self.sandbox.memory_mib());
        let status = *self.fake.mem.borrow();
        assert!((1..=MAX_VCPUS).contains(&vcpus), "{vcpus} vCPUs");
        let units = self.fake.plugs.memory().views().len();
        assert_eq!(units, self.fake.regions(), "units and their memory");
        if self.fake.has_ended() {
            assert_eq!((vcpus, mib), (1, BOOT_MIB));
            return;
        }
        assert_eq!(usize::from(vcpus), self.fake.plugs.cpus().views().len());
        let has_mem = self.fake.requested_memory().is_some();
        let plugged = units as u64 * AREA.unit + if has_mem { status.plugged } else { 0 };
        assert_eq!(mib, BOOT_MIB + (plugged >> 20));
        assert!(status.requested <= REGION && status.requested.is_multiple_of(BLOCK_BYTES));
    }

    /// Every change ends; and a guest that behaves from now on can have every size, if there still is one.
    async fn close(mut self) {
        let ended = async {
            while let Some(call) = self.calls.join_next().await {
                if let Err(error) = call {
                    assert!(error.is_cancelled(), "a change panicked: {error}");
                }
            }
        };
        let ended = tokio::time::timeout(ALL_ENDED, ended).await;
        ended.expect("a change does not end");
        self.check();
        if self.fake.has_ended() {
            let outcome = self.sandbox.resize_vcpus(1).await;
            assert!(outcome.is_err(), "a VM that has ended has no size");
            return;
        }
        self.liar.behaves.store(true, Ordering::Relaxed);
        self.fake.mem.send_modify(|status| status.driver = true);
        let kernel = tokio::spawn(behave(self.fake.clone()));
        let most = self.sandbox.max_memory_mib();
        for (vcpus, mib) in [(1, BOOT_MIB), (MAX_VCPUS, most), (2, BOOT_MIB)] {
            let resized = self.sandbox.resize_vcpus(vcpus).await;
            assert_eq!(
                resized.expect("vCPUs of a good guest").now,
                u64::from(vcpus)
            );
            let resized = self.sandbox.resize_memory(mib).await;
            assert_eq!(resized.expect("memory of a good guest").now, mib);
            self.check();
        }
        kernel.abort();
    }
}

/// The guest fetches all that waits, and ejects what it is asked to.
fn look(fake: &Fake) {
    let registers = fake.plugs.registers();
    loop {
        let mut word = [0; 4];
        registers.read(FETCH, &mut word);
        let word = u32::from_le_bytes(word);
        if word == 0 {
            return;
        }
        if word & 0xff == 3 {
            let base = if word >> 24 == KIND_CPU { CPUS } else { MEMORY };
            let at = base + u64::from(word >> 8 & 0xff) * SLOT_BYTES;
            registers.write(at + STATUS, &1_u32.to_le_bytes());
        }
    }
}

/// Kernel and driver of a good guest.
async fn behave(fake: Arc<Fake>) {
    let (mut slots, mut mem) = (fake.plug_changes(), fake.mem.subscribe());
    loop {
        look(&fake);
        fake.mem.send_if_modified(|status| {
            let moves = status.plugged != status.requested;
            status.plugged = status.requested;
            moves
        });
        tokio::select! {
            _ = slots.changed() => {}
            _ = mem.changed() => {}
        }
    }
}

fn wanted(input: &mut Unstructured<'_>) -> Result<Wanted> {
    let kind: u8 = input.arbitrary()?;
    let vcpus = match input.arbitrary::<u8>()? {
        255 => u8::MAX,
        small => small % (MAX_VCPUS + 2),
    };
    let memory_mib = match input.arbitrary::<u8>()? {
        255 => input.arbitrary()?,
        small => BOOT_MIB - 1 + u64::from(small) * 5,
    };
    Ok(Wanted {
        vcpus: (kind % 4 > 1).then_some(vcpus),
        memory_mib: (kind % 4 < 3).then_some(memory_mib),
    })
}

fn answer(input: &mut Unstructured<'_>) -> Result<Answer> {
    let kind: u8 = input.arbitrary()?;
    Ok(match kind % 8 {
        0 => Answer::Nothing,
        1 => Answer::Late(Duration::from_millis(input.arbitrary::<u16>()?.into())),
        2 | 3 => Answer::Bytes(
            plenty(kind & 0x80 == 0)
                .write_to_bytes()
                .unwrap_or_default(),
        ),
        4 | 5 => {
            let len = usize::from(input.arbitrary::<u8>()?).min(input.len());
            Answer::Bytes(input.bytes(len)?.to_vec())
        }
        _ => {
            let len = usize::from(input.arbitrary::<u8>()?).min(input.len());
            Answer::Refusal(kind / 8, input.bytes(len)?.to_vec())
        }
    })
}

/// One change; what it says is bounded and printable, and is what came of it.
async fn change(sandbox: &Sandbox, wanted: Wanted) {
    match sandbox.resize(wanted).await {
        Ok(changed) => {
            if let Some(to) = wanted.vcpus {
                let resized = changed.vcpus.as_ref().map(|resized| resized.now);
                assert_eq!(resized, Some(to.into()));
            }
            let steps = |resized: Option<Resized>| resized.map(|it| it.steps).unwrap_or_default();
            let all = steps(changed.vcpus)
                .into_iter()
                .chain(steps(changed.memory));
            for Step {
                what,
                host_us,
                noticed_us,
                online_us,
                total_us,
            } in all
            {
                assert!(noticed_us <= online_us && online_us <= total_us, "{what}");
                assert!(host_us <= total_us, "{what}");
            }
        }
        Err(why) => {
            assert!(why.len() < TAIL_BYTES, "an error of {} bytes", why.len());
            let dirty = |c: char| c.is_control() && c != '\t';
            assert!(!why.chars().any(dirty), "{why:?}");
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let ms = |count: u16| [&[14][..], &count.to_le_bytes()].concat();
    let plenty = [5, 2];
    // Up by ACPI; the agent says yes to all, the kernel looks; down.
    let up = [0, 2, 4, 103];
    let down = [0, 2, 1, 0];
    let good = [
        &[1][..],
        &plenty,
        &up,
        &[11],
        &ms(100),
        &down,
        &[11],
        &ms(10),
        &[11, 11],
    ]
    .concat();
    // By virtio-mem; half of it comes, and another driver does not run.
    let half = [
        &[0][..],
        &plenty,
        &[0, 0, 0, 103],
        &ms(9),
        &[12, 90, 0, 0],
        &ms(30_000),
    ]
    .concat();
    // Refused, not answered, given up; busy, and late.
    let refused = [
        &[1, 5, 6, 2, b'n', b'o'][..],
        &up,
        &ms(10),
        &[5, 0],
        &up,
        &ms(5000),
        &[4],
    ]
    .concat();
    let busy = [
        &good[..],
        &up,
        &[11],
        &down,
        &[9, 0, 0, 9, 19, 1, 0x82],
        &ms(30_000),
    ]
    .concat();
    // Ends while all is under way.
    let ends = [&[2][..], &up, &down, &up, &ms(50), &[13, 0], &up].concat();
    vec![good, half, refused, busy, ends]
}
