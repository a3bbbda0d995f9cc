//! Preprocessors against numbers worked out by hand, on columns and on tensors.

use crate::{batch, digits, example, failure, lists, message, numbered};
use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array, StringArray, UInt64Array};
use arrow::datatypes::{DataType, Float32Type, Float64Type, UInt32Type};
use arrow::record_batch::RecordBatch;
use candle_core::{Device, Tensor};
use mobula_core::{Batch, BatchSource, Shard};
use mobula_data::{
    Chain, Concatenator, CountVectorizer, CsvOptions, Dataset, Error, FeatureHasher,
    KBinsDiscretizer, LabelEncoder, MaxAbsScaler, MinMaxScaler, MultiHotEncoder, Normalizer,
    OneHotEncoder, OrdinalEncoder, Power, PowerTransformer, Preprocessor, RobustScaler,
    SimpleImputer, StandardScaler, Step, Strategy, StreamOptions, StringLookup, TensorSpec,
    TfidfVectorizer, Tokenizer, Unknown,
};
use std::sync::Arc;

fn dataset<const N: usize>(columns: [(&str, ArrayRef); N]) -> Dataset {
    Dataset::from_batches([batch(columns)]).expect("dataset")
}

fn floats(values: impl Into<Vec<Option<f64>>>) -> ArrayRef {
    Arc::new(Float64Array::from(values.into()))
}

fn text(values: &[Option<&str>]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

fn apply(preprocessor: &Preprocessor, dataset: &Dataset) -> RecordBatch {
    dataset.preprocess(preprocessor).and_then(|d| d.collect()).expect("rows")
}

fn f32s(array: &dyn Array) -> Vec<f32> {
    let values = match array.data_type() {
        DataType::FixedSizeList(..) => array.as_fixed_size_list().values().as_ref(),
        _ => array,
    };
    values.as_primitive::<Float32Type>().values().to_vec()
}

#[test]
fn standard_scaler_by_hand() {
    // Element 0: 2, 4, 9 (mean 5, variance 26/3); element 1: always 3.
    let image = lists(2, vec![2, 3, 4, 3, 9, 3]);
    let x = floats([Some(1.0), None, Some(3.0)]);
    let data = dataset([("image", image), ("x", x)]);
    let scaler = StandardScaler::fit(&data, ["image", "x"]).expect("fit");
    let rows = apply(&scaler, &data);
    let deviation = (26.0f64 / 3.0).sqrt();
    let expected = [-3.0, -1.0, 4.0].map(|d| (d / deviation) as f32);
    let image = f32s(rows.column(0));
    assert_eq!(image, [expected[0], 0.0, expected[1], 0.0, expected[2], 0.0]);
    let x = rows.column(1).as_primitive::<Float32Type>();
    assert_eq!((x.value(0), x.is_null(1), x.value(2)), (-1.0, true, 1.0));
}

#[test]
fn min_max_scaler_by_hand() {
    let data = dataset([("x", floats([Some(-1.0), Some(3.0), Some(0.0)]))]);
    let scaler = MinMaxScaler::fit(&data, ["x"]).expect("fit");
    assert_eq!(f32s(apply(&scaler, &data).column(0)), [0.0, 1.0, 0.25]);
}

/// INV-FIT: what is fitted does not depend on how the rows are cut.
#[test]
fn fitting_does_not_depend_on_the_blocks() {
    let fit = |sizes: &[i64]| {
        let irregular = "(id * id * id) % 1009 + 1000000.25";
        let data = numbered(3000, sizes).with_column("x", irregular).expect("column");
        let fitted = StandardScaler::fit(&data, ["x"]).expect("fit");
        let json = serde_json::to_value(&fitted).expect("JSON")["Affine"][0].clone();
        [&json["offset"][0], &json["scale"][0]].map(|v| v.as_f64().expect("a number"))
    };
    let whole = fit(&[3000]);
    for cut in [fit(&[1]), fit(&[7, 500]), fit(&[1000])] {
        for (a, b) in whole.iter().zip(cut) {
            assert!(((a - b) / a).abs() < 1e-12, "{a} {b}");
        }
    }
    assert_eq!(fit(&[1]), fit(&[1]), "and the same cut gives the same bits");
}

#[test]
fn scalers_say_what_they_cannot_fit() {
    let data = dataset([
        ("none", floats([None, None])),
        ("nan", floats([Some(1.0), Some(f64::NAN)])),
        ("name", text(&[Some("a"), Some("b")])),
    ]);
    let fit = |column: &str| message(StandardScaler::fit(&data, [column]));
    assert_eq!(fit("none"), "cannot fit column \"none\": it has no values");
    assert!(fit("nan").contains("infinite or not a number"));
    assert!(
        fit("name").contains("is Utf8, expected a number") && fit("name").contains("OneHotEncoder")
    );
    assert!(fit("nam").contains("available: none, nan, name"));
    assert!(message(MinMaxScaler::fit(&data, ["nan"])).contains("not a number"));
    let scaler = StandardScaler::fit(&digits(), ["image"]).expect("fit");
    let narrow = dataset([("image", lists(2, vec![1, 2]))]);
    assert!(message(narrow.preprocess(&scaler)).contains("has 2 values a row, expected 64"));
}

#[test]
fn imputers_fill_what_is_missing() {
    let years: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), None, Some(4)]));
    let data = dataset([
        ("x", floats([Some(1.0), None, Some(4.0)])),
        ("year", years),
        ("sex", text(&[Some("m"), None, Some("f")])),
        ("island", text(&[Some("b"), Some("b"), None])),
    ]);
    let chain = Chain::fit(
        [
            SimpleImputer::mean(["x", "year"]),
            SimpleImputer::most_frequent(["island"]),
            SimpleImputer::constant(["sex"], "unknown"),
        ],
        &data,
    );
    let rows = apply(&chain.expect("fit"), &data);
    for column in ["x", "year"] {
        let values = rows.column_by_name(column).expect(column).as_primitive::<Float64Type>();
        assert_eq!(values.values()[..], [1.0, 2.5, 4.0]);
    }
    let sex: Vec<_> = rows.column(2).as_string::<i32>().iter().flatten().collect();
    let island: Vec<_> = rows.column(3).as_string::<i32>().iter().flatten().collect();
    assert_eq!((sex, island), (vec!["m", "unknown", "f"], vec!["b", "b", "b"]));
    let wrong = SimpleImputer::constant(["x"], "text").fit(&data);
    assert!(message(wrong).contains("column \"x\" is Float64"));
    let tie = SimpleImputer::most_frequent(["sex"]).fit(&data).expect("fit");
    assert_eq!(apply(&tie, &data).column(2).as_string::<i32>().value(1), "f");
}

