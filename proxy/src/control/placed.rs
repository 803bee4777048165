//! Pods whose addresses their nodes told: a pod's node knows them from the kernel as soon as its sidecar enrols, and the API
//! server only once the kubelet has started what is to start before, which may be waiting for that very sidecar.
//!
//! A node is believed about pods that the API server says run on it, and only until the API server says addresses itself:
//! whoever makes a Workload of a pod compares both ([`Placed::addresses`]).

use std::collections::BTreeMap;
use std::net::IpAddr;

use parking_lot::Mutex;
use tokio::sync::watch;

/// What nodes told of their pods.
#[derive(Debug, Default)]
pub(crate) struct Placed {
    by_uid: Mutex<BTreeMap<String, Place>>,
    news: watch::Sender<u64>,
}

#[derive(Debug, Eq, PartialEq)]
struct Place {
    node: String,
    addresses: Vec<IpAddr>,
}

impl Placed {
    /// `node` says that its pod `uid` is reached there.
    pub(crate) fn put(&self, uid: &str, node: &str, addresses: Vec<IpAddr>) {
        let place = Place { node: node.to_owned(), addresses };
        let mut by_uid = self.by_uid.lock();
        if by_uid.get(uid) == Some(&place) || (by_uid.len() >= PLACED_MAX && !by_uid.contains_key(uid)) {
            return;
        }
        by_uid.insert(uid.to_owned(), place);
        drop(by_uid);
        self.news.send_modify(|count| *count += 1);
    }

    /// Where the pod `uid`, which runs on `node`, is reached, if that node said so.
    pub(crate) fn addresses(&self, uid: &str, node: &str) -> Vec<IpAddr> {
        let by_uid = self.by_uid.lock();
        by_uid.get(uid).filter(|place| place.node == node).map(|place| place.addresses.clone()).unwrap_or_default()
    }

    /// Forgets those that are not `wanted` any more: they are gone, or the API server knows their addresses.
    pub(crate) fn keep(&self, wanted: impl Fn(&str) -> bool) {
        self.by_uid.lock().retain(|uid, _place| wanted(uid));
    }

    /// Told with each word that is new.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }
}

/// Pods that start at once, of all nodes; the others wait for the API server's word.
const PLACED_MAX: usize = 16_384;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_node_of_a_pod_says_where_it_is() {
        let placed = Placed::default();
        let mut news = placed.news();
        let at = || vec!["10.244.0.7".parse().unwrap()];
        placed.put("u1", "n1", at());
        assert!(news.has_changed().unwrap());
        news.mark_unchanged();
        placed.put("u1", "n1", at());
        assert!(!news.has_changed().unwrap(), "the same word again is no news");
        assert_eq!(placed.addresses("u1", "n1"), at());
        assert!(placed.addresses("u1", "n2").is_empty() && placed.addresses("u2", "n1").is_empty());
        placed.keep(|uid| uid != "u1");
        assert!(placed.addresses("u1", "n1").is_empty());
    }
}
