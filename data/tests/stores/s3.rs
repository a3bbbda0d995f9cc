//! Datasets in S3. The server's buckets are folders here, so what it has can be put there by hand.

use crate::{Test, example, message};
use arrow::array::{ArrayRef, AsArray, Int64Array, StringArray};
use arrow::datatypes::Int64Type;
use arrow::record_batch::RecordBatch;
use mobula_core::{BatchSource, BoxError, Shard};
use mobula_data::{
    BatchFn, CsvOptions, Dataset, Error, StreamOptions, WriteOptions, Written, inspect, query,
};
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, OnceLock};
use tempfile::TempDir;

/// In the environment of a copy of this program: the URL of which it is to say what it finds.
pub(crate) const ASKER: &str = "MOBULA_TEST_S3_URL";

pub(crate) const TESTS: &[Test] = &[
    ("files_are_read_as_they_are_here", files_are_read_as_they_are_here),
    ("patterns_mean_what_they_mean_here", patterns_mean_what_they_mean_here),
    ("shuffled_steps_are_the_same", shuffled_steps_are_the_same),
    ("folders_named_by_values_are_columns", folders_named_by_values_are_columns),
    ("what_is_written_there_is_read_here", what_is_written_there_is_read_here),
    ("only_what_was_written_is_replaced", only_what_was_written_is_replaced),
    ("a_write_that_fails_leaves_nothing", a_write_that_fails_leaves_nothing),
    ("a_write_that_is_killed_is_no_data", a_write_that_is_killed_is_no_data),
    ("queries_read_objects", queries_read_objects),
    ("images_and_bytes", images_and_bytes),
    ("an_object_that_changes_is_an_error", an_object_that_changes_is_an_error),
    ("what_is_not_there_is_named", what_is_not_there_is_named),
    ("who_may_not_ask_is_told_how_to", who_may_not_ask_is_told_how_to),
];

/// The same: it is to write there, and whether to overwrite.
const WRITER: &str = "MOBULA_TEST_S3_OVERWRITE";

const BUCKET: &str = "bucket";

static ROOT: OnceLock<PathBuf> = OnceLock::new();

/// Ends with this program.
pub(crate) struct Server {
    server: Child,
    _folder: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Starts a server, and tells this process where it is; or why there is none.
pub(crate) fn start() -> Result<Server, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    fs::create_dir(folder.path().join(BUCKET)).map_err(|error| error.to_string())?;
    let port = mobula_core::world::free_port().map_err(|error| error.to_string())?.to_string();
    let keys = ["--access-key", "someone", "--secret-key", "something"];
    let server = Command::new("s3s-fs")
        .args(["--host", "127.0.0.1", "--port", &port])
        .args(keys)
        .arg(folder.path())
        .env("RUST_LOG", "info")
        .stdout(Stdio::piped())
        .spawn();
    let mut server = server.map_err(|error| {
        format!("no S3 server ({error}): cargo install s3s-fs --version 0.14.1 --features binary")
    })?;
    let output = server.stdout.take().ok_or("no output")?;
    let mut lines = BufReader::new(output).lines().map_while(Result::ok);
    if !lines.any(|line| line.contains("server is running")) {
        return Err("the S3 server ended".to_owned());
    }
    // What it says later would fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    // SAFETY: no other thread looks at the environment yet.
    #[expect(unsafe_code, reason = "what says where a store is")]
    unsafe {
        std::env::set_var("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"));
        std::env::set_var("AWS_ALLOW_HTTP", "true");
        std::env::set_var("AWS_REGION", "eu-central-1");
        std::env::set_var("AWS_ACCESS_KEY_ID", "someone");
        std::env::set_var("AWS_SECRET_ACCESS_KEY", "something");
    }
    ROOT.get_or_init(|| folder.path().join(BUCKET));
    Ok(Server { server, _folder: folder })
}

/// A folder of the bucket, and its URL.
fn folder(name: &str) -> (PathBuf, String) {
    let path = ROOT.get().expect("a server").join(name);
    fs::create_dir_all(&path).expect("a folder");
    (path, format!("s3://{BUCKET}/{name}"))
}

fn digits_in(folder: &Path) {
    for i in 0..4 {
        let name = format!("digits-{i}.parquet");
        fs::copy(example(&name), folder.join(name)).expect("copy");
    }
}

fn digits() -> Dataset {
    let files = example("digits-*.parquet");
    Dataset::read_parquet(files.to_str().expect("UTF-8")).expect("digits")
}

fn rows(dataset: mobula_data::Result<Dataset>) -> RecordBatch {
    dataset.and_then(|dataset| dataset.collect()).expect("rows")
}

