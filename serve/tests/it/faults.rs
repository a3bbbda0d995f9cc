//! Batching, overload, deadlines, lost clients, failing models, and the end.

use crate::support::*;
use mobula_core::{BoxError, Resources};
use mobula_serve::{Deployment, Error, Model, RunningServer, Server};
use serde_json::json;
use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Waits until so many requests are without an answer.
fn wait_for_unanswered(server: &RunningServer, n: u64) {
    let mut client = client(server);
    eventually("the request", || metric(&mut client, "unanswered_requests") == n);
}

/// One request of each value, in this order; the first alone in the model, the others behind it.
fn queue_up(
    server: &RunningServer,
    gate: &Gate,
    values: &[f32],
) -> Vec<std::thread::JoinHandle<Answer>> {
    let mut threads = Vec::new();
    for (i, x) in values.iter().enumerate() {
        threads.push(in_background(server.addr(), *x));
        wait_for_unanswered(server, i as u64 + 1);
        gate.wait_for_batches(1);
    }
    threads
}

fn answers(threads: Vec<std::thread::JoinHandle<Answer>>) -> Vec<Answer> {
    threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
}

#[test]
fn what_arrives_meanwhile_runs_as_one_batch_with_the_same_answers() {
    let gate = Gate::closed();
    let server = serve(deployment(&gate));
    let values = [10.0, 11.0, 12.0, 14.0, 15.0];
    let threads = queue_up(&server, &gate, &values);
    gate.open();
    let answers = answers(threads);
    assert_eq!(gate.wait_for_batches(2), [vec![10.0], vec![11.0, 12.0, 14.0, 15.0]]);
    for (x, answer) in values.into_iter().zip(&answers) {
        let alone = post_infer(server.addr(), &body(&[x]));
        assert_eq!(answer.json, alone.json, "batched = single");
        assert_eq!(answer.output("y"), &json!([2.0 * x, 2.0 * x + 2.0]));
    }
    assert_eq!(answers[0].header("x-mobula-batch-size"), Some(1));
    assert_eq!(answers[4].header("x-mobula-batch-size"), Some(4));
    assert!(server.stats("double").expect("stats").mean_batch_size > 1.0);
}

#[test]
fn replicas_run_at_the_same_time() {
    let gate = Gate::closed();
    let server = serve(deployment(&gate).with_replicas(2));
    let threads = queue_up(&server, &gate, &[1.0, 2.0]);
    gate.wait_for_batches(2); // Both are inside while the gate is closed.
    gate.open();
    assert!(answers(threads).iter().all(|answer| answer.status == 200));
}

#[test]
fn a_full_queue_is_429_with_a_time_to_come_back() {
    let gate = Gate::closed();
    let server = serve(small_queue(&gate, 1, 1));
    let threads = queue_up(&server, &gate, &[1.0, 2.0]);
    let refused = post_infer(server.addr(), &body(&[3.0]));
    assert_eq!(refused.status, 429, "{refused:?}");
    assert!(refused.header("retry-after").is_some_and(|seconds| seconds >= 1), "{refused:?}");
    assert!(refused.error().contains("1 rows"), "{refused:?}");
    gate.open();
    assert!(answers(threads).iter().all(|answer| answer.status == 200));
    assert_eq!(post_infer(server.addr(), &body(&[3.0])).status, 200);
}

#[test]
fn deadlines_strike_while_the_model_is_busy() {
    let gate = Gate::closed();
    let server = serve(deployment(&gate));
    let hasty = |x: f32| {
        let mut request: serde_json::Value = serde_json::from_str(&body(&[x])).expect("JSON");
        request["parameters"] = json!({"timeout": 30_000}); // Microseconds.
        request.to_string()
    };
    for x in [1.0, 2.0] {
        // The first one runs and the second one waits; the gate stays closed.
        let late = post_infer(server.addr(), &hasty(x));
        assert_eq!(late.status, 504, "{late:?}");
        assert!(late.error().contains("30ms"), "{late:?}");
    }
    gate.open();
    assert_eq!(post_infer(server.addr(), &body(&[3.0])).status, 200);
    assert_eq!(gate.wait_for_batches(2), [[1.0], [3.0]], "the late one never ran");
}

