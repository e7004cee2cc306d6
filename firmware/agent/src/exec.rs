//! Processes that are added to a container that runs. Adding one only takes
//! what is needed and connects its streams; it is made when it is started, and
//! freed by its own delete or with its container.

use std::collections::hash_map;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nacre_protocol::agent::{ExecRequest, Stdio};
use tracing::warn;

use crate::bundle::{check_id, write_json};
use crate::confinement;
use crate::container::{Container, Containers, KILL_LIMIT, Pending, Slot, name, no_process};
use crate::error::{Doing, Error};
use crate::helper;
use crate::process::{Process, State};
use crate::runtime;
use crate::spec;
use crate::stdio::{Connections, Terminal};
use crate::users;

/// What the start of an exec needs.
pub(crate) struct Added {
    process: oci_spec::runtime::Process,
    owner: (u32, u32),
    connections: Connections,
    stdio: Stdio,
}

impl Containers {
    /// Adds a process to a container whose init lives, and connects its streams. It is not made yet.
    ///
    /// # Errors
    /// `InvalidArgument`; `NotFound` for the container; `AlreadyExists`; `FailedPrecondition` if the init has
    /// ended or the container is paused; `Internal` for a stream that the host does not take.
    pub async fn exec(&self, request: ExecRequest) -> Result<(), Error> {
        let (id, exec_id) = (request.container_id.as_str(), request.exec_id.as_str());
        check_id(exec_id)?;
        let container = self.find(id)?;
        let named = name(id, exec_id);
        container.may_run_execs(&format!("adding exec {exec_id}"))?;
        let stdio = request.stdio.clone().unwrap_or_default();
        let (process, owner) = spec::adapt_exec(
            &request.process_json,
            stdio.terminal,
            spec::kernel_has_apparmor(),
        )?;
        let place = Arc::new(Process::added());
        match container
            .processes
            .lock()
            .expect("processes")
            .entry(exec_id.to_owned())
        {
            hash_map::Entry::Vacant(free) => {
                free.insert(Slot {
                    process: place.clone(),
                    pending: None,
                });
            }
            hash_map::Entry::Occupied(_) => {
                return Err(Error::AlreadyExists(format!("{named} exists")));
            }
        }
        let dialled = Connections::dial(&stdio).await;
        let mut processes = container.processes.lock().expect("processes");
        // A delete may have come between.
        let Some(slot) = processes
            .get_mut(exec_id)
            .filter(|slot| Arc::ptr_eq(&slot.process, &place))
        else {
            return Err(Error::NotFound(format!("{named} was deleted")));
        };
        match dialled {
            Ok(connections) => {
                slot.pending = Some(Pending::Exec(Box::new(Added {
                    process,
                    owner,
                    connections,
                    stdio,
                })));
                Ok(())
            }
            Err(error) => {
                processes.remove(exec_id);
                Err(error)
            }
        }
    }

