//! Calls about one process: Start, Kill, Wait, State, CloseIO, ResizePty, Pids.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{ProcessInfo, StateResponse, Status};
use containerd_shim_protos::events::task::{TaskExecStarted, TaskStart};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use ttrpc::Code;

use super::{AGENT_PATIENCE, Error, Exit, Shim, no_container, no_process};
use crate::sandbox::{self, Sandbox, monotonic_ns};
use crate::shim::events::{TaskEvent, timestamp};
use crate::shim::lifecycle::{self, ProcessEvent};

/// Exit status of a process whose program could not be run.
const NOT_RUN: u32 = 127;
/// How long a process may take to be gone after a SIGKILL that the agent has sent.
const DIES: Duration = Duration::from_secs(10);
const SIGKILL: u32 = libc::SIGKILL as u32;

impl Shim {
    /// Runs the program of a created process.
    pub(super) async fn start(self: Arc<Self>, id: &str, exec_id: &str) -> Result<u32, Error> {
        let begun_ns = monotonic_ns();
        {
            let mut state = self.lock();
            if !exec_id.is_empty() && state.containers.contains_key(id) {
                super::exec::taking_execs(&mut state, id, "start an exec")?;
            }
            let process = state.made(id, exec_id)?;
            process.life = process.life.after(ProcessEvent::Start)?;
        }
        let started = match self.sandbox().await {
            Ok(sandbox) => self.start_in(&sandbox, id, exec_id).await,
            Err(error) => Err(error),
        };
        let (event, missed) = match &started {
            Ok(_) => (ProcessEvent::Started, None),
            Err(_) => (ProcessEvent::Fail, Some(self.exit_without_start())),
        };
        if started.is_ok() {
            self.note_start(id, exec_id, begun_ns);
        }
        let held = {
            let mut state = self.lock();
            let process = state.made(id, exec_id)?;
            process.life = process.life.after(event)?;
            process.ran = started.is_ok();
            match (&started, exec_id) {
                (Err(_), _) => {}
                (Ok(_), "") => {
                    let mut start = TaskStart::new();
                    start.container_id = id.to_owned();
                    start.pid = self.identity.pid;
                    self.publisher.publish(&TaskEvent::Start(start));
                }
                (Ok(_), exec_id) => {
                    let mut start = TaskExecStarted::new();
                    start.container_id = id.to_owned();
                    start.exec_id = exec_id.to_owned();
                    start.pid = self.identity.pid;
                    self.publisher.publish(&TaskEvent::ExecStarted(start));
                }
            }
            process.held.take()
        };
        match (held.or(missed), &started) {
            (Some(exit), Ok(_)) => self.process_ended(id, exec_id, exit),
            // It is draining already: Fail made it so.
            (Some(exit), Err(_)) => self.drain(id, exec_id, exit),
            (None, _) => {}
        }
        started?;
        if exec_id.is_empty()
            && let Err(error) = self.run_poststart_hooks(id).await
        {
            // As the runtime specification has it: an error, and the container is stopped.
            let error = Error::Failed(format!("Container {id:?} is stopped: {error}"));
            if let Err(undone) = self.clone().kill(id, "", SIGKILL, true).await {
                tracing::debug!(container = id, error = %undone, "it has ended already");
            }
            return Err(error);
        }
        Ok(self.identity.pid)
    }

    /// Runs a process; an init with the network that its namespace has by now.
    async fn start_in(&self, sandbox: &Sandbox, id: &str, exec_id: &str) -> Result<u32, Error> {
        if exec_id.is_empty() {
            self.bring_network_up(sandbox, id).await?;
        }
        match sandbox.start(id, exec_id).await {
            Ok(pid) => Ok(pid),
            Err(error) => {
                if !matches!(error, sandbox::Error::Refused { .. }) {
                    end_unanswered(sandbox, id, exec_id).await;
                }
                Err(Error::Failed(error.to_string()))
            }
        }
    }

    /// The exit of a process that never ran.
    fn exit_without_start(&self) -> Exit {
        let vm_ended = self
            .sandbox_now()
            .is_none_or(|sandbox| sandbox.exit_reason().is_some());
        if vm_ended {
            Exit::killed()
        } else {
            Exit {
                status: NOT_RUN,
                ..Exit::killed()
            }
        }
    }