#[test]
fn encoders_number_the_categories() {
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![10, 9, 10]));
    let data = dataset([("name", text(&[Some("b"), Some("a"), Some("b")])), ("n", numbers)]);
    let one_hot = OneHotEncoder::fit(&data, ["name"]).expect("fit");
    assert_eq!(f32s(apply(&one_hot, &data).column(0)), [0., 1., 1., 0., 0., 1.]);
    let ordinal = OrdinalEncoder::fit(&data, ["name", "n"]).expect("fit");
    let codes = apply(&ordinal, &data);
    assert_eq!(codes.column(0).as_primitive::<UInt32Type>().values()[..], [1, 0, 1]);
    assert_eq!(codes.column(1).as_primitive::<UInt32Type>().values()[..], [1, 0, 1]);
    assert_eq!(ordinal.classes("n"), Some(vec!["9".to_owned(), "10".to_owned()]));

    let other = dataset([("name", text(&[Some("c"), None]))]);
    let unknown = failure(
        other.preprocess(&one_hot).and_then(|d| d.select(["name"])?.filter("true")?.collect()),
    );
    assert!(matches!(unknown, Error::Nulls { .. }), "{unknown}");
    let other = dataset([("name", text(&[Some("c")]))]);
    let unknown = message(other.preprocess(&one_hot).and_then(|d| d.collect()));
    assert!(unknown.contains("\"c\"") && unknown.contains("known: a, b"), "{unknown}");

    let nulls = dataset([("name", text(&[Some("c"), None, Some("a")]))]);
    let lenient = Step::from(OneHotEncoder::new(["name"]).with_unknown(Unknown::Ignore))
        .fit(&data)
        .expect("fit");
    assert_eq!(f32s(apply(&lenient, &nulls).column(0)), [0., 0., 0., 0., 1., 0.]);
    let lenient = Step::from(OrdinalEncoder::new(["name"]).with_unknown(Unknown::Ignore))
        .fit(&data)
        .expect("fit");
    let codes = apply(&lenient, &nulls);
    assert_eq!(codes.column(0).as_primitive::<UInt32Type>().values()[..], [2, 2, 0]);
}

