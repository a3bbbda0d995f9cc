//! Values on their way from one machine's store to another's.

use super::link::{Credentials, LINK_TIMEOUT, dial};
use super::object::FarPlace;
use super::server::KEEP_ALIVE;
use super::wire::{FETCH, Piece, Wanted};
use crate::error::chain;
use crate::parcel::{Stored, store};
use crate::process::wire::{Frames, MAX_FRAME_BYTES};
use crate::scheduler::NodeId;
use crate::store::ObjectId;
use crate::{BoxError, Error};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use hyper_util::rt::TokioIo;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::runtime::RuntimeFlavor;
use tokio::sync::{OnceCell, mpsc, watch};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// What is sent at a time.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces that may wait to be written.
const PIECES: usize = 8;
/// A holder that sends nothing for so long does not come through to here; one that is lost is
/// known sooner.
const PIECE_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes on their way that need no acknowledgement yet.
pub(super) const WINDOW: u32 = 16 << 20;

/// What this process needs to get values from others.
pub(super) struct Transfers {
    tokio: tokio::runtime::Handle,
    credentials: Credentials,
    /// Where the driver is, unless this is it.
    driver: Option<SocketAddr>,
    channels: Mutex<HashMap<SocketAddr, Channel>>,
    /// Machines that are gone, of which there are few.
    lost: watch::Sender<HashSet<NodeId>>,
}

static TRANSFERS: OnceLock<Transfers> = OnceLock::new();

/// To be called once, before the first value is needed.
pub(super) fn set_up(
    tokio: tokio::runtime::Handle,
    credentials: Credentials,
    driver: Option<SocketAddr>,
) {
    let (channels, lost) = (Mutex::default(), watch::Sender::default());
    // A second call would be a second `init`, which is refused.
    let _ = TRANSFERS.set(Transfers { tokio, credentials, driver, channels, lost });
}

fn transfers() -> Result<&'static Transfers, Error> {
    TRANSFERS.get().ok_or_else(|| Error::Internal("this process has no other nodes".to_owned()))
}

/// Ends the transfers from a machine that is gone, and the connection to it.
pub(super) fn lost(node: NodeId, objects: SocketAddr) {
    let Some(transfers) = TRANSFERS.get() else { return };
    transfers.lost.send_if_modified(|lost| lost.insert(node));
    transfers.channels().remove(&objects);
}

/// Nobody refers to this value any more, wherever there are copies of it.
pub(crate) fn forget_everywhere(holder: NodeId, id: ObjectId) {
    if let Ok(hub) = super::hub() {
        hub.forget(holder, id);
    }
}

/// A copy of another machine's value in this process's store, perhaps on its way.
pub(super) type Fetched = Arc<OnceCell<Arc<Stored>>>;

/// Copies of other machines' values that an agent's workers have asked for, and its own values, each
/// under its holder and its number there.
#[derive(Default)]
pub(super) struct Copies {
    copies: Mutex<HashMap<(NodeId, ObjectId), Fetched>>,
}

impl Copies {
    /// A copy of the value; whoever asks for it at the same time shares one transfer.
    pub(super) async fn bring(&self, place: FarPlace) -> Result<Arc<Stored>, Error> {
        let copy = Arc::clone(self.lock().entry((place.holder, place.id)).or_default());
        let brought = bring(&copy, place).await;
        if brought.is_err() {
            // It may have been forgotten before it was asked for, and will not be again.
            self.forget(place.holder, place.id);
        }
        brought
    }

    /// Keeps a value of this machine for as long as the driver refers to it.
    pub(super) fn keep(&self, here: NodeId, stored: Arc<Stored>) {
        let copy = Arc::new(OnceCell::new_with(Some(Arc::clone(&stored))));
        self.lock().insert((here, stored.id()), copy);
    }

