//! What the Open Inference Protocol promises, and what it refuses.

use crate::support::*;
use candle_core::{Device, Tensor};
use mobula_core::Batch;
use mobula_serve::LoadTest;
use serde_json::json;

#[test]
fn pages_about_the_server_and_the_model() {
    let server = serve(deployment(&Gate::default()).with_replicas(2));
    let addr = server.addr();
    assert_eq!(get(addr, "/v2").json["name"], "mobula");
    assert_eq!(get(addr, "/v2/health/live").json, json!({"live": true}));
    for path in ["/v2/health/ready", "/readyz"] {
        assert_eq!(get(addr, path).json, json!({"ready": true}));
    }
    for path in ["/v2/models/double", "/v2/models/double/versions/1"] {
        let page = get(addr, path).json;
        assert_eq!(page["versions"], json!(["1"]));
        assert_eq!(page["inputs"], json!([{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]));
        let ready = get(addr, &format!("{path}/ready")).json;
        assert_eq!(ready, json!({"name": "double", "ready": true}));
    }
    let index = exchange(addr, "POST", "/v2/repository/index", "", "").json;
    let entry = json!({"name": "double", "version": "1", "state": "READY", "reason": ""});
    assert_eq!(index, json!([entry]));
}

#[test]
fn nested_flat_and_versioned_requests_get_one_answer() {
    let server = serve(deployment(&Gate::default()));
    let flat = json!({"id": "q1", "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2.5, -3e0, 4]},
    ]});
    let nested = json!({"id": "q1", "parameters": {"binary_data_output": true}, "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2.5], [-3, 4]]},
    ]});
    let versioned = "/v2/models/double/versions/1/infer";
    for answer in [
        post_infer(server.addr(), &flat.to_string()),
        post_infer(server.addr(), &nested.to_string()),
        exchange(server.addr(), "POST", versioned, "content-type: text/x\r\n", &flat.to_string()),
    ] {
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.json["model_name"], "double");
        assert_eq!(answer.json["id"], "q1");
        assert_eq!(answer.output("y"), &json!([2.0, 5.0, -6.0, 8.0]));
        assert_eq!(answer.output("sum"), &json!([3, 1]));
        assert_eq!(answer.json["outputs"][0]["shape"], json!([2, 2]));
        assert_eq!(answer.header("x-mobula-batch-size"), Some(2));
        assert!(answer.header("x-mobula-queue-us").is_some());
    }
}

#[test]
fn a_request_chooses_its_outputs() {
    let server = serve(deployment(&Gate::default()));
    let ask = |name: &str| {
        json!({"outputs": [{"name": name}], "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]},
        ]})
        .to_string()
    };
    let answer = post_infer(server.addr(), &ask("sum"));
    assert_eq!(answer.json["outputs"].as_array().map(Vec::len), Some(1));
    assert_eq!(answer.output("sum"), &json!([3]));
    let answer = post_infer(server.addr(), &ask("z"));
    assert_eq!(answer.status, 400);
    assert!(answer.error().contains("\"z\"") && answer.error().contains("y, sum"), "{answer:?}");
}

#[test]
fn nan_travels_as_null_in_both_directions() {
    let server = serve(deployment(&Gate::default()));
    let answer = post_infer(server.addr(), &body(&[NAN]));
    assert_eq!(answer.output("y"), &json!([null, 156.0]));
    let x = Tensor::new(&[[f32::NAN, 1.0]], &Device::Cpu).expect("a tensor");
    let batch = Batch::new(vec![("x".to_owned(), x)]).expect("a batch");
    let answer = client(&server).infer("double", &batch).expect("an answer");
    let y: Vec<Vec<f32>> = answer.get("y").and_then(|y| Ok(y.to_vec2()?)).expect("y");
    assert!(y[0][0].is_nan() && y[0][1] == 2.0);
}

