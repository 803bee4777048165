//! HTTP, from codec to codec. Read `pipeline.rs` first: it holds the order, the files beside it hold the steps.

pub(crate) mod answers;
pub(crate) mod attempt;
pub(crate) mod body;
pub(crate) mod credit;
mod cut;
pub(crate) mod expect;
pub(crate) mod frames;
pub(crate) mod guard;
pub(crate) mod inflow;
pub(crate) mod interims;
pub(crate) mod marks;
pub(crate) mod normalize;
pub(crate) mod outflow;
pub(crate) mod pipeline;
pub(crate) mod reading;
pub(crate) mod record;
pub(crate) mod reject;
mod rest;
mod revoked;
pub(crate) mod series;
pub(crate) mod server;
pub(crate) mod spelling;
mod streams;
pub(crate) mod tunnel;
mod unseen;
pub(crate) mod upgrade;
mod websocket;
