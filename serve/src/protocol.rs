//! Inference requests and answers of the Open Inference Protocol, version 2, in JSON.
//!
//! <https://github.com/kserve/open-inference-protocol>

use crate::Error;
use crate::model::{Datatype, ModelMetadata, TensorSpec, names};
use crate::wire::{TensorIn, TensorOut};
use candle_core::Tensor;
use mobula_core::Batch;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

/// A request that has passed every check against its model's metadata.
#[derive(Debug)]
pub(crate) struct InferRequest {
    pub(crate) id: Option<String>,
    /// The client's own limit, if it set one.
    pub(crate) timeout: Option<Duration>,
    /// The inputs in the order of the metadata.
    pub(crate) inputs: Batch,
    /// The outputs asked for; empty asks for all.
    pub(crate) outputs: Vec<String>,
}

#[derive(Deserialize)]
struct RequestIn {
    id: Option<String>,
    #[serde(default)]
    parameters: Map<String, Value>,
    inputs: Vec<TensorIn>,
    #[serde(default)]
    outputs: Vec<OutputIn>,
}

#[derive(Deserialize)]
struct OutputIn {
    name: String,
}

impl InferRequest {
    /// Reads and checks a body. `max_rows` is the largest batch of the model.
    pub(crate) fn parse(
        body: &[u8],
        model: &ModelMetadata,
        max_rows: usize,
    ) -> Result<Self, Error> {
        let request: RequestIn = serde_json::from_slice(body)
            .map_err(|error| Error::Malformed { reason: error.to_string() })?;
        let inputs = read_inputs(request.inputs, model)?;
        if inputs.rows() > max_rows {
            return Err(Error::TooManyRows {
                model: model.name.clone(),
                limit: max_rows,
                got: inputs.rows(),
            });
        }
        let outputs: Vec<String> = request.outputs.into_iter().map(|o| o.name).collect();
        check_outputs(&outputs, model)?;
        let timeout = request.parameters.get("timeout").and_then(Value::as_u64);
        Ok(Self {
            id: request.id,
            timeout: timeout.filter(|us| *us > 0).map(Duration::from_micros),
            inputs,
            outputs,
        })
    }

    /// Requests of the same class can be stacked: their rows have the same shapes.
    pub(crate) fn class(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (_, tensor) in self.inputs.tensors() {
            tensor.dims()[1..].hash(&mut hasher);
        }
        hasher.finish()
    }
}

fn read_inputs(mut sent: Vec<TensorIn>, model: &ModelMetadata) -> Result<Batch, Error> {
    let got: Vec<String> = sent.iter().map(|t| t.name.clone()).collect();
    let mut tensors = Vec::with_capacity(sent.len());
    for spec in &model.inputs {
        if let Some(at) = sent.iter().position(|t| t.name == spec.name) {
            let tensor = read_tensor(sent.swap_remove(at), spec)?;
            tensors.push((spec.name.clone(), tensor));
        }
    }
    if tensors.len() < model.inputs.len() || !sent.is_empty() {
        return Err(Error::InputNames {
            model: model.name.clone(),
            expected: names(&model.inputs),
            got,
        });
    }
    same_rows(&tensors)?;
    Ok(Batch::new(tensors)?)
}

fn same_rows(tensors: &[(String, Tensor)]) -> Result<(), Error> {
    let rows = |tensor: &Tensor| tensor.dims().first().copied().unwrap_or(0);
    let first = tensors.first().map_or(0, |(_, tensor)| rows(tensor));
    match tensors.iter().find(|(_, tensor)| rows(tensor) != first) {
        None => Ok(()),
        Some((name, tensor)) => Err(Error::InvalidInput {
            input: name.clone(),
            what: "shape",
            expected: format!("{first} rows as input {:?} has", tensors[0].0),
            got: format!("{:?}", tensor.dims()),
        }),
    }
}