#[test]
fn a_client_that_hangs_up_is_not_computed_for() {
    let gate = Gate::closed();
    let server = serve(deployment(&gate));
    let threads = queue_up(&server, &gate, &[1.0]);
    let mut stream = TcpStream::connect(server.addr()).expect("connected");
    let request = request("POST", "/v2/models/double/infer", "", &body(&[2.0]));
    stream.write_all(request.as_bytes()).expect("sent");
    wait_for_unanswered(&server, 2);
    drop(stream);
    wait_for_unanswered(&server, 1);
    gate.open();
    assert_eq!(answers(threads)[0].status, 200);
    assert_eq!(post_infer(server.addr(), &body(&[3.0])).status, 200);
    assert_eq!(gate.wait_for_batches(2), [[1.0], [3.0]]);
    assert_eq!(metric(&mut client(&server), "requests_total{model=\"double\",outcome=\"cancel"), 1);
}

#[test]
fn a_panic_is_a_500_and_the_next_request_works() {
    let server = serve(deployment(&Gate::default()));
    let answer = post_infer(server.addr(), &body(&[PANIC]));
    assert_eq!(answer.status, 500);
    assert!(answer.error().contains("the beast is in the batch"), "{answer:?}");
    assert_eq!(post_infer(server.addr(), &body(&[1.0])).status, 200);
    assert_eq!(get(server.addr(), "/readyz").status, 200);
}

#[test]
fn a_poisoned_request_fails_alone() {
    for poison in [PANIC, FAIL] {
        let gate = Gate::closed();
        let server = serve(deployment(&gate));
        let threads = queue_up(&server, &gate, &[1.0, 2.0, poison, 4.0, 5.0]);
        gate.open();
        let status: Vec<u16> = answers(threads).iter().map(|answer| answer.status).collect();
        assert_eq!(status, [200, 200, 500, 200, 200]);
        assert_eq!(gate.wait_for_batches(2)[1], [2.0, poison, 4.0, 5.0], "it had neighbours");
    }
}

/// Loads so often and never again.
fn loads(times: usize) -> Deployment {
    let left = AtomicUsize::new(times);
    let loader = move || -> Result<Box<dyn Model>, BoxError> {
        match left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) {
            Ok(_) => Ok(Box::new(Gate::default())),
            Err(_) => Err("the weights are gone".into()),
        }
    };
    Deployment::new(metadata("double"), Arc::new(loader))
}

#[test]
fn a_model_that_cannot_be_rebuilt_is_unavailable() {
    let server = serve(loads(1));
    assert_eq!(post_infer(server.addr(), &body(&[PANIC])).status, 500);
    let answer = post_infer(server.addr(), &body(&[1.0]));
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.error().contains("none of its replicas"), "{answer:?}");
    for path in ["/readyz", "/v2/health/ready", "/v2/models/double/ready"] {
        let ready = get(server.addr(), path);
        assert_eq!((ready.status, &ready.json["ready"]), (503, &json!(false)), "{path}");
    }
    assert_eq!(get(server.addr(), "/livez").status, 200);
}

#[test]
fn a_lost_replica_leaves_its_batch_to_another() {
    let server = serve(loads(2).with_replicas(2));
    assert_eq!(post_infer(server.addr(), &body(&[PANIC])).status, 500);
    for _ in 0..4 {
        assert_eq!(post_infer(server.addr(), &body(&[1.0])).status, 200);
    }
    assert_eq!(server.stats("double").expect("stats").replicas, 1);
}

#[test]
fn outputs_that_contradict_the_metadata_are_the_models_fault() {
    let mut wrong = metadata("double");
    wrong.outputs[0].shape = vec![7];
    let server = serve(Deployment::new(wrong, loader(&Gate::default())));
    let answer = post_infer(server.addr(), &body(&[1.0]));
    assert_eq!(answer.status, 500);
    assert!(answer.error().contains("\"y\"") && answer.error().contains("[1, 2]"), "{answer:?}");
}

#[test]
fn what_cannot_be_deployed_says_why() {
    let gate = Gate::default();
    let deploy = |deployment: Deployment| {
        let server = Server::new(&runtime()).deploy(deployment);
        server.expect_err("it must not be deployed").to_string()
    };
    assert!(deploy(loads(0)).contains("the weights are gone"));
    let cpus = deploy(deployment(&gate).with_resources(Resources::cpus(64.0)));
    assert!(cpus.contains("64 CPU") && cpus.contains("2 CPU"), "{cpus}");
    let replicas = deploy(deployment(&gate).with_replicas(3));
    assert!(replicas.contains("3 CPU"), "at once, not after a timeout: {replicas}");
    assert!(deploy(small_queue(&gate, 8, 4)).contains("max_queue_rows is 4"));
    assert!(deploy(small_queue(&gate, 0, 4)).contains("max_batch_size is 0"));
    assert!(deploy(deployment(&gate).with_replicas(0)).contains("replicas"));
    let twice = Server::new(&runtime()).deploy(deployment(&gate)).expect("once");
    assert!(matches!(twice.deploy(deployment(&gate)), Err(Error::DuplicateModel { .. })));
}

