use super::*;
use candle_core::{DType, Device, Tensor};
use proptest::prelude::{any, prop, prop_assert_eq, proptest};
use serde::{Deserialize, Deserializer, Serializer};
use std::collections::BTreeMap;

const LARGE: usize = 8192;

fn there_and_back<T: Serialize, U: DeserializeOwned>(value: &T) -> U {
    decode("a value", &encode("a value", value).expect("encodes")).expect("decodes")
}

fn flat(draft: &Draft) -> Bytes {
    let layout = draft.layout().expect("fits");
    let mut bytes = Vec::new();
    draft.write_to(&layout, &mut bytes).expect("a Vec takes everything");
    assert_eq!(bytes.len(), layout.bytes());
    bytes.into()
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Mixed {
    name: String,
    blob: Blob,
    more: Vec<Option<Blob>>,
    #[serde(flatten)]
    rest: BTreeMap<String, Blob>,
}

fn mixed(bytes: usize) -> Mixed {
    let blob = |byte: u8| Blob::from(vec![byte; bytes]);
    Mixed {
        name: "weights".to_owned(),
        blob: blob(1),
        more: vec![Some(blob(2)), None],
        rest: [("extra".to_owned(), blob(3))].into(),
    }
}

#[test]
fn a_large_blob_is_shared_and_a_small_one_is_in_the_head() {
    let value = mixed(LARGE);
    let encoded = encode("a value", &value).expect("encodes");
    assert_eq!(encoded.buffers.len(), 3);
    assert_eq!(encoded.buffers[0].as_ptr(), value.blob.0.as_ptr());
    assert!(encoded.head.len() < 300 && encoded.bytes() > 3 * LARGE);
    let decoded: Mixed = decode("a value", &encoded).expect("decodes");
    assert_eq!(decoded.blob.0.as_ptr(), value.blob.0.as_ptr());
    assert_eq!(decoded, value);

    let encoded = encode("a value", &mixed(10)).expect("encodes");
    assert!(encoded.buffers.is_empty());
    assert_eq!(decode::<Mixed>("a value", &encoded).expect("decodes"), mixed(10));
}

#[test]
fn elsewhere_a_blob_is_plain_bytes() {
    let value = mixed(LARGE);
    let json = serde_json::to_string(&value).expect("JSON");
    assert_eq!(serde_json::from_str::<Mixed>(&json).expect("JSON"), value);
    let packed = rmp_serde::to_vec_named(&value).expect("MessagePack");
    assert_eq!(rmp_serde::from_slice::<Mixed>(&packed).expect("MessagePack"), value);
    let bytes: serde_json::Value = serde_json::to_value(Blob::from(vec![7; 2])).expect("JSON");
    assert_eq!(bytes, serde_json::json!([7, 7]));
}

/// Encodes itself with another `encode`, and as JSON, while the outer one runs.
struct Nested(Blob);

impl Serialize for Nested {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let inner = encode("inner", &self.0).map_err(serde::ser::Error::custom)?;
        assert_eq!(inner.buffers.len(), 1, "the inner payload stays in the inner encoding");
        let json = serde_json::to_string(&self.0).map_err(serde::ser::Error::custom)?;
        let inner = flat(&inner.into());
        (json, Blob(inner), &self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Nested {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (json, inner, outer) = <(String, Blob, Blob)>::deserialize(deserializer)?;
        let inner = Encoded::from_flat("inner", &inner.0).map_err(serde::de::Error::custom)?;
        let inner: Blob = decode("inner", &inner).map_err(serde::de::Error::custom)?;
        let json: Blob = serde_json::from_str(&json).map_err(serde::de::Error::custom)?;
        assert_eq!((&json, &inner), (&outer, &outer));
        Ok(Self(outer))
    }
}

#[test]
fn an_encoding_inside_another_does_not_mix_with_it() {
    let value = Nested(vec![5; LARGE].into());
    let blobs = [Blob::from(vec![1; LARGE]), Blob::from(vec![2; LARGE])];
    let decoded: (Blob, Nested, Blob) = there_and_back(&(&blobs[0], &value, &blobs[1]));
    assert_eq!((&decoded.0, &decoded.1.0, &decoded.2), (&blobs[0], &value.0, &blobs[1]));
}

struct Panics(Blob);

impl Serialize for Panics {
    fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        let _ = rmp_serde::to_vec(&self.0);
        panic!("while encoding")
    }
}

struct CatchesOne(Blob);

impl Serialize for CatchesOne {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let inner = || encode("inner", &Panics(Blob::from(vec![9; LARGE])));
        assert!(std::panic::catch_unwind(inner).is_err());
        self.0.serialize(serializer)
    }
}