    /// [`Self::signal`], with note of how long it took.
    pub(super) async fn kill(
        self: Arc<Self>,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let begun_ns = monotonic_ns();
        self.clone().signal(id, exec_id, signal, all).await?;
        let took_ns = monotonic_ns().saturating_sub(begun_ns);
        self.note(id, |timings| timings.kill.add(took_ns));
        Ok(())
    }

    /// Sends a signal. A SIGKILL works whatever the guest does: one that is not answered, or has no effect, stops the VM.
    async fn signal(
        self: Arc<Self>,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let mut exit = {
            let mut state = self.lock();
            let process = state.made(id, exec_id)?;
            if !process.life.is_live() {
                return Err(Error::NotFound(format!(
                    "The process {exec_id:?} of container {id:?} has ended"
                )));
            }
            process.exit.subscribe()
        };
        // Of an exec only itself is meant.
        let all = all && exec_id.is_empty();
        let sandbox = self.sandbox().await?;
        let sent =
            tokio::time::timeout(AGENT_PATIENCE, sandbox.signal(id, exec_id, signal, all)).await;
        let cause = match sent {
            Ok(Ok(())) => {
                if signal == SIGKILL {
                    let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
                    tokio::spawn(async move {
                        let gone = tokio::time::timeout(DIES, exit.wait_for(Option::is_some)).await;
                        let living = || {
                            let state = self.lock();
                            let process =
                                state.containers.get(&id).and_then(|c| c.process(&exec_id));
                            // One whose exit is known already waits for its Start to be over.
                            process.is_some_and(|process| {
                                process.life.is_live() && process.held.is_none()
                            })
                        };
                        if gone.is_err() && living() {
                            tracing::error!(
                                container = id,
                                exec = exec_id,
                                "a killed process lives on in the guest; the VM is stopped"
                            );
                            sandbox.stop();
                        }
                    });
                }
                return Ok(());
            }
            Ok(Err(error)) if error.code() == Some(Code::NOT_FOUND) => {
                return Err(Error::NotFound(error.to_string()));
            }
            Ok(Err(sandbox::Error::Gone { .. })) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("the agent did not answer within {AGENT_PATIENCE:?}"),
        };
        if signal != SIGKILL {
            return Err(Error::Failed(format!(
                "Cannot send signal {signal} to container {id:?}: {cause}"
            )));
        }
        tracing::error!(container = id, exec = exec_id, %cause, "the guest does not kill; the VM is stopped");
        sandbox.stop();
        Ok(())
    }

