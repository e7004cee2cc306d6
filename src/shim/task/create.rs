//! Create: what containerd mounted is shared with the guest while that boots, or
//! becomes disks of the VM; then the agent makes the container. What fails is named, and
//! what was made until then is freed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use oci_spec::runtime::Spec;
use protobuf::{Message, MessageField};

use super::storage::{Storage, Wanted};
use super::{Container, Error, Process, Shim};
use crate::control::Timings;
use crate::hooks::HostHooks;
use crate::sandbox::annotations::Overrides;
use crate::sandbox::cgroup::{Cpu, VmCgroup};
use crate::sandbox::size::Limits;
use crate::sandbox::{Sandbox, chain, monotonic_ns, spec};
use crate::shim::bootstrap;
use crate::shim::events::TaskEvent;
use crate::shim::lifecycle::{self, ContainerEvent, SandboxEvent};
use crate::shim::stdio::{Paths, Prepared, ProcessIo};

/// How long a shim that has nothing left after a failed Create waits to be told to end.
const LINGER: Duration = Duration::from_secs(30);

/// Fields of containerd's `runc.v1.Options` by number. None has a meaning for a VM.
const RUNC_OPTIONS: [(u32, &str); 12] = [
    (1, "no_pivot_root"),
    (2, "no_new_keyring"),
    (3, "shim_cgroup"),
    (4, "io_uid"),
    (5, "io_gid"),
    (6, "binary_name"),
    (7, "root"),
    (9, "systemd_cgroup"),
    (10, "criu_image_path"),
    (11, "criu_work_path"),
    (12, "task_api_address"),
    (13, "task_api_version"),
];

/// What a container holds once it is made.
struct Made {
    storage: Storage,
    io: ProcessIo,
    guest_pid: u32,
}

impl Shim {
    /// Makes a container, and answers with its host pid.
    pub(super) async fn create(self: Arc<Self>, request: CreateTaskRequest) -> Result<u32, Error> {
        let begun_ns = monotonic_ns();
        let id = request.id.clone();
        check(&request)?;
        for option in odd_options(&request) {
            tracing::warn!(
                container = id,
                option,
                "a runtime option has no meaning here"
            );
        }
        let paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        if let Err(error) = self.reserve(&id, &request.bundle, paths.clone()) {
            return Err(self.why_not(&id, error).await);
        }
        match self.make(&request, &paths).await {
            Ok(made) => {
                self.created(request, made);
                self.note_create(&id, begun_ns);
                Ok(self.identity.pid)
            }
            Err(error) => {
                // Once a hook may have run, those that undo what it did are owed.
                self.run_poststop_hooks(&id).await;
                self.failed(&id).await;
                Err(match error {
                    Error::Invalid(text) => Error::Invalid(text),
                    other => Error::Failed(format!("Cannot create container {id:?}: {other}")),
                })
            }
        }
    }

    /// Takes the id.
    fn reserve(&self, id: &str, bundle: &str, paths: Paths) -> Result<(), Error> {
        let mut state = self.lock();
        if !state.life.takes_containers() {
            return Err(Error::Precondition(format!(
                "Cannot create container {id:?}: the sandbox is {}",
                state.life
            )));
        }
        if state.containers.contains_key(id) {
            return Err(Error::AlreadyExists(format!("Container {id:?} exists")));
        }
        let life = lifecycle::Container::Idle.after(ContainerEvent::Create)?;
        let container = Container {
            life,
            bundle: bundle.to_owned(),
            init: Process::new(paths),
            execs: HashMap::new(),
            storage: None,
            guest_pid: 0,
            timings: Timings::of(id),
            hooks: None,
            share: None,
            has_network: false,
            limits: None,
        };
        state.containers.insert(id.to_owned(), container);
        Ok(())
    }

