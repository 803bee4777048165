//! The node agent: pods of this machine, their enrolment, their identity, the kernel programs.

pub(crate) mod kernel;
pub(crate) mod workload_proto;
