//! The sidecar's container and volumes, and where they stand in the pod.
//!
//! Source: Pod Security Standards, `restricted`: no privilege, no capability, no user of the node's, RuntimeDefault seccomp,
//! no volume of the host's. A pod that fits it fits it with its sidecar.

use serde_json::{Map, Value, json};

use super::forged::Earlier;
use super::pod_resources::ADDED;
use super::wish::Wishes;
use super::{Settings, VERSION, WorkloadApi, name_of, put_list, take_list};
use crate::model::app_doors::AppDoors;
use crate::model::marks::{self, Mode};

/// One pod's sidecar.
#[derive(Debug)]
pub(super) struct Sidecar<'a> {
    pub(super) wishes: &'a Wishes,
    pub(super) settings: &'a Settings,
    pub(super) doors: &'a AppDoors,
}

/// The variable with [`AppDoors`].
pub(super) const PROBES: &str = "OUTRIGGER_PROBES";

/// The variable with the socket of a Workload API that is not the node agent's.
const WORKLOAD_API: &str = "OUTRIGGER_WORKLOAD_API";

/// The value of a variable that the kubelet gives a container as `text`: it replaces `$(NAME)` in it, and makes one `$` of two
/// (Kubernetes' API reference, `EnvVar.value`).
fn kept(text: &str) -> String {
    text.replace('$', "$$")
}

/// What a container gets of a variable with the value that [`kept`] made.
pub(super) fn given(value: &str) -> String {
    value.replace("$$", "$")
}