    /// A refusal, or the better reason that a sandbox which has ended knows.
    async fn why_not(&self, id: &str, refusal: Error) -> Error {
        if self.lock().life != lifecycle::Sandbox::Stopping {
            return refusal;
        }
        let cause = match self.sandbox().await {
            Ok(sandbox) => sandbox.ready().await.err().map(|error| error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        cause.map_or(refusal, |cause| {
            Error::Failed(format!("Cannot create container {id:?}: {cause}"))
        })
    }

    /// Makes all of a container.
    async fn make(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
        paths: &Paths,
    ) -> Result<Made, Error> {
        let id = request.id.as_str();
        let bundle = PathBuf::from(&request.bundle);
        let mut spec = bootstrap::load_spec(&bundle).map_err(Error::Failed)?;
        let overrides = Overrides::of(&spec, &self.config.allowed_annotations)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        // Their start was answered by the shim that runs; here alone is known which VM that has.
        overrides
            .fits(&self.identity.overrides)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        self.check_network(id, &spec)?;
        if let Some(network) = &self.network {
            network.mount_names(&mut spec);
        }
        let sandbox = self.sandbox().await?;
        let prefix = sandbox.share_prefix();
        let guest =
            spec::for_guest(&spec, id, &prefix).map_err(|error| Error::Invalid(chain(&error)))?;
        for warning in &guest.warnings {
            tracing::warn!(container = id, "{warning}");
        }
        let hooks =
            HostHooks::of(&spec, id, &bundle).map_err(|error| Error::Invalid(error.to_string()))?;
        let prepared = Prepared::new(&sandbox, paths)
            .map_err(|error| Error::Invalid(error.to_string()))?
            .start_logger(&self.identity.namespace, id)
            .await
            .map_err(|error| Error::Failed(error.to_string()))?;

        let root = spec
            .root()
            .as_ref()
            .map_or_else(|| PathBuf::from("rootfs"), |root| root.path().clone());
        self.join_cgroup(id, &spec)?;
        let alone = self.note_limits(id, &spec);
        let shares_binds = !guest.binds.is_empty();
        let storing = {
            let (shim, sandbox) = (self.clone(), sandbox.clone());
            let wanted = Wanted {
                bundle,
                root,
                mounts: request.rootfs.clone(),
                binds: guest.binds,
                prefix,
            };
            tokio::task::spawn_blocking(move || shim.prepare_storage(&sandbox, &wanted))
        };
        let file = self
            .record
            .directory()
            .join(format!("hooks-{}.json", file_name(id)));
        let hooks = async {
            let noted = match hooks {
                Some(hooks) => Some(self.note_hooks(id, hooks, &file).await?),
                None => None,
            };
            self.run_create_hooks(noted).await
        };
        // The guest boots while the host's part is mounted and hooks run. All are waited for, so that nothing appears after a
        // failure.
        let (ready, stored, hooked) = tokio::join!(sandbox.ready(), storing, hooks);
        let stored = stored
            .map_err(|error| Error::Failed(format!("Mounting the root broke off: {error}")))
            .flatten();
        let went_well = async {
            let ready = ready.map_err(|error| Error::Failed(error.to_string()))?;
            hooked?;
            tracing::debug!(
                container = id,
                kernel = ready.kernel_release,
                "the guest is ready"
            );
            // The VM was started in the size that its first container needs.
            if !alone && stored.is_ok() {
                let fit = self.fit(&sandbox, self.sum(None)).await;
                fit.map_err(|cause| {
                    Error::Failed(format!(
                        "The VM does not grow for another container: {cause}"
                    ))
                })?;
            }
            Ok(())
        };
        let went_well: Result<(), Error> = went_well.await;
        let stored = match (went_well, stored) {
            (Ok(()), stored) => stored?,
            (Err(error), Ok(stored)) => {
                stored.withdraw().await;
                return Err(error);
            }
            (Err(error), Err(_)) => return Err(error),
        };
        let mut storage = Storage::default();
        let mounts = match stored.plug(&sandbox, &mut storage).await {
            Ok(mounts) => mounts,
            Err(error) => {
                undo(&sandbox, id, storage).await;
                return Err(error);
            }
        };
        let ports = prepared.ports(spec.process().as_ref().and_then(spec::console_size));
        let io = prepared.run(self.limits);
        let created = sandbox
            .create_container(id, guest.json, mounts, shares_binds, ports)
            .await;
        let guest_pid = match created {
            Ok(guest_pid) => guest_pid,
            Err(error) => {
                drop(io);
                undo(&sandbox, id, storage).await;
                return Err(Error::Failed(error.to_string()));
            }
        };
        Ok(Made {
            storage,
            io,
            guest_pid,
        })
    }

    /// The container's part in the limits of the VM's cgroup, if the VM has one: as long as the container is there.
    fn join_cgroup(&self, id: &str, spec: &Spec) -> Result<(), Error> {
        let join = |cgroup: &Arc<VmCgroup>| cgroup.join(id, Cpu::of(spec)).map(Arc::new);
        let share = self.cgroup.as_ref().map(join).transpose();
        let share = share.map_err(|error| Error::Failed(chain(&error)))?;
        if let Some(container) = self.lock().containers.get_mut(id) {
            container.share = share;
        }
        Ok(())
    }

    /// Takes down a container's limits; whether it is the only one.
    fn note_limits(&self, id: &str, spec: &Spec) -> bool {
        let mut state = self.lock();
        if let Some(container) = state.containers.get_mut(id) {
            container.limits = Some(Limits::of(spec));
        }
        state.containers.len() == 1
    }

    /// All of it is there: makes it known, then what happened to it meanwhile.
    fn created(self: &Arc<Self>, request: CreateTaskRequest, made: Made) {
        let mut io = TaskIO::new();
        io.stdin = request.stdin;
        io.stdout = request.stdout;
        io.stderr = request.stderr;
        io.terminal = request.terminal;
        let mut event = TaskCreate::new();
        event.container_id.clone_from(&request.id);
        event.bundle = request.bundle;
        event.rootfs = request.rootfs;
        event.io = MessageField::some(io);
        event.pid = self.identity.pid;

        let held = {
            let mut state = self.lock();
            let Some(container) = state.containers.get_mut(&request.id) else {
                return;
            };
            // Refused only by a state that Creating does not lead to.
            container.life = container
                .life
                .after(ContainerEvent::Created)
                .unwrap_or(container.life);
            container.storage = Some(made.storage);
            container.init.io = Some(made.io);
            container.guest_pid = made.guest_pid;
            self.publisher.publish(&TaskEvent::Create(event));
            let held = container.init.held.take();
            held.filter(|exit| container.is_of_its_init(exit))
        };
        tracing::info!(container = request.id, "created");
        if let Some(exit) = held {
            self.process_ended(&request.id, "", exit);
        }
    }

    /// Gives the id free again, and ends the VM if it was the only container.
    async fn failed(self: &Arc<Self>, id: &str) {
        let last = {
            let mut state = self.lock();
            if let Some(mut container) = state.containers.remove(id) {
                container.life = container
                    .life
                    .after(ContainerEvent::Fail)
                    .unwrap_or(container.life);
                tracing::debug!(container = id, life = %container.life, "Create failed");
            }
            let last = state.containers.is_empty();
            if last {
                // Allowed in every state.
                state.life = state.life.after(SandboxEvent::End).unwrap_or(state.life);
            }
            last
        };
        if !last {
            self.fit_later();
            return;
        }
        if let Some(sandbox) = self.sandbox_now() {
            sandbox.shutdown().await;
        }
        let shim = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LINGER).await;
            tracing::warn!("nobody ended the shim after a failed Create");
            shim.shut_down();
        });
    }
}

