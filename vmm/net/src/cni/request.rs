//! What a plugin is told on stdin: its part of the network's configuration and
//! what belongs to the attachment. The specification's section 3.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::conflist::{Conflist, plugin_wants};

/// A port of the host that leads to one of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// 1 to 65535
    pub host_port: u16,
    /// 1 to 65535
    pub container_port: u16,
    /// Of the transport.
    pub protocol: Protocol,
    /// The host's address that the port is of; none for all.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

/// Makes the text: the plugin's configuration as it is, with the network's name and version, the result of who was
/// before it, and those of the capability arguments that it asks for. Keys that only runtimes set are dropped from it.
pub(super) fn request(
    network: &Conflist,
    plugin: &Map<String, Value>,
    port_mappings: &[PortMapping],
    previous: Option<&Value>,
) -> Vec<u8> {
    let mut request = plugin.clone();
    request.retain(|key, _| {
        !key.starts_with("cni.dev/") && key != "capabilities" && key != "prevResult"
    });
    request.insert("name".to_owned(), json!(network.name()));
    request.insert("cniVersion".to_owned(), json!(network.version().as_str()));
    if let Some(previous) = previous {
        request.insert("prevResult".to_owned(), previous.clone());
    }
    if !port_mappings.is_empty() && plugin_wants(plugin, "portMappings") {
        let config = json!({ "portMappings": port_mappings });
        request.insert("runtimeConfig".to_owned(), config);
    }
    Value::Object(request).to_string().into_bytes()
}
