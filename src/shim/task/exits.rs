//! How exits become known: by the agent's events, or by the end of the VM. Each
//! waits for its process's output, and init's for those of its execs.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use tokio::sync::watch;

use super::{Exit, Shim};
use crate::sandbox::{AgentEvent, ExitReason, Sandbox};
use crate::shim::events::{TaskEvent, timestamp};
use crate::shim::lifecycle::{self, ProcessEvent, SandboxEvent};

/// How long init's exit waits for those of its execs, which die with it.
const EXECS_FOLLOW: Duration = Duration::from_secs(5);
/// How long a shim without a VM waits to be told to end, after its events are out.
const LINGER: Duration = Duration::from_secs(5);
/// How often a container's kills for want of memory are told at most: how many there are is the guest's choice.
const OOM_PAUSE: Duration = Duration::from_millis(200);
/// The same as [`LINGER`], when there was no container yet: Create still has to hear why.
const LINGER_BEFORE_CREATE: Duration = Duration::from_secs(30);

impl Shim {
    /// Takes what the boot came to, and follows the sandbox to its end.
    pub(in crate::shim) async fn booted(self: Arc<Self>, made: Result<Sandbox, String>) {
        let sandbox = made.as_ref().ok().cloned();
        if sandbox.is_none() {
            let mut state = self.lock();
            // Allowed in every state.
            state.life = state.life.after(SandboxEvent::End).unwrap_or(state.life);
        }
        if let Some(sandbox) = &sandbox {
            self.control_size(sandbox);
        }
        self.boot.send_replace(Some(made));
        let Some(sandbox) = sandbox else {
            // Whoever asked for it may have gone.
            tokio::time::sleep(LINGER_BEFORE_CREATE).await;
            self.shut_down();
            return;
        };
        let (shim, booting) = (self.clone(), sandbox.clone());
        tokio::spawn(async move {
            match booting.ready().await {
                Ok(ready) => {
                    let mut state = shim.lock();
                    // Not if it is ending already.
                    state.life = state.life.after(SandboxEvent::Ready).unwrap_or(state.life);
                    drop(state);
                    tracing::info!(
                        kernel = ready.kernel_release, agent = ready.build_id,
                        phases = ?booting.phases().reached(), "the guest is ready"
                    );
                }
                // Create says it too, unless the VM was stopped before.
                Err(error) => tracing::warn!(%error, "the guest does not become ready"),
            }
        });
        self.follow(sandbox).await;
    }

    /// Follows a sandbox from its boot to its end.
    async fn follow(self: Arc<Self>, sandbox: Sandbox) {
        if let Some(mut events) = sandbox.events() {
            let mut last_oom: HashMap<String, Instant> = HashMap::new();
            while let Some(event) = events.recv().await {
                match event {
                    AgentEvent::Exit {
                        container_id,
                        exec_id,
                        pid,
                        status,
                        exited_at,
                    } => {
                        let exit = Exit {
                            status: u32::from(status),
                            at: exited_at,
                            guest_pid: pid,
                        };
                        self.process_ended(&container_id, &exec_id, exit);
                    }
                    AgentEvent::Pressure {
                        total_bytes,
                        available_bytes,
                    } => self.pressed(total_bytes, available_bytes),
                    AgentEvent::Oom { container_id } => {
                        let last = last_oom.get(&container_id);
                        if last.is_some_and(|last| last.elapsed() < OOM_PAUSE) {
                            continue;
                        }
                        last_oom.insert(container_id.clone(), Instant::now());
                        let mut event = TaskOOM::new();
                        event.container_id = container_id;
                        self.publisher.publish(&TaskEvent::Oom(event));
                    }
                }
            }
        }
        let reason = sandbox.ended().await;
        let (planned, any) = self.vm_ended();
        if planned {
            tracing::info!(%reason, "the VM has ended");
            return;
        }
        if reason == ExitReason::Stopped {
            // Who stopped it has said why.
            tracing::warn!(%reason, "the VM has ended");
        } else {
            tracing::error!(%reason, console = sandbox.console_tail(), "the VM has ended by itself");
        }
        self.all_exits().await;
        self.publisher.flushed().await;
        tokio::time::sleep(if any { LINGER } else { LINGER_BEFORE_CREATE }).await;
        self.shut_down();
    }

    /// Every process that was alive has died with the VM. Says whether the end was asked for, and whether there were containers.
    fn vm_ended(self: &Arc<Self>) -> (bool, bool) {
        let (planned, live, any) = {
            let mut state = self.lock();
            let planned = state.life == lifecycle::Sandbox::ShuttingDown;
            // Allowed in every state.
            state.life = state.life.after(SandboxEvent::End).unwrap_or(state.life);
            let live: Vec<(String, String)> = state
                .containers
                .iter()
                .flat_map(|(id, container)| {
                    container
                        .ending_processes()
                        .filter(|(_, process)| process.life.is_live())
                        .map(|(exec_id, _)| (id.clone(), exec_id.to_owned()))
                })
                .collect();
            (planned, live, !state.containers.is_empty())
        };
        for (id, exec_id) in live {
            self.process_ended(&id, &exec_id, Exit::killed());
        }
        (planned, any)
    }

