//! What columns of every type become as tensors.

use crate::{batch, message};
use arrow::array::{
    Array, ArrayRef, BooleanArray, Decimal128Array, FixedSizeListArray, Float64Array, Int64Array,
    ListArray, UInt8Array, UInt64Array,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Int32Type};
use candle_core::{DType, Tensor};
use mobula_core::{BatchSource, Shard};
use mobula_data::{Dataset, StreamOptions, TensorSpec};
use proptest::prelude::*;
use std::sync::Arc;

/// All rows of the columns as one tensor.
fn tensor<const N: usize>(
    columns: [(&str, ArrayRef); N],
    spec: TensorSpec,
) -> Result<Tensor, mobula_core::Error> {
    let data = Dataset::from_batches([batch(columns)])?;
    let rows = data.count()? as usize;
    let options = StreamOptions::unlabelled([] as [&str; 0]).with_tensor(spec);
    let mut stream = data.stream(options.with_batch_size(rows).with_lanes(1))?.open(Shard::ALL)?;
    let batch = stream.next_batch()?.expect("a batch");
    batch.get("x").cloned()
}

fn floats(values: &[Option<f64>]) -> ArrayRef {
    Arc::new(Float64Array::from(values.to_vec()))
}

fn vec2(tensor: &Tensor) -> Vec<Vec<f64>> {
    tensor.to_dtype(DType::F64).and_then(|t| t.to_vec2()).expect("two dimensions")
}

#[test]
fn columns_of_different_types_stand_side_by_side() {
    let price = Decimal128Array::from(vec![12_345, -7]).with_precision_and_scale(15, 2);
    let pixels = UInt8Array::from(vec![1, 2, 3, 255]);
    let item = Arc::new(Field::new("item", DataType::UInt8, true));
    let columns: [(&str, ArrayRef); 4] = [
        ("price", Arc::new(price.expect("decimals"))),
        ("pixels", Arc::new(FixedSizeListArray::new(item, 2, Arc::new(pixels), None))),
        ("flag", Arc::new(BooleanArray::from(vec![true, false]))),
        ("count", Arc::new(UInt64Array::from(vec![3, 1 << 40]))),
    ];
    let spec = TensorSpec::stack("x", ["flag", "price", "pixels", "count"]);
    let x = tensor(columns, spec.with_dtype(DType::F64)).expect("tensor");
    let expected = [[1.0, 123.45, 1.0, 2.0, 3.0], [0.0, -0.07, 3.0, 255.0, (1u64 << 40) as f64]];
    assert_eq!(x.dtype(), DType::F64);
    assert_eq!(vec2(&x), expected);
}

#[test]
fn a_stack_of_one_column_is_a_table_and_a_column_is_not() {
    let a = || [("x", floats(&[Some(1.0), Some(2.0)]))];
    let dims = |spec| tensor(a(), spec).expect("tensor").dims().to_vec();
    assert_eq!(dims(TensorSpec::stack("x", ["x"])), [2, 1]);
    assert_eq!(dims(TensorSpec::column("x")), [2]);
}

#[test]
fn lists_of_lists_keep_their_shape() {
    let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(0..12));
    let item = |data_type| Arc::new(Field::new("item", data_type, true));
    let inner = FixedSizeListArray::new(item(DataType::Int64), 3, numbers, None);
    let outer = FixedSizeListArray::new(item(inner.data_type().clone()), 2, Arc::new(inner), None);
    // Of the second row on, as a slice of a larger array is.
    let x = tensor([("x", Arc::new(outer.slice(1, 1)) as ArrayRef)], TensorSpec::column("x"));
    let x = x.expect("tensor").to_vec3::<f32>().expect("three dimensions");
    assert_eq!(x, [[[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]]);
}

#[test]
fn lists_of_any_length_are_padded() {
    let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>([
        Some(vec![Some(1), Some(2), Some(3)]),
        None,
        Some(vec![]),
        Some(vec![Some(4), None]),
    ]));
    let column = || [("x", lists.clone())];
    let spec = TensorSpec::column("x").with_dtype(DType::I64);
    let padded = tensor(column(), spec.clone().with_length(4).with_fill(-1.0)).expect("tensor");
    assert_eq!(
        vec2(&padded),
        [[1., 2., 3., -1.], [-1., -1., -1., -1.], [-1., -1., -1., -1.], [4., -1., -1., -1.]]
    );
    let text = message(tensor(column(), spec.clone().with_length(4)));
    assert!(text.contains("1 missing values"), "{text}");
    let text = message(tensor(column(), spec.clone().with_length(2).with_fill(0.0)));
    assert!(
        text.contains("a list of 3 values in rows 0 to 3, the tensor has room for 2"),
        "{text}"
    );
    let text = message(tensor(column(), spec));
    assert!(text.contains("TensorSpec::with_length"), "{text}");
    // It is the list that has no room, not the tensor.
    let ones: ArrayRef = Arc::new(Int64Array::from(vec![1; 4]));
    let side = TensorSpec::stack("x", ["x", "one"]).with_length(2).with_fill(0.0);
    let text = message(tensor([("x", lists.clone()), ("one", ones)], side));
    assert!(text.contains("room for 2"), "{text}");
}