fn files_are_read_as_they_are_here() {
    let (here, there) = folder("formats");
    let options = WriteOptions::default().with_rows_per_file(500);
    let penguins = example("penguins.csv");
    let csv = |pattern: &str| Dataset::read_csv(pattern, CsvOptions::default());
    let penguins = csv(penguins.to_str().expect("UTF-8")).expect("penguins");
    penguins.write_csv(here.join("csv"), options.clone()).expect("write");
    let expected = rows(csv(here.join("csv").to_str().expect("UTF-8")));
    assert_eq!(rows(csv(&format!("{there}/csv"))), expected);

    type Read = fn(&str) -> mobula_data::Result<Dataset>;
    digits().write_parquet(here.join("parquet"), options.clone()).expect("write");
    digits().write_json(here.join("jsonl"), options.clone()).expect("write");
    digits().write_ipc(here.join("arrow"), options).expect("write");
    let formats: [(&str, Read); 3] = [
        ("parquet", |pattern| Dataset::read_parquet(pattern)),
        ("jsonl", |pattern| Dataset::read_json(pattern)),
        ("arrow", |pattern| Dataset::read_ipc(pattern)),
    ];
    for (format, read) in formats {
        let expected = rows(read(here.join(format).to_str().expect("UTF-8")));
        let there = read(&format!("{there}/{format}")).expect(format);
        let sent = serde_json::to_string(&there).expect("JSON");
        let sent: Dataset = serde_json::from_str(&sent).expect("a dataset");
        assert_eq!(sent.collect().expect("rows"), expected, "{format}");
        let few = there.select(["label"]).and_then(|labels| labels.filter("label = 3"));
        assert_eq!(few.and_then(|few| few.count()).expect("count"), 183, "{format}");
    }
    let one = format!("{there}/parquet/part-00000.parquet");
    let info = inspect::inspect(&one).expect("inspect");
    let file = here.join("parquet/part-00000.parquet");
    assert_eq!(info.bytes, fs::metadata(&file).expect("a file").len());
    assert_eq!(info.row_groups.len(), inspect::inspect(file).expect("inspect").row_groups.len());
}

fn patterns_mean_what_they_mean_here() {
    let (here, there) = folder("a b/ü#1%20");
    digits_in(&here);
    fs::create_dir(here.join("below")).expect("a folder");
    fs::copy(example("digits-0.parquet"), here.join("below/digits-9.parquet")).expect("copy");
    fs::copy(example("digits-0.parquet"), here.join(".digits-8.parquet")).expect("copy");
    let there = there.replace('%', "%25").replace('#', "%23");
    let all = rows(Ok(digits()));
    let count = |pattern: &str| {
        Dataset::read_parquet(format!("{there}{pattern}")).and_then(|found| found.count())
    };
    assert_eq!(rows(Dataset::read_parquet(&there)), all);
    assert_eq!(rows(Dataset::read_parquet(format!("{there}/"))), all);
    assert_eq!(rows(Dataset::read_parquet(format!("{there}/digits-*.parquet"))), all);
    assert_eq!(rows(Dataset::read_parquet("s3://bucket/a */*/digits-[0-7].*")), all);
    let one = count("/digits-0.parquet").expect("a file");
    assert_eq!(count("/*/digits-9.parquet").expect("files"), one);
    assert_eq!(count("/**/digits-[09].parquet").expect("files"), 2 * one);
    assert!(
        message(Dataset::read_parquet(format!("{there}/Digits-*.parquet"))).contains("no file")
    );
    let text = message(count("/digits-?.parquet"));
    assert!(text.contains("it has a query"), "{text}");
}

fn shuffled_steps_are_the_same() {
    let (here, there) = folder("shuffled");
    digits_in(&here);
    let labels = |dataset: Dataset| {
        let options = StreamOptions::new(["image"], "label").with_batch_size(64).with_shuffle(7);
        let source = dataset.stream(options).expect("a stream");
        let mut stream = source.open(Shard { rank: 0, world: 1 }).expect("open");
        let next = || stream.next_batch().expect("read");
        let batches = std::iter::from_fn(next).map(|batch| {
            batch.get("label").and_then(|labels| Ok(labels.to_vec1::<u32>()?)).expect("labels")
        });
        batches.collect::<Vec<_>>()
    };
    let there = labels(Dataset::read_parquet(there).expect("dataset"));
    assert_eq!(there.concat().len(), 1797);
    assert_eq!(there, labels(digits()));
}

