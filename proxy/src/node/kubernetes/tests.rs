//! The driver as the kubelet calls it: real gRPC over real sockets, in a folder as the kubelet has it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Server};

use super::beginning::Unclosed;
use super::csi_proto::identity_client::IdentityClient;
use super::csi_proto::identity_server::IdentityServer;
use super::csi_proto::node_client::NodeClient;
use super::csi_proto::node_server::NodeServer;
use super::csi_proto::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest, ProbeRequest,
};
use super::driver::{Driver, Introduction};
use super::registration_proto::registration_client::RegistrationClient;
use super::registration_proto::registration_server::RegistrationServer;
use super::registration_proto::{InfoRequest, RegistrationStatus};
use super::volume::tests::context;
use super::volumes::{Behind, Sockets, Volumes};
use super::{Owner, bind, serve};
use crate::model::marks::DRIVER;

/// Says at each socket whose it is.
struct Sayer {
    seen: Arc<Seen>,
}

/// What was asked of it.
#[derive(Default)]
struct Seen {
    gone: Mutex<Vec<String>>,
    closed: Mutex<Vec<String>>,
    /// Pods have no cgroup yet.
    is_early: AtomicBool,
}

#[tonic::async_trait]
impl Behind for Sayer {
    async fn close(&self, owner: &Owner) -> Result<(), Unclosed> {
        if self.seen.is_early.load(Ordering::Relaxed) {
            return Err(Unclosed::NoCgroup { root: "/sys/fs/cgroup".to_owned() });
        }
        self.seen.closed.lock().push(owner.uid.clone());
        Ok(())
    }

    fn serve(&self, owner: Arc<Owner>, sockets: Sockets) -> JoinSet<()> {
        let mut served = JoinSet::new();
        for (word, socket) in [("enrolment", sockets.enrolment), ("workload", sockets.workload_api)] {
            let owner = Arc::clone(&owner);
            served.spawn(async move {
                loop {
                    let (mut stream, _unnamed) = socket.accept().await.unwrap();
                    stream.write_all(format!("{word} of {} {}", owner.named(), owner.uid).as_bytes()).await.unwrap();
                }
            });
        }
        served
    }

    fn gone(&self, owner: &Owner) {
        self.seen.gone.lock().push(owner.uid.clone());
    }
}

/// A kubelet's folder, and a driver that serves it.
struct Kubelet {
    folder: PathBuf,
    seen: Arc<Seen>,
    parts: JoinSet<()>,
    node: NodeClient<Channel>,
}

impl Kubelet {
    fn volumes(folder: &Path, seen: &Arc<Seen>) -> Arc<Volumes> {
        let behind = Sayer { seen: Arc::clone(seen) };
        Arc::new(Volumes::restore(folder.join("pods"), folder.join("written"), behind).unwrap())
    }

    async fn start(folder: &Path) -> Self {
        let (seen, mut parts) = (Arc::default(), JoinSet::new());
        let driver = Driver { volumes: Self::volumes(folder, &seen), node: "n1".to_owned() };
        let path = folder.join("csi.sock");
        let router = Server::builder().add_service(IdentityServer::new(driver.clone())).add_service(NodeServer::new(driver));
        serve(bind(&path).unwrap(), router, &mut parts);
        let node = NodeClient::new(dial(path).await);
        Self { folder: folder.to_owned(), seen, parts, node }
    }

    /// What the kubelet makes before it asks.
    fn target(&self, uid: &str) -> String {
        let parent = self.folder.join("pods").join(uid).join("volumes/kubernetes.io~csi/outrigger");
        std::fs::create_dir_all(&parent).unwrap();
        parent.join("mount").display().to_string()
    }

    async fn publish(&mut self, id: &str, target: &str, context: HashMap<String, String>) -> Result<(), (Code, String)> {
        let request = NodePublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: target.to_owned(),
            readonly: true,
            volume_context: context,
        };
        let answer = self.node.node_publish_volume(request).await;
        answer.map(drop).map_err(|status| (status.code(), status.message().to_owned()))
    }

    async fn unpublish(&mut self, id: &str, target: &str) -> Result<(), Code> {
        let request = NodeUnpublishVolumeRequest { volume_id: id.to_owned(), target_path: target.to_owned() };
        self.node.node_unpublish_volume(request).await.map(drop).map_err(|status| status.code())
    }
}

/// As the kubelet dials: its gRPC library sends the socket's path as `:authority`.
async fn dial(path: PathBuf) -> Channel {
    let connector = tower::service_fn(move |_uri: http::Uri| {
        let path = path.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap()
}

async fn said(target: &str, socket: &str) -> String {
    let mut text = String::new();
    let mut stream = UnixStream::connect(Path::new(target).join(socket)).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut text)).await.unwrap().unwrap();
    text
}

