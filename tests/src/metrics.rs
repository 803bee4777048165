//! The Prometheus text format, as far as a reader of a sidecar's metrics needs it.

use std::collections::BTreeMap;

/// One sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Sample {
    /// A label's value; empty where there is none.
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// All samples of a page; lines that are none are passed over.
pub fn parse(page: &str) -> Vec<Sample> {
    page.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let (left, value) = line.rsplit_once(' ')?;
    let (name, labels) = left.split_once('{').map_or((left, ""), |(name, rest)| (name, rest.trim_end_matches('}')));
    let mut found = BTreeMap::new();
    let mut rest = labels;
    while let Some((label, after)) = rest.split_once("=\"") {
        // A value ends at the first quote that no backslash precedes.
        let mut value = String::new();
        let mut characters = after.char_indices();
        let mut end = after.len();
        while let Some((at, character)) = characters.next() {
            match character {
                '\\' => value.extend(characters.next().map(|(_, escaped)| if escaped == 'n' { '\n' } else { escaped })),
                '"' => {
                    end = at + 1;
                    break;
                }
                _ => value.push(character),
            }
        }
        found.insert(label.to_owned(), value);
        rest = after.get(end..).unwrap_or_default().trim_start_matches(',');
    }
    Some(Sample { name: name.to_owned(), labels: found, value: value.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_read_with_their_escapes() {
        let samples = parse("# HELP a b\na_total{x=\"1\",y=\"a \\\"b\\\", c\"} 3\nplain 0.5\n");
        assert_eq!(samples.len(), 2);
        assert_eq!((samples[0].label("x"), samples[0].label("y"), samples[0].value), ("1", "a \"b\", c", 3.0));
        assert_eq!((samples[1].name.as_str(), samples[1].value), ("plain", 0.5));
    }
}
