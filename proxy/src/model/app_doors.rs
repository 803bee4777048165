//! What the kubelet and Prometheus ask of a pod's app, and its sidecar asks in their place: neither of the two is of the mesh,
//! so that under strict mutual TLS nobody would let them in.
//!
//! The injection writes it into the sidecar's environment, where `SidecarArgs` reads it. An unknown field is an error: a probe
//! that is half understood would call a broken app healthy.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What may be asked of one pod's app. Nothing else can be.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct AppDoors {
    /// Where its metrics are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) metrics: Option<HttpDoor>,
    /// By `CONTAINER/KIND`, see [`door`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) probes: BTreeMap<String, AppProbe>,
}

/// One probe of one container.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct AppProbe {
    pub(crate) ask: Ask,
    pub(crate) timeout_seconds: u32,
}

/// How an app is asked.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) enum Ask {
    Http(HttpDoor),
    /// Does it accept a connection?
    Tcp(TcpDoor),
    /// `grpc.health.v1`.
    Grpc(GrpcDoor),
}

/// A GET.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HttpDoor {
    pub(crate) port: u16,
    pub(crate) path: String,
    /// Over TLS; nobody's certificate is checked, as the kubelet does not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) tls: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) headers: Vec<(String, String)>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TcpDoor {
    pub(crate) port: u16,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct GrpcDoor {
    pub(crate) port: u16,
    /// Empty: the server as a whole.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) service: String,
}

/// What a probe is for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum ProbeKind {
    Liveness,
    Readiness,
    Startup,
}

impl ProbeKind {
    pub(crate) const ALL: [Self; 3] = [Self::Liveness, Self::Readiness, Self::Startup];

    /// As in the path of [`door`].
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Liveness => "liveness",
            Self::Readiness => "readiness",
            Self::Startup => "startup",
        }
    }

    /// Its field of a container.
    pub(crate) const fn field(self) -> &'static str {
        match self {
            Self::Liveness => "livenessProbe",
            Self::Readiness => "readinessProbe",
            Self::Startup => "startupProbe",
        }
    }
}

/// The name of a probe: the end of its path at the sidecar.
pub(crate) fn door(container: &str, kind: ProbeKind) -> String {
    format!("{container}/{}", kind.as_str())
}

/// The path at the sidecar before a probe's name.
pub(crate) const PROBE_PATH: &str = "/probe/";
/// The path at the sidecar of the app's metrics.
pub(crate) const METRICS_PATH: &str = "/metrics/app";

impl fmt::Display for AppDoors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Maps with text keys, lists and numbers: all of it has a JSON form.
        f.write_str(&serde_json::to_string(self).map_err(|_not_json| fmt::Error)?)
    }
}

impl FromStr for AppDoors {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_is_unknown_is_refused() {
        let text = r#"{"metrics":{"port":9102,"path":"/metrics"},"probes":{"web/liveness":{"ask":{"http":{"port":8443,"path":"/healthz?deep=1","tls":true,"headers":[["Host","web.shop"]]}},"timeoutSeconds":3},"web/readiness":{"ask":{"grpc":{"port":50051,"service":"shop.Cart"}},"timeoutSeconds":1},"web/startup":{"ask":{"tcp":{"port":8080}},"timeoutSeconds":1}}}"#;
        let doors: AppDoors = text.parse().unwrap();
        assert_eq!(doors.to_string(), text);
        assert_eq!(AppDoors::default().to_string(), "{}");
        for bad in [r#"{"probe":{}}"#, r#"{"metrics":{"port":70000,"path":"/"}}"#, r#"{"probes":{"a":{"ask":{"exec":{}}}}}"#, ""]
        {
            assert!(bad.parse::<AppDoors>().is_err(), "{bad}");
        }
    }
}
