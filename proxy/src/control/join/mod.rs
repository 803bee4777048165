//! What proves a node that joins: the operator's token, or on Kubernetes the token of the agent's own pod.

pub(crate) mod kubernetes;

use tracing::warn;

use self::kubernetes::Reviewer;
use super::token::Token;
use crate::base::names::check_name;

/// Who may join, and as which node.
pub(crate) enum Join {
    /// Whoever shows the operator's token, under the name that it gives itself.
    Token(Token),
    /// A pod of the node agent, as the node that the API server says it runs on.
    Kubernetes(Box<Reviewer>),
}

/// Why a node may not join.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotJoined {
    /// The caller is at fault.
    #[error("the join token is wrong; it stands in join-token in the control plane's state folder")]
    Token,
    /// The caller is at fault.
    #[error("{0:?} is no name of a node")]
    Name(String),
    /// The caller is at fault.
    #[error("the service account token is refused: {0}")]
    Account(String),
    /// The environment: nobody could be asked.
    #[error("the service account token cannot be looked at: {0}")]
    NotReviewed(String),
}

impl Join {
    /// The node that `token` proves to be there, which says of itself that it is `claimed`.
    ///
    /// # Errors
    /// It proves none.
    pub(crate) async fn node(&self, token: &str, claimed: &str) -> Result<String, NotJoined> {
        let node = match self {
            Self::Token(known) if known.fits(token) => claimed.to_owned(),
            Self::Token(_) => return Err(NotJoined::Token),
            Self::Kubernetes(reviewer) => reviewer.node(token).await?,
        };
        if node != claimed {
            warn!(node, claimed, "a node joins under another name than the one that it gives itself");
            return Err(NotJoined::Account(format!("it is of a pod on the node {node}, not on {claimed}")));
        }
        check_name(&node).map_err(|_not_a_name| NotJoined::Name(node.clone()))?;
        Ok(node)
    }

    /// Is every workload bound to one node? Of pods that `outrigger run` made nobody says which.
    pub(crate) const fn binds_to_nodes(&self) -> bool {
        match self {
            Self::Token(_) => false,
            Self::Kubernetes(_) => true,
        }
    }
}
