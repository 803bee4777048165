//! What each security policy has covered: every form of its Services since the policy itself was written. Pure.
//!
//! A policy for a Service holds where the Service leads. Who changes or deletes a Service must not take the policy off its
//! pods by that: what a Service led to stays covered until the policy goes or is written otherwise (the keys of a
//! RequestAuthentication aside, which change by themselves). The form in force is remembered too, so that a change is known
//! as one after a restart. A file that is renamed or written anew is gone for a moment: what a policy covered is kept for it until
//! it is back, if it comes back in the same words. Invariant: a policy's forms only grow, and never beyond [`FORMS_MAX`] of
//! [`PORTS_MAX`]; what is too much becomes wider, not less, and where the memory of an earlier life is lost every policy that
//! is there covers all that it may have covered.

use std::collections::{BTreeMap, BTreeSet};

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use crate::base::names::Named;
use crate::model::service::PortRef;
use crate::model::target::{Former, TargetKind};
use crate::model::{Resource, ResourceKey, Resources};

/// Of every security policy that is for a Service.
#[derive(Clone, Debug, Default)]
pub(crate) struct Coverage {
    policies: BTreeMap<ResourceKey, Covered>,
    /// Of policies that are not there now, should they come back.
    gone: BTreeMap<ResourceKey, Covered>,
    /// What policies let go of because they were written otherwise, until it is told.
    released: Vec<(ResourceKey, Vec<Former>)>,
    /// Policies that came to cover more than their Services ever led to, until it is told.
    widened: Vec<(ResourceKey, Wide)>,
    /// What an earlier life wrote could not be read, and not everything that there is was seen yet.
    is_lost: bool,
    changed: bool,
}

/// Why a policy covers more than its Services ever led to.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Wide {
    /// Its Services led to more than is remembered.
    TooMuch,
    /// What its Services led to was remembered, and cannot be read any more.
    Forgotten,
}

impl Wide {
    /// All reasons.
    pub(crate) const ALL: [Self; 2] = [Self::TooMuch, Self::Forgotten];

    /// As in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::TooMuch => "too_much",
            Self::Forgotten => "forgotten",
        }
    }

    /// What it means, for people.
    pub(crate) fn told(self) -> &'static str {
        match self {
            Self::TooMuch => "its Services led to more than can be remembered: it covers more than they ever led to",
            Self::Forgotten => {
                "what its Services led to before is not known any more: it covers every port of every pod of its namespace"
            }
        }
    }
}

/// What one policy has covered.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
struct Covered {
    /// A digest of the policy as it was written.
    policy: String,
    /// The oldest first.
    forms: Vec<Former>,
    /// Counts the policies that went, from 1. 0: it is there.
    #[serde(default, skip_serializing_if = "is_there")]
    gone: u64,
    /// What it covered in an earlier life is not known.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_forgotten: bool,
    /// What it covers beyond where its Services lead now.
    #[serde(skip)]
    kept: Vec<Former>,
}