#[test]
fn a_port_in_use_names_the_address_and_the_way_out() {
    let server = serve(deployment(&Gate::default()));
    let addr = server.addr().to_string();
    let error = Server::new(&runtime()).bind(&addr).expect_err("in use");
    assert!(matches!(error, Error::AddressInUse { .. }));
    let text = error.to_string();
    assert!(text.contains(&addr) && text.contains("--http"), "{text}");
    let error = Server::new(&runtime()).bind("no.such.host.invalid:1").expect_err("no host");
    assert!(error.to_string().contains("no.such.host.invalid:1"), "{error}");
}

#[test]
fn a_shutdown_answers_what_is_under_way_and_refuses_the_rest() {
    let gate = Gate::closed();
    let server = serve(deployment(&gate));
    let addr = server.addr();
    let threads = queue_up(&server, &gate, &[1.0, 2.0]);
    let shutdown = std::thread::spawn(move || server.shutdown(PATIENCE));
    eventually("not ready", || get(addr, "/readyz").status == 503);
    let refused = post_infer(addr, &body(&[3.0]));
    assert_eq!(refused.status, 503);
    assert!(refused.error().contains("shutting down"), "{refused:?}");
    gate.open();
    assert!(answers(threads).iter().all(|answer| answer.status == 200));
    shutdown.join().expect("no panic").expect("in time");
    assert!(TcpStream::connect(addr).is_err(), "nobody listens any more");
}

#[test]
fn a_shutdown_ends_at_its_deadline() {
    let gate = Gate::closed();
    let server = serve(deployment(&gate));
    let threads = queue_up(&server, &gate, &[1.0, 2.0]);
    let error = server.shutdown(Duration::from_millis(20)).expect_err("the gate is closed");
    assert!(matches!(error, Error::ShutdownDeadline { unanswered: 2, .. }), "{error}");
    assert!(answers(threads).iter().all(|answer| answer.status == 503));
    gate.open();
}

#[test]
fn an_idle_connection_does_not_hold_up_a_shutdown() {
    let server = serve(deployment(&Gate::default()));
    let mut idle = client(&server);
    assert_eq!(idle.get("/livez").expect("live").0, 200);
    let _silent = TcpStream::connect(server.addr()).expect("connected");
    server.shutdown(PATIENCE).expect("at once");
    assert!(matches!(idle.get("/livez"), Err(Error::Connection { .. })));
}

#[test]
fn resources_are_free_again_after_the_server() {
    let runtime = runtime();
    for _ in 0..3 {
        let deployment = deployment(&Gate::default()).with_replicas(2);
        let server = Server::new(&runtime).deploy(deployment).expect("placed");
        let server = server.bind("127.0.0.1:0").expect("a free port");
        assert_eq!(post_infer(server.addr(), &body(&[1.0])).status, 200);
        server.shutdown(PATIENCE).expect("in time");
        eventually("free CPUs", || runtime.free_resources() == runtime.resources());
    }
}

#[test]
fn blocking_calls_refuse_to_stall_async_code() {
    let server = serve(deployment(&Gate::default()));
    let tokio = tokio::runtime::Runtime::new().expect("tokio");
    let mut client = client(&server);
    let result = tokio.block_on(async { client.get("/livez") });
    assert!(matches!(result, Err(Error::BlockingInAsync { .. })));
}

#[test]
fn a_server_can_live_on_the_callers_tokio() {
    let tokio = tokio::runtime::Runtime::new().expect("tokio");
    let server = Server::new(&runtime()).with_handle(tokio.handle().clone());
    let server = server.deploy(deployment(&Gate::default())).expect("deployed");
    let server = server.bind("127.0.0.1:0").expect("a free port");
    assert_eq!(post_infer(server.addr(), &body(&[1.0])).status, 200);
    server.shutdown(PATIENCE).expect("in time");
}