#[tokio::test]
async fn a_pod_gets_sockets_that_are_known_to_be_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut kubelet = Kubelet::start(folder.path()).await;
    let (one, other) = (kubelet.target("0a-1"), kubelet.target("0b-2"));
    kubelet.publish("csi-1", &one, context("0a-1")).await.unwrap();
    kubelet.publish("csi-2", &other, context("0b-2")).await.unwrap();
    assert_eq!(said(&one, "node.sock").await, "enrolment of shop/web-1 0a-1");
    assert_eq!(said(&one, "workload.sock").await, "workload of shop/web-1 0a-1");
    assert_eq!(said(&other, "node.sock").await, "enrolment of shop/web-1 0b-2");
    // It asks again whenever it is not sure.
    kubelet.publish("csi-1", &one, context("0a-1")).await.unwrap();
    assert_eq!(said(&one, "node.sock").await, "enrolment of shop/web-1 0a-1");

    kubelet.unpublish("csi-1", &one).await.unwrap();
    kubelet.unpublish("csi-1", &one).await.unwrap();
    assert!(!Path::new(&one).exists() && Path::new(&other).exists());
    assert_eq!(*kubelet.seen.gone.lock(), ["0a-1"], "once");
    assert_eq!(std::fs::read_dir(folder.path().join("written")).unwrap().count(), 1);
}

#[tokio::test]
async fn a_pod_is_closed_when_its_volume_is_asked_for_and_has_none_while_it_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let mut kubelet = Kubelet::start(folder.path()).await;
    let target = kubelet.target("0a-1");
    kubelet.seen.is_early.store(true, Ordering::Relaxed);
    let (code, text) = kubelet.publish("csi-1", &target, context("0a-1")).await.unwrap_err();
    assert_eq!(code, Code::Unavailable);
    let expected = "the pod is not started, for it cannot be closed until its sidecar is enrolled: the kubelet has made no cgroup of the pod";
    assert!(text.starts_with(expected), "{text}");
    // The kubelet asks again, also when it has had an answer.
    kubelet.seen.is_early.store(false, Ordering::Relaxed);
    for _again in 0..2 {
        kubelet.publish("csi-1", &target, context("0a-1")).await.unwrap();
    }
    assert_eq!(*kubelet.seen.closed.lock(), ["0a-1"; 2]);
    assert_eq!(said(&target, "node.sock").await, "enrolment of shop/web-1 0a-1");
    // What is no volume closes nobody.
    kubelet.publish("csi-2", &target, context("0b-2")).await.unwrap_err();
    assert_eq!(kubelet.seen.closed.lock().len(), 2);
}

#[tokio::test]
async fn who_begins_or_ends_is_always_known_for_one_or_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let seen = Arc::default();
    let volumes = Kubelet::volumes(folder.path(), &seen);
    let parent = folder.path().join("pods/0a-1/volumes/kubernetes.io~csi/outrigger");
    std::fs::create_dir_all(&parent).unwrap();
    let target = parent.join("mount").display().to_string();
    seen.is_early.store(true, Ordering::Relaxed);
    volumes.publish("csi-1", &target, true, &context("0a-1")).await.unwrap_err();
    assert_eq!(volumes.owners().len(), 1, "it may be closed later than its volume is there, and not earlier");
    volumes.unpublish("csi-1", &target).unwrap();
    assert!(volumes.owners().is_empty() && *seen.gone.lock() == ["0a-1"]);
}

#[tokio::test]
async fn a_driver_that_comes_back_serves_the_folders_that_are_there_and_forgets_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let mut kubelet = Kubelet::start(folder.path()).await;
    let (one, other) = (kubelet.target("0a-1"), kubelet.target("0b-2"));
    kubelet.publish("csi-1", &one, context("0a-1")).await.unwrap();
    kubelet.publish("csi-2", &other, context("0b-2")).await.unwrap();
    kubelet.parts.shutdown().await;
    drop(kubelet);
    std::fs::write(folder.path().join("written/csi-3.json"), b"{").unwrap();
    std::fs::remove_dir_all(folder.path().join("pods/0b-2")).unwrap();

    let mut kubelet = Kubelet::start(folder.path()).await;
    assert_eq!(said(&one, "node.sock").await, "enrolment of shop/web-1 0a-1");
    assert_eq!(*kubelet.seen.gone.lock(), ["0b-2"]);
    kubelet.unpublish("csi-1", &one).await.unwrap();
    kubelet.unpublish("csi-2", &other).await.unwrap();
}

