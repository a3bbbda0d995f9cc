//! A source that the program brings itself.

use crate::{batch, ids, message};
use arrow::array::{ArrayRef, Int64Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use mobula_core::{BatchSource, Shard};
use mobula_data::{BatchIter, Blocks, Dataset, Result, Source, StreamOptions, typetag};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Numbers in blocks of ten, of which it says that they have `announced`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Numbers {
    blocks: usize,
    announced: u64,
    column: String,
}

impl Numbers {
    fn new(blocks: usize) -> Self {
        Self { blocks, announced: 10, column: "id".to_owned() }
    }
}

#[typetag::serde]
impl Source for Numbers {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        Ok(Arc::new(self.clone()))
    }
}

impl Blocks for Numbers {
    fn schema(&self) -> SchemaRef {
        Arc::new(Schema::new(vec![Field::new("id", DataType::Int64, true)]))
    }

    fn rows(&self) -> Vec<u64> {
        vec![self.announced; self.blocks]
    }

    fn fingerprint(&self) -> Result<String> {
        Ok(format!("numbers-{}", self.blocks))
    }

    fn name(&self, block: usize) -> String {
        format!("tens {block}")
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let start = block as i64 * 10;
        let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(start..start + 10));
        let rows = batch([(self.column.as_str(), ids)]).project(projection)?;
        Ok(Box::new([rows.slice(0, 4), rows.slice(4, 6)].map(Ok).into_iter()))
    }
}

#[test]
fn own_sources_do_what_built_in_ones_do() {
    let numbers = Dataset::from_source(Numbers::new(5)).expect("dataset");
    assert_eq!(ids(&numbers), Vec::from_iter(0..50));
    assert_eq!(numbers.filter("id % 2 = 0").and_then(|d| d.count()).expect("count"), 25);
    assert_eq!(ids(&numbers.sql("SELECT sum(id) AS id FROM dataset").expect("sql")), [1225]);
    let options = StreamOptions::unlabelled(["id"]).with_batch_size(20);
    let mut stream = numbers.stream(options).and_then(|s| Ok(s.open(Shard::ALL)?)).expect("stream");
    assert_eq!(stream.next_batch().expect("batch").expect("rows").rows(), 20);
}

#[test]
fn own_sources_travel() {
    let evens = Dataset::from_source(Numbers::new(2)).and_then(|d| d.filter("id % 2 = 0"));
    let result = evens.and_then(|d| d.sql("SELECT id FROM dataset ORDER BY id DESC")).expect("sql");
    let expected = [18, 16, 14, 12, 10, 8, 6, 4, 2, 0];
    let json = serde_json::to_string(&result).expect("JSON");
    assert_eq!(ids(&serde_json::from_str(&json).expect("JSON")), expected);
    let bytes = rmp_serde::to_vec_named(&result).expect("MessagePack");
    assert_eq!(ids(&rmp_serde::from_slice(&bytes).expect("MessagePack")), expected);

    let unknown = json.replace("\"Numbers\"", "\"Letters\"");
    let error = serde_json::from_str::<Dataset>(&unknown).expect_err("no such type").to_string();
    assert!(error.contains("Letters"), "{error}");
}

#[test]
fn sources_that_break_their_word_are_named() {
    for (announced, says) in [(9, "tens 0 has 10 rows, it had 9"), (11, "has 10 rows, it had 11")] {
        let numbers = Dataset::from_source(Numbers { announced, ..Numbers::new(1) });
        let text = message(numbers.and_then(|d| d.collect()));
        assert!(text.contains(says), "{text}");
    }
    let numbers = Numbers { column: "number".to_owned(), ..Numbers::new(1) };
    let text = message(Dataset::from_source(numbers).and_then(|d| d.collect()));
    assert!(
        text.contains("tens 0 has the columns [number: Int64], expected [id: Int64]"),
        "{text}"
    );
}

#[test]
fn ranges_count() {
    assert_eq!(ids(&Dataset::range(10_000).expect("range")), Vec::from_iter(0..10_000));
    assert_eq!(Dataset::range(0).and_then(|d| d.count()).expect("count"), 0);
}
