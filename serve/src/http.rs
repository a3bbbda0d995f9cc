//! The Open Inference Protocol over HTTP, with JSON for every answer, errors included.

use crate::dispatcher::{Answer, Dispatcher};
use crate::metrics::Outcome;
use crate::protocol::{self, InferRequest};
use crate::{Error, metrics};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http_body_util::BodyExt;
use mobula_core::error::chain;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What the handlers share.
pub(crate) struct App {
    pub(crate) models: BTreeMap<String, Arc<Dispatcher>>,
    pub(crate) draining: AtomicBool,
    pub(crate) max_body_bytes: usize,
    pub(crate) body_timeout: Duration,
}

type Shared = State<Arc<App>>;

/// The model that a path names, in the version that it may name.
struct Target(Arc<Dispatcher>);

impl FromRequestParts<Arc<App>> for Target {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Error> {
        let names = Path::<HashMap<String, String>>::from_request_parts(parts, app).await;
        let Ok(Path(names)) = names else {
            return Err(not_found(parts.method.clone(), parts.uri.clone()).await);
        };
        app.find(&names).cloned().map(Self)
    }
}

pub(crate) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new()
        .route("/v2", get(server))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_page))
        .route("/v2/repository/index", post(repository_index));
    for prefix in ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"] {
        router = router
            .route(prefix, get(model))
            .route(&format!("{prefix}/ready"), get(model_ready))
            .route(&format!("{prefix}/stats"), get(model_stats))
            .route(&format!("{prefix}/infer"), post(infer));
    }
    router.fallback(not_found).method_not_allowed_fallback(wrong_method).with_state(app)
}

impl App {
    /// The model of this name, or an error that lists those there are.
    pub(crate) fn model(&self, name: &str) -> Result<&Arc<Dispatcher>, Error> {
        self.models.get(name).ok_or_else(|| Error::UnknownModel {
            name: name.to_owned(),
            available: self.models.keys().cloned().collect(),
        })
    }

    fn find(&self, names: &HashMap<String, String>) -> Result<&Arc<Dispatcher>, Error> {
        let found = self.model(names.get("model").map_or("", String::as_str))?;
        let served = &found.metadata.version;
        match names.get("version") {
            Some(version) if version != served => Err(Error::UnknownVersion {
                model: found.metadata.name.clone(),
                version: version.clone(),
                available: served.clone(),
            }),
            _ => Ok(found),
        }
    }

