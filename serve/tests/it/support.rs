//! A model behind a gate, servers on free ports, and HTTP by hand.

use candle_core::{Device, Tensor};
use mobula_core::{Batch, BoxError, Resources, Runtime};
use mobula_serve::{
    BatchingOptions, Client, Datatype, Deployment, Loader, Model, ModelMetadata, RunningServer,
    Server, TensorSpec,
};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Makes the model panic; [`FAIL`] makes it return an error, [`NAN`] a NaN.
pub(crate) const PANIC: f32 = 666.0;
pub(crate) const FAIL: f32 = 13.0;
pub(crate) const NAN: f32 = 77.0;

/// y = 2x, one batch at a time when the gate says so.
#[derive(Clone, Default)]
pub(crate) struct Gate {
    state: Arc<(Mutex<GateState>, Condvar)>,
}

#[derive(Default)]
struct GateState {
    closed: bool,
    /// First column of every batch that entered.
    entered: Vec<Vec<f32>>,
}

impl Gate {
    pub(crate) fn closed() -> Self {
        let gate = Self::default();
        gate.state.0.lock().expect("no panic holds it").closed = true;
        gate
    }

    pub(crate) fn open(&self) {
        self.state.0.lock().expect("no panic holds it").closed = false;
        self.state.1.notify_all();
    }

    /// The batches that have entered, once there are `n`.
    pub(crate) fn wait_for_batches(&self, n: usize) -> Vec<Vec<f32>> {
        let state = self.state.0.lock().expect("no panic holds it");
        let too_few = |state: &mut GateState| state.entered.len() < n;
        let (state, late) =
            self.state.1.wait_timeout_while(state, PATIENCE, too_few).expect("no panic holds it");
        assert!(!late.timed_out(), "{n} batches, got {:?}", state.entered);
        state.entered.clone()
    }

    fn pass(&self, first_column: Vec<f32>) {
        let mut state = self.state.0.lock().expect("no panic holds it");
        state.entered.push(first_column);
        self.state.1.notify_all();
        let passed = self.state.1.wait_timeout_while(state, PATIENCE, |state| state.closed);
        drop(passed.expect("no panic holds it"));
    }
}

impl Model for Gate {
    fn infer(&mut self, batch: &Batch) -> Result<Batch, BoxError> {
        let x = batch.get("x")?;
        let first: Vec<f32> = x.to_vec2()?.into_iter().map(|row: Vec<f32>| row[0]).collect();
        self.pass(first.clone());
        assert!(!first.contains(&PANIC), "the beast is in the batch");
        if first.contains(&FAIL) {
            return Err("bad luck".into());
        }
        let nan = |v: f32| if v == NAN { f32::NAN } else { 2.0 * v };
        let values = x.flatten_all()?.to_vec1()?.into_iter().map(nan).collect();
        let y = Tensor::from_vec::<_, f32>(values, x.dims(), &Device::Cpu)?;
        let sum = x.sum(1)?.to_dtype(candle_core::DType::I64)?;
        Ok(Batch::new(vec![("sum".to_owned(), sum), ("y".to_owned(), y)])?)
    }
}

pub(crate) fn metadata(name: &str) -> ModelMetadata {
    ModelMetadata::new(name)
        .with_input(TensorSpec::new("x", Datatype::Fp32, [2]))
        .with_output(TensorSpec::new("y", Datatype::Fp32, [2]))
        .with_output(TensorSpec::new("sum", Datatype::Int64, []))
}

pub(crate) fn loader(gate: &Gate) -> Loader {
    let gate = gate.clone();
    Arc::new(move || Ok(Box::new(gate.clone()) as Box<dyn Model>))
}

pub(crate) fn deployment(gate: &Gate) -> Deployment {
    Deployment::new(metadata("double"), loader(gate))
}

pub(crate) fn runtime() -> Runtime {
    Runtime::local(Resources::cpus(2.0)).expect("a runtime")
}

pub(crate) fn serve(deployment: Deployment) -> RunningServer {
    let server = Server::new(&runtime()).with_max_body_bytes(4096);
    server.deploy(deployment).expect("deploy").bind("127.0.0.1:0").expect("a free port")
}

/// One replica, batches of at most so many rows, and room for so many more.
pub(crate) fn small_queue(gate: &Gate, max_batch_size: usize, rows: usize) -> Deployment {
    deployment(gate).with_batching(BatchingOptions {
        max_batch_size,
        max_queue_rows: rows,
        ..BatchingOptions::default()
    })
}

pub(crate) fn body(rows: &[f32]) -> String {
    let data: Vec<[f32; 2]> = rows.iter().map(|x| [*x, x + 1.0]).collect();
    serde_json::json!({"inputs": [
        {"name": "x", "datatype": "FP32", "shape": [rows.len(), 2], "data": data},
    ]})
    .to_string()
}

pub(crate) fn client(server: &RunningServer) -> Client {
    Client::new(server.addr()).expect("a client").with_timeout(PATIENCE)
}

/// A request of one row on a thread of its own, with the answer's parts.
pub(crate) fn in_background(addr: SocketAddr, x: f32) -> std::thread::JoinHandle<Answer> {
    std::thread::spawn(move || post_infer(addr, &body(&[x])))
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) json: Value,
}

impl Answer {
    pub(crate) fn error(&self) -> &str {
        self.json["error"].as_str().unwrap_or_else(|| panic!("no error in {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<u64> {
        let line = self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        line.and_then(|value| value.parse().ok())
    }

    /// The values of output `name`.
    pub(crate) fn output(&self, name: &str) -> &Value {
        let outputs = self.json["outputs"].as_array().unwrap_or_else(|| panic!("{self:?}"));
        let output = outputs.iter().find(|output| output["name"] == name);
        &output.unwrap_or_else(|| panic!("no {name} in {self:?}"))["data"]
    }
}

pub(crate) fn post_infer(addr: SocketAddr, body: &str) -> Answer {
    exchange(addr, "POST", "/v2/models/double/infer", "", body)
}

pub(crate) fn get(addr: SocketAddr, path: &str) -> Answer {
    exchange(addr, "GET", path, "", "")
}

pub(crate) fn request(method: &str, path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}\
         content-length: {length}\r\n\r\n{body}"
    )
}

/// One request on a connection of its own; headers end with `\r\n` each.
pub(crate) fn exchange(
    addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> Answer {
    let mut stream = TcpStream::connect(addr).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.write_all(request(method, path, headers, body).as_bytes()).expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("not HTTP: {text}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Answer {
        status: status.unwrap_or_else(|| panic!("no status: {head}")),
        head: head.to_owned(),
        json: serde_json::from_str(body).unwrap_or_else(|_| Value::from(body)),
    }
}

/// Asks again and again until it is so.
pub(crate) fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < PATIENCE, "{what} never came");
        std::thread::yield_now();
    }
}

/// The value of a line of the metrics page.
pub(crate) fn metric(client: &mut Client, name: &str) -> u64 {
    let (status, page) = client.get("/metrics").expect("metrics");
    assert_eq!(status, 200);
    let line = page.lines().find(|line| line.starts_with(&format!("mobula_serve_{name}")));
    let value = line.and_then(|line| line.rsplit(' ').next()).and_then(|v| v.parse().ok());
    value.unwrap_or_else(|| panic!("{name} is not in:\n{page}"))
}
