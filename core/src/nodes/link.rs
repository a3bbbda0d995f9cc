//! Connections between machines. Nothing of the program is said on one before the caller has shown
//! that it knows the secret, and with TLS both ends.

#[cfg(not(feature = "tls"))]
use super::clear as guard;
#[cfg(feature = "tls")]
use super::tls as guard;
pub(super) use guard::{Credentials, Stream};

use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long it may take until two machines know each other.
pub(super) const LINK_TIMEOUT: Duration = Duration::from_secs(5);

/// Who is called says first how the two are to talk, so that a caller who was built otherwise can
/// say what is wrong.
type Greeting = [u8; 16];
const CLEAR: Greeting = *b"mobula in clear\n";
const TLS: Greeting = *b"mobula with TLS\n";
const OURS: Greeting = if cfg!(feature = "tls") { TLS } else { CLEAR };

/// Why two machines have no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("nobody listens at {address} ({source})")]
    Unreachable { address: SocketAddr, source: io::Error },
    #[error("the connection to {address} broke before it was let in ({source})")]
    Broke { address: SocketAddr, source: io::Error },
    #[error("{address} did not let it in within {LINK_TIMEOUT:?}")]
    Slow { address: SocketAddr },
    #[error("what listens at {address} is not a program of Mobula's: it says {said:?}")]
    Stranger { address: SocketAddr, said: String },
    #[error(
        "the program at {address} was built {} the feature `tls`, and this one {} it: all copies must be the same program",
        with(*.theirs), with(!.theirs)
    )]
    BuiltOtherwise { address: SocketAddr, theirs: bool },
    #[error(
        "the machine at {address} has another secret; set MOBULA_SECRET alike for all copies, or for none"
    )]
    OtherSecret { address: SocketAddr },
}

fn with(tls: bool) -> &'static str {
    if tls { "with" } else { "without" }
}

/// A connection to the machine at `address`, and this end's own address.
pub(super) async fn dial(
    address: SocketAddr,
    credentials: &Credentials,
) -> Result<(Stream, SocketAddr), LinkError> {
    let dialled = async {
        let unreachable = |source| LinkError::Unreachable { address, source };
        let connection = TcpStream::connect(address).await.map_err(unreachable)?;
        let local = connection.local_addr().map_err(unreachable)?;
        introduce(connection, address, credentials).await.map(|stream| (stream, local))
    };
    timeout(LINK_TIMEOUT, dialled).await.unwrap_or(Err(LinkError::Slow { address }))
}

async fn introduce(
    mut connection: TcpStream,
    address: SocketAddr,
    credentials: &Credentials,
) -> Result<Stream, LinkError> {
    let broke = |source| LinkError::Broke { address, source };
    connection.set_nodelay(true).map_err(broke)?;
    let mut greeting = Greeting::default();
    connection.read_exact(&mut greeting).await.map_err(broke)?;
    if greeting != OURS {
        return Err(stranger(address, &greeting));
    }
    let shown = credentials.show(connection).await.map_err(broke)?;
    shown.ok_or(LinkError::OtherSecret { address })
}

fn stranger(address: SocketAddr, greeting: &Greeting) -> LinkError {
    if [CLEAR, TLS].contains(greeting) {
        return LinkError::BuiltOtherwise { address, theirs: *greeting == TLS };
    }
    let said = String::from_utf8_lossy(greeting).into_owned();
    LinkError::Stranger { address, said }
}

/// Lets in whoever knows the secret.
pub(super) async fn answer(
    mut connection: TcpStream,
    credentials: &Credentials,
) -> io::Result<Stream> {
    let answered = async {
        connection.set_nodelay(true)?;
        connection.write_all(&OURS).await?;
        let refused = || io::Error::other("it does not know the secret");
        credentials.check(connection).await?.ok_or_else(refused)
    };
    timeout(LINK_TIMEOUT, answered).await?
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
