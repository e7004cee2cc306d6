//! Execs: Exec adds a process to a container whose init is there, Start runs it, Delete
//! frees it. What it shares with a container's init is in [`super::process`].

use std::sync::Arc;

use containerd_shim_protos::api::{DeleteResponse, ExecProcessRequest};
use containerd_shim_protos::events::task::TaskExecAdded;
use ttrpc::Code;

use super::{
    AGENT_PATIENCE, Container, Error, Exit, Process, Shim, State, no_container, no_process,
};
use crate::sandbox::spec::{self, GuestProcess};
use crate::sandbox::{Sandbox, chain, monotonic_ns};
use crate::shim::events::TaskEvent;
use crate::shim::lifecycle::{self, ProcessEvent};
use crate::shim::stdio::{Paths, Prepared, ProcessIo};

/// Longest exec id. Longer ones are dropped with the guest's events.
const LONGEST_ID: usize = 256;

impl Shim {
    /// Adds a process to a container, whose own program may be started later.
    pub(super) async fn exec(self: Arc<Self>, request: ExecProcessRequest) -> Result<(), Error> {
        let begun_ns = monotonic_ns();
        let (id, exec_id) = (request.id.as_str(), request.exec_id.as_str());
        check(&request)?;
        let process = spec::process_for_guest(&request.spec.value).map_err(|error| {
            Error::Invalid(format!(
                "Cannot read the process of exec {exec_id:?}: {}",
                chain(&error)
            ))
        })?;
        let paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        {
            let mut state = self.lock();
            let container = taking_execs(&mut state, id, "add an exec")?;
            if container.execs.contains_key(exec_id) {
                return Err(Error::AlreadyExists(format!(
                    "Exec {exec_id:?} of container {id:?} exists"
                )));
            }
            let exec = Process {
                life: lifecycle::Process::Adding,
                ..Process::new(paths.clone())
            };
            container.execs.insert(exec_id.to_owned(), exec);
        }
        let added = self.add(id, exec_id, process, &paths).await;
        let (sandbox, refused) = match added {
            Ok((sandbox, io)) => match self.added(id, exec_id, io, begun_ns) {
                Ok(()) => return Ok(()),
                Err(error) => (Some(sandbox), error),
            },
            Err(error) => (None, error),
        };
        if let Some(container) = self.lock().containers.get_mut(id) {
            container.execs.remove(exec_id);
        }
        if let Some(sandbox) = sandbox {
            free(&sandbox, id, exec_id).await;
        }
        Err(refused)
    }

    async fn add(
        &self,
        id: &str,
        exec_id: &str,
        process: GuestProcess,
        paths: &Paths,
    ) -> Result<(Sandbox, ProcessIo), Error> {
        let sandbox = self.sandbox().await?;
        let invalid = |error: crate::shim::stdio::Error| Error::Invalid(error.to_string());
        let prepared = Prepared::new(&sandbox, paths).map_err(invalid)?;
        let prepared = prepared
            .start_logger(&self.identity.namespace, id)
            .await
            .map_err(|error| Error::Failed(error.to_string()))?;
        let ports = prepared.ports(process.size);
        let io = prepared.run(self.limits);
        match sandbox.exec(id, exec_id, process.json, ports).await {
            Ok(()) => Ok((sandbox, io)),
            Err(error) => Err(match error.code() {
                Some(Code::ALREADY_EXISTS) => Error::AlreadyExists(error.to_string()),
                Some(Code::FAILED_PRECONDITION | Code::NOT_FOUND) => {
                    Error::Precondition(error.to_string())
                }
                Some(Code::INVALID_ARGUMENT) => Error::Invalid(error.to_string()),
                _ => Error::Failed(error.to_string()),
            }),
        }
    }

    /// The agent has it: makes it known, unless its container has ended meanwhile.
    fn added(&self, id: &str, exec_id: &str, io: ProcessIo, begun_ns: u64) -> Result<(), Error> {
        let mut state = self.lock();
        let container = taking_execs(&mut state, id, "add an exec")?;
        let exec = container
            .execs
            .get_mut(exec_id)
            .ok_or_else(|| no_process(id, exec_id))?;
        exec.life = exec.life.after(ProcessEvent::Added)?;
        exec.io = Some(io);
        exec.adding_ns = monotonic_ns().saturating_sub(begun_ns);
        let mut event = TaskExecAdded::new();
        event.container_id = id.to_owned();
        event.exec_id = exec_id.to_owned();
        self.publisher.publish(&TaskEvent::ExecAdded(event));
        drop(state);
        tracing::info!(container = id, exec = exec_id, "added");
        Ok(())
    }