fn read_tensor(sent: TensorIn, spec: &TensorSpec) -> Result<Tensor, Error> {
    let invalid =
        |what, expected, got| Error::InvalidInput { input: spec.name.clone(), what, expected, got };
    if sent.parameters.contains_key("binary_data_size") {
        return Err(BINARY);
    }
    if sent.datatype != spec.datatype.name() {
        return Err(invalid("datatype", spec.datatype.to_string(), sent.datatype));
    }
    if !spec.accepts(&sent.shape) || sent.shape[0] == 0 {
        let expected = format!("{:?} with at least one row", spec.batched_shape());
        return Err(invalid("shape", expected, format!("{:?}", sent.shape)));
    }
    match sent.data {
        Some(data) => data.tensor(&spec.name, &sent.shape, spec.datatype),
        None => Err(invalid("data", "numbers".to_owned(), "missing".to_owned())),
    }
}

/// The answer to a request that uses the protocol's binary extension.
pub(crate) const BINARY: Error = Error::Unsupported {
    what: "the binary tensor data extension",
    way_out: "send the tensor as JSON `data` (in tritonclient: binary_data=False)",
};

fn check_outputs(asked: &[String], model: &ModelMetadata) -> Result<(), Error> {
    let known = |name: &String| model.outputs.iter().any(|spec| spec.name == *name);
    match asked.iter().find(|name| !known(name)) {
        None => Ok(()),
        Some(name) => Err(Error::UnknownOutput {
            model: model.name.clone(),
            name: name.clone(),
            available: names(&model.outputs),
        }),
    }
}

#[derive(Serialize)]
struct AnswerOut<'a> {
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    outputs: Vec<TensorOut<'a>>,
}

/// The body of a successful answer, with the outputs that were asked for.
pub(crate) fn encode_answer(
    model: &ModelMetadata,
    id: Option<&str>,
    asked: &[String],
    outputs: &Batch,
) -> Result<Vec<u8>, Error> {
    let wanted = |name: &String| asked.is_empty() || asked.contains(name);
    let chosen = outputs.tensors().iter().filter(|(name, _)| wanted(name));
    let outputs = chosen.map(|(name, tensor)| TensorOut::new(name, tensor));
    let answer = AnswerOut {
        model_name: &model.name,
        model_version: &model.version,
        id,
        outputs: outputs.collect::<Result<_, _>>()?,
    };
    to_json(&answer)
}

#[derive(Serialize)]
struct RequestOut<'a> {
    inputs: Vec<TensorOut<'a>>,
}

/// The body of a request with these inputs.
pub(crate) fn encode_request(inputs: &Batch) -> Result<Vec<u8>, Error> {
    let inputs = inputs.tensors().iter().map(|(name, tensor)| TensorOut::new(name, tensor));
    to_json(&RequestOut { inputs: inputs.collect::<Result<_, _>>()? })
}

#[derive(Deserialize)]
struct AnswerIn {
    outputs: Vec<TensorIn>,
}

/// The outputs in the body of a successful answer.
pub(crate) fn decode_answer(body: &[u8]) -> Result<Batch, Error> {
    let malformed = |reason: String| Error::Malformed { reason };
    let answer: AnswerIn =
        serde_json::from_slice(body).map_err(|error| malformed(error.to_string()))?;
    let tensor = |sent: TensorIn| {
        let datatype = Datatype::ALL.into_iter().find(|d| d.name() == sent.datatype);
        let datatype = datatype.ok_or_else(|| malformed(format!("datatype {}", sent.datatype)))?;
        let data = sent.data.ok_or_else(|| malformed(format!("no data in {}", sent.name)))?;
        let tensor = data.tensor(&sent.name, &sent.shape, datatype)?;
        Ok((sent.name, tensor))
    };
    let tensors = answer.outputs.into_iter().map(tensor).collect::<Result<_, Error>>()?;
    Ok(Batch::new(tensors)?)
}

fn to_json(value: &impl Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|error| Error::Malformed { reason: error.to_string() })
}

/// The body of an answer that is an error.
pub(crate) fn encode_error(message: &str) -> Vec<u8> {
    serde_json::json!({ "error": message }).to_string().into_bytes()
}

/// The `error` of an answer, or its text where it has none.
pub(crate) fn decode_error(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct ErrorIn {
        error: String,
    }
    match serde_json::from_slice::<ErrorIn>(body) {
        Ok(answer) => answer.error,
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    }
}