/// Takes back what the guest has of a container that could not be made.
async fn undo(sandbox: &Sandbox, id: &str, mut storage: Storage) {
    if sandbox.exit_reason().is_none() {
        let in_guest = async {
            if let Err(error) = sandbox.delete_container(id).await {
                tracing::debug!(container = id, %error, "the guest has nothing to delete");
            }
            storage.detach(sandbox, id).await;
        };
        if tokio::time::timeout(super::AGENT_PATIENCE, in_guest)
            .await
            .is_err()
        {
            tracing::warn!(container = id, "the guest does not give its disks back");
        }
    }
    storage.withdraw().await;
}

/// A container id as part of a file name.
fn file_name(id: &str) -> String {
    let plain: String = id
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect();
    plain.chars().take(128).collect()
}

fn check(request: &CreateTaskRequest) -> Result<(), Error> {
    let id = &request.id;
    if id.is_empty() || id == "." || id == ".." || id.contains(['/', '\0']) {
        return Err(Error::Invalid(format!(
            "Container id {id:?} is empty or contains a path separator"
        )));
    }
    if !Path::new(&request.bundle).is_absolute() {
        return Err(Error::Invalid(format!(
            "Bundle {:?} is not an absolute path",
            request.bundle
        )));
    }
    if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
        return Err(Error::Unimplemented("Create from a checkpoint"));
    }
    Ok(())
}

