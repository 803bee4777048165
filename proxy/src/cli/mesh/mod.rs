//! Which mesh a command asks that only reads: the one of this machine, or that of a cluster.
//!
//! Invariant: a cluster is asked where somebody says so, or where no mesh is on this machine and a kubeconfig names a cluster;
//! never in the place of an API that was named.

mod cluster;
mod merge;

use std::ffi::OsStr;
use std::path::Path;

use clap::Args;
use serde_json::Value;

use self::cluster::Cluster;
use super::client::{self, ApiArgs};
use super::local::read_up_record;
use super::{Failure, warn};

/// Whom to ask.
#[derive(Args, Debug)]
pub(crate) struct MeshArgs {
    #[command(flatten)]
    api: ApiArgs,
    /// Ask the mesh of the cluster that KUBECONFIG names, by kubectl; also done by itself where no mesh is on this machine
    #[arg(long, conflicts_with_all = ["address", "token_file"])]
    kubernetes: bool,
}

/// The mesh that is asked.
pub(crate) enum Mesh<'a> {
    /// One control plane, at an address.
    Api(&'a ApiArgs),
    /// All replicas of a cluster's.
    Cluster(Cluster),
}

impl MeshArgs {
    /// Finds out which it is.
    ///
    /// # Errors
    /// It is a cluster's, and no control plane of it can be asked.
    pub(crate) fn find(&self) -> Result<Mesh<'_>, Failure> {
        if self.kubernetes {
            return Cluster::find().map(Mesh::Cluster);
        }
        let is_here = self.api.is_named() || read_up_record().is_some() || self.api.is_served();
        let named = std::env::var_os("KUBECONFIG");
        if is_here || !names_a_cluster(named.as_deref(), std::env::home_dir().as_deref()) {
            return Ok(Mesh::Api(&self.api));
        }
        let cluster = Cluster::find()?;
        warn("no mesh is up on this machine: the one of the cluster that the kubeconfig names is asked");
        Ok(Mesh::Cluster(cluster))
    }

    /// The API at an address; none where a cluster is asked for by name.
    pub(crate) fn api(&self) -> Option<&ApiArgs> {
        (!self.kubernetes).then_some(&self.api)
    }
}

impl Mesh<'_> {
    /// Asks its API and returns its answer; of several replicas it is one answer, with what each of them alone knows.
    pub(crate) fn get(&self, path: &str) -> Result<Value, Failure> {
        match self {
            Self::Api(api) => client::get(api, path),
            Self::Cluster(cluster) => cluster.get(path),
        }
    }

    /// Is it the one that is up on this machine?
    pub(crate) fn is_of_this_machine(&self) -> bool {
        match self {
            Self::Api(api) => api.is_of_this_machine(),
            Self::Cluster(_) => false,
        }
    }
}

/// Does somebody work with a cluster here? As kubectl finds it: by the variable, or at the usual place.
fn names_a_cluster(kubeconfig: Option<&OsStr>, home: Option<&Path>) -> bool {
    kubeconfig.is_some_and(|named| !named.is_empty()) || home.is_some_and(|home| home.join(".kube/config").exists())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, FromArgMatches as _, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        mesh: MeshArgs,
    }

    fn read(words: &[&str]) -> Result<MeshArgs, clap::Error> {
        let matches = Line::command().try_get_matches_from([&["line"], words].concat())?;
        Line::from_arg_matches(&matches).map(|line| line.mesh)
    }

    #[test]
    fn a_cluster_is_named_by_the_variable_or_at_the_usual_place() {
        let home = tempfile::tempdir().unwrap();
        let named = |variable: Option<&str>| names_a_cluster(variable.map(OsStr::new), Some(home.path()));
        assert_eq!([named(None), named(Some("")), named(Some("/a"))], [false, false, true]);
        std::fs::create_dir(home.path().join(".kube")).unwrap();
        std::fs::write(home.path().join(".kube/config"), "").unwrap();
        assert!(named(None) && named(Some("")));
        assert!(!names_a_cluster(None, None));
    }

    #[test]
    fn an_api_that_is_named_is_asked_and_nothing_else() {
        let args = read(&["--api", "127.0.0.1:9"]).unwrap();
        assert!(matches!(args.find(), Ok(Mesh::Api(_))));
        let args = read(&["--token-file", "/nowhere"]).unwrap();
        assert!(matches!(args.find(), Ok(Mesh::Api(_))));
    }

    #[test]
    fn an_api_and_a_cluster_are_not_asked_together() {
        let told = read(&["--kubernetes", "--api", "127.0.0.1:9"]).unwrap_err().to_string();
        assert!(told.contains("--api") && told.contains("--kubernetes"), "{told}");
        assert!(read(&["--kubernetes"]).unwrap().api().is_none());
    }
}
