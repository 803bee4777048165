//! `outrigger inject`: pods as the webhook would make them, from the same function.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::given::{Given, texts};
use super::{Failure, print, warn};
use crate::injection::document::inject_document;
use crate::injection::{CPU_REMEDY, MEMORY_REMEDY, Namespace, Settings, WorkloadApi, is_cpu, is_image, is_memory};
use crate::model::marks::{ENABLED, INJECT, Mode};
use crate::model::yaml::{self, Written};
use crate::telemetry::log::is_filter;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger inject -f deployment.yaml | kubectl apply -f -
  kubectl get deployment web -o yaml | outrigger inject -f -

What is not a Pod, Deployment, DaemonSet, StatefulSet, ReplicaSet, ReplicationController, Job, CronJob or List of them is printed as it is. A namespace counts as labelled outrigger.dev/inject: enabled unless the files say otherwise of it. With the flags of the control plane, what is printed is what its webhook makes of the pod.

Exit codes: 0 printed; 2 a file cannot be read or a pod cannot have a sidecar; nothing is printed then.")]
pub(crate) struct InjectArgs {
    /// A file or a folder of documents; `-` is stdin; may be given several times
    #[arg(short, long = "file", value_name = "FILE|DIR|-", required = true)]
    files: Vec<PathBuf>,
    /// The trust domain of all identities
    #[arg(long, env = "OUTRIGGER_TRUST_DOMAIN", value_name = "TD", default_value = "cluster.local")]
    trust_domain: String,
    #[command(flatten)]
    sidecars: SidecarsArgs,
}

/// What every sidecar gets that is put into a pod.
#[derive(Args, Clone, Debug)]
pub(crate) struct SidecarsArgs {
    /// The image of sidecars
    #[arg(long, env = "OUTRIGGER_SIDECAR_IMAGE", value_name = "IMAGE", value_parser = image)]
    sidecar_image: Option<String>,
    /// Where sidecars find the control plane's stream
    #[arg(long, env = "OUTRIGGER_SIDECAR_CONTROL", value_name = "HOST:PORT")]
    sidecar_control: Option<String>,
    /// Where sidecars have their identities from, in the place of their node's agent: a CSI driver and the socket in its
    /// volumes, as csi.spiffe.io/spire-agent.sock
    #[arg(long, env = "OUTRIGGER_SIDECAR_WORKLOAD_API", value_name = "DRIVER[/SOCKET]")]
    sidecar_workload_api: Option<WorkloadApi>,
    /// Where sidecars stand in their pods: native (Kubernetes 1.29) or classic
    #[arg(long, env = "OUTRIGGER_SIDECAR_MODE", value_name = "MODE", value_parser = mode)]
    sidecar_mode: Option<Mode>,
    /// What sidecars log
    #[arg(long, env = "OUTRIGGER_SIDECAR_LOG_LEVEL", value_name = "FILTER", value_parser = filter)]
    sidecar_log_level: Option<String>,
    /// How much of a processor a sidecar asks for
    #[arg(long, env = "OUTRIGGER_SIDECAR_CPU", value_name = "QUANTITY", value_parser = cpu)]
    sidecar_cpu: Option<String>,
    /// How much memory a sidecar asks for
    #[arg(long, env = "OUTRIGGER_SIDECAR_MEMORY", value_name = "QUANTITY", value_parser = memory)]
    sidecar_memory: Option<String>,
}

fn mode(text: &str) -> Result<Mode, String> {
    Mode::parse(text).ok_or_else(|| format!("{text:?} is no mode; write native or classic"))
}

/// What every pod would be refused for is refused before there is one.
fn image(text: &str) -> Result<String, String> {
    let is_fit = is_image(text).then(|| text.to_owned());
    is_fit.ok_or_else(|| format!("{text:?} is no image; write one as registry.example/outrigger:1.0"))
}

fn filter(text: &str) -> Result<String, String> {
    let is_fit = is_filter(text).then(|| text.to_owned());
    is_fit.ok_or_else(|| {
        format!("{text:?} is no level; write error, warn, info, debug or trace, or a list as info,outrigger::dataplane=debug")
    })
}

