//! The demo's shop: ordinary small services that know nothing of a mesh, one role each.

mod inventory_proto;

fn main() {}