#[tokio::test]
async fn what_is_no_pods_volume_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut kubelet = Kubelet::start(folder.path()).await;
    let target = kubelet.target("0a-1");
    let refused = |answer: Result<(), (Code, String)>| answer.unwrap_err();
    let (code, text) = refused(kubelet.publish("csi-1", &target, HashMap::new()).await);
    assert_eq!((code, text.as_str()), (Code::InvalidArgument, "this driver has ephemeral inline volumes only"));
    let mut unnamed = context("0a-1");
    unnamed.remove("csi.storage.k8s.io/pod.uid");
    let (code, text) = refused(kubelet.publish("csi-1", &target, unnamed).await);
    assert!(code == Code::InvalidArgument && text.contains("podInfoOnMount"), "{text}");
    let (code, text) = refused(kubelet.publish("csi-1", &target, context("0b-2")).await);
    assert!(code == Code::PermissionDenied && text.contains("0b-2"), "{text}");
    for elsewhere in ["/etc", "", &format!("{target}/../../x")] {
        let (code, text) = refused(kubelet.publish("csi-1", elsewhere, context("0a-1")).await);
        assert!(code == Code::InvalidArgument && text.contains("is no volume of this driver in"), "{text}");
        assert_eq!(kubelet.unpublish("csi-1", elsewhere).await, Err(Code::InvalidArgument));
    }
    assert_eq!(refused(kubelet.publish("../csi", &target, context("0a-1")).await).0, Code::InvalidArgument);
    let writable = NodePublishVolumeRequest {
        volume_id: "csi-1".to_owned(),
        target_path: target.clone(),
        readonly: false,
        volume_context: context("0a-1"),
    };
    let status = kubelet.node.node_publish_volume(writable).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "the volume can be written to; write readOnly: true"));
    assert!(!Path::new(&target).exists(), "nothing was made for any of them");

    kubelet.publish("csi-1", &target, context("0a-1")).await.unwrap();
    let another = kubelet.target("0b-2");
    let (code, text) = refused(kubelet.publish("csi-1", &another, context("0b-2")).await);
    assert!(code == Code::AlreadyExists && text.contains("csi-1"), "{text}");
    assert_eq!(kubelet.unpublish("csi-1", &another).await, Err(Code::AlreadyExists));
}

#[tokio::test]
async fn the_driver_says_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let mut kubelet = Kubelet::start(folder.path()).await;
    let mut identity = IdentityClient::new(dial(folder.path().join("csi.sock")).await);
    assert_eq!(identity.get_plugin_info(GetPluginInfoRequest {}).await.unwrap().into_inner().name, DRIVER);
    identity.get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await.unwrap();
    identity.probe(ProbeRequest {}).await.unwrap();
    assert_eq!(kubelet.node.node_get_info(NodeGetInfoRequest {}).await.unwrap().into_inner().node_id, "n1");
    kubelet.node.node_get_capabilities(NodeGetCapabilitiesRequest {}).await.unwrap();
}

#[tokio::test]
async fn the_kubelet_learns_where_the_driver_is() {
    let folder = tempfile::tempdir().unwrap();
    let (path, endpoint) = (folder.path().join("reg.sock"), PathBuf::from("/var/lib/kubelet/plugins/csi.outrigger.dev/csi.sock"));
    let mut parts = JoinSet::new();
    let router = Server::builder().add_service(RegistrationServer::new(Introduction { endpoint: endpoint.clone() }));
    serve(bind(&path).unwrap(), router, &mut parts);
    let mut client = RegistrationClient::new(dial(path).await);
    let info = client.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.r#type.as_str(), info.name.as_str(), Path::new(&info.endpoint)), ("CSIPlugin", DRIVER, endpoint.as_path()));
    assert_eq!(info.supported_versions, ["1.0.0"]);
    client.notify_registration_status(RegistrationStatus { plugin_registered: true, error: String::new() }).await.unwrap();
    client.notify_registration_status(RegistrationStatus { plugin_registered: false, error: "no".into() }).await.unwrap();
}

#[tokio::test]
async fn a_connection_that_names_the_sockets_path_as_its_authority_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("reg.sock");
    let mut parts = JoinSet::new();
    let router = Server::builder().add_service(RegistrationServer::new(Introduction { endpoint: "/run/a".into() }));
    serve(bind(&path).unwrap(), router, &mut parts);
    let mut stream = UnixStream::connect(&path).await.unwrap();
    // A question without a body, in HTTP/2 by hand: no library sends such an authority but the kubelet's.
    let field = |name: &str, value: &str| {
        let (name_bytes, value_bytes) = (u8::try_from(name.len()).unwrap(), u8::try_from(value.len()).unwrap());
        [&[0, name_bytes], name.as_bytes(), &[value_bytes], value.as_bytes()].concat()
    };
    let authority = "%2Frun%2Fa.sock";
    let mut block = vec![0x83, 0x86, 0x41, u8::try_from(authority.len()).unwrap()];
    block.extend_from_slice(authority.as_bytes());
    let method = "/pluginregistration.Registration/GetInfo";
    block.extend_from_slice(&[0x04, u8::try_from(method.len()).unwrap()]);
    block.extend_from_slice(method.as_bytes());
    block.extend(field("content-type", "application/grpc"));
    block.extend(field("te", "trailers"));
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let [_, _, a, b] = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[0, a, b, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let question =
        [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[]), &frame(1, 4, 1, &block), &frame(0, 1, 1, &[0; 5])]
            .concat();
    stream.write_all(&question).await.unwrap();
    let mut answer = Vec::new();
    let answered = async {
        while !answer.windows(DRIVER.len()).any(|bytes| bytes == DRIVER.as_bytes()) {
            let mut chunk = [0; 4096];
            let count = stream.read(&mut chunk).await.unwrap();
            assert!(count > 0, "the server closed: {answer:?}");
            answer.extend_from_slice(&chunk[..count]);
        }
    };
    tokio::time::timeout(Duration::from_secs(10), answered).await.unwrap();
}