/// A scaler fitted on the training rows must not have seen the others.
#[test]
fn a_fit_sees_the_dataset_it_is_given() {
    let (train, test) = numbered(200, &[200]).train_test_split(0.5, 3).expect("split");
    let fit = |data: &Dataset| StandardScaler::fit(data, ["id"]).expect("fit");
    assert_ne!(fit(&train), fit(&test));
    let rows = train.collect().expect("rows");
    assert_eq!(fit(&train), fit(&Dataset::from_batches([rows]).expect("dataset")));
}

/// INV-SERVE: tensors in serving get what rows got in training, to the bit, also after a file.
#[test]
fn tensors_and_columns_get_the_same_numbers() {
    let digits = digits();
    let fitted = StandardScaler::fit(&digits, ["image"]).expect("fit");
    let file = tempfile::NamedTempFile::new().expect("file");
    fitted.save(file.path()).expect("save");
    let loaded = Preprocessor::load(file.path()).expect("load");
    assert_eq!(loaded, fitted);

    let stream = |data: &Dataset| {
        let options = StreamOptions::new(["image"], "label").with_batch_size(50);
        let mut stream = data.stream(options).and_then(|s| Ok(s.open(Shard::ALL)?)).expect("open");
        stream.next_batch().expect("read").expect("a batch")
    };
    let expected = stream(&digits.preprocess(&fitted).expect("preprocess"));
    let got = loaded.transform_batch(&stream(&digits)).expect("transform");
    let image =
        |batch: &Batch| batch.get("image").and_then(|t| Ok(t.to_vec2::<f32>()?)).expect("image");
    assert_eq!(image(&got), image(&expected));
    assert_eq!(got.get("label").expect("label").dims(), [50]);

    // [rows, 8, 8] keeps its dimensions; what is not named passes.
    let cube =
        stream(&digits).get("image").and_then(|t| Ok(t.reshape((50, 8, 8))?)).expect("image");
    let batch = Batch::new(vec![("image".to_owned(), cube)]).expect("batch");
    let scaled = loaded.transform_batch(&batch).expect("transform");
    assert_eq!(scaled.get("image").expect("image").dims(), [50, 8, 8]);
}

#[test]
fn tensors_of_the_wrong_shape_are_refused() {
    let fitted = StandardScaler::fit(&digits(), ["image"]).expect("fit");
    let serve = |name: &str, width: usize| {
        let tensor = Tensor::zeros((2, width), candle_core::DType::F32, &Device::Cpu);
        let batch = Batch::new(vec![(name.to_owned(), tensor.expect("tensor"))]).expect("batch");
        fitted.transform_batch(&batch)
    };
    assert_eq!(serve("image", 64).expect("transform").rows(), 2);
    assert!(message(serve("image", 63)).contains("has 63 values a row, expected 64"));
    assert!(message(serve("picture", 64)).contains("no column \"image\"; available: picture"));
}