#[test]
fn missing_values_are_an_error_or_filled() {
    let a = || [("x", floats(&[Some(1.5), None, Some(2.5)]))];
    let text = message(tensor(a(), TensorSpec::column("x")));
    assert!(text.contains("column \"x\" has 1 missing values"), "{text}");
    let filled = tensor(a(), TensorSpec::column("x").with_fill(7.0)).expect("tensor");
    assert_eq!(filled.to_vec1::<f32>().expect("one dimension"), [1.5, 7.0, 2.5]);
    let text = message(tensor(a(), TensorSpec::column("x").with_dtype(DType::U8).with_fill(-1.0)));
    assert!(text.contains("has the value -1"), "{text}");
}

#[test]
fn what_a_type_cannot_hold_is_an_error() {
    let refused = |value: f64, dtype| {
        message(tensor([("x", floats(&[Some(value)]))], TensorSpec::column("x").with_dtype(dtype)))
    };
    for (value, dtype) in [
        (1e39, DType::F32),
        (70_000.0, DType::F16),
        (0.5, DType::I64),
        (256.0, DType::U8),
        (-1.0, DType::U32),
        (1e19, DType::I64),
        (f64::NAN, DType::I32),
    ] {
        let text = refused(value, dtype);
        assert!(text.contains("has the value"), "{value} as {dtype:?}: {text}");
    }
    let infinite = tensor([("x", floats(&[Some(f64::INFINITY)]))], TensorSpec::column("x"));
    assert_eq!(infinite.expect("tensor").to_vec1::<f32>().expect("values"), [f32::INFINITY]);
    assert!(refused(1.0, DType::F8E4M3).contains("one of u8, u32"));
    let bytes: ArrayRef = Arc::new(UInt8Array::from(vec![1]));
    let small = TensorSpec::column("x").with_dtype(DType::F8E4M3);
    assert!(message(tensor([("x", bytes)], small)).contains("one of u8, u32"));
}

#[test]
fn whole_numbers_are_never_rounded() {
    let large = 9_007_199_254_740_993; // 2^53 + 1: no double has it.
    for data_type in [DataType::Decimal64(18, 0), DataType::Decimal128(18, 0), DataType::Int64] {
        let column = cast(&(Arc::new(Int64Array::from(vec![large])) as ArrayRef), &data_type);
        let column = column.expect("cast");
        let x = tensor([("x", column)], TensorSpec::column("x").with_dtype(DType::I64));
        assert_eq!(x.expect("tensor").to_vec1::<i64>().expect("values"), [large]);
    }
    let beyond: ArrayRef = Arc::new(UInt64Array::from(vec![1 << 63]));
    let text = message(tensor([("x", beyond)], TensorSpec::column("x").with_dtype(DType::I64)));
    assert!(text.contains("has the value 9223372036854775808"), "{text}");
}

#[test]
fn missing_lists_of_lists_are_an_error_at_every_level() {
    let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(0..8));
    let item = |data_type| Arc::new(Field::new("item", data_type, true));
    let gone = Some([true, true, false, true].into_iter().collect());
    let inner = FixedSizeListArray::new(item(DataType::Int64), 2, numbers, gone);
    let outer = FixedSizeListArray::new(item(inner.data_type().clone()), 2, Arc::new(inner), None);
    let text = message(tensor([("x", Arc::new(outer) as ArrayRef)], TensorSpec::column("x")));
    assert!(text.contains("1 missing values"), "{text}");
    let none = FixedSizeListArray::try_new_with_length(
        item(DataType::Int64),
        0,
        Arc::new(Int64Array::from(Vec::<i64>::new())),
        None,
        3,
    );
    let none: ArrayRef = Arc::new(none.expect("lists of nothing"));
    let text = message(tensor([("x", none)], TensorSpec::column("x")));
    assert!(text.contains("at least one value a row"), "{text}");
}

