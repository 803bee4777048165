//! The node's ends of a pod's links: which devices of this machine a pod's own devices are paired with.
//!
//! Source: rtnetlink(7), `include/uapi/linux/{if_link,net_namespace}.h`. Two devices are a pair when each names the other as its
//! link. What a pod's device merely stands on, as a macvlan does, names nobody back. The pod's devices are asked for from here
//! (`IFLA_TARGET_NETNSID`, which takes CAP_NET_ADMIN): nobody enters its namespace.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;

use super::rtnetlink::{ask, attribute, half, number_of, short_piece, word};

/// The devices of the caller's own namespace that are paired with one of `netns`, by number.
///
/// # Errors
/// The kernel does not answer, or the caller may not ask.
pub(crate) fn nodes_ends(netns: &File) -> io::Result<Vec<u32>> {
    Links::of_node()?.ends_of(netns)
}

/// The devices of the caller's own namespace that are paired with others, for a look at many pods.
#[derive(Debug)]
pub(crate) struct Links(BTreeMap<u32, u32>);

impl Links {
    /// # Errors
    /// The kernel does not answer.
    pub(crate) fn of_node() -> io::Result<Self> {
        links(None).map(Self)
    }

    /// Those that are paired with one of `netns`, by number. After [`Self::of_node`], because by the list of links the kernel gives
    /// numbers to the namespaces that they lead to.
    fn ends_of(&self, netns: &File) -> io::Result<Vec<u32>> {
        let Some(number) = number_of(netns)? else { return Ok(Vec::new()) };
        let theirs = links(Some(number))?;
        let paired = |(device, link): (&u32, &u32)| (self.0.get(link) == Some(device)).then_some(*link);
        Ok(theirs.iter().filter_map(paired).collect())
    }

    /// Those of a pod's `ends` that stand, and are not paired with a device of the pod's namespace any more. An end that is gone
    /// took the other one with it: nothing leaves there.
    ///
    /// # Errors
    /// The kernel does not answer, or the caller may not ask.
    pub(crate) fn astray(&self, netns: &File, ends: &[u32]) -> io::Result<Vec<u32>> {
        if ends.is_empty() {
            return Ok(Vec::new());
        }
        let paired = self.ends_of(netns)?;
        Ok(ends.iter().copied().filter(|end| self.0.contains_key(end) && !paired.contains(end)).collect())
    }
}

/// Every device of this thread's namespace, or of the one with this number, that names a link, and the link.
fn links(netns: Option<u32>) -> io::Result<BTreeMap<u32, u32>> {
    let mut found = BTreeMap::new();
    // `struct ifinfomsg`, all zero: every device.
    let mut body = vec![0; 16];
    body.extend(netns.iter().flat_map(|number| attribute(IFLA_TARGET_NETNSID, *number)));
    ask(libc::RTM_GETLINK, libc::NLM_F_DUMP, &body, |answer| {
        let device = word(answer, 4);
        let mut attributes = answer.get(16..).unwrap_or_default();
        while let Some((attribute, others)) = short_piece(attributes) {
            if let (Some(IFLA_LINK), Some(device), Some(link)) = (half(attribute, 2), device, word(attribute, 4)) {
                found.insert(device, link);
            }
            attributes = others;
        }
    })?;
    Ok(found)
}

const IFLA_LINK: u16 = 5;
const IFLA_TARGET_NETNSID: u16 = 46;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_answers_and_a_namespace_is_paired_with_nobody_by_itself() {
        links(None).unwrap();
        if rustix::process::geteuid().is_root() {
            assert_eq!(nodes_ends(&File::open("/proc/self/ns/net").unwrap()).unwrap(), Vec::<u32>::new());
        }
    }
}
