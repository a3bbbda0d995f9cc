//! How a copy gets in at its driver, which may not be there yet.

use super::link::{Credentials, LinkError, Stream, dial};
use super::role::Join;
use super::secret::Secret;
use super::silence::{Heard, Listened};
use super::transfer::WINDOW;
use super::wire::{FromNode, JOIN, ToNode};
use crate::clock::SystemClock;
use crate::process::wire::{Frames, MAX_FRAME_BYTES};
use crate::{BoxError, Error};
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::Streaming;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tower::ServiceExt;

const RETRY: Duration = Duration::from_millis(200);
/// Frames that may wait for the driver; then who has more waits too.
pub(super) const OUTBOUND: usize = 1024;

/// A stream to the driver, whose secret is this copy's.
pub(super) struct Session {
    pub(super) out: mpsc::Sender<FromNode>,
    pub(super) inbound: Streaming<ToNode>,
    pub(super) heard: Heard,
    pub(super) credentials: Credentials,
    pub(super) driver: SocketAddr,
    /// This end of the connection.
    pub(super) local: SocketAddr,
}

/// Why this copy is not in.
enum Outside {
    /// That may change.
    Yet(BoxError),
    ForGood(BoxError),
}

/// Tries to get in until it is too late: the driver may not be there yet, and the secret's file may
/// still be that of an earlier start.
pub(super) async fn knock(join: &Join) -> Result<Session, BoxError> {
    loop {
        let error = match enter(join).await {
            Ok(session) => return Ok(session),
            Err(Outside::ForGood(error)) => return Err(error),
            Err(Outside::Yet(error)) => error,
        };
        if join.is_late() {
            return Err(error);
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn enter(join: &Join) -> Result<Session, Outside> {
    let (driver, secret) = tokio::task::block_in_place(|| whom(join))?;
    let credentials = Credentials::new(&secret).map_err(|error| Outside::ForGood(error.into()))?;
    let dialled = dial(driver, &credentials).await;
    let (stream, local) = dialled.map_err(|error| not_linked(error, &secret))?;
    let channel = over(stream).await.map_err(|error| Outside::Yet(error.into()))?;
    let (out, frames) = mpsc::channel(OUTBOUND);
    let opened = open(channel, frames).await;
    let (inbound, heard) =
        opened.map_err(|status| Outside::ForGood(refused(status.message()).into()))?;
    Ok(Session { out, inbound, heard, credentials, driver, local })
}

/// The driver's address, and the secret.
fn whom(join: &Join) -> Result<(SocketAddr, Secret), Outside> {
    let driver = join.address().map_err(|error| Outside::Yet(error.into()))?;
    let secret = join.secret().map_err(|error| match error {
        // The environment does not change, files do.
        Error::LaunchVariable { .. } => Outside::ForGood(error.into()),
        error => Outside::Yet(error.into()),
    })?;
    Ok((driver, secret))
}

fn not_linked(error: LinkError, secret: &Secret) -> Outside {
    match (&error, secret.file()) {
        (LinkError::OtherSecret { address }, Some(file)) => Outside::Yet(
            refused(&format!(
                "the machine at {address} has another secret than {}, which may be of an earlier \
                 start; set MOBULA_SECRET alike for all copies, or for none",
                file.display()
            ))
            .into(),
        ),
        (LinkError::Unreachable { .. }, _) => {
            Outside::Yet(refused(&format!("{error}; is rank 0 running there?")).into())
        }
        (LinkError::Broke { .. } | LinkError::Slow { .. }, _) => {
            Outside::Yet(refused(&error.to_string()).into())
        }
        _ => Outside::ForGood(refused(&error.to_string()).into()),
    }
}

fn refused(reason: &str) -> Error {
    Error::Join { action: "join the driver".to_owned(), reason: reason.to_owned() }
}

/// A channel over a connection that is there already, and not made anew.
async fn over(stream: Stream) -> Result<Channel, tonic::transport::Error> {
    let mut stream = Some(stream);
    let connector = tower::service_fn(move |_| {
        let taken = stream.take().map(TokioIo::new);
        std::future::ready(taken.ok_or(std::io::Error::from(std::io::ErrorKind::NotConnected)))
    });
    let endpoint = Endpoint::from_static("http://driver")
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    endpoint.connect_with_connector(connector).await
}

async fn open(
    channel: Channel,
    frames: mpsc::Receiver<FromNode>,
) -> Result<(Streaming<ToNode>, Heard), Status> {
    let heard = Heard::new(SystemClock::new());
    let listened = heard.clone();
    let channel = channel.map_response(move |response: http::Response<tonic::body::Body>| {
        response.map(|body| Listened::new(body, listened.clone()))
    });
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_FRAME_BYTES);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let request = Request::new(ReceiverStream::new(frames));
    let method = http::uri::PathAndQuery::from_static(JOIN);
    let codec = Frames::<FromNode, ToNode>::default();
    let stream = grpc.streaming(request, method, codec).await?;
    Ok((stream.into_inner(), heard))
}