#[test]
fn what_was_saved_before_there_were_custom_preprocessors_loads() {
    let old = r#"{"Chain": [
        {"SimpleImputer": [{"column": "x", "fill": {"Float": 2.5}}]},
        {"Affine": [{"column": "x", "offset": [1.0], "scale": [0.5]}]},
        {"OneHotEncoder": [{"column": "s", "categories": ["a", "b"], "unknown": "Error"}]},
        {"OrdinalEncoder": [{"column": "y", "categories": [9, 10], "unknown": "Ignore"}]},
        {"Concatenator": {"columns": [["x", 1], ["s", 2]], "output": "features"}}
    ]}"#;
    let loaded: Preprocessor = serde_json::from_str(old).expect("an old file");
    let y: ArrayRef = Arc::new(Int64Array::from(vec![10, 7]));
    let data =
        dataset([("x", floats([None, Some(1.0)])), ("s", text(&[Some("b"), Some("a")])), ("y", y)]);
    let rows = apply(&loaded, &data);
    assert_eq!(rows.column(0).as_primitive::<UInt32Type>().values()[..], [1, 2]);
    assert_eq!(f32s(rows.column(1)), [3.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
}

#[test]
fn a_broken_file_is_named() {
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), "{\"Affine\": [").expect("write");
    assert!(message(Preprocessor::load(file.path())).contains("is not a valid preprocessor file"));
    assert!(message(Preprocessor::load("absent.json")).contains("cannot read absent.json"));
}

/// Mixed columns of real data, from CSV to tensors and to serving without the label.
#[test]
fn penguins_become_features_and_classes() {
    let penguins =
        Dataset::read_csv(example("penguins.csv"), CsvOptions::default()).expect("penguins");
    let (train, test) = penguins.train_test_split(0.25, 5).expect("split");
    let numeric = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"];
    let chain = Chain::fit(
        [
            SimpleImputer::mean(numeric),
            StandardScaler::of(numeric),
            SimpleImputer::most_frequent(["sex"]),
            OneHotEncoder::of(["sex", "island"]),
            Concatenator::of([&numeric[..], &["sex", "island"]].concat(), "features"),
            LabelEncoder::of("species"),
        ],
        &train,
    )
    .expect("fit");
    let source = test
        .preprocess(&chain)
        .and_then(|d| d.stream(StreamOptions::new(["features"], "species").with_batch_size(16)))
        .expect("stream");
    let mut stream = source.open(Shard::ALL).expect("open");
    let batch = stream.next_batch().expect("read").expect("a batch");
    assert_eq!(batch.get("features").expect("features").dims(), [16, 4 + 2 + 3]);
    assert_eq!(batch.get("species").expect("species").dims(), [16]);
    let classes = chain.classes("species").expect("classes");
    assert_eq!(classes, ["Adelie", "Chinstrap", "Gentoo"]);

    let request = test.sql("SELECT * EXCEPT (species) FROM dataset").expect("query");
    let served = apply(&chain.without("species"), &request);
    let rows = apply(&chain, &test);
    assert_eq!(served.column_by_name("features"), rows.column_by_name("features"));
    assert!(message(request.preprocess(&chain)).contains("no column \"species\""));
}

#[test]
fn streams_refuse_missing_values_and_say_how_many() {
    let data = dataset([("x", floats([Some(1.0), None, None]))]);
    let source = data.stream(StreamOptions::unlabelled(["x"])).expect("stream");
    let text = message(source.open(Shard::ALL).and_then(|mut s| s.next_batch()));
    assert!(text.contains("column \"x\" has 2 missing values in rows 0 to 2"), "{text}");
    assert!(text.contains("SimpleImputer") && text.contains("filter(\"x IS NOT NULL\")"), "{text}");
}

