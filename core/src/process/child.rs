//! The worker's side: a process whose main thread serves the control stream, and whose work runs
//! on a thread of its own.

use super::desk::{Desk, Work};
use super::wire::{
    Assignment, Frames, FromWorker, MAX_FRAME_BYTES, METHOD, MemberSpec, Outcome, ToWorker,
};
use crate::current::{self, Current};
use crate::group::{Inbox, Line, Member};
use crate::parcel::{Outgoing, Packed, reader};
use crate::remote::RemoteFn;
use crate::store::Offer;
use crate::threads::{STACK_BYTES, own_pool};
use crate::value::Encoded;
use crate::{BoxError, Error, nested, panics};
use hyper_util::rt::TokioIo;
use std::io::Read;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::codec::Streaming;
use tonic::transport::{Channel, Endpoint};

const BEAT_INTERVAL: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Waits to be told what this process is for, before it starts any thread. `None`: the driver has
/// gone, or has no use for it.
pub(crate) fn assignment(control: &mut StdUnixStream) -> Option<Assignment> {
    let mut length = [0; 4];
    control.read_exact(&mut length).ok()?;
    let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
    control.read_exact(&mut bytes).ok()?;
    rmp_serde::from_slice(&bytes).ok()
}

/// Serves the control stream until the driver says, or its silence tells, that all is done.
/// Returns the exit code.
pub(crate) fn serve(control: StdUnixStream) -> i32 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = match runtime {
        Ok(runtime) => runtime.block_on(session(control)),
        Err(error) => Err(error.into()),
    };
    match served {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("worker {}: {error}", std::process::id());
            1
        }
    }
}

async fn session(control: StdUnixStream) -> Result<(), BoxError> {
    let (outbound, frames) = mpsc::channel(256);
    outbound.send(FromWorker::Hello { build: super::build_id() }).await?;
    let mut inbound = connect(control, frames).await?;
    let inbox = Arc::new(Inbox::default());
    let desk = Desk::open(outbound.clone())?;
    nested::open(outbound.clone());
    let mut beat = tokio::time::interval(BEAT_INTERVAL);
    loop {
        tokio::select! {
            _ = beat.tick() => {
                // A full queue is a sign of life by itself.
                let _ = outbound.try_send(FromWorker::Beat);
            }
            () = desk.stuck() => desk.send_back(),
            frame = inbound.message() => match frame? {
                Some(ToWorker::Run { function, args, member }) => {
                    start(function, args, member, &outbound, &inbox)?;
                }
                Some(ToWorker::Actor { limits, saves }) => desk.for_actor(&limits, saves),
                Some(ToWorker::Call { call, what, function, args }) => {
                    desk.add(Work { call, what, function, args });
                }
                Some(ToWorker::Forget { call }) => desk.forget(call),
                Some(ToWorker::Adopted { call }) => desk.adopted(call),
                Some(ToWorker::SavedAdopted { call }) => desk.saved_adopted(call),
                Some(ToWorker::Resolved { ticket, result }) => {
                    if let Some(nested) = nested::nested() {
                        nested.resolved(ticket, result);
                    }
                }
                Some(ToWorker::Values { ticket, first, values }) => {
                    if let Some(nested) = nested::nested() {
                        nested.values(ticket, first, values);
                    }
                }
                Some(ToWorker::Resume) => {
                    if let Some(nested) = nested::nested() {
                        nested.resumed();
                    }
                }
                Some(ToWorker::Granted { call, below }) => desk.granted(call, below),
                Some(ToWorker::TakenOver { call, below }) => desk.taken_over(call, below),
                Some(ToWorker::Gathered { key, values }) => inbox.gathered(key, values),
                Some(ToWorker::Told { message }) => inbox.told(message),
                Some(ToWorker::Reforming { generation }) => inbox.reforming(generation),
                Some(ToWorker::Reformed { member }) => inbox.reformed(member),
                Some(ToWorker::Stop) => inbox.stop(),
                Some(ToWorker::Shutdown) => return Ok(()),
                None => return Err("the driver closed the control stream".into()),
            }
        }
    }
}