impl Coverage {
    /// What an earlier life wrote.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let written: BTreeMap<String, Covered> = serde_json::from_slice(bytes)?;
        let mut read = Self::default();
        for (key, covered) in written {
            let key = key.parse().map_err(serde::de::Error::custom)?;
            let all = if covered.gone == 0 { &mut read.policies } else { &mut read.gone };
            all.insert(key, covered);
        }
        Ok(read)
    }

    /// What an earlier life wrote cannot be read: each policy that is found may have covered anything in its namespace.
    pub(crate) fn lost() -> Self {
        Self { is_lost: true, changed: true, ..Self::default() }
    }

    /// For the next life. None: nothing is different since the last time, and that was not in vain.
    pub(crate) fn write(&mut self, in_vain: bool) -> Option<Vec<u8>> {
        if !std::mem::take(&mut self.changed) && !in_vain {
            return None;
        }
        let policies: BTreeMap<String, &Covered> =
            self.policies.iter().chain(&self.gone).map(|(key, covered)| (key.to_string(), covered)).collect();
        // Texts, numbers and lists of them have a JSON form.
        Some(serde_json::to_vec(&policies).unwrap_or_default())
    }

    /// Takes in where the Services of a security policy lead now, and returns what it covers beyond that. `policy` is as it is
    /// written.
    pub(crate) fn keep(&mut self, policy: &Resource, resources: &Resources) -> Vec<Former> {
        let key = policy.key();
        let namespace = &policy.metadata().namespace;
        let services = policy.targets().iter().filter(|target| target.kind == TargetKind::Service);
        let now: Vec<Former> = services
            .filter_map(|target| Former::of(resources.service(&Named::new(namespace.as_str(), target.name.as_str()))?))
            .collect();
        let written = written(policy);
        let returned = self.gone.remove(&key);
        self.changed |= returned.is_some();
        let mut covered = match self.policies.remove(&key).or(returned) {
            Some(covered) if covered.policy == written => Covered { gone: 0, ..covered },
            _of_this_life if self.is_lost => {
                self.changed = true;
                let covered = Covered::forgotten(written, policy);
                if covered.is_wide().is_some() && !self.widened.contains(&(key.clone(), Wide::Forgotten)) {
                    self.widened.push((key.clone(), Wide::Forgotten));
                }
                covered
            }
            before => {
                self.changed = true;
                let kept = before.map(|before| before.beyond(&now)).unwrap_or_default();
                if !kept.is_empty() {
                    self.released.push((key.clone(), kept));
                }
                Covered { policy: written, ..Covered::default() }
            }
        };
        let was_wide = covered.is_wide();
        for form in &now {
            self.changed |= covered.take(form);
        }
        covered.limit();
        if was_wide.is_none() && covered.is_wide().is_some() {
            self.widened.push((key.clone(), Wide::TooMuch));
        }
        let kept = covered.beyond(&now);
        covered.kept.clone_from(&kept);
        self.policies.insert(key, covered);
        kept
    }

    /// What a policy covered in the life of another control plane, which wrote it down beside the policy. It counts where nothing
    /// is known of the policy yet. `policy` is as it is written.
    pub(crate) fn recall(&mut self, policy: &Resource, kept: Vec<Former>) {
        let key = policy.key();
        if !self.policies.contains_key(&key) && !self.gone.contains_key(&key) {
            self.changed = true;
            self.policies.insert(key, Covered { policy: written(policy), forms: kept, ..Covered::default() });
        }
    }

    /// The policy is gone, perhaps to come back.
    pub(crate) fn set_aside(&mut self, policy: &ResourceKey) {
        let Some(covered) = self.policies.remove(policy) else { return };
        self.changed = true;
        let last = self.gone.values().map(|covered| covered.gone).max().unwrap_or_default();
        self.gone.insert(policy.clone(), Covered { gone: last + 1, ..covered });
        if self.gone.len() > GONE_MAX
            && let Some(first) = self.gone.iter().min_by_key(|(_, covered)| covered.gone).map(|(key, _)| key.clone())
        {
            self.let_go(&first);
        }
    }

    /// The policy was deleted, and does not come back as what it was.
    pub(crate) fn let_go(&mut self, policy: &ResourceKey) {
        let gone = self.gone.remove(policy);
        let Some(covered) = self.policies.remove(policy).or(gone) else { return };
        self.changed = true;
        if !covered.kept.is_empty() {
            self.released.push((policy.clone(), covered.kept));
        }
    }

    /// Everything that there is was seen: sets policies of an earlier life aside that are not there any more. What comes from
    /// now on is new.
    pub(crate) fn retain(&mut self, is_there: impl Fn(&ResourceKey) -> bool) {
        self.is_lost = false;
        let gone: Vec<ResourceKey> = self.policies.keys().filter(|policy| !is_there(policy)).cloned().collect();
        for policy in gone {
            self.set_aside(&policy);
        }
    }

    /// Policies that cover more than their Services lead to, each with that.
    pub(crate) fn kept(&self) -> impl Iterator<Item = (&ResourceKey, &[Former])> {
        let kept = self.policies.iter().filter(|(_, covered)| !covered.kept.is_empty());
        kept.map(|(key, covered)| (key, covered.kept.as_slice()))
    }

    /// Those of a namespace.
    pub(crate) fn kept_in(&self, namespace: &str) -> impl Iterator<Item = (&ResourceKey, &[Former])> {
        self.kept().filter(move |(key, _)| *key.name.namespace == *namespace)
    }

    /// What policies let go of since this was asked last.
    pub(crate) fn released(&mut self) -> Vec<(ResourceKey, Vec<Former>)> {
        std::mem::take(&mut self.released)
    }

    /// Policies that were made wider since this was asked last.
    pub(crate) fn widened(&mut self) -> Vec<(ResourceKey, Wide)> {
        std::mem::take(&mut self.widened)
    }

    /// Policies that cover more than their Services ever led to.
    pub(crate) fn wide(&self) -> impl Iterator<Item = (&ResourceKey, Wide)> {
        self.policies.iter().filter_map(|(policy, covered)| Some((policy, covered.is_wide()?)))
    }
}

