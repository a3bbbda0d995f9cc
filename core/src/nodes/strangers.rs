//! Connections whose other end has not shown yet that it knows the secret: few, and not for long.

use super::link::LINK_TIMEOUT;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout_at};

/// So many may be there at a time. Whoever scans ports cannot use up this process's descriptors.
pub(super) const AT_ONCE: usize = 64;
/// When there are more, who was there first goes, but not before this time: many machines of a
/// program may well come at once.
pub(super) const STAY: Duration = Duration::from_millis(250);

pub(super) struct Strangers {
    stay: Duration,
    handshakes: JoinSet<()>,
    by_age: VecDeque<(Instant, AbortHandle)>,
}

impl Strangers {
    pub(super) fn new(stay: Duration) -> Self {
        Self { stay, handshakes: JoinSet::new(), by_age: VecDeque::new() }
    }

    /// Begins a handshake, once there is room for it: when another one ends, or the oldest has had
    /// its time.
    pub(super) async fn add(&mut self, handshake: impl Future<Output = ()> + Send + 'static) {
        while self.handshakes.try_join_next().is_some() {}
        self.by_age.retain(|(_, handshake)| !handshake.is_finished());
        if self.handshakes.len() >= AT_ONCE {
            self.make_room().await;
        }
        self.by_age.push_back((Instant::now(), self.handshakes.spawn(handshake)));
    }

    async fn make_room(&mut self) {
        let Some((since, oldest)) = self.by_age.front() else { return };
        if timeout_at(*since + self.stay, self.handshakes.join_next()).await.is_err() {
            oldest.abort();
            self.handshakes.join_next().await;
        }
    }
}

const _: () = assert!(STAY.as_millis() < LINK_TIMEOUT.as_millis());

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::{Notify, mpsc};

    /// Says who is shown out.
    struct Leaves(usize, mpsc::UnboundedSender<usize>);

    impl Drop for Leaves {
        fn drop(&mut self) {
            let _ = self.1.send(self.0);
        }
    }

    #[tokio::test]
    async fn beyond_the_bound_the_oldest_goes() {
        let (out, mut left) = mpsc::unbounded_channel();
        let mut strangers = Strangers::new(Duration::ZERO);
        for n in 0..AT_ONCE + 2 {
            let guard = Leaves(n, out.clone());
            strangers
                .add(async move {
                    std::future::pending::<()>().await;
                    drop(guard);
                })
                .await;
            assert!(strangers.handshakes.len() <= AT_ONCE);
        }
        assert_eq!([left.recv().await, left.recv().await], [Some(0), Some(1)]);
        assert!(left.try_recv().is_err(), "the others may stay");
    }

    #[tokio::test]
    async fn a_crowd_waits_for_those_who_are_being_let_in() {
        let (done, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let mut strangers = Strangers::new(LINK_TIMEOUT * 100);
        for n in 0..3 * AT_ONCE {
            let (done, called) = (Arc::clone(&done), Arc::clone(&go));
            let handshake = async move {
                called.notified().await;
                done.fetch_add(1, Ordering::Relaxed);
            };
            // As soon as there is no more room, one of them ends.
            if n >= AT_ONCE {
                go.notify_one();
            }
            strangers.add(handshake).await;
        }
        assert_eq!(done.load(Ordering::Relaxed), 2 * AT_ONCE);
    }
}