fn cpu(text: &str) -> Result<String, String> {
    let is_fit = is_cpu(text).then(|| text.to_owned());
    is_fit.ok_or_else(|| format!("{text:?} is no amount of processors for a sidecar; write {CPU_REMEDY}"))
}

fn memory(text: &str) -> Result<String, String> {
    let is_fit = is_memory(text).then(|| text.to_owned());
    is_fit.ok_or_else(|| format!("{text:?} is no amount of memory for a sidecar; write {MEMORY_REMEDY}"))
}

impl SidecarsArgs {
    /// What is said here, and else what holds where nobody says anything.
    pub(crate) fn settings(&self, trust_domain: &str) -> Settings {
        let Self {
            sidecar_image,
            sidecar_control,
            sidecar_workload_api,
            sidecar_mode,
            sidecar_log_level,
            sidecar_cpu,
            sidecar_memory,
        } = self.clone();
        let usual = Settings::default();
        Settings {
            image: sidecar_image.unwrap_or(usual.image),
            control: sidecar_control.unwrap_or(usual.control),
            trust_domain: trust_domain.to_owned(),
            workload_api: sidecar_workload_api,
            mode: sidecar_mode.unwrap_or(usual.mode),
            log_level: sidecar_log_level.unwrap_or(usual.log_level),
            cpu: sidecar_cpu.unwrap_or(usual.cpu),
            memory: sidecar_memory.unwrap_or(usual.memory),
        }
    }
}

/// Runs `outrigger inject`.
pub(crate) fn run(args: &InjectArgs) -> Result<ExitCode, Failure> {
    let settings = args.sidecars.settings(&args.trust_domain);
    let mut documents = Vec::new();
    for given in texts(&args.files) {
        let Given { path, text } = given.map_err(|told| Failure::invalid([told]))?;
        let name = path.display().to_string();
        documents.extend(yaml::written(&text).into_iter().map(|written| (name.clone(), written)));
    }
    let printed = injected(documents, &settings)?;
    for line in &printed.notes {
        warn(line);
    }
    print(&printed.text)?;
    Ok(ExitCode::SUCCESS)
}

/// What is written to stdout and stderr.
#[derive(Debug)]
struct Printed {
    text: String,
    notes: Vec<String>,
}

fn injected(documents: Vec<(String, Written)>, settings: &Settings) -> Result<Printed, Failure> {
    let mut faults = Vec::new();
    let mut read = Vec::new();
    for (file, Written { text, value }) in documents {
        match value {
            Ok(value) => read.push((file, text, value)),
            Err(fault) => faults.push(format!("{file}:{}: {}; {}", fault.at, fault.text, fault.remedy)),
        }
    }
    let namespaces = namespaces(read.iter().map(|(.., value)| value));
    let namespace = |name: &str| namespaces.get(name).cloned().unwrap_or_else(|| labelled(name));
    let mut printed = Printed { text: String::new(), notes: Vec::new() };
    for (file, text, mut value) in read {
        let told = inject_document(&mut value, &namespace, settings);
        let mut changed = false;
        for pod in told {
            let what = format!("{file}: {}", pod.what);
            match pod.result {
                Ok(Ok(warnings)) => {
                    changed = true;
                    printed.notes.extend(warnings.into_iter().map(|warning| format!("warning: {what}: {warning}")));
                }
                Ok(Err(reason)) => printed.notes.push(format!("{what}: no sidecar: {}", reason.as_str())),
                Err(refusal) => faults.push(format!("{what}: {refusal}")),
            }
        }
        printed.text.push_str("---\n");
        let text = if changed { yaml::write(&value).map_err(|error| Failure::invalid([error]))? } else { text };
        printed.text.push_str(text.trim_end());
        printed.text.push('\n');
    }
    if !faults.is_empty() {
        return Err(Failure::invalid(faults));
    }
    if printed.text.is_empty() {
        return Err(Failure::invalid(["there is no document"]));
    }
    Ok(printed)
}