    /// Completes when the process's exit is known.
    pub(super) async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let mut exit = {
            let mut state = self.lock();
            state.made(id, exec_id)?.exit.subscribe()
        };
        let exit = exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit);
        exit.ok_or_else(|| no_container(id))
    }

    /// What there is to know, without asking the guest. What is still being made is not there yet, as with runc's shim.
    pub(super) fn state(&self, id: &str, exec_id: &str) -> Result<StateResponse, Error> {
        let state = self.lock();
        let container = state
            .containers
            .get(id)
            .filter(|container| container.is_made())
            .ok_or_else(|| no_container(id))?;
        let process = container
            .process(exec_id)
            .filter(|process| process.life != lifecycle::Process::Adding)
            .ok_or_else(|| no_process(id, exec_id))?;
        let mut response = StateResponse::new();
        response.id = id.to_owned();
        response.exec_id = exec_id.to_owned();
        response.bundle.clone_from(&container.bundle);
        response.pid = self.identity.pid;
        response.status = match process.life {
            lifecycle::Process::Adding
            | lifecycle::Process::Created
            | lifecycle::Process::Starting => Status::CREATED,
            lifecycle::Process::Running if container.life == lifecycle::Container::Paused => {
                Status::PAUSED
            }
            // Its exit is told when its output is out.
            lifecycle::Process::Running | lifecycle::Process::Draining => Status::RUNNING,
            lifecycle::Process::Stopped => Status::STOPPED,
        }
        .into();
        response.stdin.clone_from(&process.paths.stdin);
        response.stdout.clone_from(&process.paths.stdout);
        response.stderr.clone_from(&process.paths.stderr);
        response.terminal = process.paths.terminal;
        if let Some(exit) = *process.exit.borrow() {
            response.exit_status = exit.status;
            response.exited_at = timestamp(exit.at);
        }
        Ok(response)
    }

    /// Ends stdin after what was written to it.
    pub(super) fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        let mut state = self.lock();
        let process = state.made(id, exec_id)?;
        if let Some(io) = &mut process.io {
            io.close_stdin();
        }
        Ok(())
    }

    /// Sets the size of a terminal.
    pub(super) async fn resize_pty(
        &self,
        id: &str,
        exec_id: &str,
        columns: u32,
        rows: u32,
    ) -> Result<(), Error> {
        {
            let mut state = self.lock();
            let process = state.made(id, exec_id)?;
            if !process.paths.terminal {
                return Err(Error::Precondition(format!(
                    "Container {id:?} has no terminal"
                )));
            }
            if !process.life.is_live() {
                return Err(Error::NotFound(format!(
                    "The process {exec_id:?} of container {id:?} has ended"
                )));
            }
        }
        let sandbox = self.sandbox().await?;
        sandbox
            .resize_pty(id, exec_id, columns, rows)
            .await
            .map_err(|error| Error::Failed(error.to_string()))
    }

    /// Guest pids, with the exec that each belongs to. An init whose exit has not been told is there, as a process is
    /// that nobody has waited for: a containerd that comes back takes a task without a process for a leaked one, and
    /// deletes it before it takes events.
    pub(super) async fn pids(&self, id: &str) -> Result<Vec<ProcessInfo>, Error> {
        let execs: Vec<String> = {
            let mut state = self.lock();
            let ended = matches!(
                state.made(id, "")?.life,
                lifecycle::Process::Draining | lifecycle::Process::Stopped
            );
            let container = state.containers.get(id).ok_or_else(|| no_container(id))?;
            if ended && self.publisher.is_behind() {
                let mut init = ProcessInfo::new();
                init.pid = container.guest_pid;
                return Ok(vec![init]);
            }
            container.execs.keys().cloned().collect()
        };
        let sandbox = self.sandbox().await?;
        let processes = sandbox
            .pids(id)
            .await
            .map_err(|error| Error::Failed(error.to_string()))?;
        let info = |process: sandbox::Process| {
            let mut info = ProcessInfo::new();
            info.pid = process.pid;
            // The guest may only name what there is.
            if execs.contains(&process.exec_id) {
                info.info = MessageField::some(process_details(&process.exec_id));
            }
            info
        };
        Ok(processes.into_iter().map(info).collect())
    }
}

/// Kills what may run although its start was not answered: nothing may run whose exit is told.
async fn end_unanswered(sandbox: &sandbox::Sandbox, id: &str, exec_id: &str) {
    let all = exec_id.is_empty();
    let killed =
        tokio::time::timeout(AGENT_PATIENCE, sandbox.signal(id, exec_id, SIGKILL, all)).await;
    let gone = match killed {
        Ok(Ok(())) => true,
        Ok(Err(error)) => error.code() == Some(Code::NOT_FOUND),
        Err(_) => false,
    };
    if !gone {
        tracing::error!(
            container = id,
            exec = exec_id,
            "the guest does not start and does not kill; the VM is stopped"
        );
        sandbox.stop();
    }
}

/// `containerd.runc.v1.ProcessDetails`: the exec id in field 1.
fn process_details(exec_id: &str) -> Any {
    let mut any = Any::new();
    any.type_url = "containerd.runc.v1.ProcessDetails".to_owned();
    let mut value = Vec::new();
    let mut stream = protobuf::CodedOutputStream::vec(&mut value);
    // Writing to a Vec does not fail.
    let _ = stream
        .write_string(1, exec_id)
        .and_then(|()| stream.flush());
    drop(stream);
    any.value = value;
    any
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_details_carry_the_exec_id() {
        let any = process_details("ab");
        assert_eq!(any.value, b"\x0a\x02ab");
    }
}