fn folders_named_by_values_are_columns() {
    let (here, there) = folder("parted");
    let options = WriteOptions::default().with_partition_by(["label"]);
    digits().write_parquet(here.join("by label"), options).expect("write");
    let local = rows(Dataset::read_parquet(here.join("by label").to_str().expect("UTF-8")));
    let all = Dataset::read_parquet(format!("{there}/by label")).expect("dataset");
    assert_eq!(rows(Ok(all.clone())), local);
    assert_eq!(all.filter("label = 3").and_then(|few| few.count()).expect("count"), 183);
    let open = Dataset::read_parquet(format!("{there}/by label/label=[23]/*.parquet"));
    assert_eq!(rows(open).num_rows(), 183 + 177);
    let one = Dataset::read_parquet(format!("{there}/by label/label=3"));
    assert!(rows(one).column_by_name("label").is_none());
    let cities = ["Oslo", "New York", "a/b=c", "100%"];
    let values: ArrayRef = Arc::new(StringArray::from(cities.to_vec()));
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..4));
    let cities =
        RecordBatch::try_from_iter_with_nullable([("id", ids, false), ("city", values, true)])
            .expect("a batch");
    let cities = Dataset::from_batches([cities]).expect("dataset");
    let options = WriteOptions::default().with_partition_by(["city"]);
    cities.write_parquet(format!("{there}/by%20city"), options).expect("write");
    for url in ["by city", "by%20city", "by city/*/*.parquet"] {
        let all = Dataset::read_parquet(format!("{there}/{url}")).expect("dataset");
        assert_eq!(rows(all.sort(["id"])), rows(Ok(cities.clone())), "{url}");
    }
    let one = Dataset::read_parquet(format!("{there}/by city/city=New%2520York")).expect("dataset");
    assert_eq!(one.count().expect("count"), 1);
}

/// The files of a folder and of those in it, without the numbers of their writes.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("list").map(|entry| entry.expect("entry"));
    let mut names: Vec<_> = entries
        .flat_map(|entry| {
            let name = entry.file_name().into_string().expect("UTF-8");
            match entry.path().is_dir() {
                true => {
                    names(&entry.path()).iter().map(|below| format!("{name}/{below}")).collect()
                }
                false => vec![name],
            }
        })
        .collect();
    names.sort();
    names
}

fn what_is_written_there_is_read_here() {
    let (here, there) = folder("written");
    let options = || WriteOptions::default().with_rows_per_file(500);
    let written = digits().write_parquet(format!("{there}/a b"), options()).expect("write");
    assert_eq!(names(&here.join("a b")).len(), written.files.len() + 1);
    assert_eq!((written.rows(), written.files.len() > 1), (1797, true));
    assert_eq!(
        rows(Dataset::read_parquet(here.join("a b").to_str().expect("UTF-8"))),
        rows(Ok(digits()))
    );
    assert_eq!(rows(Dataset::read_parquet(format!("{there}/a b"))), rows(Ok(digits())));
    let parted = options().with_partition_by(["label"]);
    digits().write_ipc(format!("{there}/parted"), parted).expect("write");
    let three =
        Dataset::read_ipc(format!("{there}/parted")).and_then(|all| all.filter("label = 3"));
    assert_eq!(three.and_then(|three| three.count()).expect("count"), 183);
    assert!(names(&here.join("parted")).iter().any(|name| name.starts_with("label=3/part-")));
}

fn only_what_was_written_is_replaced() {
    let (here, there) = folder("replaced");
    let range = |rows| Dataset::range(rows).expect("rows");
    let write = |rows, overwrite| {
        let options = WriteOptions::default().with_rows_per_file(2000).with_overwrite(overwrite);
        range(rows).write_parquet(format!("{there}/rows"), options)
    };
    write(10_000, false).expect("write");
    let text = message(write(1, false));
    assert!(text.contains("exists; write elsewhere, or overwrite it"), "{text}");
    let before = Dataset::read_parquet(format!("{there}/rows")).expect("dataset");
    write(3000, true).expect("write");
    assert_eq!(rows(Dataset::read_parquet(format!("{there}/rows"))), rows(Ok(range(3000))));
    assert_eq!(names(&here.join("rows")).len(), 3, "two files and their list");
    let gone = message(before.collect());
    assert!(gone.contains("replaced/rows/part-"), "{gone}");
    fs::create_dir(here.join("own")).expect("a folder");
    fs::write(here.join("own/diary.txt"), "today").expect("write");
    let options = WriteOptions::default().with_overwrite(true);
    let text = message(range(1).write_csv(format!("{there}/own"), options));
    assert!(text.contains("_written.json"), "{text}");
    assert_eq!(names(&here.join("own")), ["diary.txt"]);
}

