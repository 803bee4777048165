//! Which texts are references of images: a registry, a name, a tag, a digest.
//!
//! Source: the grammar of the distribution project's `reference` package, by which the nodes read them, and the digests of the
//! OCI image specification. A pod with any other text is admitted by the API server, and never started by its node
//! (`InvalidImageName`).

/// Is it an image's reference? Whether there is such an image, the node will see.
pub(crate) fn is_image(text: &str) -> bool {
    let (text, digest) = text.split_once('@').map_or((text, None), |(text, digest)| (text, Some(digest)));
    let (name, tag) = match text.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        // The colon before a registry's port, or none.
        _untagged => (text, None),
    };
    name.len() <= NAME_MAX && is_name(name) && tag.is_none_or(is_tag) && digest.is_none_or(is_digest)
}

fn is_name(name: &str) -> bool {
    let is_of_registry = |(registry, path): (&str, &str)| is_registry(registry) && is_path(path);
    is_path(name) || name.split_once('/').is_some_and(is_of_registry)
}

fn is_path(path: &str) -> bool {
    path.split('/').all(is_path_component)
}

fn is_path_component(component: &str) -> bool {
    let is_plain = |sign: char| sign.is_ascii_lowercase() || sign.is_ascii_digit();
    let is_separator = |between: &str| matches!(between, "" | "." | "_" | "__") || between.bytes().all(|sign| sign == b'-');
    component.starts_with(is_plain) && component.ends_with(is_plain) && component.split(is_plain).all(is_separator)
}

fn is_registry(registry: &str) -> bool {
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|digit| digit.is_ascii_digit());
    if let Some((address, port)) = registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        let is_address = !address.is_empty() && address.bytes().all(|sign| sign == b':' || sign.is_ascii_hexdigit());
        return is_address && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    }
    let (host, port) = registry.split_once(':').map_or((registry, None), |(host, port)| (host, Some(port)));
    let is_label = |label: &str| {
        let is_plain = |sign: char| sign.is_ascii_alphanumeric();
        label.starts_with(is_plain) && label.ends_with(is_plain) && label.chars().all(|sign| is_plain(sign) || sign == '-')
    };
    host.split('.').all(is_label) && port.is_none_or(is_port)
}

fn is_tag(tag: &str) -> bool {
    let is_word = |sign: char| sign.is_ascii_alphanumeric() || sign == '_';
    tag.len() <= TAG_MAX && tag.starts_with(is_word) && tag.chars().all(|sign| is_word(sign) || matches!(sign, '.' | '-'))
}

fn is_digest(digest: &str) -> bool {
    let Some((algorithm, digits)) = digest.split_once(':') else { return false };
    let length = DIGESTS.into_iter().find_map(|(name, length)| (name == algorithm).then_some(length));
    length == Some(digits.len()) && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

const NAME_MAX: usize = 255;
const TAG_MAX: usize = 128;
/// The algorithms that nodes know, and how many digits each gives.
const DIGESTS: [(&str, usize); 3] = [("sha256", 64), ("sha384", 96), ("sha512", 128)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_a_registry_a_name_a_tag_and_a_digest() {
        let digest = "0123456789abcdef".repeat(4);
        for text in [
            "outrigger",
            "outrigger:0.1.0",
            "library/outrigger",
            "registry.example/outrigger:1.0",
            "registry.example:5000/team-a/out_rigger/x__y/a.b/c--d:V1.0-rc.1_x",
            "localhost:5000/outrigger",
            "REGISTRY/outrigger",
            "[fd00::1]:5000/outrigger:1",
            "[fd00::1]/outrigger",
            "outrigger:_-.",
            &format!("outrigger@sha256:{digest}"),
            &format!("registry.example/outrigger:1.0@sha512:{digest}{digest}"),
            &"a".repeat(255),
        ] {
            assert!(is_image(text), "{text}");
        }
    }

    #[test]
    fn what_no_node_could_read_is_no_reference() {
        let digest = "0123456789abcdef".repeat(4);
        for text in [
            "",
            "a b",
            "a//b:c:d",
            "a//b",
            "a:b:c",
            "/outrigger",
            "outrigger/",
            "outrigger:",
            ":1.0",
            "Outrigger",
            "registry.example/Outrigger",
            "registry.example:port/outrigger",
            "registry.example:/outrigger",
            "-registry/outrigger",
            "registry-.example/outrigger",
            "registry..example/outrigger",
            "[fd00::1/outrigger",
            "[]:5000/outrigger",
            "[fd00::1]5000/outrigger",
            "out___rigger",
            "out..rigger",
            "out.-rigger",
            "_outrigger",
            "outrigger-",
            "outrigger:-1",
            "outrigger:1+2",
            "https://registry.example/outrigger",
            "outrigger@",
            "outrigger@sha256:0a",
            "outrigger@latest",
            &format!("outrigger@md5:{digest}"),
            &format!("outrigger@sha256:{}", digest.to_uppercase()),
            &format!("outrigger@sha256:{digest}:1"),
            &format!("outrigger:{}", "1".repeat(129)),
            &"a".repeat(256),
        ] {
            assert!(!is_image(text), "{text}");
        }
    }
}