/// The names of runc options that are set and mean nothing here.
fn odd_options(request: &CreateTaskRequest) -> Vec<&'static str> {
    let Some(options) = request.options.as_ref() else {
        return Vec::new();
    };
    if !options.type_url.ends_with("containerd.runc.v1.Options") {
        return Vec::new();
    }
    // An empty message keeps every field as an unknown one.
    let Ok(fields) = protobuf::well_known_types::empty::Empty::parse_from_bytes(&options.value)
    else {
        return vec!["(unreadable options)"];
    };
    RUNC_OPTIONS
        .iter()
        .filter(|(number, _)| {
            fields
                .special_fields
                .unknown_fields()
                .get(*number)
                .is_some()
        })
        .map(|(_, name)| *name)
        .collect()
}

#[cfg(test)]
mod tests {
    use protobuf::well_known_types::any::Any;

    use super::*;

    fn request(id: &str) -> CreateTaskRequest {
        let mut request = CreateTaskRequest::new();
        request.id = id.into();
        request.bundle = "/bundle".into();
        request
    }

    #[test]
    fn ids_that_could_leave_a_directory_are_invalid() {
        assert!(check(&request("c1")).is_ok());
        for id in ["", ".", "..", "a/b", "../x", "a\0"] {
            assert!(
                matches!(check(&request(id)), Err(Error::Invalid(_))),
                "{id:?}"
            );
        }
        let mut restore = request("c1");
        restore.checkpoint = "/cp".into();
        assert!(matches!(check(&restore), Err(Error::Unimplemented(_))));
        let mut relative = request("c1");
        relative.bundle = "bundle".into();
        assert!(matches!(check(&relative), Err(Error::Invalid(_))));
    }

    #[test]
    fn runc_options_are_named_and_never_fail() {
        let mut request = request("c1");
        assert!(odd_options(&request).is_empty());
        let mut options = Any::new();
        options.type_url = "containerd.runc.v1.Options".into();
        // systemd_cgroup = true, root = "/r"
        options.value = b"\x48\x01\x3a\x02/r".to_vec();
        request.options = MessageField::some(options.clone());
        assert_eq!(odd_options(&request), ["root", "systemd_cgroup"]);
        options.value = b"\xff".to_vec();
        request.options = MessageField::some(options.clone());
        assert_eq!(odd_options(&request), ["(unreadable options)"]);
        options.type_url = "something.else".into();
        request.options = MessageField::some(options);
        assert!(odd_options(&request).is_empty());
    }

    #[test]
    fn file_names_are_plain() {
        assert_eq!(file_name("a b:ü"), "a_b__");
        assert_eq!(file_name(&"x".repeat(500)).len(), 128);
    }
}
