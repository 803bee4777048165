//! Where sidecars find a Workload API that is not the node agent's: in the ephemeral volume of a CSI driver, SPIRE's as a rule.
//!
//! Source: the SPIFFE CSI driver, whose volume is the folder of the socket of the node's SPIRE agent. A socket of the node
//! itself is refused: a pod reaches it by a `hostPath` volume alone, which Pod Security `restricted` forbids, and with it every
//! pod that has a sidecar.

use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

use crate::model::marks;

/// A driver, and the name of the socket in its volumes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct WorkloadApi {
    driver: String,
    socket: String,
}

/// Why a text names none. The user is at fault.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum WorkloadApiError {
    #[error(
        "{0} is a path on the node: a pod reaches it by a hostPath volume alone, which Pod Security restricted forbids; name the driver that brings the socket into pods, as csi.spiffe.io"
    )]
    HostPath(String),
    #[error("{0} is the node agent's own driver, whose Workload API is asked where nothing is set")]
    Own(String),
    #[error("{0:?} is no driver's name; write one as csi.spiffe.io")]
    Driver(String),
    #[error("{0:?} is no name of a socket in the driver's volume; write one as csi.spiffe.io/spire-agent.sock")]
    Socket(String),
}

impl WorkloadApi {
    /// Where the socket is in a container with [`Self::mount`].
    pub(crate) fn path(&self) -> String {
        format!("{FOLDER}/{}", self.socket)
    }

    /// The volume of a pod, a sidecar's or the control plane's.
    pub(crate) fn volume(&self) -> Value {
        // The driver refuses one that can be written to.
        json!({ "name": marks::WORKLOAD_API, "csi": { "driver": self.driver, "readOnly": true } })
    }

    /// The container's part of it.
    pub(crate) fn mount() -> Value {
        json!({ "name": marks::WORKLOAD_API, "mountPath": FOLDER, "readOnly": true })
    }
}

impl FromStr for WorkloadApi {
    type Err = WorkloadApiError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with('/') || text.starts_with("unix:") {
            return Err(WorkloadApiError::HostPath(text.to_owned()));
        }
        let (driver, socket) = text.split_once('/').unwrap_or((text, SOCKET));
        let ends = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
        let is_driver = driver.len() <= DRIVER_MAX && driver.bytes().all(fits);
        if !is_driver || !ends(driver.as_bytes().first()) || !ends(driver.as_bytes().last()) {
            return Err(WorkloadApiError::Driver(driver.to_owned()));
        }
        if driver == marks::DRIVER {
            return Err(WorkloadApiError::Own(driver.to_owned()));
        }
        // One name in the volume's own folder: neither `..`, nor another folder, nor what a command could take for a flag.
        let begins = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let fits = |byte: u8| begins(byte) || byte == b'.' || byte == b'-';
        if socket.len() > SOCKET_MAX || !socket.bytes().next().is_some_and(begins) || !socket.bytes().all(fits) {
            return Err(WorkloadApiError::Socket(socket.to_owned()));
        }
        Ok(Self { driver: driver.to_owned(), socket: socket.to_owned() })
    }
}

impl fmt::Display for WorkloadApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.driver, self.socket)
    }
}

/// Where SPIFFE's documentation mounts the volume.
const FOLDER: &str = "/spiffe-workload-api";
/// What SPIRE's charts call the agent's socket.
const SOCKET: &str = "spire-agent.sock";
/// Of the name of a CSIDriver.
const DRIVER_MAX: usize = 63;
/// An address of unix(7) has 108 bytes, with the folder's.
const SOCKET_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_named_with_its_socket_or_has_spires() {
        for (text, path) in [
            ("csi.spiffe.io", "/spiffe-workload-api/spire-agent.sock"),
            ("csi.spiffe.io/agent.sock", "/spiffe-workload-api/agent.sock"),
        ] {
            assert_eq!(text.parse::<WorkloadApi>().unwrap().path(), path);
        }
        let read: WorkloadApi = "csi.spiffe.io".parse().unwrap();
        assert_eq!(read.to_string().parse(), Ok(read));
    }

    #[test]
    fn a_socket_of_the_node_is_refused_by_name_and_so_is_what_names_nothing() {
        let refused = |text: &str| text.parse::<WorkloadApi>().unwrap_err();
        for text in ["/run/spire/agent-sockets/spire-agent.sock", "unix:///run/spire/agent.sock"] {
            assert_eq!(refused(text), WorkloadApiError::HostPath(text.to_owned()));
        }
        assert!(refused("/run/spire/agent.sock").to_string().contains("hostPath"));
        assert_eq!(refused("csi.outrigger.dev"), WorkloadApiError::Own("csi.outrigger.dev".to_owned()));
        for text in ["", "CSI.spiffe.io", "-csi", "csi.", "csi spiffe"] {
            assert_eq!(refused(text), WorkloadApiError::Driver(text.to_owned()));
        }
        for socket in ["", "a/b", ".", "..", "...", "../a", "a/../b", ".a", "-a", "a b", "a\n", "a\\b"] {
            assert_eq!(refused(&format!("csi.spiffe.io/{socket}")), WorkloadApiError::Socket(socket.to_owned()));
        }
    }

    #[test]
    fn the_charts_schema_admits_what_is_admitted_here() {
        let schema: Value = serde_json::from_str(include_str!("../../../deploy/chart/values.schema.json")).unwrap();
        let pattern = regex::Regex::new(schema["properties"]["workloadApi"]["pattern"].as_str().unwrap()).unwrap();
        let long = |letters: usize| format!("csi.spiffe.io/{}", "a".repeat(letters));
        let texts = ["csi.spiffe.io", "csi.spiffe.io/agent.sock", "csi.spiffe.io/_a-1", "csi.spiffe.io/", "csi.spiffe.io/.."];
        let more = ["csi.spiffe.io/.", "csi.spiffe.io/...", "csi.spiffe.io/../a", "csi.spiffe.io/a/b", "csi.spiffe.io//a"];
        let others = ["csi.spiffe.io/.a", "csi.spiffe.io/-a", "csi.spiffe.io/a b", "../csi", "..", "CSI.spiffe.io", "csi/a\\b"];
        let all = texts.into_iter().chain(more).chain(others).map(str::to_owned).chain([long(64), long(65)]);
        for text in all {
            assert_eq!(pattern.is_match(&text), text.parse::<WorkloadApi>().is_ok(), "{text:?}");
        }
        // The template says by name why these are refused; an empty one is the mesh's own authority.
        for text in ["/run/spire/agent.sock", "unix:///run/spire/agent.sock", ""] {
            assert!(pattern.is_match(text), "{text:?}");
        }
    }
}
