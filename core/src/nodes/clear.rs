//! Without TLS: who calls shows the secret, and whoever is between can read all that is said. The end
//! that answers shows nothing: whoever gets the driver's or an agent's port once that is free, such as
//! another user of the machine, learns the secret from the next caller. The feature `tls` is for where
//! this may happen.

use super::secret::{MAX_BYTES, Secret, is_same};
use crate::Error;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub(super) type Stream = TcpStream;

const WELCOME: u8 = 1;

#[derive(Clone)]
pub(super) struct Credentials(Secret);

impl Credentials {
    pub(super) fn new(secret: &Secret) -> Result<Self, Error> {
        Ok(Self(secret.clone()))
    }

    /// The caller's side. `None`: the other end has another secret.
    pub(super) async fn show(&self, mut connection: TcpStream) -> io::Result<Option<Stream>> {
        let secret = self.0.bytes();
        let bytes = u16::try_from(secret.len()).map_err(io::Error::other)?;
        connection.write_all(&[&bytes.to_be_bytes(), secret].concat()).await?;
        let is_welcome = connection.read_u8().await? == WELCOME;
        Ok(is_welcome.then_some(connection))
    }

    /// The other side. `None`: the caller has another secret.
    pub(super) async fn check(&self, mut connection: TcpStream) -> io::Result<Option<Stream>> {
        let bytes = usize::from(connection.read_u16().await?);
        if bytes > MAX_BYTES {
            return Err(io::Error::other(format!("a secret of {bytes} bytes")));
        }
        let mut shown = vec![0; bytes];
        connection.read_exact(&mut shown).await?;
        let is_known = is_same(&shown, self.0.bytes());
        connection.write_u8(if is_known { WELCOME } else { 0 }).await?;
        Ok(is_known.then_some(connection))
    }
}
