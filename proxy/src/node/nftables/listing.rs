//! What nft(8) lists of a table: what was counted, and the table itself, to be compared with what was loaded.
//!
//! Source: libnftables-json(5). Invariant: two listings of one table are equal whatever was counted in between, and two
//! tables never.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use proxy_common::counters::{Counter, Counters};
use serde_json::{Map, Value};

/// A table as it stands.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Listing {
    /// Chains and rules, in order, with their handles: a rule that was taken out and put back is another one.
    pub(super) table: Vec<Value>,
}

/// Reads a listing.
///
/// # Errors
/// It is none.
pub(super) fn parse(text: &str) -> io::Result<(Listing, Counters)> {
    let whole: Value = serde_json::from_str(text)?;
    let list = whole.get("nftables").and_then(Value::as_array).ok_or(io::ErrorKind::InvalidData)?;
    let (mut table, mut counters) = (Vec::new(), Counters::ZERO);
    for item in list {
        if item.get("metainfo").is_some() {
            continue;
        }
        let mut item = item.clone();
        if let Some(counter) = item.get_mut("counter").and_then(Value::as_object_mut) {
            take_count(counter, &mut counters);
        }
        name_cgroups(&mut item, &inode);
        table.push(item);
    }
    Ok((Listing { table }, counters))
}

/// Moves what a counter counted from its description.
fn take_count(described: &mut Map<String, Value>, counters: &mut Counters) {
    let packets = described.remove("packets").and_then(|packets| packets.as_u64()).unwrap_or_default();
    described.remove("bytes");
    let name = described.get("name").and_then(Value::as_str).unwrap_or_default();
    let known = Counter::ALL.into_iter().find(|counter| counter.name() == name);
    if let Some(place) = known.and_then(|counter| counters.0.get_mut(counter as usize)) {
        *place = packets;
    }
}

/// A rule knows a cgroup by its number. nft(8) shows the first folder of that number it comes by, on a hybrid machine
/// perhaps of another hierarchy: the number is what does not change.
fn name_cgroups(value: &mut Value, inode: &impl Fn(&str) -> Option<u64>) {
    match value {
        Value::Object(fields) => {
            let is_cgroup =
                fields.get("left").and_then(|left| left.pointer("/socket/key")).and_then(Value::as_str) == Some("cgroupv2");
            if is_cgroup && let Some(right) = fields.get_mut("right") {
                if let Some(number) = right.as_str().and_then(inode) {
                    *right = number.into();
                }
                return;
            }
            fields.values_mut().for_each(|value| name_cgroups(value, inode));
        }
        Value::Array(values) => values.iter_mut().for_each(|value| name_cgroups(value, inode)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn inode(path: &str) -> Option<u64> {
    std::fs::metadata(Path::new(super::CGROUPS).join(path)).ok().map(|found| found.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(packets: u64, rule: &str) -> String {
        format!(
            r#"{{"nftables": [{{"metainfo": {{"version": "1.0.6"}}}},
            {{"counter": {{"family": "inet", "name": "redirected", "table": "outrigger", "handle": 4, "packets": {packets}, "bytes": 60}}}},
            {{"rule": {{"chain": "outbound", "handle": 8, "expr": [{{"{rule}": null}}]}}}}]}}"#
        )
    }

    #[test]
    fn what_was_counted_is_told_and_changes_nothing() {
        let (before, none) = parse(&listing(0, "accept")).unwrap();
        let (after, some) = parse(&listing(7, "accept")).unwrap();
        assert_eq!(before, after);
        assert_eq!((none.of(Counter::Redirected), some.of(Counter::Redirected)), (0, 7));
        assert_ne!(before, parse(&listing(0, "drop")).unwrap().0);
        assert!(parse("{}").is_err() && parse("").is_err());
    }

    #[test]
    fn a_cgroup_is_compared_by_its_number() {
        let rule = |path: &str| serde_json::json!([{ "match": { "left": { "socket": { "key": "cgroupv2" } }, "right": path } }]);
        let inode = |path: &str| ["a", "cpu/b"].contains(&path).then_some(7);
        let named = |path: &str| {
            let mut rule = rule(path);
            name_cgroups(&mut rule, &inode);
            rule
        };
        assert_eq!(named("a"), named("cpu/b"));
        assert_ne!(named("a"), named("c"));
    }
}