    /// Frees an exec that has ended or was never started.
    ///
    /// # Errors
    /// `InvalidArgument` without an exec's id; `NotFound`; `FailedPrecondition` while it runs or starts.
    pub fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        check_id(exec_id)?;
        let container = self.find(id)?;
        let mut processes = container.processes.lock().expect("processes");
        let slot = processes
            .get(exec_id)
            .ok_or_else(|| no_process(id, exec_id))?;
        match slot.process.state() {
            State::Added | State::Exited(_) => {
                processes.remove(exec_id);
                Ok(())
            }
            state => Err(Error::FailedPrecondition(format!(
                "deleting {}: it is {state}",
                name(id, exec_id)
            ))),
        }
    }

    /// Makes the process of an exec and lets it run its program. When this fails with the process made, it
    /// is about to end.
    pub(crate) async fn run_exec(
        &self,
        container: &Arc<Container>,
        exec_id: &str,
        added: Added,
    ) -> Result<(), Error> {
        let id = container.id.as_str();
        let process = container.process(exec_id)?;
        let Added {
            process: mut specified,
            owner,
            connections,
            stdio,
        } = added;
        if specified.capabilities().is_none() {
            specified.set_capabilities(container.capabilities.clone());
        }
        let directory = Directory::create(container.ground.bundle.path(), exec_id)?;
        let mut owner = owner;
        if let Some(users) = &container.users {
            owner = users.outside(owner);
            let init = container.process("")?.pid();
            let init = init.ok_or_else(|| no_process(id, ""))?;
            let identity = users::lend(&mut specified, init);
            write_json(&directory.0.join(helper::IDENTITY), &identity)?;
        } else if container.has_filter
            && let Some(own) = confinement::lend(&mut specified)
        {
            write_json(&directory.0.join(helper::OWN), &own)?;
        }
        write_json(&directory.0.join(helper::PROCESS), &specified)?;
        let (ends, rest) = connections.ends(stdio.terminal, owner)?;
        let expectation = self.0.reaper.expect();
        let made = runtime::join(
            &expectation,
            container.ground.bundle.path(),
            id,
            &directory.0,
            ends,
            stdio.terminal,
        )
        .await?;
        let ended = expectation.claim(made.pid);
        drop(expectation);
        let terminal = made
            .terminal
            .map(|master| Terminal::new(master, stdio.columns, stdio.rows, owner.0));
        let (terminal, unusable) = match terminal.transpose() {
            Ok(terminal) => (terminal, None),
            Err(error) => (None, Some(error)),
        };
        let pumps = rest.pumps(terminal.as_ref());
        process.is_made(made.pid, terminal);
        self.tell_end(container.clone(), exec_id.to_owned(), process, ended);
        if let Some(error) = unusable {
            return Err(error);
        }
        pumps?.start(&name(id, exec_id));
        made.gate.open().await
    }
}

impl Container {
    /// Refuses what `doing` says when no exec can run.
    pub(crate) fn may_run_execs(&self, doing: &str) -> Result<(), Error> {
        self.must_live(doing)?;
        match self.ground.cgroup.is_frozen() {
            false => Ok(()),
            true => Err(Error::FailedPrecondition(format!(
                "container {}, {doing}: it is paused",
                self.id
            ))),
        }
    }

    /// Keeps the size of the terminal that an added exec will have; false if there is no such exec.
    pub(crate) fn size_added(&self, exec_id: &str, columns: u32, rows: u32) -> bool {
        let mut processes = self.processes.lock().expect("processes");
        match processes.get_mut(exec_id).map(|slot| &mut slot.pending) {
            Some(Some(Pending::Exec(added))) if added.stdio.terminal => {
                added.stdio.columns = columns.min(u16::MAX.into());
                added.stdio.rows = rows.min(u16::MAX.into());
                true
            }
            _ => false,
        }
    }

    /// Ends all that outlives the init, and waits until the ends of the execs are told: the end of the init
    /// is the last of its container.
    pub(crate) async fn end_execs(&self) {
        self.ground.cgroup.signal(libc::SIGKILL);
        let execs: Vec<(String, Arc<Process>)> = {
            let processes = self.processes.lock().expect("processes");
            processes
                .iter()
                .filter(|(exec_id, _)| !exec_id.is_empty())
                .map(|(exec_id, slot)| (exec_id.clone(), slot.process.clone()))
                .collect()
        };
        let deadline = tokio::time::Instant::now() + KILL_LIMIT;
        for (exec_id, process) in execs {
            let mut watch = process.watch();
            let told = watch.wait_for(|state| matches!(state, State::Added | State::Exited(_)));
            if tokio::time::timeout_at(deadline, told).await.is_err() {
                warn!("{} outlives its container's init", name(&self.id, &exec_id));
            }
        }
    }
}

/// A directory for the making of one exec; goes when that is done.
struct Directory(PathBuf);

impl Directory {
    fn create(bundle: &Path, exec_id: &str) -> Result<Directory, Error> {
        let path = bundle.join("execs").join(exec_id);
        fs::create_dir_all(&path).doing(|| format!("making {}", path.display()))?;
        Ok(Directory(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            warn!("removing {}: {error}", self.0.display());
        }
    }
}
