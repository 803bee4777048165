//! The node agent: pods of this machine, their enrolment, their identity, the kernel programs.

pub(crate) mod kernel;
pub(crate) mod netns;
pub(crate) mod workload_proto;
