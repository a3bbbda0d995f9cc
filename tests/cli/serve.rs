use crate::program::{Running, mobula};
use candle_core::{Device, Tensor};
use mobula::nn::models::MlpOptions;
use mobula::nn::{Model, ModelSpec, Pass};
use mobula::serve::Client;
use mobula::{Batch, CheckpointStore, Error, RunDir, models};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A model repository in `folder` with one untrained classifier, "points".
fn repository(folder: &Path) -> (PathBuf, Model) {
    let spec = ModelSpec::new("mlp", &MlpOptions::new(2, [8], 3)).expect("a spec");
    let model = Model::build(&spec, 7, &Device::Cpu).expect("a model");
    let store = CheckpointStore::new(folder.join("checkpoints"), 1);
    let checkpoint = store.save(1, |dir| model.save(dir).map_err(Error::layer)).expect("saved");
    let repository = folder.join("models");
    models::export_classifier(&checkpoint, &repository, "points", "point", 2).expect("exported");
    (repository, model)
}

fn points() -> Batch {
    let rows = Tensor::new(&[[0.5f32, -1.0], [2.0, 0.25]], &Device::Cpu).expect("a tensor");
    Batch::new(vec![("point".to_owned(), rows)]).expect("a batch")
}

fn serve(folder: &Path) -> Running {
    let folder = folder.to_str().expect("UTF-8");
    Running::start(&["serve", folder, "--http", "127.0.0.1:0", "--replicas", "1"])
}

/// The `HOST:PORT` that it says it listens on.
fn address(server: &Running) -> String {
    let line = server.line_with("listening on");
    let url = line.split_whitespace().find_map(|word| word.strip_prefix("http://"));
    url.expect("a URL").trim_end_matches(';').to_owned()
}

#[test]
fn a_served_model_answers_as_it_does_in_the_program() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let (repository, model) = repository(folder.path());
    let mut server = serve(&repository);
    let shown = server.line_with("points version 1");
    assert!(shown.contains("mlp, replicas: 1"), "{shown}");
    assert_eq!(server.line_with("inputs").trim(), "inputs   point FP32 [-1, 2]");
    let curl = server.line_with("try: curl");
    let mut client = Client::new(address(&server)).expect("a client");

    let answer = client.infer("points", &points()).expect("an answer");
    let classes = answer.get("class").expect("class").to_vec1::<u32>().expect("integers");
    let points = points();
    let logits = model.forward(points.get("point").expect("point"), &Pass::eval());
    let expected = logits.and_then(|logits| Ok(logits.argmax(1)?)).expect("classes");
    assert_eq!(classes, expected.to_vec1::<u32>().expect("integers"));

    let body = curl.split('\'').nth(1).expect("a quoted body").to_owned();
    let (status, text) = client.post("/v2/models/points/infer", body).expect("an answer");
    assert_eq!(status, 200, "the printed example works: {text}");

    server.interrupt();
    let code = server.wait(Duration::from_secs(20)).code();
    assert!(matches!(code, Some(0 | 130)), "{code:?}");
}

#[test]
fn a_run_is_served_from_its_models() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(folder.path(), "trained", 7, &()).expect("a run");
    let path = run.path().to_str().expect("UTF-8");
    let none = mobula(&["serve", path]);
    assert!(none.error().contains("has no models"), "{none:?}");

    repository(run.path());
    let server = serve(run.path());
    let mut client = Client::new(address(&server)).expect("a client");
    assert_eq!(client.get("/v2/models/points/ready").expect("an answer").0, 200);
}

#[test]
fn a_port_in_use_is_one_clear_line() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let (repository, _) = repository(folder.path());
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("an address").to_string();
    let refused = mobula(&["serve", repository.to_str().expect("UTF-8"), "--http", &addr]);
    assert!(refused.error().starts_with(&format!("{addr} is in use")), "{refused:?}");
}

#[test]
fn what_is_no_repository_is_said() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let missing = mobula(&["serve", folder.path().join("gone").to_str().expect("UTF-8")]);
    assert!(missing.error().contains("expected a model repository"), "{missing:?}");
    let empty = mobula(&["serve", folder.path().to_str().expect("UTF-8")]);
    assert!(empty.error().contains("it has no model"), "{empty:?}");
}
