//! The stock, by gRPC: the service and its client.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use tonic::{Request, Response, Status};

use crate::inventory_proto::inventory_client::InventoryClient;
use crate::inventory_proto::inventory_server::{Inventory, InventoryServer};
use crate::inventory_proto::{StockReply, StockRequest};

struct Shelf;

#[tonic::async_trait]
impl Inventory for Shelf {
    async fn stock(&self, request: Request<StockRequest>) -> Result<Response<StockReply>, Status> {
        let product = request.into_inner().product;
        println!("inventory Stock {product}");
        let pieces = match product.as_str() {
            "canoe" => 7,
            "paddle" => 40,
            _ => return Err(Status::not_found(format!("no product {product}"))),
        };
        Ok(Response::new(StockReply { product, pieces }))
    }
}

/// Serves until the process is ended.
pub(crate) async fn serve(port: u16) -> Result<()> {
    let address = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
    println!("inventory listens on port {port}");
    tonic::transport::Server::builder().add_service(InventoryServer::new(Shelf)).serve(address).await.context("cannot serve")
}

/// Asks for the pieces of a product.
pub(crate) async fn stock(address: &'static str, product: &str) -> Result<u32> {
    let mut client = InventoryClient::connect(address).await.context("cannot reach inventory")?;
    let reply = client.stock(StockRequest { product: product.to_owned() }).await?;
    Ok(reply.into_inner().pieces)
}