    pub(super) fn forget(&self, holder: NodeId, id: ObjectId) {
        // Dropped outside of the lock: its memory may have to be given back.
        let copy = self.lock().remove(&(holder, id));
        drop(copy);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(NodeId, ObjectId), Fetched>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn bring(copy: &Fetched, place: FarPlace) -> Result<Arc<Stored>, Error> {
    copy.get_or_try_init(|| transfers_fetch(place)).await.cloned()
}

/// Fetches a copy, if it is not there, from a thread that may wait.
pub(super) fn bring_blocking(copy: &Fetched, place: FarPlace) -> Result<Arc<Stored>, Error> {
    let _lent = crate::current::lend();
    let (sender, brought) = sync_channel(1);
    let copy = Arc::clone(copy);
    transfers()?.tokio.spawn(async move { drop(sender.send(bring(&copy, place).await)) });
    let wait = || brought.recv().unwrap_or_else(|_| Err(interrupted()));
    match tokio::runtime::Handle::try_current().map(|tokio| tokio.runtime_flavor()) {
        // Such a thread serves others, who go on elsewhere meanwhile.
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(wait),
        _ => wait(),
    }
}

fn interrupted() -> Error {
    Error::Internal("a transfer ended without a word".to_owned())
}

async fn transfers_fetch(place: FarPlace) -> Result<Arc<Stored>, Error> {
    let transfers = transfers()?;
    let failed = |error: BoxError| {
        let text = chain(&*error);
        Error::system("fetching a value from another node", std::io::Error::other(text))
    };
    // On the runtime of the transfers, whichever thread waits for it.
    let fetch = transfers.tokio.spawn(transfers.fetch_unless_lost(place));
    fetch.await.map_err(|error| failed(error.into()))?.map_err(failed)
}

impl Transfers {
    async fn fetch_unless_lost(&self, place: FarPlace) -> Result<Arc<Stored>, BoxError> {
        let mut lost = self.lost.subscribe();
        tokio::select! {
            // `self` never ends, so neither does the watch.
            _ = lost.wait_for(|lost| lost.contains(&place.holder)) => {
                Err(format!("node {} was lost", place.holder.0).into())
            }
            fetched = self.fetch(place) => fetched,
        }
    }

    async fn fetch(&self, place: FarPlace) -> Result<Arc<Stored>, BoxError> {
        let address = place.address.or(self.driver).ok_or("nobody knows where its holder is")?;
        let mut grpc = tonic::client::Grpc::new(self.channel(address)?)
            .max_decoding_message_size(MAX_FRAME_BYTES);
        tokio::time::timeout(LINK_TIMEOUT, grpc.ready()).await??;
        let request = Request::new(Wanted { holder: place.holder, id: place.id });
        let codec = Frames::<Wanted, Piece>::default();
        let path = http::uri::PathAndQuery::from_static(FETCH);
        let opened = grpc.server_streaming(request, path, codec);
        let mut pieces = tokio::time::timeout(PIECE_TIMEOUT, opened).await??.into_inner();
        let (sender, received) = mpsc::channel::<Bytes>(PIECES);
        let write = tokio::task::spawn_blocking(move || Stored::receive(place.bytes, received));
        while let Some(Piece(bytes)) =
            tokio::time::timeout(PIECE_TIMEOUT, pieces.message()).await??
        {
            // It has failed already, and says why.
            if sender.send(bytes).await.is_err() {
                break;
            }
        }
        drop(sender);
        Ok(Arc::new(write.await??))
    }

    fn channel(&self, address: SocketAddr) -> Result<Channel, BoxError> {
        let mut channels = self.channels();
        if let Some(channel) = channels.get(&address) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .http2_keep_alive_interval(KEEP_ALIVE.interval)
            .keep_alive_timeout(KEEP_ALIVE.timeout)
            .keep_alive_while_idle(true);
        let credentials = self.credentials.clone();
        let connector = tower::service_fn(move |_| {
            let credentials = credentials.clone();
            async move { dial(address, &credentials).await.map(|(stream, _)| TokioIo::new(stream)) }
        });
        let _entered = self.tokio.enter();
        let channel = endpoint.connect_with_connector_lazy(connector);
        channels.insert(address, channel.clone());
        Ok(channel)
    }

    fn channels(&self) -> MutexGuard<'_, HashMap<SocketAddr, Channel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A value of this process's store, piece by piece.
pub(super) async fn give_out(
    wanted: Wanted,
    here: NodeId,
) -> Result<BoxStream<'static, Result<Piece, Status>>, Status> {
    // Another machine may have the address of one that is lost, and its own value of this number.
    if wanted.holder != here {
        return Err(Status::not_found(format!("this is {here:?}, not {:?}", wanted.holder)));
    }
    let gone = |error: Error| Status::not_found(error.to_string());
    let flat = tokio::task::spawn_blocking(move || -> Result<Bytes, Error> {
        Ok(store()?.flat(wanted.id)?)
    });
    let flat = flat.await.map_err(|error| Status::internal(error.to_string()))?.map_err(gone)?;
    let starts = (0..flat.len()).step_by(PIECE_BYTES);
    let pieces = starts.map(move |at| Ok(Piece(flat.slice(at..flat.len().min(at + PIECE_BYTES)))));
    Ok(stream::iter(pieces).boxed())
}