#[test]
fn what_cannot_be_fitted_or_applied_is_said() {
    let data = dataset([
        ("x", floats([Some(-1.0), Some(0.0), Some(3.0)])),
        ("gap", floats([Some(1.0), None, Some(3.0)])),
        ("nan", floats([Some(1.0), Some(f64::NAN), Some(3.0)])),
        ("name", text(&[Some("a"), None, Some("!")])),
    ]);
    let fit = |step: Step| message(step.fit(&data));
    let box_cox = PowerTransformer::new(["x"]).with_power(Power::BoxCox);
    assert!(
        fit(box_cox.into()).contains("column \"x\" has the value -1, expected numbers above 0")
    );
    assert!(fit(RobustScaler::of(["nan"])).contains("infinite or not a number"));
    assert!(fit(MaxAbsScaler::of(["nan"])).contains("infinite or not a number"));
    assert!(fit(PowerTransformer::of(["name"])).contains("is Utf8, expected a number"));
    let wrong = RobustScaler::new(["x"]).with_quantile_range(75.0, 25.0);
    assert!(fit(wrong.into()).contains("quantile_range is 75 to 25, expected two percentages"));
    let pairs = dataset([("pair", lists(2, vec![1, 2]))]);
    let wrong = message(KBinsDiscretizer::fit(&pairs, ["pair"]));
    assert!(wrong.contains("expected a number a row"), "{wrong}");
    let wrong = KBinsDiscretizer::new(["x"]).with_bins(1);
    assert!(fit(wrong.into()).contains("bins is 1, expected 2 or more"));
    assert!(fit(FeatureHasher::of(["x"], 0, "h")).contains("num_features is 0, expected 1 to"));
    assert!(fit(FeatureHasher::of(["y"], 8, "h")).contains("no column \"y\""));
    assert!(fit(Tokenizer::of(["x"])).contains("is Float64, expected text"));
    assert!(fit(MultiHotEncoder::of(["name"])).contains("is Utf8, expected lists; split text"));
    assert!(fit(CountVectorizer::of(["name"])).contains("\"name\" has 1 missing values"));
    let few = dataset([("name", text(&[Some("a"), Some("!")]))]);
    assert!(message(TfidfVectorizer::fit(&few, ["name"])).contains("no word of two or more"));

    let apply = |fitted: Result<Preprocessor, Error>| {
        message(data.preprocess(&fitted.expect("fit")).and_then(|d| d.collect()))
    };
    assert!(apply(Normalizer::fit(&data, ["x", "gap"])).contains("\"gap\" has 1 missing values"));
    let renamed = |column| data.with_column("x", column).expect("a column");
    let bins = KBinsDiscretizer::fit(&data, ["x"]).expect("fit");
    let nan = message(renamed("nan").preprocess(&bins).and_then(|d| d.collect()));
    assert!(nan.contains("\"x\" has the value NaN, expected numbers"), "{nan}");
    let box_cox = Step::from(PowerTransformer::new(["x"]).with_power(Power::BoxCox));
    let box_cox = box_cox.fit(&renamed("gap")).expect("fit");
    assert!(apply(Ok(box_cox)).contains("expected numbers above 0, as Box-Cox takes"));
}

#[test]
fn missing_values_stay_missing_in_bins_and_words() {
    let data = dataset([
        ("x", floats([Some(1.0), None, Some(3.0)])),
        ("name", text(&[Some("An owl"), None, Some("")])),
    ]);
    let halves = KBinsDiscretizer::new(["x"]).with_bins(2).with_strategy(Strategy::Uniform);
    let steps = [halves.into(), Tokenizer::of(["name"])];
    let rows = apply(&Chain::fit(steps, &data).expect("fit"), &data);
    let bins: Vec<_> = rows.column(0).as_primitive::<UInt32Type>().iter().collect();
    assert_eq!(bins, [Some(0), None, Some(1)]);
    let words = rows.column(1).as_list::<i32>();
    let first = words.value(0);
    let first: Vec<_> = first.as_string::<i32>().iter().flatten().collect();
    assert_eq!((first, words.is_null(1), words.value(2).len()), (vec!["An", "owl"], true, 0));
}

