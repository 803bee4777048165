//! Request shadowing: a fraction of requests is copied to another service.
//!
//! Sources: Gateway API HTTPRequestMirrorFilter (GEP-3171). The copy's answer is dropped, and neither its speed nor its
//! failure reaches the caller.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::names::{Named, check_name};
use crate::base::problems::{FieldPath, Problems};
use crate::base::random::Dice;

/// What a user writes (Gateway API HTTPRequestMirrorFilter).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ShadowConfig {
    /// The service that gets the copies.
    pub(crate) backend_ref: ShadowBackendConfig,
    /// Share of requests, 0 to 100; all of them when neither this nor `fraction` is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) percent: Option<u32>,
    /// Share of requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fraction: Option<FractionConfig>,
}

/// A reference to a service (Gateway API BackendObjectReference).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ShadowBackendConfig {
    /// Empty, as for every core kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) group: Option<String>,
    /// `Service`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<String>,
    /// The service's name.
    pub(crate) name: String,
    /// Its namespace; the route's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
    /// Its port.
    pub(crate) port: u16,
}

/// A fraction (Gateway API Fraction).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct FractionConfig {
    /// At most the denominator.
    pub(crate) numerator: u32,
    /// 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) denominator: Option<u32>,
}

/// The compiled shadow.
#[derive(Clone, Debug)]
pub(crate) struct Shadow {
    /// The service that gets the copies, and its port.
    pub(crate) service: Named,
    pub(crate) port: u16,
    numerator: u32,
    /// Never 0.
    denominator: u32,
}

impl ShadowConfig {
    /// Reports every fault under `at` and returns a shadow only if there is none. `namespace` is the route's. Whether the
    /// service exists is for the caller to see.
    pub(crate) fn compile(&self, namespace: &str, at: &FieldPath, problems: &mut Problems) -> Option<Shadow> {
        let (mut good, backend, target) = (true, &self.backend_ref, at.field("backendRef"));
        if backend.group.as_deref().is_some_and(|group| !group.is_empty() && group != "core")
            || backend.kind.as_deref().is_some_and(|kind| kind != "Service")
        {
            problems.refuse(&target, "only a Service can get copies", "leave group and kind out, or write kind: Service");
            good = false;
        }
        let namespace = backend.namespace.as_deref().unwrap_or(namespace);
        for (field, text) in [("name", backend.name.as_str()), ("namespace", namespace)] {
            if let Err(error) = check_name(text) {
                problems.refuse(&target.field(field), error.to_string(), "write the name of a service");
                good = false;
            }
        }
        if backend.port == 0 {
            problems.refuse(&target.field("port"), "0 is not a port", "write a port of the service");
            good = false;
        }
        let (numerator, denominator) = match (self.percent, &self.fraction) {
            (None, None) => (1, 1),
            (Some(percent), None) => (percent, 100),
            (None, Some(fraction)) => (fraction.numerator, fraction.denominator.unwrap_or(100)),
            (Some(_), Some(_)) => {
                problems.refuse(at, "percent and fraction are both there", "keep one of them");
                return None;
            }
        };
        if denominator == 0 || numerator > denominator {
            problems.refuse(
                &at.field(if self.percent.is_some() { "percent" } else { "fraction" }),
                format!("{numerator} of {denominator} is no share of all requests"),
                if self.percent.is_some() {
                    "write 0 to 100"
                } else {
                    "write a numerator of at most the denominator, which is 1 or more"
                },
            );
            good = false;
        }
        good.then(|| Shadow { service: Named::new(namespace, backend.name.as_str()), port: backend.port, numerator, denominator })
    }
}

impl Shadow {
    /// Draws whether this request is copied.
    pub(crate) fn draw(&self, dice: &mut Dice) -> bool {
        dice.fraction() * f64::from(self.denominator) < f64::from(self.numerator)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn compile(extra: Value) -> Result<Shadow, String> {
        let mut config = json!({"backendRef": {"name": "web-next", "port": 80}});
        for (name, value) in extra.as_object().unwrap() {
            config[name] = value.clone();
        }
        let config: ShadowConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("HTTPRoute/shop/web");
        let compiled = config.compile("shop", &FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    /// How many of 10,000 requests are copied.
    fn check(extra: Value, expected: std::ops::RangeInclusive<usize>) {
        let (shadow, mut dice) = (compile(extra.clone()).unwrap(), Dice::from_seed(1));
        let copied = (0..10_000).filter(|_| shadow.draw(&mut dice)).count();
        assert!(expected.contains(&copied), "{extra}: {copied}");
    }

    #[test]
    fn the_share_that_is_written_is_copied() {
        check(json!({}), 10_000..=10_000);
        check(json!({"percent": 0}), 0..=0);
        check(json!({"percent": 100}), 10_000..=10_000);
        check(json!({"percent": 10}), 900..=1_100);
        check(json!({"fraction": {"numerator": 5, "denominator": 1000}}), 25..=80);
        check(json!({"fraction": {"numerator": 50}}), 4_800..=5_200);
    }

    #[test]
    fn the_namespace_is_the_routes_unless_it_is_written() {
        assert_eq!(compile(json!({})).unwrap().service, Named::new("shop", "web-next"));
        let other = json!({"backendRef": {"name": "web", "namespace": "lab", "port": 80, "kind": "Service", "group": ""}});
        assert_eq!(compile(other).unwrap().service, Named::new("lab", "web"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for extra in [
            json!({"percent": 101}),
            json!({"percent": 1, "fraction": {"numerator": 1}}),
            json!({"fraction": {"numerator": 2, "denominator": 1}}),
            json!({"fraction": {"numerator": 0, "denominator": 0}}),
            json!({"backendRef": {"name": "web", "port": 0}}),
            json!({"backendRef": {"name": "Web", "port": 80}}),
            json!({"backendRef": {"name": "web"}}),
            json!({"backendRef": {"name": "web", "port": 80, "kind": "Pod"}}),
        ] {
            assert!(compile(extra.clone()).is_err(), "{extra}");
        }
    }
}
