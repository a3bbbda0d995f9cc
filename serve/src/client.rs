//! A small client of the Open Inference Protocol over one keep-alive connection.

use crate::{Error, protocol};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use mobula_core::{Batch, BoxError};
use std::fmt;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Handle, Runtime};

/// An open connection to a server.
pub(crate) struct Connection {
    addr: String,
    sender: SendRequest<Full<Bytes>>,
}

impl Connection {
    pub(crate) async fn open(addr: &str) -> Result<Self, Error> {
        let failed = |source: BoxError| Error::Connection { addr: addr.to_owned(), source };
        let stream = TcpStream::connect(addr).await.map_err(|e| failed(e.into()))?;
        stream.set_nodelay(true).map_err(|e| failed(e.into()))?;
        let shaken = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = shaken.map_err(|e| failed(e.into()))?;
        // Its error reaches the caller through `sender`.
        tokio::spawn(connection);
        Ok(Self { addr: addr.to_owned(), sender })
    }

    pub(crate) fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    /// The status and body of the answer.
    pub(crate) async fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(u16, Bytes), Error> {
        let answer = self.exchange(method, path, body).await;
        answer.map_err(|source| Error::Connection { addr: self.addr.clone(), source })
    }

    async fn exchange(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(u16, Bytes), BoxError> {
        self.sender.ready().await?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.addr)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let response = self.sender.send_request(request).await?;
        let status = response.status().as_u16();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }
}

pub(crate) fn infer_path(model: &str) -> String {
    format!("/v2/models/{model}/infer")
}

/// The outputs of an answer, or its error.
pub(crate) fn read_answer(status: u16, body: &[u8]) -> Result<Batch, Error> {
    match status {
        200 => protocol::decode_answer(body),
        _ => Err(Error::Rejected { status, message: protocol::decode_error(body) }),
    }
}

/// A client that blocks. It keeps its connection, and opens another when that is lost.
pub struct Client {
    addr: String,
    timeout: Duration,
    runtime: Runtime,
    connection: Option<Connection>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl Client {
    /// A client of the server at `addr`, `HOST:PORT`. Nothing is sent yet.
    pub fn new(addr: impl fmt::Display) -> Result<Self, Error> {
        Ok(Self {
            addr: addr.to_string(),
            timeout: Duration::from_secs(60),
            runtime: current_thread()?,
            connection: None,
        })
    }

    /// The same with another limit on the time that an answer may take. Default 60 s.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The body of a request with these inputs, as `curl -d` takes it.
    pub fn request_body(inputs: &Batch) -> Result<String, Error> {
        let body = crate::protocol::encode_request(inputs)?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Asks `model` for the outputs of `inputs`, whose first dimension is the rows.
    ///
    /// Errors are [`Error::Rejected`] with the status and message of the server, or
    /// [`Error::Connection`].
    pub fn infer(&mut self, model: &str, inputs: &Batch) -> Result<Batch, Error> {
        let body = protocol::encode_request(inputs)?;
        let (status, body) = self.ask(Method::POST, &infer_path(model), body.into())?;
        read_answer(status, &body)
    }

    /// The status and body at a path, such as `/metrics`.
    pub fn get(&mut self, path: &str) -> Result<(u16, String), Error> {
        let (status, body) = self.ask(Method::GET, path, Bytes::new())?;
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    /// The status and body of the answer to a POST of `body`.
    pub fn post(&mut self, path: &str, body: impl Into<Bytes>) -> Result<(u16, String), Error> {
        let (status, body) = self.ask(Method::POST, path, body.into())?;
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    fn ask(&mut self, method: Method, path: &str, body: Bytes) -> Result<(u16, Bytes), Error> {
        if Handle::try_current().is_ok() {
            return Err(Error::BlockingInAsync { call: "serve::Client" });
        }
        let Self { addr, timeout, runtime, connection } = self;
        let exchange = async {
            let mut open = match connection.take().filter(Connection::is_open) {
                Some(open) => open,
                None => Connection::open(addr).await?,
            };
            let answer = open.ask(method, path, body).await?;
            *connection = Some(open);
            Ok(answer)
        };
        let timed = async { tokio::time::timeout(*timeout, exchange).await };
        runtime.block_on(timed).unwrap_or_else(|elapsed| {
            Err(Error::Connection { addr: addr.clone(), source: elapsed.into() })
        })
    }
}

pub(crate) fn current_thread() -> Result<Runtime, Error> {
    Builder::new_current_thread().enable_all().build().map_err(|source| Error::Threads { source })
}
