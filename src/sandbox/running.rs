//! What the agent is asked of a container that runs: execs, freezing, limits,
//! readings. Each call waits for the agent, has its deadline, and names its thing in its error.

use nacre_protocol::agent::{
    DeleteExecRequest, ExecRequest, PauseRequest, ResumeRequest, StatsRequest, StatsResponse,
    Stdio, UpdateRequest,
};

use super::Sandbox;
use super::calls::process_name;
use super::error::Error;

impl Sandbox {
    /// Adds a process to a running container; [`Sandbox::start`] runs it. `process_json` is OCI's `Process`.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process_json: Vec<u8>,
        stdio: Stdio,
    ) -> Result<(), Error> {
        let mut request = ExecRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.process_json = process_json;
        request.stdio = Some(stdio).into();
        let agent = self.agent().await?;
        agent
            .call(
                format!("adding {}", process_name(id, exec_id)),
                self.0.timeouts.agent,
                |client, context| async move { client.exec(context, &request).await },
            )
            .await?;
        Ok(())
    }

    /// Frees an exec that has ended or was never started.
    pub async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        let mut request = DeleteExecRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        let agent = self.agent().await?;
        agent
            .call(
                format!("deleting {}", process_name(id, exec_id)),
                self.0.timeouts.agent,
                |client, context| async move { client.delete_exec(context, &request).await },
            )
            .await?;
        Ok(())
    }

    /// Freezes every process of a container; they are frozen when this returns.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let mut request = PauseRequest::new();
        request.container_id = id.to_owned();
        let agent = self.agent().await?;
        agent
            .call(
                format!("pausing container {id}"),
                self.0.timeouts.agent,
                |client, context| async move { client.pause(context, &request).await },
            )
            .await?;
        Ok(())
    }

    /// Thaws every process of a container.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let mut request = ResumeRequest::new();
        request.container_id = id.to_owned();
        let agent = self.agent().await?;
        agent
            .call(
                format!("resuming container {id}"),
                self.0.timeouts.agent,
                |client, context| async move { client.resume(context, &request).await },
            )
            .await?;
        Ok(())
    }

    /// Applies limits to the container's cgroup in the guest. `resources_json` is OCI's `LinuxResources`; what is
    /// absent stays as it is.
    pub async fn update(&self, id: &str, resources_json: Vec<u8>) -> Result<(), Error> {
        let mut request = UpdateRequest::new();
        request.container_id = id.to_owned();
        request.resources_json = resources_json;
        let agent = self.agent().await?;
        agent
            .call(
                format!("updating the limits of container {id}"),
                self.0.timeouts.agent,
                |client, context| async move { client.update(context, &request).await },
            )
            .await?;
        Ok(())
    }

    /// Readings of the container's cgroup in the guest. They are the guest's word.
    pub async fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        let mut request = StatsRequest::new();
        request.container_id = id.to_owned();
        let agent = self.agent().await?;
        agent
            .call(
                format!("reading the cgroup of container {id}"),
                self.0.timeouts.agent,
                |client, context| async move { client.stats(context, &request).await },
            )
            .await
    }
}
