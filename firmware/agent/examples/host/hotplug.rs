//! CPUs and memory that come and go. What must be plugged is asked for on the
//! console, `PLUG cpu UID`, `UNPLUG cpu UID`, `PLUG memory MIB` (at 4 GiB),
//! `PLUG virtio-mem MIB` (its new size); whoever runs the machine reads it.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nacre_protocol::agent::{
    OfflineCpuRequest, OfflineCpuResponse, OfflineMemoryRequest, OfflineMemoryResponse,
    OnlineCpuRequest, OnlineCpuResponse, OnlineMemoryRequest, OnlineMemoryResponse,
    ResourcesRequest, ResourcesResponse, WatchMemoryRequest,
};
use ttrpc::Code;

use super::{Harness, Outcome, process, same, spec};

const MIB: u64 = 1 << 20;
/// Where memory is plugged.
const BASE: u64 = 4 << 30;
/// How long somebody may take to plug, in milliseconds.
const PLUG_MS: u32 = 30_000;

impl Harness {
    async fn online_cpu(&self, uid: u32, wait_ms: u32) -> ttrpc::Result<OnlineCpuResponse> {
        let request = OnlineCpuRequest {
            uid,
            wait_ms,
            ..Default::default()
        };
        let answer = self.agent.online_cpu(minute(), &request).await;
        println!("  OnlineCpu {uid}: {answer:?}");
        answer
    }

    async fn offline_cpu(&self, uid: u32) -> ttrpc::Result<OfflineCpuResponse> {
        let request = OfflineCpuRequest {
            uid,
            ..Default::default()
        };
        let answer = self.agent.offline_cpu(minute(), &request).await;
        println!("  OfflineCpu {uid}: {answer:?}");
        answer
    }

    async fn online_memory(
        &self,
        base: u64,
        mib: u64,
        wait_ms: u32,
    ) -> ttrpc::Result<OnlineMemoryResponse> {
        let request = OnlineMemoryRequest {
            base,
            bytes: mib * MIB,
            wait_ms,
            ..Default::default()
        };
        let answer = self.agent.online_memory(minute(), &request).await;
        println!("  OnlineMemory {mib} MiB: {answer:?}");
        answer
    }

    async fn offline_memory(
        &self,
        base: u64,
        mib: u64,
        deadline_ms: u32,
    ) -> ttrpc::Result<OfflineMemoryResponse> {
        let request = OfflineMemoryRequest {
            base,
            bytes: mib * MIB,
            deadline_ms,
            ..Default::default()
        };
        let answer = self.agent.offline_memory(minute(), &request).await;
        println!("  OfflineMemory {mib} MiB: {answer:?}");
        answer
    }

    async fn watch_memory(&self, high_bytes: u64) -> Outcome {
        let request = WatchMemoryRequest {
            high_bytes,
            ..Default::default()
        };
        let answer = self.agent.watch_memory(minute(), &request).await;
        answer.map(|_| ()).map_err(|error| error.to_string())
    }

    async fn what_there_is(&self) -> Result<ResourcesResponse, String> {
        let request = ResourcesRequest::default();
        let answer = self.agent.resources(minute(), &request).await;
        answer.map_err(|error| error.to_string())
    }

    /// How many CPUs a new process of a container may run on.
    async fn nproc(&self, id: &str, exec_id: &str) -> Result<String, String> {
        let (out, _, _) = self.run_exec(id, exec_id, process(&["nproc"]), b"").await?;
        Ok(out.trim().to_owned())
    }
}

fn minute() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(60))
}

fn text<T>(answer: ttrpc::Result<T>) -> Result<T, String> {
    answer.map_err(|error| error.to_string())
}

/// The call failed with this code, and its message has these words.
fn refused<T>(answer: ttrpc::Result<T>, code: Code, words: &str) -> Outcome {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => {
            same(status.code(), code)?;
            match status.message().contains(words) {
                true => Ok(()),
                false => Err(format!("no `{words}` in `{}`", status.message())),
            }
        }
        Err(error) => Err(format!("another failure: {error}")),
        Ok(_) => Err(format!("not refused with {code:?}, {words}")),
    }
}