/// The fastest of many: what the machine does beside it does not count.
#[test]
fn one_row_of_twenty_columns_takes_microseconds() {
    let rows = 1000;
    let number = |c: usize| move |i: usize| Some(((i * 7919 + c * 31) % 1009) as f64);
    let numbers: Vec<_> = (0..16).map(|c| format!("n{c}")).collect();
    let words: Vec<_> = (0..4).map(|c| format!("t{c}")).collect();
    let mut columns: Vec<(&str, ArrayRef)> = Vec::new();
    for (c, name) in numbers.iter().enumerate() {
        columns.push((name, floats((0..rows).map(number(c)).collect::<Vec<_>>())));
    }
    for (c, name) in words.iter().enumerate() {
        let values = (0..rows).map(|i| Some(["a", "b", "c"][(i + c) % 3])).collect::<Vec<_>>();
        columns.push((name, text(&values)));
    }
    let batch = RecordBatch::try_from_iter(columns).expect("batch");
    let data = Dataset::from_batches([batch.clone()]).expect("dataset");
    let steps = [
        SimpleImputer::mean(&numbers[..8]),
        StandardScaler::of(&numbers[..4]),
        RobustScaler::of(&numbers[4..8]),
        PowerTransformer::of(&numbers[8..12]),
        MaxAbsScaler::of(&numbers[12..16]),
        OneHotEncoder::of(&words[..]),
        Concatenator::of([numbers, words].concat(), "features"),
    ];
    let chain = Chain::fit(steps, &data).expect("fit");
    let row = batch.slice(5, 1);
    let time = |_| {
        let start = std::time::Instant::now();
        assert_eq!(chain.transform(&row).expect("a row").num_columns(), 1);
        start.elapsed()
    };
    let fastest = (0..300).map(time).min().expect("some");
    println!("one row of 20 columns through 7 steps: {fastest:?}");
    assert!(fastest < std::time::Duration::from_millis(1), "{fastest:?}");
}

/// What rounding makes of a constant is no spread.
#[test]
fn a_constant_is_only_centred() {
    let tenths: ArrayRef = Arc::new(Float64Array::from(vec![0.1; 3]));
    let data = Dataset::from_batches([batch([("x", tenths)])]).expect("dataset");
    let scaler = StandardScaler::fit(&data, ["x"]).expect("fit");
    let scaled = data.preprocess(&scaler).and_then(|data| data.collect()).expect("rows");
    let x = scaled.column(0).as_primitive::<Float32Type>().values().to_vec();
    assert!(x.iter().all(|x| x.abs() < 1e-6), "{x:?}");
}

/// What JSON cannot hold would be lost with the checkpoint.
#[test]
fn nothing_is_filled_with_what_is_no_number() {
    let x: ArrayRef = Arc::new(Float64Array::from(vec![Some(1.0), Some(f64::NAN), None]));
    let data = Dataset::from_batches([batch([("x", x)])]).expect("dataset");
    for step in [SimpleImputer::mean(["x"]), SimpleImputer::constant(["x"], f64::INFINITY)] {
        let text = message(step.fit(&data));
        assert!(text.contains("\"x\"") && text.contains("not a number"), "{text}");
    }
}

#[test]
fn large_numbers_are_no_missing_categories() {
    let hashes: ArrayRef = Arc::new(UInt64Array::from(vec![1, u64::MAX]));
    let data = Dataset::from_batches([batch([("hash", hashes)])]).expect("dataset");
    let text = message(OrdinalEncoder::fit(&data, ["hash"]));
    assert!(text.contains("18446744073709551615"), "{text}");
}

fn words(rows: &[Option<&str>]) -> Dataset {
    let data = dataset([("text", text(rows))]);
    let split = Tokenizer::fit(&data, ["text"]).expect("fit");
    data.preprocess(&split).expect("words")
}

#[test]
fn a_vocabulary_by_hand() {
    // b three times, a and c twice, d once.
    let rows = [Some("b"), Some("c"), None, Some("a"), Some("b"), Some("c"), Some("a"), Some("b")];
    let data = dataset([("text", text(&rows)), ("other", text(&[Some("x"); 8]))]);
    let lookup = StringLookup::fit(&data, ["text"]).expect("fit");
    assert_eq!(lookup.classes("text").expect("classes"), ["", "[UNK]", "b", "a", "c"]);
    let again: Preprocessor =
        serde_json::from_str(&serde_json::to_string(&lookup).expect("JSON")).expect("again");
    let seen = dataset([("text", text(&[Some("c"), Some("new"), None, Some("b"), Some("")]))]);
    let got = apply(&again, &seen);
    let numbers = got.column(0).as_primitive::<UInt32Type>();
    assert_eq!((numbers.values().to_vec(), numbers.null_count()), (vec![4, 1, 0, 2, 1], 0));
    assert_eq!(apply(&lookup.without("text"), &data).num_columns(), 2);
    let categories = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    let categories = arrow::compute::cast(&text(&rows), &categories).expect("a dictionary");
    let same = StringLookup::fit(&dataset([("text", categories)]), ["text"]).expect("fit");
    assert_eq!(same, lookup);
}

