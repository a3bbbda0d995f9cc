//! Answers who asks what this program is doing.

use super::{Status, metrics, socket};
use crate::runtime::WeakRuntime;
use crate::{Error, Runtime};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// Who is slower than this to ask, or to read, gets no answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Requests that are answered at one time; others wait to be accepted.
const AT_ONCE: usize = 8;
/// After an error the system gets time to mend it: perhaps there are no more file descriptors.
const PAUSE: Duration = Duration::from_millis(200);

/// What a client sends: a version of the exchange and what it wants.
pub(super) const REQUEST: &[u8] = b"mobula 1 status\n";

/// Answers requests from now on, as long as the runtime lives. A program that cannot listen runs
/// all the same; one whose metrics address is wrong does not.
pub(crate) fn open(runtime: &Runtime, tokio: &tokio::runtime::Handle) -> Result<(), Error> {
    let _ = runtime.seen().started.set(crate::run::unix_time());
    let _entered = tokio.enter();
    metrics::serve(runtime, tokio)?;
    let listening = socket::listen().and_then(|(listener, guard)| {
        let listener = UnixListener::from_std(listener);
        Ok((listener.map_err(|e| Error::system("listening for `mobula status`", e))?, guard))
    });
    match listening {
        Ok((listener, guard)) => {
            let _ = runtime.seen().socket.set(guard);
            tokio.spawn(serve(listener, runtime.downgrade()));
        }
        Err(error) => tracing::warn!(%error, "`mobula status` will not find this program"),
    }
    Ok(())
}

async fn serve(listener: UnixListener, runtime: WeakRuntime) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let runtime = runtime.clone();
                tokio::spawn(async move {
                    // Who asks and does not wait for the answer is no concern of this program.
                    let _ = tokio::time::timeout(DEADLINE, answer(stream, runtime)).await;
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

async fn answer(mut stream: UnixStream, runtime: WeakRuntime) -> std::io::Result<()> {
    let mut request = [0; REQUEST.len()];
    stream.read_exact(&mut request).await?;
    let text = match (request == REQUEST, look(&runtime).await) {
        (false, _) => r#"{"error":"this version of Mobula answers only `mobula 1 status`"}"#.into(),
        (true, None) => r#"{"error":"the program is ending"}"#.into(),
        (true, Some(status)) => serde_json::to_vec(&status)?,
    };
    stream.write_all(&text).await?;
    stream.shutdown().await
}

/// Looks without keeping the thread that serves all workers.
pub(super) async fn look(runtime: &WeakRuntime) -> Option<Status> {
    let runtime = runtime.clone();
    // The runtime is let go of there too: the last to do so may have much to drop.
    let look = move || runtime.upgrade().map(|runtime| runtime.status());
    tokio::task::spawn_blocking(look).await.ok().flatten()
}