#[test]
fn a_panic_while_encoding_leaves_nothing_behind() {
    let blob = Blob::from(vec![1; LARGE]);
    let encoded = encode("outer", &CatchesOne(blob.clone())).expect("encodes");
    assert_eq!((encoded.buffers.len(), encoded.buffers[0][0]), (1, 1));
    assert!(std::panic::catch_unwind(|| encode("outer", &Panics(blob.clone()))).is_err());
    // Outside of an `encode`, a blob is bytes again.
    assert!(rmp_serde::to_vec(&blob).expect("encodes").len() > LARGE);
}

#[test]
fn bytes_that_look_like_a_reference_arrive_as_they_are() {
    let mut forged = b"\x00mobula\xff".to_vec();
    forged.extend(0u64.to_le_bytes());
    let value = (Blob::from(vec![1; LARGE]), Blob::from(forged));
    assert_eq!(there_and_back::<_, (Blob, Blob)>(&value), value);
}

#[test]
fn a_payload_that_is_missing_is_an_error_that_says_so() {
    let mut encoded = encode("a value", &mixed(LARGE)).expect("encodes");
    encoded.buffers.truncate(1);
    let error = decode::<Mixed>("the result", &encoded).expect_err("payloads are missing");
    assert!(error.to_string().contains("payload 1 of 1 is missing"), "{error}");
}

#[derive(Serialize, Deserialize)]
struct Weights {
    #[serde(with = "tensor")]
    weights: Tensor,
    named: BTreeMap<String, TensorValue>,
}

fn numbers(dtype: DType, count: usize) -> Tensor {
    let values = Tensor::arange(0u32, count as u32, &Device::Cpu).expect("a range");
    (values / 100.0).and_then(|v| v.to_dtype(dtype)).expect("all types convert")
}

fn same(a: &Tensor, b: &Tensor) {
    assert_eq!((a.dtype(), a.dims()), (b.dtype(), b.dims()));
    let bits = |t: &Tensor| tensor::with_bytes(&t.contiguous().expect("copies"), <[u8]>::to_vec);
    assert_eq!(bits(a).expect("on the CPU"), bits(b).expect("on the CPU"));
}

#[test]
fn tensors_of_every_type_come_back() {
    use DType::*;
    for dtype in [U8, U32, I16, I32, I64, BF16, F16, F32, F64, F8E4M3] {
        for count in [0, 1, 6, 20_000] {
            let value = numbers(dtype, count);
            same(&there_and_back::<_, TensorValue>(&TensorValue(value.clone())).0, &value);
        }
    }
    for dtype in [F8E8M0, F6E2M3, F6E3M2, F4] {
        let value = Tensor::from_raw_buffer(&[7; LARGE], dtype, &[LARGE], &Device::Cpu);
        let value = value.expect("raw bytes");
        same(&there_and_back::<_, TensorValue>(&TensorValue(value.clone())).0, &value);
    }
}

#[test]
fn views_arrive_contiguous_and_alone() {
    let whole = numbers(DType::F32, 20_000).reshape((100, 200)).expect("its size");
    let transposed = whole.t().expect("a matrix");
    let narrowed = whole.narrow(0, 10, 20).expect("in range");
    let columns = whole.narrow(1, 3, 50).expect("in range");
    let scalar = whole.get(3).and_then(|row| row.get(7)).expect("in range");
    for view in [transposed, narrowed, columns, scalar, whole.broadcast_left(2).expect("copies")] {
        let draft = Draft::new("a view", &TensorValue(view.clone())).expect("encodes");
        let bytes = view.elem_count() * 4;
        assert!(draft.snapshot().expect("copies").bytes() < bytes + 100, "only its own elements");
        let back: TensorValue = there_and_back(&TensorValue(view.clone()));
        assert!(back.0.is_contiguous());
        same(&back.0, &view);
    }
}

#[test]
fn tensors_in_structs_and_in_text() {
    let tensor = numbers(DType::F32, 4000);
    let named = [("b".to_owned(), TensorValue(numbers(DType::BF16, 3)))];
    let value = Weights { weights: tensor.clone(), named: named.into() };
    let back: Weights = there_and_back(&value);
    same(&back.weights, &tensor);
    same(&back.named["b"].0, &value.named["b"].0);
    let json = serde_json::to_string(&value).expect("JSON");
    same(&serde_json::from_str::<Weights>(&json).expect("JSON").weights, &tensor);
}