    /// Frees an exec that has ended, or was never started.
    pub(super) async fn delete_exec(
        &self,
        id: &str,
        exec_id: &str,
    ) -> Result<DeleteResponse, Error> {
        let begun_ns = monotonic_ns();
        let (life, mut exit) = {
            let state = self.lock();
            let container = state.containers.get(id).ok_or_else(|| no_container(id))?;
            let exec = container
                .execs
                .get(exec_id)
                .ok_or_else(|| no_process(id, exec_id))?;
            (exec.life, exec.exit.subscribe())
        };
        let exit = match life {
            lifecycle::Process::Created => Some(Exit::killed()),
            // Its output is on its way, and its reader's time is limited.
            lifecycle::Process::Draining | lifecycle::Process::Stopped => exit
                .wait_for(Option::is_some)
                .await
                .ok()
                .and_then(|exit| *exit),
            lifecycle::Process::Adding
            | lifecycle::Process::Starting
            | lifecycle::Process::Running => {
                return Err(Error::Precondition(format!(
                    "The exec {exec_id:?} of container {id:?} is {life}: kill it before it is deleted"
                )));
            }
        };
        if let Some(sandbox) = self.sandbox_now() {
            free(&sandbox, id, exec_id).await;
        }
        let removed = {
            let mut state = self.lock();
            let container = state
                .containers
                .get_mut(id)
                .ok_or_else(|| no_container(id))?;
            match container.execs.get(exec_id) {
                // Started while the guest was asked.
                Some(exec) if exec.life != life && exec.exit.borrow().is_none() => {
                    return Err(Error::Precondition(format!(
                        "The exec {exec_id:?} of container {id:?} is {}",
                        exec.life
                    )));
                }
                _ => container.execs.remove(exec_id),
            }
        };
        match (removed, exit) {
            (Some(_), Some(exit)) => {
                let took_ns = monotonic_ns().saturating_sub(begun_ns);
                self.note(id, |timings| timings.delete.add(took_ns));
                Ok(self.answer(exit))
            }
            _ => Err(no_process(id, exec_id)),
        }
    }
}

/// The container, if processes can be added to it: its init is there, whether its program runs yet or not, and it is
/// not frozen.
pub(super) fn taking_execs<'a>(
    state: &'a mut State,
    id: &str,
    doing: &str,
) -> Result<&'a mut Container, Error> {
    use lifecycle::Process::{Created, Running, Starting};
    in_life(state, id, doing, &[Created, Starting, Running])
}

/// The container, if its program runs and is not frozen.
pub(super) fn running<'a>(
    state: &'a mut State,
    id: &str,
    doing: &str,
) -> Result<&'a mut Container, Error> {
    in_life(state, id, doing, &[lifecycle::Process::Running])
}

fn in_life<'a>(
    state: &'a mut State,
    id: &str,
    doing: &str,
    init: &[lifecycle::Process],
) -> Result<&'a mut Container, Error> {
    let container = state
        .containers
        .get_mut(id)
        .ok_or_else(|| no_container(id))?;
    let refused = |life: &str| {
        Err(Error::Precondition(format!(
            "Cannot {doing}: container {id:?} is {life}"
        )))
    };
    if container.life != lifecycle::Container::Running {
        return refused(container.life.name());
    }
    if !init.contains(&container.init.life) {
        return refused(container.init.life.name());
    }
    Ok(container)
}

/// Frees what the guest has of an exec. A guest that does not is told of in the log only: its other processes go on.
async fn free(sandbox: &Sandbox, id: &str, exec_id: &str) {
    if sandbox.exit_reason().is_some() {
        return;
    }
    match tokio::time::timeout(AGENT_PATIENCE, sandbox.delete_exec(id, exec_id)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) if error.code() == Some(Code::NOT_FOUND) => {}
        Ok(Err(error)) => {
            tracing::warn!(container = id, exec = exec_id, %error, "the guest did not delete an exec");
        }
        Err(_) => {
            tracing::warn!(
                container = id,
                exec = exec_id,
                "the guest does not answer about an exec to delete"
            );
        }
    }
}

fn check(request: &ExecProcessRequest) -> Result<(), Error> {
    let id = &request.exec_id;
    if id.is_empty() || id == "." || id == ".." || id.len() > LONGEST_ID || id.contains(['/', '\0'])
    {
        return Err(Error::Invalid(format!(
            "Exec id {:?} is empty, longer than {LONGEST_ID} bytes, or contains a path separator",
            id.chars().take(LONGEST_ID).collect::<String>()
        )));
    }
    if *id == request.id {
        return Err(Error::AlreadyExists(format!(
            "Exec id {id:?} is the container's own"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_ids_that_could_leave_a_directory_are_invalid() {
        let mut request = ExecProcessRequest::new();
        request.id = "c1".into();
        for id in ["", ".", "..", "a/b", "a\0", &"x".repeat(257)] {
            request.exec_id = id.to_owned();
            assert!(matches!(check(&request), Err(Error::Invalid(_))), "{id:?}");
        }
        request.exec_id = "e1".into();
        assert!(check(&request).is_ok());
        request.exec_id = "c1".into();
        assert!(matches!(check(&request), Err(Error::AlreadyExists(_))));
    }
}
