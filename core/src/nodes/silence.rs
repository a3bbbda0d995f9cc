//! How long another machine has said nothing. What counts is that no bytes come: a large frame may be
//! on its way for longer than anybody would be patient with silence.

use crate::clock::Clock;
use hyper::body::{Body, Frame, SizeHint};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::timeout;
use tonic::Status;
use tonic::codec::Streaming;

/// After a silence, how long it is listened once more: what came may not have been read yet.
const SECOND_LOOK: Duration = Duration::from_millis(500);

/// When bytes came last. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Heard {
    clock: Arc<dyn Clock>,
    last: Arc<Mutex<Duration>>,
}

impl Heard {
    pub(super) fn new(clock: impl Clock + 'static) -> Self {
        let last = Arc::new(Mutex::new(clock.now()));
        Self { clock: Arc::new(clock), last }
    }

    fn note(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = self.clock.now();
    }

    /// What is left until it has been silent for so long.
    fn left(&self, silence: Duration) -> Duration {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        silence.saturating_sub(self.clock.now().saturating_sub(last))
    }

    /// The next message; `None` after so long a silence.
    pub(super) async fn message<T>(
        &self,
        stream: &mut Streaming<T>,
        silence: Duration,
    ) -> Option<Result<Option<T>, Status>> {
        loop {
            for patience in [self.left(silence), SECOND_LOOK] {
                if let Ok(message) = timeout(patience, stream.message()).await {
                    self.note();
                    return Some(message);
                }
            }
            if self.left(silence).is_zero() {
                return None;
            }
        }
    }
}

/// The body of a stream, each piece of which is noted.
pub(super) struct Listened<B> {
    body: B,
    heard: Heard,
}

impl<B> Listened<B> {
    pub(super) fn new(body: B, heard: Heard) -> Self {
        Self { body, heard }
    }
}

impl<B: Body + Unpin> Body for Listened<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if polled.is_ready() {
            self.heard.note();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::VirtualClock;
    use crate::process::wire::{Frames, MAX_FRAME_BYTES};
    use bytes::Bytes;
    use tokio::sync::mpsc;

    const SILENCE: Duration = Duration::from_millis(10);

    /// Pieces that come 9 ms after each other.
    struct Drip {
        pieces: mpsc::Receiver<Bytes>,
        clock: VirtualClock,
    }

    impl Body for Drip {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            let polled = self.pieces.poll_recv(context);
            self.clock.advance(if polled.is_ready() { SILENCE * 9 / 10 } else { Duration::ZERO });
            polled.map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
        }
    }

    fn opened() -> (mpsc::Sender<Bytes>, VirtualClock, Heard, Streaming<Vec<u64>>) {
        let (sender, pieces) = mpsc::channel(1);
        let clock = VirtualClock::default();
        let heard = Heard::new(clock.clone());
        let body = Listened::new(Drip { pieces, clock: clock.clone() }, heard.clone());
        let codec = Frames::<(), Vec<u64>>::default();
        let stream = Streaming::new_request(codec, body, None, Some(MAX_FRAME_BYTES));
        (sender, clock, heard, stream)
    }

    /// A message as gRPC frames it.
    fn frame(message: &[u64]) -> Vec<u8> {
        let text = rmp_serde::to_vec(message).expect("encodes");
        [&[0][..], &(text.len() as u32).to_be_bytes(), &text].concat()
    }

    #[tokio::test]
    async fn a_large_message_may_take_longer_than_a_silence() {
        let (sender, _clock, heard, mut stream) = opened();
        let message = vec![u64::MAX; 100];
        let bytes = frame(&message);
        let drip = async move {
            // Longer than the second look; on the stream's clock, than 80 silences.
            for piece in bytes.chunks(bytes.len().div_ceil(90)) {
                tokio::time::sleep(Duration::from_millis(10)).await;
                sender.send(Bytes::copy_from_slice(piece)).await.expect("it is read");
            }
            sender
        };
        let (heard, _sender) = tokio::join!(heard.message(&mut stream, SILENCE), drip);
        let heard = heard.expect("it was never silent").expect("it is whole");
        assert_eq!(heard, Some(message));
    }

    #[tokio::test]
    async fn half_a_message_and_then_silence_is_noticed() {
        let (sender, clock, heard, mut stream) = opened();
        let half = Bytes::from(frame(&[1, 2, 3])[..7].to_vec());
        sender.send(half).await.expect("there is room");
        assert!(heard.left(SILENCE) == SILENCE);
        let quiet = async {
            // The half has come when there is room for more.
            let _room = sender.reserve().await.expect("it is read");
            clock.advance(SILENCE);
        };
        let (heard, ()) = tokio::join!(heard.message(&mut stream, SILENCE), quiet);
        assert!(heard.is_none());
    }
}
