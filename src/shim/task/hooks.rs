//! When the host's hooks of a container run.

use std::path::Path;
use std::sync::Arc;

use super::{Error, Shim};
use crate::hooks::{self, HostHooks, Stage};
use crate::record::Resource;
use crate::sandbox::chain;

impl Shim {
    /// Takes note of a container's hooks: from here on its poststop hooks are owed.
    pub(super) async fn note_hooks(
        &self,
        id: &str,
        hooks: HostHooks,
        file: &Path,
    ) -> Result<Arc<HostHooks>, Error> {
        let resource = Resource::Poststop(file.to_owned());
        let hooks = Arc::new(hooks);
        let noting = {
            let (record, hooks, resource) = (self.record.clone(), hooks.clone(), resource.clone());
            let file = file.to_owned();
            // Both are synced to the disk, which may take long.
            tokio::task::spawn_blocking(move || {
                record.add(resource).map_err(|error| chain(&error))?;
                let kept = hooks.keep(&file);
                kept.map_err(|error| format!("Cannot write {}: {error}", file.display()))
            })
        };
        match noting.await {
            Ok(noted) => noted.map_err(Error::Failed)?,
            Err(error) => {
                return Err(Error::Failed(format!("Recording hooks broke off: {error}")));
            }
        }
        if let Some(container) = self.lock().containers.get_mut(id) {
            container.hooks = Some((hooks.clone(), resource));
        }
        Ok(hooks)
    }

    /// Runs the hooks of Create.
    pub(super) async fn run_create_hooks(
        &self,
        hooks: Option<Arc<HostHooks>>,
    ) -> Result<(), Error> {
        let Some(hooks) = hooks else { return Ok(()) };
        let pid = self.identity.pid;
        blocking(move || {
            hooks.run(Stage::Prestart, pid)?;
            hooks.run(Stage::CreateRuntime, pid)
        })
        .await
    }

    /// Runs the hooks of Start.
    pub(super) async fn run_poststart_hooks(&self, id: &str) -> Result<(), Error> {
        let hooks = {
            let state = self.lock();
            let container = state.containers.get(id);
            container.and_then(|container| container.hooks.as_ref().map(|(hooks, _)| hooks.clone()))
        };
        let Some(hooks) = hooks.filter(|hooks| hooks.has(Stage::Poststart)) else {
            return Ok(());
        };
        let pid = self.identity.pid;
        blocking(move || hooks.run(Stage::Poststart, pid)).await
    }

    /// Runs the hooks that a container which is gone is owed. What fails is logged.
    pub(super) async fn run_poststop_hooks(&self, id: &str) {
        let owed = {
            let mut state = self.lock();
            let container = state.containers.get_mut(id);
            container.and_then(|container| container.hooks.take())
        };
        let Some((hooks, resource)) = owed else {
            return;
        };
        let record = self.record.clone();
        let settled = tokio::task::spawn_blocking(move || {
            // Not by way of the record, which others need meanwhile.
            hooks.run_poststop();
            if let Resource::Poststop(file) = &resource {
                // What stays is tried again by the record.
                let _ = std::fs::remove_file(file);
            }
            record.free(&resource)
        });
        if let Ok(Err(error)) = settled.await {
            tracing::warn!(
                container = id,
                error = chain(&error),
                "hooks stay in the record"
            );
        }
    }
}

async fn blocking(
    work: impl FnOnce() -> Result<(), hooks::Error> + Send + 'static,
) -> Result<(), Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(ran) => ran.map_err(|error| Error::Failed(error.to_string())),
        Err(error) => Err(Error::Failed(format!("Running hooks broke off: {error}"))),
    }
}