mobula_data::inventory::submit! { BatchFn::new("fails late", |batch| ends(batch, || Err("as it is told".into()))) }
mobula_data::inventory::submit! { BatchFn::new("aborts late", |batch| ends(batch, || std::process::abort())) }

/// Does something at row 150,000.
fn ends(
    batch: &RecordBatch,
    end: fn() -> Result<RecordBatch, BoxError>,
) -> Result<RecordBatch, BoxError> {
    let ids = batch.column(0).as_primitive::<Int64Type>();
    if ids.values().contains(&150_000) { end() } else { Ok(batch.clone()) }
}

fn ending(function: &str, url: &str, overwrite: bool) -> mobula_data::Result<Written> {
    let rows = Dataset::range(200_000).and_then(|rows| rows.map_batches(function))?;
    let options = WriteOptions::default().with_rows_per_file(10_000).with_overwrite(overwrite);
    rows.write_parquet(url, options)
}

fn a_write_that_fails_leaves_nothing() {
    let (here, there) = folder("failed");
    let text = message(ending("fails late", &format!("{there}/rows"), false));
    assert!(text.contains("as it is told"), "{text}");
    assert!(!here.join("rows").exists() || names(&here.join("rows")).is_empty());
    // What lies beside it is nobody's business, and a folder above it is none that was written.
    fs::create_dir_all(here.join("other")).expect("a folder");
    fs::write(here.join("other/diary.txt"), "today").expect("write");
    Dataset::range(5)
        .and_then(|rows| rows.write_parquet(format!("{there}/rows"), WriteOptions::default()))
        .expect("write");
    let above = WriteOptions::default().with_overwrite(true);
    let text = message(digits().write_parquet(&there, above));
    assert!(text.contains("_written.json"), "{text}");
    assert!(here.join("other/diary.txt").exists() && names(&here.join("rows")).len() == 2);
    ending("fails late", &format!("{there}/rows"), true).expect_err("a failure");
    assert_eq!(rows(Dataset::read_parquet(format!("{there}/rows"))).num_rows(), 5);
    assert_eq!(names(&here.join("rows")).len(), 2);
}

fn a_write_that_is_killed_is_no_data() {
    let (here, there) = folder("killed");
    let url = format!("{there}/rows");
    let kill = |overwrite: &str| {
        let mut writer = Command::new(std::env::current_exe().expect("this program"));
        writer.env(ASKER, &url).env(WRITER, overwrite);
        let ended = writer.output().expect("a copy of this program").status;
        assert!(!ended.success(), "{ended}");
        assert!(names(&here.join("rows")).len() > 3, "some files were sent");
    };
    kill("no");
    let read = || Dataset::read_parquet(&url).and_then(|found| found.count());
    assert!(matches!(read(), Err(Error::Unfinished { .. })), "{:?}", read());
    let pattern = Dataset::read_parquet(format!("{url}/*.parquet"));
    assert!(matches!(pattern, Err(Error::Unfinished { .. })));
    let options = || WriteOptions::default().with_overwrite(true);
    let few = Dataset::range(7).expect("rows");
    few.write_parquet(&url, options()).expect("write");
    assert_eq!((read().expect("count"), names(&here.join("rows")).len()), (7, 2));
    // What was there before stays, while another one is written and when it is not.
    kill("yes");
    assert_eq!(read().expect("count"), 7);
    few.write_parquet(&url, options()).expect("write");
    assert_eq!((read().expect("count"), names(&here.join("rows")).len()), (7, 2));
}

fn queries_read_objects() {
    let (here, there) = folder("queries");
    digits_in(&here);
    let sql = |files: String| {
        let sql =
            format!("SELECT label, count(*) AS n FROM '{files}' GROUP BY label ORDER BY label");
        query::<String>(&sql, []).expect("an answer")
    };
    let local = example("digits-*.parquet");
    assert_eq!(sql(format!("{there}/digits-*.parquet")), sql(local.display().to_string()));
    let first = format!("SELECT label FROM '{there}/*.parquet' LIMIT 3");
    let first = query::<String>(&first, []).expect("an answer");
    let expected = digits().select(["label"]).and_then(|labels| labels.head(3)).expect("rows");
    assert_eq!(first.column(0), expected.column(0));
}