/// What is sent as the input, and words that the error must contain.
const BAD_INPUTS: [(&str, &[&str]); 15] = [
    (r#"{"name":"x","datatype":"FP64","shape":[1,2],"data":[1,2]}"#, &["\"x\"", "FP64", "FP32"]),
    (r#"{"name":"x","datatype":"FP32","shape":[1,3],"data":[1,2,3]}"#, &["[1, 3]", "[-1, 2]"]),
    (r#"{"name":"x","datatype":"FP32","shape":[2],"data":[1,2]}"#, &["[2]", "[-1, 2]"]),
    (r#"{"name":"x","datatype":"FP32","shape":[0,2],"data":[]}"#, &["[0, 2]", "at least one row"]),
    (r#"{"name":"x","datatype":"FP32","shape":[],"data":[1]}"#, &["[]", "[-1, 2]"]),
    (r#"{"name":"x","datatype":"FP32","shape":[-1,2],"data":[1,2]}"#, &["-1"]),
    (r#"{"name":"x","datatype":"FP32","shape":[1,2],"data":[1,2,3]}"#, &["of 3 numbers", "2 for"]),
    (r#"{"name":"x","datatype":"FP32","shape":[9223372036854775808,2],"data":[1]}"#, &["sane"]),
    (r#"{"name":"x","datatype":"FP32","shape":[2,2],"data":[[1,2,3,4]]}"#, &["nested as [1, 4]"]),
    (r#"{"name":"x","datatype":"FP32","shape":[2,2],"data":[[1,2,3],[4]]}"#, &["ragged"]),
    (r#"{"name":"x","datatype":"FP32","shape":[1,2],"data":["1",2]}"#, &["string", "number"]),
    (r#"{"name":"x","datatype":"FP32","shape":[1,2],"data":[1e39,2]}"#, &["FP32", "1e39"]),
    (r#"{"name":"x","datatype":"FP32","shape":[1,2],"data":7}"#, &["array"]),
    (r#"{"name":"x","datatype":"FP32","shape":[1,2]}"#, &["data missing"]),
    (r#"{"name":"z","datatype":"FP32","shape":[1,2],"data":[1,2]}"#, &["[x]", "[z]"]),
];

#[test]
fn a_bad_input_is_a_400_that_names_it() {
    let server = serve(deployment(&Gate::default()));
    for (input, words) in BAD_INPUTS {
        let answer = post_infer(server.addr(), &format!(r#"{{"inputs":[{input}]}}"#));
        assert_eq!(answer.status, 400, "{input}: {answer:?}");
        for word in words {
            assert!(answer.error().contains(word), "{input}: {word:?} not in {answer:?}");
        }
    }
    assert_eq!(server.stats("double").expect("stats").failures, BAD_INPUTS.len() as u64);
}

#[test]
fn a_bad_body_is_a_400_that_says_where() {
    let server = serve(deployment(&Gate::default()));
    for body in ["", "{", "[]", "null", r#"{"inputs": 3}"#, "\u{0}", "{\"inputs\": [}"] {
        let answer = post_infer(server.addr(), body);
        assert_eq!(answer.status, 400, "{body:?}");
        assert!(answer.error().contains("line 1"), "{answer:?}");
    }
    let deep = "[".repeat(2000);
    assert_eq!(post_infer(server.addr(), &deep).status, 400);
    let binary = r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],
        "parameters":{"binary_data_size":8}}]}"#;
    for (headers, body, word) in [
        ("inference-header-content-length: 5\r\n", "{}", "binary"),
        ("", binary, "binary"),
        ("content-encoding: gzip\r\n", "{}", "compressed"),
    ] {
        let answer = exchange(server.addr(), "POST", "/v2/models/double/infer", headers, body);
        assert_eq!(answer.status, 400);
        assert!(answer.error().contains(word), "{answer:?}");
    }
}

#[test]
fn wrong_paths_methods_and_sizes_are_json_errors_too() {
    let server = serve(small_queue(&Gate::default(), 3, 3));
    let addr = server.addr();
    for (method, path, status, words) in [
        ("POST", "/v2/models/tripple/infer", 404, ["tripple", "available: double"]),
        ("GET", "/v2/models/tripple/ready", 404, ["tripple", "double"]),
        ("GET", "/v2/models/double/versions/9", 404, ["\"9\"", "available: 1"]),
        ("GET", "/nowhere", 404, ["/nowhere", "/v2/models"]),
        ("GET", "/v2/models/%ff", 404, ["%ff", "nothing"]),
        ("GET", "/v2/models/double/infer", 405, ["GET", "POST"]),
        ("DELETE", "/v2/models/double", 405, ["DELETE", "GET"]),
    ] {
        let answer = exchange(addr, method, path, "", "");
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
        for word in words {
            assert!(answer.error().contains(word), "{method} {path}: {answer:?}");
        }
    }
    let answer = post_infer(addr, &body(&[0.0; 4]));
    assert_eq!(answer.status, 400);
    assert!(answer.error().contains("4 rows") && answer.error().contains("at most 3"));
    let answer = post_infer(addr, &" ".repeat(8000));
    assert_eq!(answer.status, 413);
    assert!(answer.error().contains("4096 bytes"), "{answer:?}");
}

#[test]
fn a_load_test_brings_every_answer_back_in_order() {
    let server = serve(deployment(&Gate::default()).with_replicas(2));
    let load = LoadTest { clients: 16, requests: 300, ..LoadTest::default() };
    let report = load.run(server.addr(), "double", |i| {
        let x = Tensor::new(&[[i as f32 + 1000.0, 0.5]], &Device::Cpu)?;
        Ok(Batch::new(vec![("x".to_owned(), x)])?)
    });
    let report = report.expect("the server answers");
    assert_eq!((report.requests, report.failures), (300, 0));
    assert!(report.p50 <= report.p99 && report.p99 <= report.elapsed);
    for (i, response) in report.responses.iter().enumerate() {
        let y = response.as_ref().expect("200").get("y").expect("y");
        assert_eq!(y.to_vec2::<f32>().expect("values"), [[2.0 * i as f32 + 2000.0, 1.0]]);
    }
    let stats = server.stats("double").expect("stats");
    assert_eq!((stats.requests, stats.rows, stats.failures), (300, 300, 0));
    assert!(stats.p50 <= stats.p99 && stats.batches <= 300);
    let triton = get(server.addr(), "/v2/models/double/stats").json;
    assert_eq!(triton["model_stats"][0]["inference_count"], 300);
    let unknown = server.stats("tripple").expect_err("no such model");
    assert!(unknown.to_string().contains("double"));
}

#[test]
fn a_load_test_counts_failures() {
    let server = serve(deployment(&Gate::default()));
    let load = LoadTest { clients: 2, requests: 6, ..LoadTest::default() };
    let report = load.run(server.addr(), "double", |i| {
        let x = Tensor::new(&[[if i == 3 { FAIL } else { 1.0 }, 0.5]], &Device::Cpu)?;
        Ok(Batch::new(vec![("x".to_owned(), x)])?)
    });
    let report = report.expect("the server answers");
    assert_eq!((report.requests, report.failures), (6, 1));
    let error = report.responses[3].as_ref().expect_err("it failed");
    assert!(error.status() == 500 && error.to_string().contains("bad luck"), "{error}");
}
