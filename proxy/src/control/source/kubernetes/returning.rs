//! Pods that their kubelet speaks of for the first time since their machine was not heard of. Pure.
//!
//! A kubelet that starts says of each container with a readiness probe that it is not ready, until it has probed it, if the pod was not
//! ready as the API server has it (`setReadyStateOnKubeletRestart` of Kubernetes). The node controller had taken that back when
//! the machine fell silent; so all pods of a machine are unready at once, for a moment, whatever they do. What the kubelet says of
//! a pod that was ready before counts once it had time to ask.

use std::collections::BTreeMap;

use super::pod::Pod;
use crate::base::names::Named;

#[derive(Debug, Default)]
pub(super) struct Returning {
    pods: BTreeMap<Named, (String, State)>,
}

#[derive(Debug)]
enum State {
    /// Nobody hears of its machine.
    Unheard,
    /// Its kubelet says that it is not ready: as it says it, and how often that was looked at.
    Unready(Box<Pod>, u8),
}

impl Returning {
    /// A pod as the API server has it now. Of whom the kubelet speaks again is left unheard of for now.
    pub(super) fn see(&mut self, name: &Named, pod: &mut Pod) {
        let before = self.pods.remove(name).filter(|(uid, _)| *uid == pod.uid).map(|(_, state)| state);
        if !pod.workload.spec.unready || pod.workload.spec.addresses.is_empty() {
            return;
        }
        let state = if pod.workload.spec.unheard {
            State::Unheard
        } else {
            let looks = match before {
                None => return,
                Some(State::Unheard) => 0,
                Some(State::Unready(_, looks)) => looks,
            };
            let said = Box::new(pod.clone());
            pod.workload.spec.unheard = true;
            State::Unready(said, looks)
        };
        self.pods.insert(name.clone(), (pod.uid.clone(), state));
    }

    pub(super) fn forget(&mut self, name: &Named) {
        self.pods.remove(name);
    }

    /// Is there a pod whose kubelet had no time to ask?
    pub(super) fn is_awaited(&self) -> bool {
        self.pods.values().any(|(_, state)| matches!(state, State::Unready(..)))
    }

    /// To be asked now and then, with as much time in between as a kubelet needs. Returns the pods whose kubelet had it, as it
    /// says that they are.
    pub(super) fn look(&mut self) -> Vec<(Named, Pod)> {
        let had_time = |state: &mut State| match state {
            State::Unheard => false,
            State::Unready(_, looks) => {
                *looks += 1;
                *looks > 1
            }
        };
        let told = self.pods.extract_if(.., |_, (_, state)| had_time(state));
        let told = told.filter_map(|(name, (_, state))| match state {
            State::Unheard => None,
            State::Unready(pod, _) => Some((name, *pod)),
        });
        told.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::object::testing::object;
    use super::*;

    const READY: &str = "{type: Ready, status: 'True'}, {type: ContainersReady, status: 'True'}";
    const UNHEARD: &str = "{type: Ready, status: 'False'}, {type: ContainersReady, status: 'True'}";
    const UNREADY: &str = "{type: Ready, status: 'False', reason: ContainersNotReady}, {type: ContainersReady, status: 'False', reason: ContainersNotReady}";

    fn pod(conditions: &str, uid: &str) -> Pod {
        let text = format!(
            "{{ apiVersion: v1, kind: Pod, metadata: {{ name: web, namespace: shop, uid: '{uid}' }}, \
             spec: {{ nodeName: one, containers: [{{ name: web }}] }}, \
             status: {{ podIPs: [{{ ip: 10.65.0.4 }}], conditions: [{conditions}] }} }}"
        );
        Pod::read(&object(&text).body).unwrap()
    }

    fn name() -> Named {
        Named::new("shop", "web")
    }

    /// Is it unheard of, when it was told in these forms?
    fn seen(returning: &mut Returning, forms: &[&str]) -> Vec<bool> {
        let forms = forms.iter().map(|conditions| {
            let mut pod = pod(conditions, "1");
            returning.see(&name(), &mut pod);
            pod.workload.spec.unheard
        });
        forms.collect()
    }

    #[test]
    fn what_a_kubelet_says_first_of_a_pod_that_was_unheard_of_counts_when_it_had_time_to_ask() {
        let mut returning = Returning::default();
        assert_eq!(seen(&mut returning, &[READY, UNHEARD]), [false, true]);
        assert!(!returning.is_awaited() && returning.look().is_empty(), "nobody spoke");
        assert_eq!(seen(&mut returning, &[UNREADY, UNREADY]), [true, true]);
        assert!(returning.is_awaited() && returning.look().is_empty(), "it may have spoken a moment ago");
        assert_eq!(seen(&mut returning, &[UNREADY]), [true], "said again, it is not more time");
        let told: Vec<_> =
            returning.look().into_iter().map(|(_, pod)| (pod.workload.spec.unready, pod.workload.spec.unheard)).collect();
        assert_eq!(told, [(true, false)]);
        assert!(!returning.is_awaited());
        assert_eq!(seen(&mut returning, &[UNREADY]), [false]);
    }

    #[test]
    fn who_is_ready_again_or_another_pod_is_believed_at_once() {
        let mut returning = Returning::default();
        assert_eq!(seen(&mut returning, &[UNHEARD, READY, UNREADY]), [true, false, false]);
        assert_eq!(seen(&mut returning, &[UNHEARD, UNREADY, READY, UNREADY]), [true, true, false, false]);
        assert_eq!(seen(&mut returning, &[UNHEARD]), [true]);
        let mut another = pod(UNREADY, "2");
        returning.see(&name(), &mut another);
        assert!(!another.workload.spec.unheard && !returning.is_awaited());
        assert_eq!(seen(&mut returning, &[UNHEARD]), [true]);
        returning.forget(&name());
        assert_eq!(seen(&mut returning, &[UNREADY]), [false]);
    }
}