fn images_and_bytes() {
    let (here, there) = folder("images");
    for i in 0..70_u8 {
        let image = image::RgbImage::from_fn(8, 6, |x, y| image::Rgb([i, x as u8, y as u8]));
        fs::create_dir_all(here.join(format!("{}", i % 3))).expect("a folder");
        image.save(here.join(format!("{}/{i}.png", i % 3))).expect("an image");
    }
    fs::write(here.join("0/notes.txt"), "no image").expect("a file");
    fs::write(here.join("0/empty"), "").expect("a file");
    let local = rows(Dataset::read_images(here.to_str().expect("UTF-8"), [3, 4]));
    let remote = rows(Dataset::read_images(&there, [3, 4]));
    assert_eq!(remote.num_rows(), 70);
    assert_eq!(remote.column_by_name("image"), local.column_by_name("image"));
    // Of more blocks than there are processors.
    let large = Dataset::read_images(format!("{there}/1/1*.png"), [1700, 1700]).expect("images");
    assert_eq!(rows(large.select(["path"])).num_rows(), 5);
    assert_eq!(rows(Ok(large)).num_rows(), 5);
    let local = rows(Dataset::read_binary_files(here.to_str().expect("UTF-8")));
    let remote = rows(Dataset::read_binary_files(&there));
    assert_eq!(remote.num_rows(), 72);
    assert_eq!(remote.column_by_name("bytes"), local.column_by_name("bytes"));
}

fn an_object_that_changes_is_an_error() {
    let (here, there) = folder("changes");
    digits_in(&here);
    let labels = digits().select(["label"]).expect("labels");
    labels.write_csv(here.join("csv"), WriteOptions::default()).expect("write");
    let parquet = Dataset::read_parquet(&there).expect("dataset");
    let csv = Dataset::read_csv(format!("{there}/csv"), CsvOptions::default()).expect("dataset");
    let first = parquet.collect().expect("rows").num_rows();
    assert_eq!(csv.count().expect("count"), first as u64);
    fs::copy(example("digits-0.parquet"), here.join("digits-2.parquet")).expect("copy");
    let file = here.join("csv/part-00000.csv");
    let text = fs::read_to_string(&file).expect("read");
    fs::write(&file, text.replace('1', "2")).expect("write");
    let changed = |dataset: Dataset| match dataset.collect() {
        Err(Error::FileChanged { path }) => path.display().to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!(changed(parquet), format!("{there}/digits-2.parquet"));
    assert_eq!(changed(csv), format!("{there}/csv/part-00000.csv"));
}

fn what_is_not_there_is_named() {
    for url in ["s3://bucket/absent.parquet", "s3://bucket/absent/*.parquet", "s3://other/x"] {
        let text = message(Dataset::read_parquet(url));
        assert!(text.contains(url), "{text}");
    }
    let text = message(Dataset::read_parquet("ftp://host/file.parquet"));
    assert!(text.contains("one of s3, gs, az") || text.contains("s3://bucket/key"), "{text}");
    let (here, there) = folder("broken");
    fs::write(here.join("a.parquet"), "PAR1, it says").expect("write");
    let text = message(Dataset::read_parquet(&there));
    assert!(text.contains("broken/a.parquet is not a valid Parquet file"), "{text}");
}

/// Says what comes of a URL.
pub(crate) fn ask(url: &str) -> ExitCode {
    if let Some(overwrite) = std::env::var_os(WRITER) {
        println!("{:?}", ending("aborts late", url, overwrite == "yes"));
        return ExitCode::SUCCESS;
    }
    println!("{}", message(Dataset::read_parquet(url)));
    ExitCode::SUCCESS
}

fn who_may_not_ask_is_told_how_to() {
    let (here, there) = folder("private");
    digits_in(&here);
    let ask = |change: &dyn Fn(&mut Command)| {
        let mut asker = Command::new(std::env::current_exe().expect("this program"));
        asker.env(ASKER, &there);
        change(&mut asker);
        let said = asker.output().expect("a copy of this program");
        String::from_utf8(said.stdout).expect("UTF-8")
    };
    let wrong = ask(&|asker| {
        asker.env("AWS_SECRET_ACCESS_KEY", "a guess");
    });
    assert!(wrong.contains("AWS_SECRET_ACCESS_KEY"), "{wrong}");
    assert!(wrong.contains(&there) && !wrong.contains("a guess"), "{wrong}");
    let nobody = ask(&|asker| {
        asker.env("AWS_SKIP_SIGNATURE", "true");
    });
    assert!(nobody.contains("AWS_ACCESS_KEY_ID"), "{nobody}");
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let nowhere = format!("http://{}", free.expect("a port"));
    let nowhere = ask(&|asker| {
        asker.env("AWS_ENDPOINT_URL", &nowhere);
    });
    assert!(nowhere.contains("AWS_ENDPOINT_URL"), "{nowhere}");
}