    fn model_is_ready(&self, model: &Dispatcher) -> bool {
        !self.draining.load(Ordering::Relaxed) && model.gauges().replicas_up > 0
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = protocol::encode_error(&chain(&self));
        let mut response = json_response(status, body);
        if let Self::QueueFull { retry_after, .. } = self {
            let seconds = HeaderValue::from(retry_after.as_secs());
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}

fn json_response(status: StatusCode, body: Vec<u8>) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn ok(value: &Value) -> Response {
    json_response(StatusCode::OK, value.to_string().into_bytes())
}

async fn server() -> Response {
    ok(&json!({
        "name": "mobula",
        "version": env!("CARGO_PKG_VERSION"),
        "extensions": ["model_repository", "statistics"],
    }))
}

async fn live() -> Response {
    ok(&json!({ "live": true }))
}

async fn ready(State(app): Shared) -> Response {
    readiness(json!({}), app.models.values().all(|model| app.model_is_ready(model)))
}

async fn model_ready(State(app): Shared, Target(model): Target) -> Response {
    readiness(json!({ "name": model.metadata.name }), app.model_is_ready(&model))
}

/// 200 or 503; clients of the protocol also read `ready` from the body.
fn readiness(mut body: Value, ready: bool) -> Response {
    body["ready"] = Value::Bool(ready);
    if ready {
        return ok(&body);
    }
    body["error"] = Value::from("not ready: shutting down, or a model has no replica running");
    json_response(StatusCode::SERVICE_UNAVAILABLE, body.to_string().into_bytes())
}

async fn model(Target(model): Target) -> Response {
    ok(&protocol::describe(&model.metadata))
}

async fn model_stats(Target(model): Target) -> Response {
    let metrics = model.metrics().clone();
    ok(&metrics.triton(&model.metadata.name, &model.metadata.version))
}

async fn repository_index(State(app): Shared) -> Response {
    let entry = |model: &Arc<Dispatcher>| {
        let ready = app.model_is_ready(model);
        json!({
            "name": model.metadata.name,
            "version": model.metadata.version,
            "state": if ready { "READY" } else { "UNAVAILABLE" },
            "reason": "",
        })
    };
    ok(&app.models.values().map(entry).collect())
}

async fn metrics_page(State(app): Shared) -> Response {
    let snapshot = |(name, model): (&String, &Arc<Dispatcher>)| {
        let gauges = model.gauges();
        (name.clone(), model.metrics().clone(), gauges)
    };
    let models: Vec<_> = app.models.iter().map(snapshot).collect();
    let content_type = (header::CONTENT_TYPE, "text/plain; version=0.0.4");
    ([content_type], metrics::prometheus(&models)).into_response()
}

async fn not_found(method: Method, uri: Uri) -> Error {
    Error::NotFound { method: method.to_string(), path: uri.path().to_owned() }
}

async fn wrong_method(method: Method, uri: Uri) -> Error {
    Error::MethodNotAllowed { method: method.to_string(), path: uri.path().to_owned() }
}

async fn infer(
    State(app): Shared,
    Target(model): Target,
    request: Request,
) -> Result<Response, Error> {
    let answer = infer_with(&app, &model, request).await;
    if let Err(error) = &answer {
        model.metrics().count(Outcome::of_status(error.status()));
    }
    answer
}

async fn infer_with(app: &App, model: &Dispatcher, request: Request) -> Result<Response, Error> {
    let arrived = mobula_core::clock::Clock::now(&model.clock);
    check_headers(request.headers())?;
    let body = read_body(app, request.into_body()).await?;
    let mut request = InferRequest::parse(&body, &model.metadata, model.batching.max_batch_size)?;
    let (id, asked) = (request.id.take(), std::mem::take(&mut request.outputs));
    let answer = model.infer(request).await?;
    let body = protocol::encode_answer(&model.metadata, id.as_deref(), &asked, &answer.outputs)?;
    let took = mobula_core::clock::Clock::now(&model.clock) - arrived;
    model.answered(&answer, took);
    Ok(explain(json_response(StatusCode::OK, body), &answer))
}

/// Says how the answer came about: in a batch of how many rows, after what wait.
fn explain(mut response: Response, answer: &Answer) -> Response {
    let queued = u64::try_from(answer.queued.as_micros()).unwrap_or(u64::MAX);
    let headers = response.headers_mut();
    headers.insert("x-mobula-batch-size", HeaderValue::from(answer.batch_rows));
    headers.insert("x-mobula-queue-us", HeaderValue::from(queued));
    response
}

/// Refuses encodings that are not spoken here, rather than misreading them as JSON. The content
/// type is not looked at: clients of the protocol send none.
fn check_headers(headers: &HeaderMap) -> Result<(), Error> {
    if headers.contains_key("inference-header-content-length") {
        return Err(protocol::BINARY);
    }
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => Err(Error::Unsupported {
            what: "a compressed body",
            way_out: "send it without Content-Encoding",
        }),
        _ => Ok(()),
    }
}

async fn read_body(app: &App, body: Body) -> Result<Bytes, Error> {
    let timeout = Error::BodyTimeout { after: app.body_timeout };
    let read = collect(body, app.max_body_bytes);
    tokio::time::timeout(app.body_timeout, read).await.map_err(|_| timeout)?
}

/// The whole body. One that is too large is read on for a while and thrown away: a client that
/// is cut off while it sends would never see the answer.
async fn collect(mut body: Body, limit: usize) -> Result<Bytes, Error> {
    let mut kept: Vec<u8> = Vec::new();
    let mut first = Bytes::new();
    let mut size = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Error::Malformed { reason: error.to_string() })?;
        let data = frame.into_data().unwrap_or_default();
        size += data.len();
        if size == data.len() {
            first = data; // Most bodies are one frame, which need not be copied.
        } else if size <= limit {
            kept.extend_from_slice(&std::mem::take(&mut first));
            kept.extend_from_slice(&data);
        } else if size > limit.saturating_mul(4) {
            break;
        }
    }
    match size > limit {
        true => Err(Error::BodyTooLarge { limit }),
        false if kept.is_empty() => Ok(first),
        false => Ok(kept.into()),
    }
}