impl Covered {
    /// Of a policy that was there before, and may have covered anything to which one of its Services can lead.
    fn forgotten(written: String, policy: &Resource) -> Self {
        let services = policy.targets().iter().filter(|target| target.kind == TargetKind::Service);
        let forms = services.map(|target| Former::anywhere(&target.name)).collect();
        Self { policy: written, forms, is_forgotten: true, ..Self::default() }
    }

    /// Does it cover more than its Services ever led to?
    fn is_wide(&self) -> Option<Wide> {
        let why = if self.is_forgotten { Wide::Forgotten } else { Wide::TooMuch };
        self.forms.iter().any(|form| form.every_port || form.selector.is_empty()).then_some(why)
    }

    /// Remembers a form. Says whether it is new.
    fn take(&mut self, form: &Former) -> bool {
        let has = |known: &Former| known.every_port || form.ports.is_subset(&known.ports);
        if self.forms.iter().any(|known| known.service == form.service && known.selector.is_empty() && has(known)) {
            return false;
        }
        let same = |known: &Former| known.service == form.service && known.selector == form.selector;
        let index = self.forms.iter().position(same).unwrap_or(self.forms.len());
        match self.forms.get_mut(index) {
            Some(known) if has(known) => return false,
            Some(known) => known.ports.extend(form.ports.iter().cloned()),
            None => self.forms.push(form.clone()),
        }
        if let Some(known) = self.forms.get_mut(index).filter(|known| known.ports.len() > PORTS_MAX) {
            (known.every_port, known.ports) = (true, BTreeSet::new());
        }
        true
    }

    /// Keeps the forms from growing without end: one that selects everybody takes the place of all of a Service's. None is
    /// forgotten, though it may select nobody now: its pods may come back.
    fn limit(&mut self) {
        if self.forms.len() <= FORMS_MAX {
            return;
        }
        let mut ports: BTreeMap<String, (bool, BTreeSet<PortRef>)> = BTreeMap::new();
        for form in self.forms.drain(..) {
            let (every_port, ports) = ports.entry(form.service).or_default();
            *every_port |= form.every_port;
            ports.extend(form.ports);
        }
        let wide = ports.into_iter().map(|(service, (every_port, ports))| {
            let every_port = every_port || ports.len() > PORTS_MAX;
            let ports = if every_port { BTreeSet::new() } else { ports };
            Former { service, selector: BTreeMap::new(), ports, every_port }
        });
        self.forms.extend(wide);
    }

    /// What was covered and is not where the Services lead now.
    fn beyond(&self, now: &[Former]) -> Vec<Former> {
        let left = self.forms.iter().map(|form| {
            let is_led_to = |port: &_| now.iter().any(|now| now.is_as_wide_as(form) && now.ports.contains(port));
            let ports = form.ports.iter().filter(|port| !is_led_to(port)).cloned().collect();
            Former { ports, ..form.clone() }
        });
        left.filter(|form| form.every_port || !form.ports.is_empty()).collect()
    }
}

