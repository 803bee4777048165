//! Where a field stands in a YAML text. A second reading, made only for a message.

use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::Spanned;

use super::options;

/// Line and column of the field at `path` (as `spec.rules[0].matches`); of the nearest thing around it where it is not
/// written. None where the text cannot be read.
pub(super) fn locate(text: &str, path: &str) -> Option<(u64, u64)> {
    let tree: Spanned<Node> = serde_saphyr::from_str_with_options(text, options()).ok()?;
    let mut place = (tree.referenced.line(), tree.referenced.column());
    let mut node = &tree.value;
    for step in steps(path) {
        let found = match (node, step) {
            (Node::Map(entries), Step::Field(name)) => {
                entries.iter().find(|(key, _)| key.value == name).map(|(key, value)| (key.referenced, value))
            }
            (Node::List(items), Step::Index(index)) => items.get(index).map(|item| (item.referenced, item)),
            _ => None,
        };
        let Some((at, next)) = found else { break };
        if at.line() > 0 {
            place = (at.line(), at.column());
        }
        node = &next.value;
    }
    (place.0 > 0).then_some(place)
}

/// One step of a path.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step<'a> {
    Field(&'a str),
    Index(usize),
}

fn steps(path: &str) -> impl Iterator<Item = Step<'_>> {
    path.split('.').filter(|part| !part.is_empty()).flat_map(|part| {
        let (name, indices) = part.split_once('[').map_or((part, ""), |(name, rest)| (name, rest));
        let indices = indices.split('[').filter_map(|index| index.strip_suffix(']')?.parse().ok()).map(Step::Index);
        [name].into_iter().filter(|name| !name.is_empty()).map(Step::Field).chain(indices)
    })
}

/// A document as far as places in it matter.
#[derive(Debug)]
enum Node {
    Map(Vec<(Spanned<String>, Spanned<Self>)>),
    List(Vec<Spanned<Self>>),
    Leaf,
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
                Ok(Node::Leaf)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
                Ok(Node::Leaf)
            }

            fn visit_i128<E>(self, _: i128) -> Result<Node, E> {
                Ok(Node::Leaf)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
                Ok(Node::Leaf)
            }

            fn visit_u128<E>(self, _: u128) -> Result<Node, E> {
                Ok(Node::Leaf)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
                Ok(Node::Leaf)
            }

            fn visit_str<E>(self, _: &str) -> Result<Node, E> {
                Ok(Node::Leaf)
            }

            fn visit_bytes<E>(self, _: &[u8]) -> Result<Node, E> {
                Ok(Node::Leaf)
            }

            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Leaf)
            }

            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Leaf)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
                Node::deserialize(deserializer)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    items.push(item);
                }
                Ok(Node::List(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Node::Map(entries))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "spec:\n  rules:\n  - name: a\n  - name: b\n    matches:\n      - path: {value: /x}\n";

    #[test]
    fn a_path_is_found_in_a_text() {
        for (path, place) in [
            ("", (1, 1)),
            ("spec", (1, 1)),
            ("spec.rules", (2, 3)),
            ("spec.rules[1]", (4, 5)),
            ("spec.rules[1].matches[0].path.value", (6, 16)),
        ] {
            assert_eq!(locate(TEXT, path), Some(place), "{path}");
        }
    }

    #[test]
    fn what_is_not_written_is_where_it_should_be() {
        assert_eq!(locate(TEXT, "spec.rules[1].retry.codes"), Some((4, 5)));
        assert_eq!(locate(TEXT, "spec.rules[7]"), Some((2, 3)));
        assert_eq!(locate("a: [", "a"), None);
    }
}