    /// Completes when the exit of every process is known.
    pub(super) async fn all_exits(&self) {
        let exits: Vec<watch::Receiver<Option<Exit>>> = {
            let state = self.lock();
            let containers = state.containers.values();
            let made = containers.filter(|container| container.is_made());
            made.flat_map(|container| {
                container
                    .ending_processes()
                    .map(|(_, process)| process.exit.subscribe())
            })
            .collect()
        };
        for mut exit in exits {
            // Its container may be deleted meanwhile, and then there is nothing to wait for.
            let _ = exit.wait_for(Option::is_some).await;
        }
    }

    /// A process has ended. What it must follow comes first: an exit while the
    /// container is made or the process started is held until that is known. Only the first exit counts.
    pub(super) fn process_ended(self: &Arc<Self>, id: &str, exec_id: &str, exit: Exit) {
        {
            let mut state = self.lock();
            let Some(container) = state.containers.get_mut(id) else {
                return;
            };
            let made = container.is_made();
            if exec_id.is_empty() && made && !container.is_of_its_init(&exit) {
                tracing::debug!(container = id, "an exit of one that had the id before");
                return;
            }
            let Some(process) = container.process_mut(exec_id) else {
                return;
            };
            if !made || process.life == lifecycle::Process::Starting {
                process.held.get_or_insert(exit);
                return;
            }
            let Ok(next) = process.life.after(ProcessEvent::Exit) else {
                return;
            };
            process.life = next;
        }
        self.drain(id, exec_id, exit);
    }

    /// Makes the exit of a draining process known, when its output is out.
    pub(super) fn drain(self: &Arc<Self>, id: &str, exec_id: &str, exit: Exit) {
        let (output, execs) = {
            let mut state = self.lock();
            let Some(container) = state.containers.get_mut(id) else {
                return;
            };
            let execs: Vec<_> = if exec_id.is_empty() {
                container
                    .ending_processes()
                    .filter(|(exec_id, _)| !exec_id.is_empty())
                    .map(|(exec_id, exec)| (exec_id.to_owned(), exec.exit.subscribe()))
                    .collect()
            } else {
                Vec::new()
            };
            let Some(process) = container.process_mut(exec_id) else {
                return;
            };
            (process.io.as_mut().map(|io| io.drain()), execs)
        };
        tracing::debug!(
            container = id,
            exec = exec_id,
            status = exit.status,
            "a process has ended"
        );
        tokio::spawn(
            self.clone()
                .finish(id.to_owned(), exec_id.to_owned(), exit, output, execs),
        );
    }

    async fn finish(
        self: Arc<Self>,
        id: String,
        exec_id: String,
        exit: Exit,
        output: Option<impl Future<Output = ()>>,
        execs: Vec<(String, watch::Receiver<Option<Exit>>)>,
    ) {
        if let Some(output) = output {
            output.await;
        }
        if !execs.is_empty() {
            self.execs_ended(&id, execs).await;
        }
        let mut state = self.lock();
        let Some(process) = state
            .containers
            .get_mut(&id)
            .and_then(|c| c.process_mut(&exec_id))
        else {
            return;
        };
        let Ok(next) = process.life.after(ProcessEvent::Drained) else {
            return;
        };
        process.life = next;
        // Of an exec whose program could not be run its Start has told, and there is no exit.
        let told = exec_id.is_empty() || process.ran;
        let mut event = TaskExit::new();
        event.container_id.clone_from(&id);
        event.id = if exec_id.is_empty() {
            id.clone()
        } else {
            exec_id.clone()
        };
        event.pid = self.identity.pid;
        event.exit_status = exit.status;
        event.exited_at = timestamp(exit.at);
        if told {
            self.publisher.publish(&TaskEvent::Exit(event));
        }
        process.exit.send_replace(Some(exit));
        drop(state);
        tracing::info!(
            container = id,
            exec = exec_id,
            status = exit.status,
            "exited"
        );
    }

    /// Completes when the exits of these execs of a container whose init has ended are known. The guest ends them with
    /// init; of one that it forgets the end is told without it.
    async fn execs_ended(
        self: &Arc<Self>,
        id: &str,
        mut execs: Vec<(String, watch::Receiver<Option<Exit>>)>,
    ) {
        let exits = async |execs: &mut Vec<(String, watch::Receiver<Option<Exit>>)>| {
            for (_, exit) in execs {
                // Deleted meanwhile is as good as ended.
                let _ = exit.wait_for(Option::is_some).await;
            }
        };
        if tokio::time::timeout(EXECS_FOLLOW, exits(&mut execs))
            .await
            .is_ok()
        {
            return;
        }
        for (exec_id, exit) in &execs {
            if exit.borrow().is_none() {
                tracing::warn!(
                    container = id,
                    exec = exec_id,
                    "init has ended and an exec of it has not"
                );
                // Nothing if it has ended and its output is on its way.
                self.process_ended(id, exec_id, Exit::killed());
            }
        }
        exits(&mut execs).await;
    }
}
