//! What the published suite of Gateway API needs on a cluster: its program, and the image that its mesh tests run in pods.
//!
//! Nothing is pulled here: the image is made of the sources of the one that the suite's manifests name, which is Istio's echo.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::{build, programs, up};
use crate::image::Image;
use crate::setup::step;

/// Who runs it, as in the published image.
const USER: &str = "1338:1338";
/// The end of the only name that this can stand for.
const NAME: &str = "/echo-advanced";

/// Builds the suite, and gives the node the image under the name that the suite has for it.
pub(super) fn run(root: &Path) -> Result<()> {
    build::suite(root)?;
    let suite = build::sources(root, "gateway", "sigs.k8s.io/gateway-api/conformance")?;
    let manifests =
        std::fs::read_to_string(suite.join("mesh/manifests.yaml")).context("the suite has no manifests for a mesh")?;
    let certificates = build::sources(root, "echo", "istio.io/istio")?.join("tests/testdata/certs/dns");
    let program = |name: &str| (programs(root).join("echo").join(name), format!("bin/{name}"));
    for name in images(&manifests) {
        ensure!(
            name.split(':').next().is_some_and(|name| name.ends_with(NAME)),
            "the suite wants an image that is not made here: {name}"
        );
        let image = Image {
            name: name.to_owned(),
            entrypoint: vec!["/bin/server".to_owned()],
            user: USER.to_owned(),
            folders: Vec::new(),
            files: vec![
                program("server"),
                program("client"),
                (certificates.join("cert-chain.pem"), "cert.crt".to_owned()),
                (certificates.join("key.pem"), "cert.key".to_owned()),
            ],
        };
        step("giving the node the suite's image", || up::load(root, &image))?;
    }
    Ok(())
}

/// The images that manifests name, each once.
fn images(manifests: &str) -> BTreeSet<&str> {
    manifests.lines().filter_map(|line| line.trim().trim_start_matches("- ").strip_prefix("image:")).map(str::trim).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_image_of_the_manifests_is_found_once() {
        let manifests = "spec:\n  containers:\n    - name: a\n      image: r/echo-advanced:v1\n    - image: r/echo-advanced:v1\n";
        assert_eq!(images(manifests).into_iter().collect::<Vec<_>>(), ["r/echo-advanced:v1"]);
    }
}