/// A digest of a policy as it is written. Keys are left out: they are rotated by who issues tokens, and nobody decides
/// anything about the policy by that.
fn written(policy: &Resource) -> String {
    let mut policy = policy.clone();
    policy.keep(Vec::new());
    if let Resource::RequestAuthentication(policy) = &mut policy {
        for provider in &mut policy.spec.providers {
            provider.jwks = None;
        }
    }
    let digest = digest(&SHA256, policy.to_json().as_bytes());
    digest.as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde calls")]
fn is_there(gone: &u64) -> bool {
    *gone == 0
}

/// The most forms of its Services that are remembered of one policy: a new selector with each release is many releases.
const FORMS_MAX: usize = 256;

/// The most ports that are remembered of one form: those of a Service, and what they were renamed to.
const PORTS_MAX: usize = 1024;

/// The most policies that are gone and remembered all the same.
const GONE_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::sync::Arc;

    use expect_test::{Expect, expect};

    use super::*;
    use crate::model::yaml;

    /// What the first policy covers beyond its Services, after it saw these documents one after the other.
    fn check(coverage: &mut Coverage, forms: &[&str], expected: Expect) {
        let mut said = String::new();
        for text in forms {
            let documents: Vec<Arc<Resource>> =
                yaml::read(text).into_iter().map(|document| Arc::new(document.unwrap().resource)).collect();
            let resources =
                Resources { by_key: documents.iter().map(|it| (it.key(), Arc::clone(it))).collect(), ..Resources::default() };
            let policy = documents.iter().find(|it| it.key().kind.is_security()).unwrap();
            said.clear();
            for former in coverage.keep(policy, &resources) {
                let every = if former.every_port { " every port" } else { "" };
                let ports = serde_json::to_string(&former.ports).unwrap();
                writeln!(said, "{} {:?} {ports}{every}", former.service, former.selector).unwrap();
            }
        }
        for (policy, forms) in coverage.released() {
            writeln!(said, "{policy} lets go of {}", forms.len()).unwrap();
        }
        expected.assert_eq(&said);
    }

    fn service(selector: &str, ports: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {{selector: {selector}, ports: [{ports}]}}\n---\n{}",
            GATE
        )
    }

    const GATE: &str = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: gate, namespace: shop}\nspec: {targetRefs: [{kind: Service, name: web}], action: ALLOW}\n";

    #[test]
    fn a_service_that_leads_elsewhere_leaves_what_it_led_to_covered() {
        let first = service("{app: web}", "{port: 80, targetPort: http}");
        let mut coverage = Coverage::default();
        check(&mut coverage, &[&first], expect![[""]]);
        check(
            &mut coverage,
            &[&service("{app: nobody}", "{port: 80, targetPort: http}")],
            expect![[r#"
                web {"app": "web"} ["http"]
            "#]],
        );
        check(
            &mut coverage,
            &[&service("{app: web}", "{port: 80, targetPort: 9090}")],
            expect![[r#"
                web {"app": "web"} ["http"]
                web {"app": "nobody"} ["http"]
            "#]],
        );
        // Without the Service, all of it.
        check(
            &mut coverage,
            &[GATE],
            expect![[r#"
                web {"app": "web"} [9090,"http"]
                web {"app": "nobody"} ["http"]
            "#]],
        );
        // One that leads further than before leaves nothing over.
        check(
            &mut Coverage::default(),
            &[&service("{app: web, v: one}", "{port: 80}"), &service("{app: web}", "{port: 80}, {port: 81}")],
            expect![[""]],
        );
    }

    #[test]
    fn it_is_covered_until_the_policy_goes_or_is_written_otherwise() {
        let (first, second) = (service("{app: web}", "{port: 80}"), service("{app: nobody}", "{port: 80}"));
        let mut coverage = Coverage::default();
        check(
            &mut coverage,
            &[&first, &second, &second.replace("name: gate,", "name: gate, annotations: {reviewed: today},")],
            expect![[r#"
                AuthorizationPolicy/shop/gate lets go of 1
            "#]],
        );
        let mut coverage = Coverage::default();
        check(&mut coverage, &[&first], expect![[""]]);
        coverage.let_go(&"AuthorizationPolicy/shop/gate".parse().unwrap());
        check(&mut coverage, &[&second], expect![[""]]);
    }

    #[test]
    fn a_change_is_known_as_one_after_a_restart() {
        let mut coverage = Coverage::default();
        check(&mut coverage, &[&service("{app: web}", "{port: 80}")], expect![[""]]);
        let bytes = coverage.write(false).unwrap();
        assert!(coverage.write(false).is_none());
        check(
            &mut Coverage::read(&bytes).unwrap(),
            &[&service("{app: nobody}", "{port: 80}")],
            expect![[r#"
                web {"app": "web"} [80]
            "#]],
        );
    }

    #[test]
    fn a_policy_that_goes_and_comes_back_in_the_same_words_covers_what_it_covered() {
        let (first, second) = (service("{app: web}", "{port: 80}"), service("{app: nobody}", "{port: 80}"));
        let gate: ResourceKey = "AuthorizationPolicy/shop/gate".parse().unwrap();
        let moved = || {
            let mut coverage = Coverage::default();
            check(&mut coverage, &[&first], expect![[""]]);
            coverage.set_aside(&gate);
            coverage
        };
        let kept = || expect![["web {\"app\": \"web\"} [80]\n"]];
        check(&mut moved(), &[&second], kept());
        // Over a restart, too, whether it went before or in between.
        let bytes = moved().write(false).unwrap();
        check(&mut Coverage::read(&bytes).unwrap(), &[&second], kept());
        let mut away = moved();
        check(&mut away, &[&first], expect![[""]]);
        let mut between = Coverage::read(&away.write(false).unwrap()).unwrap();
        between.retain(|_| false);
        check(&mut between, &[&second], kept());
        // In other words it is another policy.
        let other = second.replace("action: ALLOW", "action: DENY");
        check(&mut moved(), &[&other], expect![["AuthorizationPolicy/shop/gate lets go of 1\n"]]);
        // What was deleted starts anew.
        let mut deleted = moved();
        deleted.let_go(&gate);
        check(&mut deleted, &[&second], expect![[""]]);
    }

    #[test]
    fn keys_that_change_by_themselves_release_nothing() {
        let tokens = |key: &str| {
            format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: RequestAuthentication\nmetadata: {{name: t, namespace: shop}}\nspec:\n  targetRefs: [{{kind: Service, name: web}}]\n  providers: [{{issuer: i, audiences: [a], jwks: {{keys: [{{kid: {key}, kty: EC}}]}}}}]\n"
            )
        };
        let with = |selector: &str, key: &str| service(selector, "{port: 80}").replace(GATE, &tokens(key));
        check(
            &mut Coverage::default(),
            &[&with("{app: web}", "one"), &with("{app: nobody}", "one"), &with("{app: nobody}", "two")],
            expect![[r#"
                web {"app": "web"} [80]
            "#]],
        );
    }

    #[test]
    fn too_many_forms_make_the_policy_wider_and_never_narrower() {
        // Whether their pods are there or away.
        let forms: Vec<String> = (0..=FORMS_MAX).map(|n| service(&format!("{{l{n}: x}}"), "{port: 80}")).collect();
        let mut coverage = Coverage::default();
        let (last, before) = forms.split_last().unwrap();
        for form in before {
            check_quietly(&mut coverage, form);
        }
        let gate: ResourceKey = "AuthorizationPolicy/shop/gate".parse().unwrap();
        assert_eq!(coverage.kept_in("shop").next().unwrap().1.len(), FORMS_MAX - 1);
        assert!(coverage.widened().is_empty());
        check(&mut coverage, &[last], expect![["web {} [80]\n"]]);
        assert_eq!(coverage.widened(), [(gate, Wide::TooMuch)]);
        assert_eq!(coverage.wide().count(), 1);
    }

    #[test]
    fn too_many_ports_of_one_form_are_all_ports_of_it() {
        let mut coverage = Coverage::default();
        for n in 0..=PORTS_MAX {
            check_quietly(&mut coverage, &service("{app: web}", &format!("{{port: 80, targetPort: p{n}}}")));
        }
        assert_eq!(coverage.widened().len(), 1);
        let everywhere = expect![[r#"
            web {"app": "web"} [] every port
        "#]];
        check(&mut coverage, &[&service("{app: web}", "{port: 80}")], everywhere);
    }

    #[test]
    fn where_the_memory_is_lost_each_policy_that_is_there_covers_all_that_it_may_have_covered() {
        assert!(Coverage::read(b"").is_err() && Coverage::read(b"{\"no key\":{\"policy\":\"\",\"forms\":[]}}").is_err());
        let anywhere = || expect![["web {} [] every port\n"]];
        let (first, second) = (service("{app: web}", "{port: 80}"), service("{app: nobody}", "{port: 80}"));
        let mut coverage = Coverage::lost();
        // However often it is seen before all is, and in whatever words.
        check(&mut coverage, &[GATE, &first, &first.replace("action: ALLOW", "action: DENY"), &first], anywhere());
        coverage.retain(|_| true);
        check(&mut coverage, &[&second], anywhere());
        assert_eq!(coverage.widened(), [("AuthorizationPolicy/shop/gate".parse().unwrap(), Wide::Forgotten)]);
        // The next life knows it from the first.
        let mut again = Coverage::read(&coverage.write(false).unwrap()).unwrap();
        check(&mut again, &[&first], anywhere());
        assert_eq!(again.wide().map(|(_, why)| why).collect::<Vec<_>>(), [Wide::Forgotten]);
        // Who may change the policy lets go, and a policy that is written later is new.
        check(
            &mut again,
            &[&first.replace("action: ALLOW", "action: DENY")],
            expect![["AuthorizationPolicy/shop/gate lets go of 1\n"]],
        );
        assert_eq!(again.wide().count(), 0);
        let mut later = Coverage::lost();
        later.retain(|_| true);
        check(&mut later, &[&first, &second], expect![["web {\"app\": \"web\"} [80]\n"]]);
    }

    fn check_quietly(coverage: &mut Coverage, text: &str) {
        let documents = yaml::read(text).into_iter().map(|document| Arc::new(document.unwrap().resource));
        let resources = Resources { by_key: documents.map(|it| (it.key(), it)).collect(), ..Resources::default() };
        let policy = resources.by_key.values().find(|it| it.key().kind.is_security()).unwrap();
        coverage.keep(policy, &resources);
    }
}