#[test]
fn a_vocabulary_is_cut_by_frequency() {
    let data = words(&[Some("b b b a a"), Some("c c d"), None]);
    let classes = |lookup: StringLookup| {
        let fitted = Step::from(lookup).fit(&data).expect("fit");
        fitted.classes("text").expect("classes")[2..].join(" ")
    };
    let lookup = || StringLookup::new(["text"]);
    assert_eq!(classes(lookup()), "b a c d");
    assert_eq!(classes(lookup().with_max_tokens(4)), "b a");
    assert_eq!(classes(lookup().with_min_frequency(2)), "b a c");
    let refused = |lookup: StringLookup| message(Step::from(lookup).fit(&data));
    let text = refused(lookup().with_max_tokens(2));
    assert!(text.contains("max_tokens is 2, expected 3 or more"), "{text}");
    let text = refused(lookup().with_min_frequency(9));
    assert!(text.contains("\"text\": no text of it occurs 9 times"), "{text}");
    let text = message(StringLookup::fit(&numbered(3, &[3]), ["id"]));
    assert!(text.contains("\"id\" is Int64, expected text"), "{text}");
}

/// Lists of words become rows of a tensor, whatever a missing list has behind it.
#[test]
fn words_become_a_padded_tensor() {
    let data = words(&[Some("to be or not to be"), None, Some("be")]);
    let lookup = StringLookup::fit(&data, ["text"]).expect("fit");
    let ids = data.preprocess(&lookup).expect("ids");
    let tensor = |spec: TensorSpec| {
        let options = StreamOptions::unlabelled([] as [&str; 0]);
        let source = ids.stream(options.with_tensor(spec.with_dtype(candle_core::DType::U32)))?;
        let mut stream = source.open(Shard::ALL).map_err(Error::from)?;
        let batch = stream.next_batch().map_err(Error::from)?.expect("a batch");
        Ok::<_, Error>(batch.get("text").expect("text").to_vec2::<u32>().expect("numbers"))
    };
    let spec = || TensorSpec::column("text");
    // be and to twice or more, by frequency: be 2, to 3, not 4, or 5.
    let padded = tensor(spec().with_length(6)).expect("a tensor");
    assert_eq!(padded, [[3, 2, 5, 4, 3, 2], [0; 6], [2, 0, 0, 0, 0, 0]]);
    let cut = tensor(spec().with_length(2).with_truncation(true)).expect("a tensor");
    assert_eq!(cut, [[3, 2], [0, 0], [2, 0]]);
    let text = message(tensor(spec().with_length(2)));
    assert!(text.contains("a list of 6 values") && text.contains("with_truncation"), "{text}");
    let text = message(data.stream(StreamOptions::unlabelled(["text"])));
    assert!(text.contains("encode its text with StringLookup"), "{text}");
}

/// Slices and missing lists have texts that are none of their rows.
#[test]
fn hidden_texts_are_not_in_the_vocabulary() {
    let rows = [Some("x x x x"), Some("a b"), Some("gone gone"), Some("b")];
    let lists = words(&rows).collect().expect("rows").column(0).as_list::<i32>().clone();
    let nulls = arrow::buffer::NullBuffer::from(vec![true, true, false, true]);
    let (item, offsets, values, _) = lists.into_parts();
    let lists = arrow::array::ListArray::new(item, offsets, values, Some(nulls));
    let data = dataset([("text", Arc::new(lists.slice(1, 3)) as ArrayRef)]);
    let lookup = StringLookup::fit(&data, ["text"]).expect("fit");
    assert_eq!(lookup.classes("text").expect("classes")[2..], ["b", "a"]);
    let got = apply(&lookup, &data);
    let got = got.column(0).as_list::<i32>();
    let row = |at| got.value(at).as_primitive::<UInt32Type>().values().to_vec();
    assert_eq!((row(0), row(1), row(2), got.null_count()), (vec![3, 2], vec![], vec![2], 0));
}
