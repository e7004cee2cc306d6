//! A shim's program driven as containerd drives it, but without containerd:
//! the answer to `start`, the connection to its socket, and calls over it. It
//! knows nothing of whose shim it is.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::Client;
use containerd_shim_protos::bootstrap_api::BootstrapResult;
use containerd_shim_protos::ttrpc::{Code, Request};
use protobuf::Message;

/// What `start` answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Absolute path of the socket.
    pub socket: String,
    /// Version of the task service, 2 or 3.
    pub version: u32,
}

impl Answer {
    /// Reads an answer in any of its three forms: JSON, a protobuf `BootstrapResult`, or the bare address.
    ///
    /// # Errors
    /// It is none of them, or the address is no `unix://` URL of an absolute path.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let text = || String::from_utf8_lossy(bytes).into_owned();
        let (url, version) = if bytes.first() == Some(&b'{') {
            let value: serde_json::Value = serde_json::from_slice(bytes)
                .with_context(|| format!("start answered with {:?}", text()))?;
            ensure!(
                value["protocol"] == "ttrpc",
                "start answered with protocol {} instead of ttrpc",
                value["protocol"]
            );
            let address = value["address"].as_str();
            let address = address.context("start's answer has no address")?.to_owned();
            (address, value["version"].as_u64().unwrap_or_default())
        } else if bytes.starts_with(b"unix://") {
            (text().trim_end().to_owned(), 2)
        } else {
            let result = BootstrapResult::parse_from_bytes(bytes)
                .with_context(|| format!("start answered with {:?}", text()))?;
            ensure!(result.protocol == "ttrpc", "protocol {:?}", result.protocol);
            (
                result.address,
                u64::try_from(result.version).unwrap_or_default(),
            )
        };
        let version = match version {
            2 => 2,
            3 => 3,
            other => bail!("start answered with version {other}: 2 and 3 are known"),
        };
        match url.strip_prefix("unix://") {
            Some(path) if path.starts_with('/') => Ok(Self {
                socket: path.to_owned(),
                version,
            }),
            _ => bail!("the address {url:?} is no unix:// URL of an absolute path"),
        }
    }
}

/// A connection to a shim. Calls block, and more than one may be under way, from several threads.
#[derive(Clone)]
pub struct Connection {
    client: Client,
    service: String,
    patience: Duration,
}

impl Connection {
    /// Dials once, as containerd does, for calls of the task service in the answer's version. A call that takes longer than
    /// `patience` fails.
    ///
    /// # Errors
    /// Nobody accepts there.
    pub fn dial(answer: &Answer, patience: Duration) -> Result<Self> {
        let client = Client::connect(&format!("unix://{}", answer.socket))
            .with_context(|| format!("dialling {}", answer.socket))?;
        Ok(Self {
            client,
            service: format!("containerd.task.v{}.Task", answer.version),
            patience,
        })
    }

    /// A call of the task service.
    ///
    /// # Errors
    /// The shim refuses, does not answer in time, or answers with something else.
    pub fn task<R: Message>(&self, method: &str, request: &impl Message) -> Result<R> {
        let payload = self.call(&self.service, method, request.write_to_bytes()?)?;
        R::parse_from_bytes(&payload).with_context(|| format!("reading the answer to {method}"))
    }

    /// A call of any service, by name, with messages in their wire form.
    ///
    /// # Errors
    /// As for [`Connection::task`].
    pub fn call(&self, service: &str, method: &str, payload: Vec<u8>) -> Result<Vec<u8>> {
        let mut request = Request::new();
        request.service = service.to_owned();
        request.method = method.to_owned();
        request.payload = payload;
        request.timeout_nano = i64::try_from(self.patience.as_nanos()).unwrap_or(i64::MAX);
        let response = self
            .client
            .request(request)
            .with_context(|| format!("calling {service}/{method}"))?;
        let code = response.status.code.enum_value_or_default();
        ensure!(
            code == Code::OK,
            "{service}/{method}: {}",
            response.status.message
        );
        Ok(response.payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_forms_of_an_answer_are_read() {
        let mut result = BootstrapResult::new();
        result.version = 3;
        result.protocol = "ttrpc".to_owned();
        result.address = "unix:///run/s".to_owned();
        for (bytes, version) in [
            (b"unix:///run/s\n".to_vec(), 2),
            (
                br#"{"version":2,"address":"unix:///run/s","protocol":"ttrpc"}"#.to_vec(),
                2,
            ),
            (
                br#"{"version":3,"address":"unix:///run/s","protocol":"ttrpc"}"#.to_vec(),
                3,
            ),
            (result.write_to_bytes().unwrap(), 3),
        ] {
            let answer = Answer::parse(&bytes).unwrap();
            assert_eq!(
                (answer.socket.as_str(), answer.version),
                ("/run/s", version)
            );
        }
        for bytes in [
            &b"unix://relative"[..],
            br#"{"version":4,"address":"unix:///run/s","protocol":"ttrpc"}"#,
            br#"{"version":3,"address":"unix:///run/s","protocol":"grpc"}"#,
            b"",
        ] {
            assert!(Answer::parse(bytes).is_err(), "{bytes:?}");
        }
    }
}