fn file(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

pub async fn resources(h: &Harness) -> Outcome {
    let first = h.what_there_is().await?;
    println!("  {first:?}");
    same(first.online_uids.first(), Some(&0))?;
    same(first.lacks.as_slice(), &[])?;
    same(first.memory_available_bytes > 0, true)?;
    same(first.memory_free_bytes <= first.memory_total_bytes, true)?;
    same(first.kernel_bytes > first.memory_total_bytes / 2, true)?;
    let policy = [
        "/sys/module/memory_hotplug/parameters/online_policy",
        "/sys/module/memory_hotplug/parameters/auto_movable_ratio",
        "/sys/devices/system/memory/auto_online_blocks",
    ];
    same(
        policy.map(file),
        ["auto-movable", "301", "online"].map(String::from),
    )?;
    let (_, _, status) = h
        .sh("busy", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
        .await?;
    same(status, 0)?;
    let second = h.what_there_is().await?;
    let busy = second.cpu_busy_us - first.cpu_busy_us;
    let total = second.cpu_total_us - first.cpu_total_us;
    println!("  {busy} of {total} µs were busy");
    same(busy > 0 && busy <= total, true)
}

/// Needs two CPUs from the start.
pub async fn cpu_off_and_on(h: &Harness) -> Outcome {
    h.sleeper("cpus", "").await?;
    same(file("/sys/fs/cgroup/nacre/cpus/cpuset.cpus"), String::new())?;
    same(h.nproc("cpus", "before").await?, "2".into())?;
    refused(h.offline_cpu(0).await, Code::FAILED_PRECONDITION, "first")?;
    refused(h.offline_cpu(77).await, Code::NOT_FOUND, "77")?;
    let begun = Instant::now();
    refused(h.online_cpu(77, 300).await, Code::NOT_FOUND, "77")?;
    same(begun.elapsed() >= Duration::from_millis(300), true)?;
    same(text(h.offline_cpu(1).await)?.vcpus_online, 1)?;
    same(h.nproc("cpus", "one").await?, "1".into())?;
    same(h.what_there_is().await?.online_uids.as_slice(), &[0])?;
    same(text(h.offline_cpu(1).await)?.vcpus_online, 1)?;
    for round in 0..5 {
        same(text(h.online_cpu(1, 0).await)?.vcpus_online, 2)?;
        // The answer means that containers may run there.
        let pids = file("/sys/fs/cgroup/nacre/cpus/cgroup.procs");
        let status = file(&format!(
            "/proc/{}/status",
            pids.lines().next().unwrap_or_default()
        ));
        let allowed = status
            .lines()
            .find(|line| line.starts_with("Cpus_allowed_list"));
        same(allowed.map(|line| line.ends_with("0-1")), Some(true))
            .map_err(|why| format!("round {round}: {allowed:?}: {why}"))?;
        text(h.offline_cpu(1).await)?;
    }
    text(h.online_cpu(1, 0).await)?;
    same(text(h.online_cpu(1, 0).await)?.vcpus_online, 2)?;
    same(h.nproc("cpus", "two").await?, "2".into())?;
    same(h.what_there_is().await?.online_uids.as_slice(), &[0, 1])?;
    h.end("cpus").await
}

/// A CPU is plugged and unplugged, twice: that of `host.cpu=UID` on the kernel's command line, else 2.
pub async fn cpu_plug(h: &Harness) -> Outcome {
    let line = file("/proc/cmdline");
    let uid = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("host.cpu=")?.parse().ok())
        .unwrap_or(2);
    for round in 0..2 {
        let before = h.what_there_is().await?.online_uids.len() as u32;
        println!("PLUG cpu {uid}");
        let came = text(h.online_cpu(uid, PLUG_MS).await)?;
        same(came.vcpus_online, before + 1)?;
        same(h.what_there_is().await?.online_uids.contains(&uid), true)?;
        let id = format!("plug{round}");
        h.sleeper(&id, "").await?;
        same(h.nproc(&id, "x").await?, (before + 1).to_string())?;
        same(text(h.offline_cpu(uid).await)?.vcpus_online, before)?;
        h.end(&id).await?;
        println!("UNPLUG cpu {uid}");
        let begun = Instant::now();
        while h.offline_cpu(uid).await.is_ok() {
            same(begun.elapsed() < Duration::from_secs(20), true)?;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        refused(h.offline_cpu(uid).await, Code::NOT_FOUND, "no such CPU")?;
    }
    Ok(())
}

/// What virtio-mem adds comes online by itself and movable; the device must be there, with nothing plugged yet.
pub async fn virtio_mem(h: &Harness) -> Outcome {
    let before = h.what_there_is().await?;
    same(before.virtio_mem, true)?;
    for mib in [512, 0] {
        println!("PLUG virtio-mem {mib}");
        let begun = Instant::now();
        while h.what_there_is().await?.movable_bytes != before.movable_bytes + mib * MIB {
            same(begun.elapsed() < Duration::from_secs(20), true)
                .map_err(|_| format!("{:?}", file("/proc/meminfo")))?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        println!("  {mib} MiB after {:?}", begun.elapsed());
    }
    Ok(())
}

/// Memory comes, goes, and comes again, with and without the kernel's own bringing it online.
pub async fn memory_plug(h: &Harness) -> Outcome {
    let before = h.what_there_is().await?;
    refused(
        h.online_memory(BASE + 1, 128, 0).await,
        Code::INVALID_ARGUMENT,
        "multiples",
    )?;
    refused(
        h.online_memory(BASE, 256, 200).await,
        Code::NOT_FOUND,
        "within 200 ms",
    )?;
    refused(
        h.offline_memory(BASE, 256, 0).await,
        Code::NOT_FOUND,
        "none",
    )?;
    println!("PLUG memory 256");
    let came = text(h.online_memory(BASE, 256, PLUG_MS).await)?;
    same(came.blocks.len(), 2)?;
    same(came.blocks.iter().all(|block| block.movable), true)?;
    same(
        came.memory_total_bytes > before.memory_total_bytes + 200 * MIB,
        true,
    )?;
    let now = h.what_there_is().await?;
    same(now.movable_bytes, 256 * MIB)?;
    let gone = text(h.offline_memory(BASE, 256, 0).await)?;
    same(
        gone.memory_total_bytes < before.memory_total_bytes + 50 * MIB,
        true,
    )?;
    text(h.offline_memory(BASE, 256, 0).await)?;
    let came = text(h.online_memory(BASE, 256, 0).await)?;
    same(came.blocks.iter().all(|block| block.movable), true)?;
    same(text(h.online_memory(BASE, 128, 0).await)?.blocks.len(), 1)?;
    // Without the kernel's help.
    let auto = "/sys/devices/system/memory/auto_online_blocks";
    std::fs::write(auto, "offline").map_err(|error| error.to_string())?;
    println!("PLUG memory 128");
    let came = text(h.online_memory(BASE + 256 * MIB, 128, PLUG_MS).await)?;
    same(came.blocks.len(), 1)?;
    same(came.blocks[0].movable, true)?;
    std::fs::write(auto, "online").map_err(|error| error.to_string())?;
    text(h.offline_memory(BASE + 256 * MIB, 128, 0).await)?;
    // The kernel's own memory is refused at once, and stays.
    let begun = Instant::now();
    let kernel = h.offline_memory(0, 128, 0).await;
    refused(kernel, Code::FAILED_PRECONDITION, "block 0")?;
    println!("  refused after {:?}", begun.elapsed());
    Ok(())
}

/// A page that cannot be moved keeps its block online; the attempt ends in time, and leaves all as it was. After
/// `memory_plug`, with 256 MiB plugged and online.
pub async fn memory_busy(h: &Harness) -> Outcome {
    let (reader, writer) = std::io::pipe().map_err(|error| error.to_string())?;
    let mut pages = vec![1_u8; 16 * 4096];
    pages.fill(7);
    let slice = libc::iovec {
        iov_base: pages.as_mut_ptr().cast(),
        iov_len: pages.len(),
    };
    // SAFETY: the pages are alive until the pipe is closed below, and nobody reads them from it.
    let held = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const slice, 1, 0) };
    same(held > 0, true)?;
    let before = h.what_there_is().await?;
    let begun = Instant::now();
    let busy = h.offline_memory(BASE, 256, 2000).await;
    let took = begun.elapsed();
    println!("  refused after {took:?}");
    refused(busy, Code::FAILED_PRECONDITION, "movable zone")?;
    same(took < Duration::from_secs(10), true)?;
    let after = h.what_there_is().await?;
    same(after.memory_total_bytes, before.memory_total_bytes)?;
    same(after.movable_bytes, before.movable_bytes)?;
    drop((reader, writer));
    drop(pages);
    text(h.offline_memory(BASE, 256, 20_000).await).map(|_| ())
}

/// A container that allocates beyond the limit is slowed down and not killed, the host is told, and raises the limit.
pub async fn watch_memory(h: &Harness) -> Outcome {
    let high = || file("/sys/fs/cgroup/nacre/memory.high");
    h.watch_memory(64 * MIB).await?;
    same(high(), (64 * MIB).to_string())?;
    let told = || h.seen.pressure.lock().unwrap().len();
    same(told(), 0)?;
    let script =
        "echo begun; dd if=/dev/zero of=/big bs=1M count=150 2>/dev/null; echo $?; rm /big";
    let raise = async {
        let begun = Instant::now();
        while told() == 0 && begun.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        println!("  told after {:?}", begun.elapsed());
        // Slowed down, it goes on telling.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let slowed = file("/sys/fs/cgroup/nacre/memory.current");
        println!("  {slowed} bytes in use, {} events", told());
        h.watch_memory(0).await?;
        same(high(), "max".into())
    };
    let begun = Instant::now();
    let run = h.run("hungry", spec(&["sh", "-c", script], ""), b"");
    let (ran, raised) = tokio::join!(run, raise);
    raised?;
    let (streams, status) = ran?;
    println!("  ended after {:?}", begun.elapsed());
    same(
        String::from_utf8_lossy(&streams.stdout).as_ref(),
        "begun\n0\n",
    )?;
    same(status, 0)?;
    let times = h.seen.pressure.lock().unwrap().clone();
    same(times.len() >= 2, true)?;
    // They are sent with a pause; on the way it may shrink.
    let paused = (times[times.len() - 1] - times[0]).as_millis() / 200;
    same(times.len() as u128 <= paused + 2, true)?;
    // Disarmed: nothing more comes of it.
    let count = told();
    let (_, _, status) = h
        .sh(
            "fed",
            "dd if=/dev/zero of=/big bs=1M count=100 2>/dev/null; rm /big",
        )
        .await?;
    same(status, 0)?;
    tokio::time::sleep(Duration::from_millis(700)).await;
    same(told(), count)?;
    std::io::stdout().flush().map_err(|error| error.to_string())
}