/// `GET /v2/models/{m}`: what the model takes and gives, rows first.
pub(crate) fn describe(model: &ModelMetadata) -> Value {
    let tensor = |spec: &TensorSpec| {
        serde_json::json!({
            "name": spec.name, "datatype": spec.datatype, "shape": spec.batched_shape(),
        })
    };
    serde_json::json!({
        "name": model.name,
        "versions": [model.version],
        "platform": "mobula",
        "inputs": model.inputs.iter().map(tensor).collect::<Vec<_>>(),
        "outputs": model.outputs.iter().map(tensor).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model() -> ModelMetadata {
        ModelMetadata::new("m")
            .with_input(TensorSpec::new("x", Datatype::Fp32, [-1]))
            .with_input(TensorSpec::new("n", Datatype::Uint8, []))
            .with_output(TensorSpec::new("y", Datatype::Fp32, [1]))
    }

    /// Bodies that are nearly right: every part may be of the wrong kind.
    fn body() -> impl Strategy<Value = String> {
        let part = |good: &'static [&'static str]| {
            let wild = ["null", "-1", "[]", "{}", "\"x\"", "1e999", "[[[1]],2]", "true", "[0]"];
            let wild: Vec<&str> = wild.into_iter().chain(good.iter().copied()).collect();
            prop_oneof![3 => prop::sample::select(good), 1 => prop::sample::select(wild)]
        };
        let shape = part(&["[2,3]", "[1,6]", "[6]", "[2]"]);
        let data = part(&["[1,2,3,4,5,6]", "[[1,2,3],[4,5,6]]", "[7,256]", "[0.5,null]", "[1,2]"]);
        let datatype = part(&["\"FP32\"", "\"UINT8\""]);
        let name = part(&["\"x\"", "\"n\""]);
        let input = (name, shape, datatype, data).prop_map(|(n, s, t, d)| {
            format!("{{\"name\":{n},\"shape\":{s},\"datatype\":{t},\"data\":{d}}}")
        });
        prop::collection::vec(input, 0..4)
            .prop_map(|inputs| format!("{{\"inputs\":[{}]}}", inputs.join(",")))
    }

    proptest! {
        /// What is accepted fits the metadata; what is not is the client's fault, and no panic.
        #[test]
        fn a_request_is_right_or_refused(body in body(), cut in 0usize..400) {
            for text in [&body[..], &body[..cut.min(body.len())]] {
                match InferRequest::parse(text.as_bytes(), &model(), 4) {
                    Ok(request) => {
                        let rows = request.inputs.rows();
                        prop_assert!((1..=4).contains(&rows));
                        prop_assert_eq!(request.inputs.get("x").expect("x").dims()[0], rows);
                        prop_assert_eq!(request.inputs.get("n").expect("n").dims(), &[rows]);
                    }
                    Err(error) => prop_assert_eq!(error.status(), 400),
                }
            }
        }

        /// Every value survives its trip over the wire, bit by bit.
        #[test]
        fn numbers_survive_the_wire(
            floats in prop::collection::vec(any::<f32>(), 3),
            ints in prop::collection::vec(any::<i64>(), 3),
        ) {
            let device = candle_core::Device::Cpu;
            let f = Tensor::from_vec(floats.clone(), 3, &device).expect("a tensor");
            let i = Tensor::from_vec(ints.clone(), 3, &device).expect("a tensor");
            let batch = Batch::new(vec![("f".to_owned(), f), ("i".to_owned(), i)]).expect("rows");
            let body = encode_answer(&model(), None, &[], &batch).expect("JSON");
            let back = decode_answer(&body).expect("an answer");
            let f: Vec<f32> = back.get("f").expect("f").to_vec1().expect("floats");
            for (sent, got) in floats.iter().zip(f) {
                let same = sent.to_bits() == got.to_bits();
                prop_assert!(same || (!sent.is_finite() && got.is_nan()), "{sent} {got}");
            }
            prop_assert_eq!(back.get("i").expect("i").to_vec1::<i64>().expect("ints"), ints);
        }
    }
}
