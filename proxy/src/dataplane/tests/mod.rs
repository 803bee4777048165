//! Whole sidecars in memory: real HTTP and TLS at both ends, paused time, scripted applications.

mod answers;
mod attacks;
mod burst;
mod config;
mod connect;
mod connections;
mod cost;
mod credit;
mod expect;
mod fidelity;
mod grants;
mod headroom;
mod http;
mod interims;
mod leaving;
mod link;
mod malformed;
mod opaque;
mod outbound;
mod refusals;
mod rest;
mod revoked;
mod routes;
mod smuggling;
mod streams;
mod trust;
mod unseen;
mod upload;

use super::world;
