//! What driver and worker say to each other: one bidirectional gRPC stream per worker, frames in
//! MessagePack.

use crate::actor::checkpoint::Saves;
use crate::actor::lanes::Class;
use crate::group::Host;
use crate::nested::{Failure, Submission};
use crate::parcel::Packed;
use crate::remote::decode;
use bytes::{Buf, BufMut, Bytes};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::marker::PhantomData;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// The path of the one gRPC method.
pub(crate) const METHOD: &str = "/mobula.v1.Control/Connect";

/// Frames larger than this are refused.
pub(crate) const MAX_FRAME_BYTES: usize = 1 << 30;

/// What a process learns before it starts its first thread.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Assignment {
    /// Environment variables to set.
    pub(crate) environment: Vec<(String, String)>,
}

/// From the driver.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToWorker {
    /// Run this function as a member of a group; the only one of this process.
    Run {
        /// Its registered name.
        function: String,
        /// Its encoded arguments.
        args: Vec<Packed>,
        /// Who the worker is in its group.
        member: MemberSpec,
    },
    /// This process is for an actor; so many calls of each group may run at the same time.
    Actor { limits: Vec<usize>, saves: Saves },
    /// Queue a call; calls are begun in the order of their numbers, methods in that of their lane.
    Call { call: u64, what: What, function: String, args: Vec<Packed> },
    /// This call may yield the values below this number.
    Granted { call: u64, below: u64 },
    /// The driver has the large values of this call below this number.
    TakenOver { call: u64, below: u64 },
    /// The driver has the large result of this call.
    Adopted { call: u64 },
    /// The driver has the large state that was saved after this call.
    SavedAdopted { call: u64 },
    /// Do not run this call, if it has not begun.
    Forget { call: u64 },
    /// What all members gave for a key, by rank.
    Gathered { key: String, values: Vec<Bytes> },
    /// What this worker has submitted under this ticket has ended.
    Resolved { ticket: u64, result: Result<Packed, Box<Failure>> },
    /// Values of the stream that this worker has submitted under this ticket, the first of this
    /// number.
    Values { ticket: u64, first: u64, values: Vec<Packed> },
    /// The CPUs that this worker has lent are its own again.
    Resume,
    /// A message of the group's maker to a member.
    Told { message: Bytes },
    /// Members were lost, or are to join, and this generation follows.
    Reforming { generation: u64 },
    /// It has begun: who this one is in it.
    Reformed { member: MemberSpec },
    /// Finish soon: the function sees it in [`Member::stop_requested`](crate::Member).
    Stop,
    /// End the process now.
    Shutdown,
}

/// What a call works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum What {
    /// Nothing but its arguments.
    Task,
    /// The same, and it gives many values: those below `skip` are known to the driver, and those
    /// below `granted` may be sent.
    Stream { skip: u64, granted: u64 },
    /// Makes the state of the actor that lives in the process.
    Build,
    /// The actor's state.
    Method(Class),
}

impl What {
    /// Whether it can as well run in another process.
    pub(crate) fn is_task(self) -> bool {
        matches!(self, Self::Task | Self::Stream { .. })
    }
}

/// From the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromWorker {
    /// The first frame.
    Hello { build: String },
    /// Alive.
    Beat,
    /// Something for the driver, in the group's own encoding.
    Report { generation: u64, payload: Bytes },
    /// This member's part of a gathering.
    Gather { generation: u64, key: String, value: Bytes },
    /// The member's function has ended.
    Done { generation: u64, outcome: Outcome },
    /// Values of a call that goes on, the first of this number.
    Yielded { call: u64, first: u64, values: Vec<Packed> },
    /// A call has ended, after so many microseconds of running.
    Reply { call: u64, micros: u32, outcome: Outcome },
    /// The state of the actor after this call, whose reply comes next, or why there is none. It
    /// counts from that reply on.
    Saved { call: u64, state: Result<Packed, String> },
    /// This call, which the driver has no use for, runs, and no other will begin: the process is
    /// to be ended. All earlier replies have gone before this.
    Doomed { call: u64 },
    /// Run this, and say when it has ended.
    Submit { ticket: u64, submission: Box<Submission> },
    /// What was submitted under this ticket is not wanted any more.
    CallOff { ticket: u64 },
    /// The result of this ticket is not needed any more.
    Release { ticket: u64 },
    /// The stream of this ticket may give the values below this number.
    Grant { ticket: u64, below: u64 },
    /// This worker has mapped the large values of this stream below this number.
    Mapped { ticket: u64, below: u64 },
    /// This worker waits for what it has submitted: others may have its CPUs.
    Lend,
    /// It wants its CPUs back.
    Reclaim,
    /// These were queued behind a long one, and can run elsewhere.
    Returned { calls: Vec<u64> },
}

/// How a function ended.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Outcome {
    Value(Packed),
    Failed {
        message: String,
    },
    Panicked {
        message: String,
        location: String,
    },
    /// It was not run: an argument could not be brought to its machine.
    InputLost {
        reason: String,
    },
}

impl ToWorker {
    /// The values that it refers to.
    pub(crate) fn packed_mut(&mut self) -> &mut [Packed] {
        match self {
            Self::Run { args, .. } | Self::Call { args, .. } => args,
            Self::Resolved { result: Ok(value), .. } => std::slice::from_mut(value),
            Self::Values { values, .. } => values,
            _ => &mut [],
        }
    }
}

impl FromWorker {
    /// The values that it refers to.
    pub(crate) fn packed_mut(&mut self) -> &mut [Packed] {
        match self {
            Self::Done { outcome: Outcome::Value(value), .. } => std::slice::from_mut(value),
            Self::Reply { outcome: Outcome::Value(value), .. } => std::slice::from_mut(value),
            Self::Saved { state: Ok(value), .. } => std::slice::from_mut(value),
            Self::Yielded { values, .. } => values,
            Self::Submit { submission, .. } => &mut submission.args,
            _ => &mut [],
        }
    }
}

/// Who a worker is in its group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemberSpec {
    pub(crate) group: String,
    pub(crate) rank: usize,
    pub(crate) world: usize,
    pub(crate) generation: u64,
    pub(crate) threads: usize,
    pub(crate) host: Host,
    pub(crate) context: Bytes,
}

/// Encodes `E` and decodes `D` on a gRPC stream.
#[derive(Debug)]
pub(crate) struct Frames<E, D>(PhantomData<fn(E) -> D>);

impl<E, D> Default for Frames<E, D> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<E: Serialize + Send + 'static, D: DeserializeOwned + Send + 'static> Codec for Frames<E, D> {
    type Encode = E;
    type Decode = D;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self::default()
    }

    fn decoder(&mut self) -> Self {
        Self::default()
    }
}

impl<E: Serialize, D> Encoder for Frames<E, D> {
    type Item = E;
    type Error = Status;

    fn encode(&mut self, frame: E, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        // Without field names: both ends are one build.
        let written = rmp_serde::encode::write(&mut buffer.writer(), &frame);
        written.map_err(|e| Status::internal(format!("cannot encode a control frame: {e}")))
    }
}

impl<E, D: DeserializeOwned> Decoder for Frames<E, D> {
    type Item = D;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<D>, Status> {
        let bytes = buffer.copy_to_bytes(buffer.remaining());
        let frame = decode("a control frame", &bytes);
        frame.map(Some).map_err(|e| Status::internal(e.to_string()))
    }
}
