//! What a machine offers to the others: the driver its door, everybody the values of its store.

use super::secret::Secret;
use super::silence::{Heard, Listened};
use super::transfer::{WINDOW, give_out};
use super::wire::{FETCH, FromNode, JOIN, Piece, ToNode, Wanted};
use crate::Error;
use crate::clock::SystemClock;
use crate::process::wire::{Frames, MAX_FRAME_BYTES};
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt};
use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::codec::Streaming;
use tonic::{Request, Response, Status};

/// Who came in, and where to send what is for it.
pub(super) type Guest = (Streaming<FromNode>, Heard, mpsc::UnboundedSender<ToNode>);

/// Serves until the process ends. An agent has no `door`.
pub(super) fn serve(
    listener: TcpListener,
    secret: Secret,
    door: Option<mpsc::Sender<Guest>>,
) -> impl Future<Output = ()> + Send {
    let service = Service { secret: Arc::new(secret), door };
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    async move {
        if let Err(error) = server.serve_with_incoming(service, incoming(listener)).await {
            tracing::error!(%error, "the server for other nodes has ended");
        }
    }
}

/// Connections as they come; one that fails is no reason to end.
fn incoming(listener: TcpListener) -> BoxStream<'static, std::io::Result<TcpStream>> {
    let accept = |listener: TcpListener| async move {
        let accepted = listener.accept().await.and_then(|(connection, _)| {
            connection.set_nodelay(true)?;
            Ok(connection)
        });
        Some((accepted, listener))
    };
    stream::unfold(listener, accept).boxed()
}

#[derive(Clone)]
struct Service {
    secret: Arc<Secret>,
    door: Option<mpsc::Sender<Guest>>,
}

impl tower_service::Service<http::Request<tonic::body::Body>> for Service {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
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
                    grpc.server_streaming(Fetch(service), request).await
                }
                other => Status::unimplemented(format!("there is no {other}")).into_http(),
            })
        })
    }
}

impl Service {
    /// NODE-1.
    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        if self.secret.is_shown(request.metadata()) {
            return Ok(());
        }
        Err(Status::unauthenticated("the secret is not the driver's"))
    }

    async fn let_in(
        self,
        request: Request<Streaming<FromNode>>,
        heard: Heard,
    ) -> Result<Response<BoxStream<'static, Result<ToNode, Status>>>, Status> {
        self.check(&request)?;
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

struct Fetch(Service);

impl tower_service::Service<Request<Wanted>> for Fetch {
    type Response = Response<BoxStream<'static, Result<Piece, Status>>>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Wanted>) -> Self::Future {
        let checked = self.0.check(&request);
        Box::pin(async move {
            checked?;
            give_out(request.into_inner()).await.map(Response::new)
        })
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
