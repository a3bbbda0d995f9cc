//! Prometheus metrics over HTTP, where the environment asks for them.

use super::{prometheus, server};
use crate::runtime::WeakRuntime;
use crate::{Error, Runtime, console};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Where the program serves `/metrics`, such as `127.0.0.1:9100`; port 0 takes a free one, which
/// is printed. Everybody who reaches the address can read the metrics: keep it local.
pub const METRICS_VARIABLE: &str = "MOBULA_METRICS";

/// Connections that are served at one time; others wait to be accepted.
const AT_ONCE: usize = 16;
/// A connection is closed after this, however slowly it is used.
const DEADLINE: Duration = Duration::from_secs(60);
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(200);

/// Serves the metrics if the environment names an address.
pub(super) fn serve(runtime: &Runtime, tokio: &tokio::runtime::Handle) -> Result<(), Error> {
    let Ok(text) = std::env::var(METRICS_VARIABLE) else { return Ok(()) };
    let address: SocketAddr = text.parse().map_err(|_| wrong(&text))?;
    // A program that was started by another one has its environment, too: it goes without.
    let listener = std::net::TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok((listener.local_addr()?, TcpListener::from_std(listener)?))
    });
    match listener {
        Ok((bound, listener)) => {
            console::note(format!("Metrics at http://{bound}/metrics"));
            tokio.spawn(accept(listener, runtime.downgrade()));
        }
        Err(error) => console::note(format!("No metrics: cannot listen at {address}: {error}")),
    }
    Ok(())
}

fn wrong(text: &str) -> Error {
    Error::LaunchVariable {
        variable: METRICS_VARIABLE.to_owned(),
        got: Some(text.to_owned()),
        expected: "an address and a port, such as 127.0.0.1:9100".to_owned(),
    }
}

async fn accept(listener: TcpListener, runtime: WeakRuntime) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let runtime = runtime.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request| answer(request, runtime.clone()));
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEADER_DEADLINE);
            let served = http.serve_connection(TokioIo::new(stream), service);
            // A scraper that goes away is no concern of this program.
            let _ = tokio::time::timeout(DEADLINE, served).await;
            drop(place);
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    runtime: WeakRuntime,
) -> Result<Response<String>, Infallible> {
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    Ok(match (request.uri().path(), is_read) {
        ("/metrics", true) => match server::look(&runtime).await {
            Some(status) => respond(StatusCode::OK, prometheus(&status)),
            None => respond(StatusCode::SERVICE_UNAVAILABLE, "the program is ending\n".into()),
        },
        ("/metrics", false) => {
            let mut refused = respond(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into());
            refused
                .headers_mut()
                .insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
            refused
        }
        _ => respond(StatusCode::NOT_FOUND, "metrics are at /metrics\n".into()),
    })
}

fn respond(status: StatusCode, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let text = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, text);
    response
}
