//! What a machine offers to the others: the driver its door, everybody the values of its store.

use super::link::{Credentials, Stream, answer};
use super::silence::{Heard, Listened};
use super::strangers::{STAY, Strangers};
use super::transfer::{WINDOW, give_out};
use super::wire::{FETCH, FromNode, JOIN, Piece, ToNode, Wanted};
use crate::Error;
use crate::clock::SystemClock;
use crate::process::wire::{Frames, MAX_FRAME_BYTES};
use crate::scheduler::NodeId;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, StreamExt};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::body::Body;
use tonic::codec::Streaming;
use tonic::{Request, Response, Status};

/// After a connection that could not be taken: there may be no descriptors left for a while.
const PAUSE: Duration = Duration::from_millis(100);

/// When a connection is closed whose other end has vanished without a word.
#[derive(Clone, Copy)]
pub(super) struct KeepAlive {
    /// How long nothing comes before it is asked whether it is there.
    pub(super) interval: Duration,
    /// How long it may take to answer: what is on its way before may be large.
    pub(super) timeout: Duration,
}

pub(super) const KEEP_ALIVE: KeepAlive =
    KeepAlive { interval: Duration::from_secs(30), timeout: Duration::from_secs(60) };

/// Who came in, and where to send what is for it.
pub(super) type Guest = (Streaming<FromNode>, Heard, mpsc::UnboundedSender<ToNode>);

/// Serves until the process ends. An agent has no `door`.
pub(super) async fn serve(
    listener: TcpListener,
    credentials: Credentials,
    here: NodeId,
    door: Option<mpsc::Sender<Guest>>,
) {
    let service = Service { here, door };
    let mut strangers = Strangers::new(STAY);
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                strangers.add(welcome(connection, credentials.clone(), service.clone())).await;
            }
            Err(error) => {
                tracing::warn!(%error, "a connection of another node could not be taken");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// NODE-1.
async fn welcome(connection: TcpStream, credentials: Credentials, service: Service) {
    match answer(connection, &credentials).await {
        Ok(stream) => drop(tokio::spawn(talk(stream, service, KEEP_ALIVE))),
        Err(error) => tracing::debug!(%error, "a connection was not let in"),
    }
}

async fn talk(stream: Stream, service: Service, keep_alive: KeepAlive) {
    let call = |request: http::Request<Incoming>| service.call(request.map(Body::new));
    let served = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(keep_alive.interval)
        .keep_alive_timeout(keep_alive.timeout)
        .max_concurrent_streams(None)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .serve_connection(TokioIo::new(stream), service_fn(call));
    if let Err(error) = served.await {
        tracing::debug!(%error, "the connection of a node broke");
    }
}

#[derive(Clone)]
struct Service {
    here: NodeId,
    door: Option<mpsc::Sender<Guest>>,
}

impl Service {
    fn call(
        &self,
        request: http::Request<Body>,
    ) -> impl Future<Output = Result<http::Response<Body>, Infallible>> + Send + 'static {
        let service = self.clone();
        async move {
            Ok(match request.uri().path() {
                JOIN => {
                    let mut grpc = tonic::server::Grpc::new(Frames::<ToNode, FromNode>::default())
                        .apply_max_message_size_config(
                            Some(MAX_FRAME_BYTES),
                            Some(MAX_FRAME_BYTES),
                        );
                    let heard = Heard::new(SystemClock::new());
                    let request = request.map(|body| Listened::new(body, heard.clone()));
                    grpc.streaming(Join(service, heard), request).await
                }
                FETCH => {
                    let mut grpc = tonic::server::Grpc::new(Frames::<Piece, Wanted>::default());
                    grpc.server_streaming(Fetch(service.here), request).await
                }
                other => Status::unimplemented(format!("there is no {other}")).into_http(),
            })
        }
    }

    async fn let_in(
        self,
        request: Request<Streaming<FromNode>>,
        heard: Heard,
    ) -> Result<Response<BoxStream<'static, Result<ToNode, Status>>>, Status> {
        let door = self.door.ok_or_else(|| Status::unimplemented("this is not the driver"))?;
        let (frames, outbound) = mpsc::unbounded_channel();
        let closing = |_| Status::unavailable("the driver is ending");
        door.send((request.into_inner(), heard, frames)).await.map_err(closing)?;
        Ok(Response::new(UnboundedReceiverStream::new(outbound).map(Ok).boxed()))
    }
}

struct Join(Service, Heard);

impl tower_service::Service<Request<Streaming<FromNode>>> for Join {
    type Response = Response<BoxStream<'static, Result<ToNode, Status>>>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Streaming<FromNode>>) -> Self::Future {
        Box::pin(self.0.clone().let_in(request, self.1.clone()))
    }
}

struct Fetch(NodeId);

impl tower_service::Service<Request<Wanted>> for Fetch {
    type Response = Response<BoxStream<'static, Result<Piece, Status>>>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Wanted>) -> Self::Future {
        let given = give_out(request.into_inner(), self.0);
        Box::pin(async move { given.await.map(Response::new) })
    }
}

/// A listener on the first of these addresses that this machine has.
pub(super) async fn listen(
    addresses: &[std::net::SocketAddr],
) -> Result<(TcpListener, std::net::SocketAddr), Error> {
    let mut reasons = Vec::new();
    for address in addresses {
        match TcpListener::bind(address).await.and_then(|l| l.local_addr().map(|at| (l, at))) {
            Ok(listener) => return Ok(listener),
            Err(error) => reasons.push(format!("{address}: {error}")),
        }
    }
    Err(Error::Join {
        action: "listen for the other copies of this program".to_owned(),
        reason: format!("{}; is MASTER_PORT in use?", reasons.join("; ")),
    })
}

#[cfg(test)]
mod tests {
    use super::super::link::dial;
    use super::super::secret::Secret;
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn who_vanishes_without_a_word_is_hung_up_on() {
        let secret = Secret::given("what both ends know".to_owned()).expect("long enough");
        let credentials = Credentials::new(&secret).expect("credentials");
        let (listener, here) = listen(&[([127, 0, 0, 1], 0).into()]).await.expect("a port");
        let called = async {
            let (connection, _) = listener.accept().await.expect("a caller");
            let stream = answer(connection, &credentials).await.expect("it knows the secret");
            let soon = Duration::from_millis(10);
            let keep_alive = KeepAlive { interval: soon, timeout: soon };
            talk(stream, Service { here: NodeId::HERE, door: None }, keep_alive).await;
        };
        let caller = async {
            let (mut stream, _) = dial(here, &credentials).await.expect("let in");
            // The beginning of HTTP/2 with no settings, and not a word more.
            let words = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
            stream.write_all(words).await.expect("writes");
            stream.flush().await.expect("writes");
            // With TLS, the end may come without the farewell.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let both = async { tokio::join!(called, caller) };
        tokio::time::timeout(Duration::from_secs(60), both).await.expect("it is closed");
    }
}
