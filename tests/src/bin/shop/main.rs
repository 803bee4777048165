//! The demo's shop: ordinary small services that know nothing of a mesh, one role each.
//!
//! They find each other by name, speak plain HTTP/1.1 and gRPC, retry nothing, encrypt nothing and check nobody.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an ordinary program speaks to its terminal")]
#![expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "an ordinary program reads the clock")]

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

mod certificates;
mod inventory;
mod inventory_proto;
mod reflect;
mod services;
mod token;
mod web;

const USAGE: &str = "usage: shop ROLE

services (each listens on PORT, 8080 unless the variable says otherwise):
  storefront   the shop's page: asks catalog, reviews and inventory; PUT /order asks payments
  catalog      products
  reviews      what people think; VERSION says which version answers
  inventory    pieces in stock, by gRPC
  payments     takes money; FAIL_EVERY=N makes every Nth payment fail
  echo         answers what it was asked: ?status=503, ?delay=200 (ms), ?once=KEY (503 the first time)
  reflect      the same in HTTP/1.1, HTTP/2 and gRPC, on all of PORTS, 8080,7070 unless the variable says otherwise;
               gRPC's health check too: HEALTH=NOT_SERVING makes it ill
tools:
  certificates FOLDER                   make an authority and certificates of a server and a client
  keys FOLDER                           make a signing key and its key set (key.pk8, jwks.json)
  token FOLDER ISSUER AUDIENCE SUBJECT SECONDS [CLAIM=VALUE]...   sign a token that expires in so many seconds";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shop: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["certificates", folder] => return certificates::make(folder),
        ["keys", folder] => return token::make_keys(folder),
        ["token", folder, issuer, audience, subject, seconds, claims @ ..] => {
            println!("{}", token::sign(folder, issuer, audience, subject, seconds.parse().context("SECONDS")?, claims)?);
            return Ok(());
        }
        _ => {}
    }
    let [role] = words.as_slice() else { bail!("{USAGE}") };
    let port = std::env::var("PORT").ok().map_or(Ok(8080), |port| port.parse()).context("PORT is no port")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match *role {
            "reflect" => {
                let ports = std::env::var("PORTS").unwrap_or_else(|_unset| "8080,7070".to_owned());
                let ports: Vec<u16> = ports.split(',').map(str::parse).collect::<Result<_, _>>().context("PORTS are no ports")?;
                reflect::serve(&ports, services::Service::new("echo")?).await
            }
            "inventory" => inventory::serve(port).await,
            "storefront" | "catalog" | "reviews" | "payments" | "echo" => web::serve(port, services::Service::new(role)?).await,
            _ => bail!("{USAGE}"),
        }
    })
}