#[test]
fn bytes_are_gathered_as_every_float() {
    let item = Arc::new(Field::new("item", DataType::UInt8, false));
    let bytes = Arc::new(UInt8Array::from_iter_values(0..=255));
    let image: ArrayRef = Arc::new(FixedSizeListArray::new(item, 64, bytes, None));
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64, DType::U8] {
        let spec = TensorSpec::column("x").with_dtype(dtype);
        let x = tensor([("x", image.clone())], spec).expect("tensor");
        assert_eq!((x.dtype(), x.dims()), (dtype, &[4, 64][..]));
        let values = vec2(&x).concat();
        assert!(values.into_iter().eq((0..=255).map(f64::from)));
    }
}

fn types() -> impl Strategy<Value = DataType> {
    prop_oneof![
        Just(DataType::Int8),
        Just(DataType::Int16),
        Just(DataType::Int32),
        Just(DataType::Int64),
        Just(DataType::UInt8),
        Just(DataType::UInt16),
        Just(DataType::UInt32),
        Just(DataType::UInt64),
        Just(DataType::Float16),
        Just(DataType::Float32),
        Just(DataType::Float64),
        Just(DataType::Decimal64(12, 3)),
        Just(DataType::Decimal128(12, 3)),
        Just(DataType::Decimal128(30, 12)),
        Just(DataType::Decimal256(40, 1)),
    ]
}

proptest! {
    /// Whatever the types, the values are those that Arrow's casts give.
    #[test]
    fn any_types_side_by_side(
        rows in prop::collection::vec(prop::collection::vec(prop::option::of(0i64..100), 3), 1..40),
        from in prop::collection::vec(types(), 3),
    ) {
        let column = |at: usize| -> ArrayRef {
            let whole: ArrayRef = Arc::new(rows.iter().map(|row| row[at]).collect::<Int64Array>());
            cast(&whole, &from[at]).expect("cast")
        };
        let columns = [("a", column(0)), ("b", column(1)), ("c", column(2))];
        let spec = TensorSpec::stack("x", ["c", "a", "b"]).with_fill(-5.0);
        let x = vec2(&tensor(columns, spec).expect("tensor"));
        for (row, got) in rows.iter().zip(x) {
            let expected: Vec<f64> =
                [2, 0, 1].iter().map(|at| row[*at].map_or(-5.0, |v| v as f64)).collect();
            prop_assert_eq!(got, expected);
        }
    }
}

/// Decimals of Parquet are read as one word where that is enough, and stay what they are for queries.
#[test]
fn decimals_of_parquet_are_the_same_whichever_way_they_are_read() {
    let cents = |digits| -> ArrayRef {
        let values = [Some(12_345), None, Some(-99)].into_iter().cycle().take(5000);
        let values = values.collect::<Decimal128Array>();
        Arc::new(values.with_precision_and_scale(digits, 2).expect("decimals"))
    };
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("prices");
    let prices =
        Dataset::from_batches([batch([("a", cents(9)), ("b", cents(18)), ("c", cents(19))])]);
    prices.and_then(|data| data.write_parquet(&path, Default::default())).expect("written");
    let data = Dataset::read_parquet(path.to_str().expect("UTF-8")).expect("Parquet");
    let schema = data.schema().expect("schema");
    assert!(schema.fields().iter().all(|f| matches!(f.data_type(), DataType::Decimal128(..))));
    let all = |data: &Dataset| {
        let spec = TensorSpec::stack("x", ["c", "b", "a"]).with_fill(0.5).with_dtype(DType::F64);
        let options = StreamOptions::unlabelled([] as [&str; 0]).with_tensor(spec);
        let mut stream =
            data.stream(options.with_batch_size(5000)).expect("stream").open(Shard::ALL);
        let batch = stream.as_mut().expect("open").next_batch().expect("read").expect("a batch");
        vec2(batch.get("x").expect("x"))
    };
    let rows = all(&data);
    assert_eq!(rows[..3], [[123.45; 3], [0.5; 3], [-0.99; 3]]);
    // By the engine.
    let kept = data.filter("a IS NULL OR a < 1000").expect("filter");
    assert_eq!(all(&kept), rows);
    let sum =
        data.sql("SELECT sum(a) AS total FROM dataset").and_then(|d| d.collect()).expect("sum");
    assert_eq!(sum.num_rows(), 1);
}

/// What streams are known by is made of it: in another form, none could be resumed.
#[test]
fn a_tensor_is_written_as_it_was() {
    let json = |spec: &TensorSpec| serde_json::to_string(spec).expect("JSON");
    let spec = TensorSpec::column("x");
    let expected =
        r#"{"name":"x","columns":["x"],"is_stack":false,"dtype":null,"fill":null,"length":null}"#;
    assert_eq!(json(&spec), expected);
    let cut = spec.with_length(2).with_truncation(true);
    let again: TensorSpec = serde_json::from_str(&json(&cut)).expect("a tensor");
    assert_eq!(again, cut);
}
