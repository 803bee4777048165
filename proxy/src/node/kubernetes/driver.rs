//! The CSI driver as the kubelet calls it, and how the kubelet gets to know it.
//!
//! Sources: the CSI specification (Identity and Node service), the kubelet's `pluginregistration/v1`. The driver has no
//! controller, attaches nothing, stages nothing and mounts nothing.

use std::path::PathBuf;
use std::sync::Arc;

use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::csi_proto::identity_server::Identity;
use super::csi_proto::node_server::Node;
use super::csi_proto::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse, NodePublishVolumeRequest,
    NodePublishVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, ProbeRequest, ProbeResponse,
};
use super::registration_proto::registration_server::Registration;
use super::registration_proto::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use super::volume::Wrong;
use super::volumes::{VolumeError, Volumes};
use crate::model::marks::DRIVER;

/// What is served at the driver's socket.
#[derive(Clone)]
pub(super) struct Driver {
    pub(super) volumes: Arc<Volumes>,
    /// The node's name.
    pub(super) node: String,
}

/// What is served at the socket by which the kubelet learns of the driver.
pub(super) struct Introduction {
    /// The driver's socket, as the kubelet sees it.
    pub(super) endpoint: PathBuf,
}

#[tonic::async_trait]
impl Identity for Driver {
    async fn get_plugin_info(&self, _: Request<GetPluginInfoRequest>) -> Result<Response<GetPluginInfoResponse>, Status> {
        let vendor_version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(GetPluginInfoResponse { name: DRIVER.to_owned(), vendor_version }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(GetPluginCapabilitiesResponse {}))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse {}))
    }
}

#[tonic::async_trait]
impl Node for Driver {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let NodePublishVolumeRequest { volume_id, target_path, readonly, volume_context } = request.into_inner();
        let published = self.volumes.publish(&volume_id, &target_path, readonly, &volume_context).await;
        published.map_err(|error| refused(&volume_id, &error))?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let NodeUnpublishVolumeRequest { volume_id, target_path } = request.into_inner();
        self.volumes.unpublish(&volume_id, &target_path).map_err(|error| refused(&volume_id, &error))?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        Ok(Response::new(NodeGetCapabilitiesResponse {}))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse { node_id: self.node.clone() }))
    }
}

#[tonic::async_trait]
impl Registration for Introduction {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: DRIVER.to_owned(),
            endpoint: self.endpoint.display().to_string(),
            supported_versions: vec![CSI_VERSION.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        if plugin_registered {
            info!(driver = DRIVER, "the kubelet knows the driver");
        } else {
            // It tries again by itself.
            warn!(driver = DRIVER, error, "the kubelet does not take the driver");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// The kubelet writes the text into the pod's events.
fn refused(volume: &str, error: &VolumeError) -> Status {
    let text = super::super::chain(error);
    warn!(volume, error = text, "a volume is refused");
    match error {
        VolumeError::Wrong(Wrong::Taken(_)) => Status::already_exists(text),
        VolumeError::Wrong(Wrong::AnotherPod { .. }) => Status::permission_denied(text),
        VolumeError::Wrong(_) => Status::invalid_argument(text),
        VolumeError::Failed { .. } => Status::internal(text),
        VolumeError::Unclosed(_) => Status::unavailable(text),
    }
}

const CSI_VERSION: &str = "1.0.0";
