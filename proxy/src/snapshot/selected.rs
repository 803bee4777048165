//! Which workloads a Service selects, found by one of its labels: ten thousand Services that each went through ten thousand
//! workloads would take the control plane many seconds at every change.

use std::collections::BTreeMap;

use crate::model::Resources;
use crate::model::object::Object;
use crate::model::service::ServiceSpec;
use crate::model::workload::WorkloadSpec;

/// The workloads of each label of a namespace, in the order of their names.
pub(super) struct Selected<'a>(BTreeMap<Label<'a>, Vec<&'a Object<WorkloadSpec>>>);

/// Namespace, name and value.
type Label<'a> = (&'a str, &'a str, &'a str);

impl<'a> Selected<'a> {
    pub(super) fn of(resources: &'a Resources) -> Self {
        let mut by_label: BTreeMap<Label<'a>, Vec<&Object<WorkloadSpec>>> = BTreeMap::new();
        for workload in resources.workloads() {
            for (name, value) in &workload.metadata.labels {
                by_label.entry((&workload.metadata.namespace, name, value)).or_default().push(workload);
            }
        }
        Self(by_label)
    }

    /// Those that a Service selects.
    pub(super) fn by(&self, service: &Object<ServiceSpec>) -> Vec<&'a Object<WorkloadSpec>> {
        let some = self.candidates(service).iter().copied();
        some.filter(|workload| service.spec.selects(&workload.metadata.labels)).collect()
    }

    /// Those that have the rarest of the labels that it wants.
    fn candidates<'b>(&'b self, service: &'b Object<ServiceSpec>) -> &'b [&'a Object<WorkloadSpec>] {
        let namespace = service.metadata.namespace.as_str();
        let having = |(name, value): (&'b String, &'b String)| -> &'b [&'a Object<WorkloadSpec>] {
            self.0.get(&(namespace, name.as_str(), value.as_str())).map_or(&[], Vec::as_slice)
        };
        service.spec.selector.iter().map(having).min_by_key(|workloads| workloads.len()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use crate::model::yaml;
    use crate::snapshot::compile::admit;

    #[test]
    fn a_service_looks_at_the_workloads_of_its_rarest_label_alone() {
        let mut text = String::new();
        for number in 0..20 {
            let namespace = if number % 2 == 0 { "shop" } else { "bank" };
            writeln!(
                text,
                "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{namespace: {namespace}, name: w-{number}, \
                 labels: {{tier: front, app: a-{}}}}}\nspec: {{addresses: [10.64.0.{}]}}",
                number / 4,
                number + 1
            )
            .unwrap();
        }
        let selectors = ["{app: a-1}", "{tier: front, app: a-1}", "{tier: back, app: a-1}", "{tier: front}", "{app: a-9}", "{}"];
        for (number, selector) in selectors.into_iter().enumerate() {
            writeln!(
                text,
                "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: shop, name: s-{number}}}\nspec: {{selector: {selector}, \
                 ports: [{{port: 80}}]}}"
            )
            .unwrap();
        }
        let mut resources = Resources::default();
        for document in yaml::read(&text) {
            let resource = document.unwrap().resource;
            admit(&mut resources, resource.key(), Ok(std::sync::Arc::new(resource)));
        }
        let selected = Selected::of(&resources);
        let mut looked_at = Vec::new();
        for service in resources.services() {
            let all = resources.workloads_in(&service.metadata.namespace);
            let named: Vec<_> = all.filter(|it| service.spec.selects(&it.metadata.labels)).map(Object::named).collect();
            assert_eq!(selected.by(service).into_iter().map(Object::named).collect::<Vec<_>>(), named);
            looked_at.push((selected.candidates(service).len(), named.len()));
        }
        assert_eq!(looked_at, [(2, 2), (2, 2), (0, 0), (10, 10), (0, 0), (0, 0)]);
    }
}