#[test]
fn an_encoded_value_is_a_snapshot_and_a_draft_is_not() {
    let var = candle_core::Var::from_tensor(&numbers(DType::F32, 5000)).expect("a variable");
    let draft = || Draft::new("weights", &TensorValue(var.as_tensor().clone())).expect("encodes");
    let (snapshot, late) = (draft().snapshot().expect("copies"), draft());
    let before = var.as_tensor().copy().expect("copies");
    var.set(&var.as_tensor().affine(2.0, 1.0).expect("maths")).expect("in place");
    same(&decode::<TensorValue>("weights", &snapshot).expect("decodes").0, &before);
    let late = late.snapshot().expect("copies");
    same(&decode::<TensorValue>("weights", &late).expect("decodes").0, var.as_tensor());
}

#[test]
fn a_tensor_that_lies_about_its_shape_is_refused() {
    #[derive(Serialize)]
    struct Lie {
        dtype: &'static str,
        shape: Vec<usize>,
        data: Blob,
    }
    let lies = [
        ("f32", vec![3], 8, "8 bytes"),
        ("f32", vec![usize::MAX, 2], 8, "8 bytes"),
        ("f32", vec![0, usize::MAX, 2], 0, "0 bytes"),
        ("i7", vec![1], 1, "\"i7\""),
    ];
    for (dtype, shape, bytes, expected) in lies {
        let lie = Lie { dtype, shape, data: vec![0; bytes].into() };
        let encoded = encode("a lie", &lie).expect("encodes");
        let error = decode::<TensorValue>("a lie", &encoded).expect_err("a lie").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_flat_form_shares_its_memory_and_aligns_payloads() {
    let value = (mixed(LARGE + 1), TensorValue(numbers(DType::F32, 5001)));
    let flat = flat(&Draft::new("a value", &value).expect("encodes"));
    let encoded = Encoded::from_flat("a value", &flat).expect("well formed");
    let inside = flat.as_ptr_range();
    for buffer in &encoded.buffers {
        assert!(inside.contains(&buffer.as_ptr()));
        assert!((buffer.as_ptr() as usize - inside.start as usize).is_multiple_of(64));
    }
    let back: (Mixed, TensorValue) = decode("a value", &encoded).expect("decodes");
    assert!(inside.contains(&back.0.blob.0.as_ptr()), "a blob points into the flat form");
    drop((flat, encoded));
    assert_eq!(back.0, value.0);
    same(&back.1.0, &value.1.0);
}

#[test]
fn a_damaged_flat_form_is_refused() {
    let whole = flat(&Draft::new("a value", &mixed(LARGE)).expect("encodes"));
    for short in (0..200).chain([LARGE, whole.len() - 1]) {
        let error = Encoded::from_flat("a value", &whole.slice(..short)).expect_err("too short");
        assert!(matches!(error, Error::Codec { .. }), "{error}");
    }
    // Every byte of the fixed header at its largest: sizes that overflow, other versions.
    for at in 0..24 {
        let mut bytes = whole.to_vec();
        bytes[at] = 0xff;
        assert!(Encoded::from_flat("a value", &bytes.into()).is_err(), "byte {at}");
    }
}

proptest! {
    #[test]
    fn blobs_of_any_size_come_back_through_the_flat_form(
        blobs in prop::collection::vec((any::<u8>(), 0..12_000usize), 0..12),
    ) {
        let blobs: Vec<_> = blobs.iter().map(|(b, n)| Blob::from(vec![*b; *n])).collect();
        let flat = flat(&Draft::new("blobs", &blobs).expect("encodes"));
        let encoded = Encoded::from_flat("blobs", &flat).expect("well formed");
        prop_assert_eq!(decode::<Vec<Blob>>("blobs", &encoded).expect("decodes"), blobs);
    }

    #[test]
    fn damage_is_an_error_or_another_value_but_no_panic(
        flips in prop::collection::vec((0..400usize, any::<u8>()), 1..8),
    ) {
        let value = (mixed(LARGE), TensorValue(numbers(DType::F32, 5000)));
        let mut bytes = flat(&Draft::new("a value", &value).expect("encodes")).to_vec();
        flips.iter().for_each(|(at, byte)| bytes[*at] = *byte);
        if let Ok(encoded) = Encoded::from_flat("a value", &bytes.into()) {
            let _ = decode::<(Mixed, TensorValue)>("a value", &encoded);
        }
    }
}
