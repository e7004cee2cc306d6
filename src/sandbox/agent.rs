//! The connection for calls: the ttrpc client of the agent's service. Every
//! call has a deadline, ends when the VM ends, and runs in a task of its own,
//! because ttrpc closes the whole connection when a request is dropped while
//! it is being written.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use nacre_protocol::agent_ttrpc::AgentClient;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use super::console::Tail;
use super::error::Error;
use super::gate::Gate;
use super::host::bounded;
use super::machine::{GuestStream, Machine};

/// Longest error message that is taken from the agent, in characters.
const MESSAGE_CHARACTERS: usize = 4096;
/// How long a broken connection waits for the VM's end, which is the better reason.
const END_FOLLOWS: Duration = Duration::from_secs(1);

/// The agent, as its host calls it.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient,
    machine: Arc<dyn Machine>,
    tail: Tail,
}

impl Agent {
    /// Takes the accepted connection. Needs a tokio runtime.
    pub(crate) fn new(stream: GuestStream, machine: Arc<dyn Machine>, tail: Tail) -> Self {
        let client = AgentClient::new(Client::new(Socket::new(Gate::calling(stream))));
        Self {
            client,
            machine,
            tail,
        }
    }

    /// Makes one call. `name` says what it is and for whom, for errors.
    pub(crate) async fn call<T, F, C>(
        &self,
        name: String,
        deadline: Duration,
        request: C,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = ttrpc::Result<T>> + Send,
        C: FnOnce(AgentClient, Context) -> F + Send + 'static,
    {
        let client = self.client.clone();
        let context = ttrpc::context::with_duration(deadline);
        let answer = tokio::spawn(async move { request(client, context).await });
        let answer = tokio::select! {
            biased;
            answer = answer => answer,
            reason = self.machine.ended() => {
                return Err(Error::Gone { reason, console: self.tail.text() });
            }
            () = tokio::time::sleep(deadline) => {
                return Err(Error::Timeout { call: name, after: deadline });
            }
        };
        match answer {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(ttrpc::Error::RpcStatus(status))) => Err(Error::Refused {
                call: name,
                code: status.code.enum_value_or(ttrpc::Code::UNKNOWN),
                message: bounded(&status.message, MESSAGE_CHARACTERS),
            }),
            Ok(Err(error)) if error.to_string().contains("deadline elapsed") => {
                Err(Error::Timeout {
                    call: name,
                    after: deadline,
                })
            }
            Ok(Err(error)) => Err(self.broken(name, error.to_string()).await),
            Err(error) => Err(self.broken(name, error.to_string()).await),
        }
    }

    async fn broken(&self, call: String, cause: String) -> Error {
        match tokio::time::timeout(END_FOLLOWS, self.machine.ended()).await {
            Ok(reason) => Error::Gone {
                reason,
                console: self.tail.text(),
            },
            Err(_) => Error::Disconnected {
                call,
                cause: bounded(&cause, MESSAGE_CHARACTERS),
            },
        }
    }
}
