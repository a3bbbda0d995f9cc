//! How a copy gets in at its driver, which may not be there yet.

use super::link::{Credentials, LINK_TIMEOUT, LinkError, Stream, dial};
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
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::Streaming;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
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
    session(driver, &secret).await
}

async fn session(driver: SocketAddr, secret: &Secret) -> Result<Session, Outside> {
    let credentials = Credentials::new(secret).map_err(|error| Outside::ForGood(error.into()))?;
    let dialled = dial(driver, &credentials).await;
    let (stream, local) = dialled.map_err(|error| not_linked(error, secret))?;
    let (out, frames) = mpsc::channel(OUTBOUND);
    let opened = async {
        let channel = over(stream).await.map_err(|error| Outside::Yet(error.into()))?;
        open(channel, frames).await.map_err(not_opened)
    };
    let slow = |_| not_linked(LinkError::Slow { address: driver }, secret);
    let (inbound, heard) = timeout(LINK_TIMEOUT, opened).await.map_err(slow)??;
    Ok(Session { out, inbound, heard, credentials, driver, local })
}

/// A driver that ends, or whose connection breaks, may be followed by another one.
fn not_opened(status: Status) -> Outside {
    let error = refused(status.message()).into();
    match status.code() {
        Code::Unimplemented => Outside::ForGood(error),
        _ => Outside::Yet(error),
    }
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

#[cfg(test)]
mod tests {
    use super::super::link::answer;
    use super::super::server::{listen, serve};
    use super::*;
    use crate::scheduler::NodeId;
    use tokio::net::TcpListener;

    fn secret() -> Secret {
        Secret::given("what both ends know".to_owned()).expect("long enough")
    }

    async fn here() -> (TcpListener, SocketAddr) {
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        listen(&[anywhere]).await.expect("a port")
    }

    /// Lets one caller in, and keeps the connection open for so long without a word.
    async fn let_in_only(listener: &TcpListener, silence: Duration) {
        let credentials = Credentials::new(&secret()).expect("credentials");
        let (connection, _) = listener.accept().await.expect("a caller");
        let stream = answer(connection, &credentials).await.expect("it knows the secret");
        tokio::time::sleep(silence).await;
        drop(stream);
    }

    async fn come(driver: SocketAddr) -> Result<Session, Outside> {
        timeout(LINK_TIMEOUT * 3, session(driver, &secret())).await.expect("in time")
    }

    #[tokio::test]
    async fn who_is_let_in_and_then_left_comes_again() {
        let (listener, driver) = here().await;
        let (came, ()) = tokio::join!(come(driver), let_in_only(&listener, Duration::ZERO));
        assert!(matches!(came, Err(Outside::Yet(_))));
        let (guests, mut arrivals) = mpsc::channel(1);
        let credentials = Credentials::new(&secret()).expect("credentials");
        tokio::spawn(serve(listener, credentials, NodeId::HERE, Some(guests)));
        let (came, guest) = tokio::join!(come(driver), arrivals.recv());
        assert!(came.is_ok() && guest.is_some());
    }

    #[tokio::test]
    async fn who_is_let_in_and_then_hears_nothing_comes_again() {
        let (listener, driver) = here().await;
        let came = tokio::select! {
            came = come(driver) => came,
            () = let_in_only(&listener, LINK_TIMEOUT * 4) => unreachable!("silent for longer"),
        };
        let Err(Outside::Yet(error)) = came else { panic!("it may yet get in") };
        assert!(error.to_string().contains("did not let it in within 5s"), "{error}");
    }

    #[tokio::test]
    async fn who_calls_a_machine_that_is_not_the_driver_stays_out() {
        let (listener, agent) = here().await;
        let credentials = Credentials::new(&secret()).expect("credentials");
        tokio::spawn(serve(listener, credentials, NodeId(1), None));
        let Err(Outside::ForGood(error)) = come(agent).await else { panic!("that never changes") };
        assert!(error.to_string().contains("not the driver"), "{error}");
    }
}
