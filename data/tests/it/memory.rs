//! The budget of memory. It is the process's, so that these tests run in one of their own.

use crate::{failure, ids, message, numbered};
use arrow::array::AsArray;
use arrow::datatypes::Int64Type;
use mobula_core::{BatchSource, Shard};
use mobula_data::{Dataset, Error, JoinType, StorageLevel, StreamOptions};
use std::process::Command;

/// Says that a process is one that [`within`] has started.
const CHILD: &str = "MOBULA_DATA_TEST_CHILD";

/// Runs `body`, of the test of this name, in a process with this budget, and with files in this folder,
/// if given.
fn within(test: &str, bytes: &str, folder: Option<&str>, body: fn()) {
    if std::env::var_os(CHILD).is_some() {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command.args(["--exact", &format!("memory::{test}"), "--nocapture"]);
    command.env("MOBULA_DATA_BYTES", bytes).env(CHILD, "1");
    if let Some(folder) = folder {
        command.env("TMPDIR", folder);
    }
    let output = command.output().expect("starts");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// 16 MB of numbers, and as many of text.
fn large() -> Dataset {
    Dataset::range(2_000_000)
        .and_then(|d| d.with_column("text", "'row ' || (id % 1000)"))
        .expect("rows")
}

fn epoch_rows(dataset: &Dataset, options: StreamOptions) -> usize {
    let stream = dataset.stream(options).expect("stream").open(Shard::ALL);
    let (mut stream, mut rows) = (stream.expect("open"), 0);
    while let Some(batch) = stream.next_batch().expect("batch") {
        rows += batch.rows();
    }
    rows
}

fn sorted() -> mobula_data::Result<()> {
    let shuffled = large().random_shuffle(1)?;
    let rows = shuffled.sort(["text DESC", "id DESC"])?.limit(3)?;
    let rows = rows.collect()?;
    let ids = rows.column_by_name("id").expect("id").as_primitive::<Int64Type>();
    assert_eq!(ids.values().to_vec(), [1_999_999, 1_998_999, 1_997_999]);
    Ok(())
}

#[test]
fn sorts_spill_what_has_no_room() {
    within("sorts_spill_what_has_no_room", "6MB", None, child_sorts);
}

#[test]
fn nothing_spills_while_there_is_room() {
    within("nothing_spills_while_there_is_room", "600000000", Some("/dev/null"), child_sorts);
}

fn child_sorts() {
    sorted().expect("sorts");
}

#[test]
fn a_spill_without_a_folder_says_so() {
    within("a_spill_without_a_folder_says_so", "6000000", Some("/dev/null"), child_has_no_folder);
}

fn child_has_no_folder() {
    let text = message(sorted());
    assert!(text.contains("cannot spill to a file in /dev/null"), "{text}");
    assert!(text.contains("set TMPDIR"), "{text}");
    let text = message(large().persist(StorageLevel::Disk));
    assert!(text.contains("/dev/null"), "{text}");
}

/// Groups and kept blocks beyond the budget.
#[test]
fn groups_and_kept_blocks_have_the_same_rows_on_disk() {
    within("groups_and_kept_blocks_have_the_same_rows_on_disk", "6000000", None, child_keeps);
}

fn child_keeps() {
    let kept = large().materialize().expect("kept");
    let paths = kept.block_refs().expect("blocks").iter().filter(|block| block.path.is_some());
    let (on_disk, all) = (paths.count(), kept.block_refs().expect("blocks").len());
    assert!(on_disk > all / 2 && on_disk < all, "{on_disk} of {all}");
    let groups = kept.aggregate(["id"], ["count(*) AS n"]).expect("groups");
    assert_eq!(groups.count().expect("count"), 2_000_000);
    assert_eq!(ids(&groups.limit(3).expect("limit")), [0, 1, 2]);
    let options = StreamOptions::unlabelled(["id"]).with_batch_size(1024).with_shuffle(1);
    assert_eq!(epoch_rows(&kept, options), 2_000_000);
}

#[test]
fn a_stream_goes_on_however_little_there_is() {
    within("a_stream_goes_on_however_little_there_is", "1000", None, child_streams);
}

fn child_streams() {
    for shuffle in [None, Some(1)] {
        let options = StreamOptions::unlabelled(["id"]).with_batch_size(512);
        let options = shuffle.into_iter().fold(options, StreamOptions::with_shuffle);
        let all = numbered(20_000, &[100]);
        assert_eq!(epoch_rows(&all, options), 20_000);
    }
}

#[test]
fn joins_beyond_the_budget_are_done_or_refused() {
    within("joins_beyond_the_budget_are_done_or_refused", "6000000", None, child_joins);
}

fn child_joins() {
    let right = large().rename("text", "other").expect("rename");
    let joined = large().join(&right, ["id"], JoinType::Inner).expect("plan");
    assert_eq!(joined.count().expect("rows"), 2_000_000);
    let odd = joined.sql("SELECT count(*) AS id FROM dataset WHERE text != other").expect("plan");
    assert_eq!(ids(&odd), [0]);
}

/// Joins that are not of equal keys, and those below a value that a query asks for first.
#[test]
fn other_joins_beyond_the_budget_are_done() {
    within("other_joins_beyond_the_budget_are_done", "6000000", None, child_joins_otherwise);
}

fn child_joins_otherwise() {
    let below = "SELECT count(*) AS id FROM dataset WHERE id <= (SELECT max(a.id) FROM dataset a JOIN dataset b ON a.id = b.id)";
    assert_eq!(ids(&large().sql(below).expect("plan")), [2_000_000]);
    let grouped = "SELECT count(*) AS id FROM (SELECT id, count(*) AS n FROM dataset GROUP BY id) a JOIN (SELECT id FROM dataset LIMIT 3) b ON a.n > b.id";
    assert_eq!(ids(&large().sql(grouped).expect("plan")), [2_000_000]);
}

/// Nothing is kept of what is not asked for: there is no folder to spill to.
#[test]
fn the_first_rows_need_little() {
    within("the_first_rows_need_little", "60000000", Some("/dev/null"), child_asks_for_few);
}

fn child_asks_for_few() {
    let wide = Dataset::range(4_000_000)
        .and_then(|d| d.with_column("text", "repeat('row ' || (id % 1000), 20)"))
        .expect("rows");
    assert_eq!(ids(&wide.top_k("id", 3).expect("plan")), [3_999_999, 3_999_998, 3_999_997]);
    let first = wide.sql("SELECT * FROM dataset LIMIT 3").expect("plan");
    assert_eq!(ids(&first), [0, 1, 2]);
    let small = wide.sql("SELECT id FROM dataset WHERE id % 40 = 0").expect("plan");
    // All of them would be five thousand million.
    let pairs = "SELECT a.id FROM dataset a JOIN dataset b ON a.id < b.id LIMIT 5";
    assert_eq!(small.sql(pairs).expect("plan").count().expect("rows"), 5);
}

#[test]
fn a_budget_that_is_none_is_named() {
    within("a_budget_that_is_none_is_named", "much", None, child_reads_a_budget);
}

fn child_reads_a_budget() {
    let text = message(numbered(3, &[3]).sql("SELECT * FROM dataset"));
    assert!(text.contains("MOBULA_DATA_BYTES") && text.contains("much"), "{text}");
    assert!(matches!(failure(large().materialize()), Error::Core(_)));
}

/// By joins in memory, or by those that spill.
#[test]
fn queries_beyond_the_budget_have_the_same_answer() {
    within("queries_beyond_the_budget_have_the_same_answer", "20000000", None, child_queries);
    within(
        "queries_beyond_the_budget_have_the_same_answer",
        "600000000",
        Some("/dev/null"),
        child_queries,
    );
}

fn child_queries() {
    let sql = "SELECT a.text, count(*) AS n, sum(b.id) AS id FROM a JOIN b USING (id) GROUP BY a.text ORDER BY id DESC LIMIT 2";
    let answer = mobula_data::query(sql, [("a", large()), ("b", large())]).expect("an answer");
    let rows = mobula_data::rows::text(&answer).expect("text");
    assert_eq!(
        rows,
        [["row 999", "2000", "2000998000"], ["row 998", "2000", "2000996000"]]
            .map(|r| r.map(str::to_owned))
    );
}