async fn connect(
    control: StdUnixStream,
    frames: mpsc::Receiver<FromWorker>,
) -> Result<Streaming<ToWorker>, BoxError> {
    control.set_nonblocking(true)?;
    let control = Mutex::new(Some(tokio::net::UnixStream::from_std(control)?));
    let connector = tower::service_fn(move |_| {
        let stream = control.lock().unwrap_or_else(PoisonError::into_inner).take();
        let lost = || std::io::Error::other("the control stream was lost");
        std::future::ready(stream.map(TokioIo::new).ok_or_else(lost))
    });
    // The address is never looked up: the connector hands out the inherited socket.
    let endpoint = Endpoint::from_static("http://driver").connect_timeout(CONNECT_TIMEOUT);
    let channel: Channel = endpoint.connect_with_connector(connector).await?;
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_FRAME_BYTES);
    grpc.ready().await?;
    let codec = Frames::<FromWorker, ToWorker>::default();
    let method = http::uri::PathAndQuery::from_static(METHOD);
    let response = grpc.streaming(Request::new(ReceiverStream::new(frames)), method, codec).await?;
    Ok(response.into_inner())
}

/// Runs the function on its own thread, with a stack deep enough for a backward pass.
fn start(
    function: String,
    args: Vec<Packed>,
    spec: MemberSpec,
    outbound: &mpsc::Sender<FromWorker>,
    inbox: &Arc<Inbox>,
) -> Result<(), BoxError> {
    let (outbound, inbox) = (outbound.clone(), Arc::clone(inbox));
    let name = format!("rank {}", spec.rank);
    let thread = std::thread::Builder::new().name(name).stack_size(STACK_BYTES);
    thread.spawn(move || {
        let _pool = own_pool(rayon::current_num_threads());
        let frames = outbound.clone();
        let send = move |frame| frames.blocking_send(frame).map_err(|_| driver_gone());
        let reader = reader();
        let args = args.into_iter().map(|packed| packed.open(&reader)).collect();
        serve_member(&function, args, spec, Arc::new(send), &inbox);
    })?;
    Ok(())
}

/// Runs a member's function, and again in each later generation that the member is asked to take
/// part in, for as long as the process lives.
fn serve_member(
    function: &str,
    args: Result<Vec<Encoded>, Error>,
    mut spec: MemberSpec,
    line: Line,
    inbox: &Arc<Inbox>,
) {
    // The driver takes a large result from where it is; until there is another one.
    let mut kept;
    loop {
        let (rank, generation) = (spec.rank, spec.generation);
        let _span = tracing::info_span!("member", rank, generation).entered();
        let member = Member::new(spec, Arc::clone(&line), Arc::clone(inbox));
        let life = member.share_life();
        let (outcome, offer) = match &args {
            // It has no queue of calls, and waits like one.
            Ok(args) => {
                let current = Current { object: None, lease: None, call: Some(0) };
                current::run(current, || run(function, args, member))
            }
            Err(error) => (Outcome::Failed { message: error.to_string() }, None),
        };
        let generation = life.lock().unwrap_or_else(PoisonError::into_inner).generation();
        // However it ended: in a generation that is over nobody counts on it.
        if inbox.is_newest(generation) && line(FromWorker::Done { generation, outcome }).is_err() {
            return;
        }
        kept = offer;
        spec = inbox.wait_for_newer(generation);
        drop(kept);
    }
}

/// Runs a group member's function; its end, however it ends, as a value.
pub(crate) fn run(function: &str, args: &[Encoded], member: Member) -> (Outcome, Option<Offer>) {
    outcome_of(panics::catch(function, || RemoteFn::find(function)?.run(Some(member), args)))
}

/// The end of a function, as it is sent, and what must be kept until it has been taken.
pub(super) fn outcome_of(result: Result<Outgoing, Error>) -> (Outcome, Option<Offer>) {
    match result.and_then(Outgoing::into_packed) {
        Ok((value, offer)) if value.bytes() < MAX_FRAME_BYTES => (Outcome::Value(value), offer),
        Ok((value, _)) => {
            let message =
                format!("its result has {} bytes, at most {MAX_FRAME_BYTES} fit", value.bytes());
            (Outcome::Failed { message }, None)
        }
        Err(error) => (failure(error), None),
    }
}

fn failure(error: Error) -> Outcome {
    match error {
        Error::TaskPanicked { message, location, .. } => Outcome::Panicked { message, location },
        Error::TaskFailed { message, .. } => Outcome::Failed { message },
        other => Outcome::Failed { message: other.to_string() },
    }
}

fn driver_gone() -> Error {
    Error::WorkerLost {
        task: "the driver".to_owned(),
        reason: "its control stream closed".to_owned(),
    }
}
