//! Requests' bodies that go on after their answers began: how long, and what ends them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, SendStream};
use http::{Request, Response};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use super::world::{World, app_at, document, pod, service, vip};

/// More than all windows between a caller and an application take together.
const LONG: usize = 2 << 20;

/// What the application saw of a request's body.
#[derive(Debug, Eq, PartialEq)]
enum Seen {
    Whole(usize),
    Reset(Option<Reason>),
}

/// What the application does with a request: answers at once, `whole` or only the head, and reads nothing until it is told to.
fn world(whole: bool) -> (World, Arc<crate::dataplane::Proxy>, mpsc::UnboundedReceiver<Seen>, oneshot::Sender<()>) {
    let mut api = pod("api", "api-1", 3);
    // Not declared: the application is spoken to as its caller speaks.
    api["spec"]["ports"][0]["name"] = json!("main");
    let limits = document("Mesh", "mesh", json!({ "limits": { "streamTimeout": "30s" } }));
    let world = World::new(&[pod("web", "web-1", 2), api, service("api", "api", 1), limits]);
    let web = world.sidecar("web", "web-1", 2);
    world.sidecar("api", "api-1", 3);
    let (see, seen) = mpsc::unbounded_channel();
    let (read, reads) = oneshot::channel();
    let reads = parking_lot::Mutex::new(Some(reads));
    world.raw_app(app_at(3), move |stream, _| {
        let (see, reads) = (see.clone(), reads.lock().take());
        tokio::spawn(async move {
            let mut codec = h2::server::handshake(stream).await.unwrap();
            let (request, mut respond) = codec.accept().await.unwrap().unwrap();
            tokio::spawn(async move { while codec.accept().await.is_some() {} });
            let answer: SendStream<Bytes> = respond.send_response(Response::new(()), whole).unwrap();
            let mut body = request.into_body();
            let mut reads = reads.unwrap();
            let (mut took, mut grants) = (0, false);
            loop {
                tokio::select! {
                    told = &mut reads, if !grants => {
                        grants = true;
                        told.unwrap();
                        body.flow_control().release_capacity(took).unwrap();
                    }
                    data = body.data() => match data {
                        Some(Ok(data)) => {
                            took += data.len();
                            if grants {
                                body.flow_control().release_capacity(data.len()).unwrap();
                            }
                        }
                        Some(Err(error)) => {
                            see.send(Seen::Reset(error.reason())).unwrap();
                            break;
                        }
                        None => {
                            see.send(Seen::Whole(took)).unwrap();
                            break;
                        }
                    },
                }
            }
            drop(answer);
        });
    });
    (world, web, seen, read)
}

/// Sends the beginning of a long body and hears the head of the answer.
async fn upload(world: &World, web: &Arc<crate::dataplane::Proxy>) -> (SendStream<Bytes>, h2::RecvStream) {
    let (sender, connection) = h2::client::Builder::new()
        .max_send_buffer_size(2 * LONG)
        .handshake::<_, Bytes>(world.connect(web, vip(1)))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = Request::post("http://api.shop/upload").body(()).unwrap();
    let (answer, mut body) = sender.ready().await.unwrap().send_request(request, false).unwrap();
    body.send_data(Bytes::from(vec![b'x'; LONG]), true).unwrap();
    let answer = timeout(Duration::from_secs(5), answer).await.unwrap().unwrap();
    assert_eq!(answer.status(), 200);
    (body, answer.into_body())
}

#[tokio::test(start_paused = true)]
async fn an_upload_whose_caller_leaves_is_taken_back_from_a_server_that_reads_nothing() {
    let (world, web, mut seen, _read) = world(false);
    let caller = upload(&world, &web).await;
    sleep(Duration::from_secs(10)).await;
    assert!(seen.try_recv().is_err(), "the caller waits");
    let (mut body, answer) = caller;
    body.send_reset(Reason::CANCEL);
    drop(answer);
    let seen = timeout(Duration::from_secs(1), seen.recv()).await.unwrap();
    assert_eq!(seen, Some(Seen::Reset(Some(Reason::CANCEL))));
}

#[tokio::test(start_paused = true)]
async fn an_upload_goes_on_after_its_answer_as_long_as_the_server_takes_some_of_it() {
    let (world, web, mut seen, read) = world(true);
    let (_body, mut answer) = upload(&world, &web).await;
    assert!(answer.data().await.is_none());
    sleep(Duration::from_secs(20)).await;
    read.send(()).unwrap();
    let seen = timeout(Duration::from_secs(1), seen.recv()).await.unwrap();
    assert_eq!(seen, Some(Seen::Whole(LONG)));
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_nobody_reads_after_its_answer_is_given_up_in_time() {
    let (world, web, mut seen, _read) = world(true);
    let (_body, mut answer) = upload(&world, &web).await;
    assert!(answer.data().await.is_none());
    let seen = timeout(Duration::from_secs(60), seen.recv()).await.unwrap();
    assert_eq!(seen, Some(Seen::Reset(Some(Reason::CANCEL))));
}