/// What the documents say of namespaces.
fn namespaces<'a>(documents: impl Iterator<Item = &'a Value>) -> BTreeMap<String, Namespace> {
    let of_kind = documents.filter(|value| value.get("kind").is_some_and(|kind| kind == "Namespace"));
    let read = |value: &Value| {
        let name = value.pointer("/metadata/name")?.as_str()?.to_owned();
        let map =
            |pointer: &str| value.pointer(pointer).and_then(|map| serde_json::from_value(map.clone()).ok()).unwrap_or_default();
        Some(Namespace { name, labels: map("/metadata/labels"), annotations: map("/metadata/annotations") })
    };
    of_kind.filter_map(read).map(|namespace| (namespace.name.clone(), namespace)).collect()
}

/// A namespace of which nothing is known: whoever asks for injection wants it.
fn labelled(name: &str) -> Namespace {
    Namespace { name: name.to_owned(), labels: [(INJECT.to_owned(), ENABLED.to_owned())].into(), annotations: BTreeMap::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser, Debug)]
    struct Asked {
        #[command(flatten)]
        sidecars: SidecarsArgs,
    }

    fn asked(flag: &str, value: &str) -> Result<Asked, clap::Error> {
        <Asked as clap::Parser>::try_parse_from(["it", &format!("--{flag}={value}")])
    }

    #[test]
    fn what_no_pod_could_be_made_with_is_refused_by_its_flag() {
        for (flag, value) in [
            ("sidecar-cpu", "foo"),
            ("sidecar-cpu", "0"),
            ("sidecar-cpu", "64Mi"),
            ("sidecar-cpu", "100"),
            ("sidecar-memory", "64"),
            ("sidecar-memory", "-1"),
            ("sidecar-memory", "64MB"),
            ("sidecar-log-level", "loud"),
            ("sidecar-image", "no image"),
            ("sidecar-image", "a//b:c:d"),
        ] {
            let told = asked(flag, value).unwrap_err().to_string();
            assert!(told.contains(&format!("--{flag}")) && told.contains(value) && told.contains("write "), "{told}");
        }
        for (flag, value) in
            [("sidecar-cpu", "0.5"), ("sidecar-memory", "64Mi"), ("sidecar-log-level", "info,outrigger::dataplane=debug")]
        {
            assert!(asked(flag, value).is_ok(), "{flag}={value}");
        }
    }

    #[test]
    fn the_charts_schema_admits_what_is_admitted_here() {
        let schema: Value = serde_json::from_str(include_str!("../../../deploy/chart/values.schema.json")).unwrap();
        let pattern = |pointer: &str| regex::Regex::new(schema.pointer(pointer).unwrap().as_str().unwrap()).unwrap();
        let cpus =
            ["foo", "-1", "", "0", "0.0", "1m", "10m", "8000m", "8001m", "0.5m", "0.5", "1.5", "1.", ".5", "8", "8.0", "8.1"];
        let cpus = [&cpus[..], &["10", "100", "1e3", "64Mi", "0.001", "0.0001"]].concat();
        let memories =
            ["foo", "-1", "", "0", "1", "64", "64m", "64k", "999999", "1000000", "67108864", "1000k", "1Ki", "2048Ki", "64Mi"];
        let memories = [&memories[..], &["64M", "64MB", "1 Gi", "1.5Gi", "0.5Gi", "8Gi", "9Gi", "64Gi", "9000Mi", "1T"]].concat();
        let filters =
            ["info", "INFO", "loud", "", "off", "outrigger", "warn,outrigger::dataplane=debug", "info,=x=", "outrigger=debug"];
        let images = ["outrigger", "registry.example:5000/a/outrigger", "no image", "", "/outrigger", "a/", "a//b", "a//b:c:d"];
        let names =
            ["Outrigger", "REGISTRY/outrigger", "[fd00::1]:5000/a", "-a/b", "a-/b", "a.-b", "a__b", "a___b", "a--b", "a..b/c"];
        let images = [&images[..], &names].concat();
        for (flag, pointer, texts) in [
            ("sidecar-cpu", "/properties/sidecar/properties/cpu/pattern", &cpus[..]),
            ("sidecar-memory", "/properties/sidecar/properties/memory/pattern", &memories[..]),
            ("sidecar-log-level", "/$defs/filter/pattern", &filters[..]),
            ("sidecar-image", "/properties/image/properties/repository/pattern", &images[..]),
        ] {
            let pattern = pattern(pointer);
            for text in texts {
                assert_eq!(pattern.is_match(text), asked(flag, text).is_ok(), "{flag}={text}");
            }
        }
        let tags = pattern("/properties/image/properties/tag/pattern");
        let digest = format!("1.0@sha256:{}", "0a".repeat(32));
        for tag in ["1.0", "_-.", "-1", "1:2", "a/b", "1.0@latest", "1.0@sha256:0a", &digest, &"1".repeat(128), &"1".repeat(129)]
        {
            assert_eq!(tags.is_match(tag), asked("sidecar-image", &format!("outrigger:{tag}")).is_ok(), "{tag}");
        }
        // The chart's own version then.
        assert!(tags.is_match(""));
    }

    const DEPLOYMENT: &str = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: shop}\nspec:\n  template:\n    metadata:\n      annotations: {on: \"yes\", time: \"12:30:45\", port: \"080\"}\n    spec:\n      containers:\n      - name: web\n        image: web:1\n        livenessProbe: {httpGet: {port: 8080, path: /healthz}}\n";
    const SERVICE: &str = "# Kept as it is.\napiVersion: v1\nkind: Service\nmetadata: {name: web}   # here too\n";

    fn documents(text: &str) -> Vec<(String, Written)> {
        yaml::written(text).into_iter().map(|written| ("web.yaml".to_owned(), written)).collect()
    }

    fn causes(text: &str) -> Vec<String> {
        injected(documents(text), &Settings::default()).unwrap_err().causes
    }

    #[test]
    fn the_printed_pod_is_the_one_that_the_webhook_makes() {
        let text = format!("{DEPLOYMENT}---\n{SERVICE}");
        let printed = injected(documents(&text), &Settings::default()).unwrap();
        let read = yaml::written(&printed.text);
        let before = yaml::written(DEPLOYMENT).remove(0).value.unwrap();
        let template = before.pointer("/spec/template").unwrap();
        let outcome = crate::injection::inject(template, &labelled("shop"), &Settings::default()).unwrap();
        let crate::injection::Outcome::Injected(webhooks) = outcome else { panic!("{outcome:?}") };
        let after = read[0].value.as_ref().unwrap();
        assert_eq!(after.pointer("/spec/template"), Some(&webhooks.pod));
        assert_eq!(read[1].text, SERVICE);
        // Whoever reads YAML 1.1 reads the same.
        for quoted in ["\"on\": \"yes\"", "time: \"12:30:45\"", "port: \"080\""] {
            assert!(printed.text.replace('\'', "\"").contains(quoted), "{quoted}: {}", printed.text);
        }
        // What was printed comes out as it is.
        let again = injected(documents(&printed.text), &Settings::default()).unwrap();
        assert_eq!(again.text, printed.text);
    }

    #[test]
    fn a_namespace_that_is_there_says_whether_its_pods_get_sidecars() {
        let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
        let text = format!("{DEPLOYMENT}---\n{namespace}");
        let printed = injected(documents(&text), &Settings::default()).unwrap();
        assert_eq!(printed.text, format!("---\n{text}"));
        assert!(
            printed.notes[0].starts_with("web.yaml: Deployment shop/web: no sidecar: neither the pod"),
            "{:?}",
            printed.notes
        );
    }

    #[test]
    fn what_cannot_be_read_or_injected_is_named_and_nothing_is_printed() {
        let host = DEPLOYMENT.replace("      containers:", "      hostNetwork: true\n      containers:");
        let told = causes(&format!("{SERVICE}---\nkind: [\n---\n{host}"));
        assert!(told[0].starts_with("web.yaml:") && told[0].contains("not YAML"), "{told:?}");
        assert!(told[1].starts_with("web.yaml: Deployment shop/web: hostNetwork: "), "{told:?}");
        assert_eq!(causes("# nothing\n"), ["there is no document"]);
    }
}