impl Sidecar<'_> {
    /// What is written down at the pod: which injection it was, what it asked for, so that the next one can tell what others
    /// have changed since, and what it `added` to what the pod asks for as a whole.
    pub(super) fn status(&self, added: Option<Value>) -> Value {
        let Wishes { mode, image, .. } = self.wishes;
        let mut status = json!({ "version": VERSION, "mode": mode.as_str(), "image": image, "resources": self.resources() });
        if let (Some(added), Some(status)) = (added, status.as_object_mut()) {
            status.insert(ADDED.to_owned(), added);
        }
        status
    }

    /// Puts container and volumes into the pod's `body`, in the place of `earlier` ones. Returns the container's resources.
    pub(super) fn place(&self, body: &mut Map<String, Value>, earlier: Option<&Earlier>) -> Value {
        let lists = [("initContainers", Mode::Native), ("containers", Mode::Classic)];
        let (mut found, mut resources) = (None, Value::Null);
        for (field, mode) in lists {
            let mut list = take_list(body, field);
            if let Some(at) = list.iter().position(|container| name_of(container) == Some(marks::CONTAINER)) {
                found = Some(list.remove(at));
            }
            if mode == self.wishes.mode {
                let container = match (&found, earlier) {
                    (Some(found), Some(earlier)) => self.over(found, earlier),
                    _first_time => self.container(),
                };
                resources = container.get("resources").cloned().unwrap_or_default();
                // What comes before the sidecar has no network: nobody serves its connections.
                list.insert(0, container);
            }
            put_list(body, field, list);
        }
        let mut volumes = take_list(body, "volumes");
        let workload_api = self.settings.workload_api.as_ref();
        if workload_api.is_none() {
            volumes.retain(|volume| name_of(volume) != Some(marks::WORKLOAD_API));
        }
        let ours = [
            json!({ "name": marks::SOCKETS, "csi": { "driver": marks::DRIVER, "readOnly": true } }),
            json!({ "name": marks::STATE, "emptyDir": { "medium": "Memory", "sizeLimit": STATE_SIZE } }),
        ];
        for ours in ours.into_iter().chain(workload_api.map(WorkloadApi::volume)) {
            match volumes.iter_mut().find(|volume| name_of(volume) == name_of(&ours)) {
                Some(there) => *there = ours,
                None => volumes.push(ours),
            }
        }
        put_list(body, "volumes", volumes);
        resources
    }

    fn container(&self) -> Value {
        let Wishes { mode, image, log_level, .. } = self.wishes;
        let Settings { control, trust_domain, .. } = self.settings;
        let of_pod = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": path } } });
        let run = |words: &[&str]| json!({ "exec": { "command": words } });
        // What comes after is started when this ends.
        let begin = run(&["/outrigger", "wait"]);
        let lifecycle = match mode {
            Mode::Native => json!({ "postStart": begin }),
            // The kubelet ends a native one after the app, and this one beside it.
            Mode::Classic => json!({ "postStart": begin, "preStop": run(&["/outrigger", "wait", "--app-ended"]) }),
        };
        let mut container = json!({
            "name": marks::CONTAINER,
            "image": image,
            "args": ["sidecar"],
            "env": [
                of_pod("OUTRIGGER_NAMESPACE", "metadata.namespace"),
                of_pod("OUTRIGGER_NAME", "metadata.name"),
                { "name": "OUTRIGGER_CONTROL", "value": control },
                { "name": "OUTRIGGER_TRUST_DOMAIN", "value": trust_domain },
                { "name": "OUTRIGGER_STATE", "value": STATE_FOLDER },
                { "name": PROBES, "value": kept(&self.doors.to_string()) },
                { "name": "OUTRIGGER_LOG", "value": "json" },
                { "name": "OUTRIGGER_LOG_LEVEL", "value": log_level },
                // Beside its own log, as all that containers tell; how many requests get a line, Mesh says.
                { "name": "OUTRIGGER_ACCESS_LOG", "value": "-" },
            ],
            "lifecycle": lifecycle,
            "resources": self.resources(),
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "capabilities": { "drop": ["ALL"] },
                "privileged": false,
                "readOnlyRootFilesystem": true,
                "runAsGroup": USER,
                "runAsNonRoot": true,
                "runAsUser": USER,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [
                { "name": marks::SOCKETS, "mountPath": "/run/outrigger", "readOnly": true },
                { "name": marks::STATE, "mountPath": STATE_FOLDER },
                // The API server gives its token to every container in which nothing is mounted at that place (the admission
                // plugin ServiceAccount). The sidecar asks nothing of the API server.
                { "name": marks::STATE, "mountPath": TOKEN_FOLDER, "readOnly": true, "subPath": "no-token" },
            ],
        });
        if *mode == Mode::Native
            && let Some(container) = container.as_object_mut()
        {
            container.insert("restartPolicy".to_owned(), "Always".into());
        }
        if let Some(workload_api) = &self.settings.workload_api {
            let of_it =
                [("env", json!({ "name": WORKLOAD_API, "value": workload_api.path() })), ("volumeMounts", WorkloadApi::mount())];
            for (list, item) in of_it {
                container.get_mut(list).and_then(Value::as_array_mut).into_iter().for_each(|list| list.push(item.clone()));
            }
        }
        container
    }

    fn resources(&self) -> Value {
        let Wishes { cpu, memory, cpu_limit, memory_limit, .. } = self.wishes;
        let mut resources = json!({ "requests": { "cpu": cpu, "memory": memory } });
        let limits: Map<String, Value> = [("cpu", cpu_limit), ("memory", memory_limit)]
            .into_iter()
            .filter_map(|(name, limit)| Some((name.to_owned(), limit.as_deref()?.into())))
            .collect();
        if !limits.is_empty()
            && let Some(resources) = resources.as_object_mut()
        {
            resources.insert("limits".to_owned(), limits.into());
        }
        resources
    }

    /// The container as it should be, with what the API server and other webhooks may add to one or change in it: a mirror's
    /// image, resources that somebody tunes, variables and volumes that all containers get.
    fn over(&self, found: &Value, earlier: &Earlier) -> Value {
        let mut container = self.container();
        let status = self.status(None);
        let Some(fresh) = container.as_object_mut() else { return container };
        for field in ["imagePullPolicy", "terminationMessagePath"] {
            if let Some(value) = found.get(field) {
                fresh.insert(field.to_owned(), value.clone());
            }
        }
        for field in ["image", "resources"] {
            // Not if something else is asked for now.
            if let Some(value) = found.get(field)
                && earlier.status.get(field) == status.get(field)
            {
                fresh.insert(field.to_owned(), value.clone());
            }
        }
        for (field, key) in [("env", "name"), ("volumeMounts", "mountPath")] {
            let mut list = take_list(fresh, field);
            let of = |item: &Value| item.get(key).and_then(Value::as_str).map(str::to_owned);
            let known: Vec<_> = list.iter().map(of).collect();
            let there = found.get(field).and_then(Value::as_array).into_iter().flatten();
            // Ours is there as it is asked for now, or not at all.
            let there = there.filter(|item| !matches!(name_of(item), Some(WORKLOAD_API | marks::WORKLOAD_API)));
            list.extend(there.filter(|item| !known.contains(&of(item))).cloned());
            put_list(fresh, field, list);
        }
        container
    }
}

/// Nobody else's on the node; the image's too.
const USER: u32 = 14_000;
const STATE_FOLDER: &str = "/var/lib/outrigger";
/// Where programs look for their pod's service account token.
const TOKEN_FOLDER: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The last good configuration of a sidecar that knows thousands of services has a few MiB.
const STATE_SIZE: &str = "64Mi";
