//! Datasets behind HTTP, on servers that do what networks do.

use crate::{Test, example, message};
use mobula_data::{Dataset, Error, ParquetSink, WriteOptions};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("a_file_is_read_by_its_url", a_file_is_read_by_its_url),
    ("answers_that_are_cut_off_are_asked_again", answers_that_are_cut_off_are_asked_again),
    ("a_file_that_changes_is_an_error", a_file_that_changes_is_an_error),
    ("a_server_that_ends_is_no_damaged_file", a_server_that_ends_is_no_damaged_file),
    ("no_url_is_guessed", no_url_is_guessed),
    ("blocks_wait_at_the_same_time", blocks_wait_at_the_same_time),
];

/// What a server does with the request of this number.
type Behaviour = Arc<dyn Fn(usize) -> Answer + Send + Sync>;

#[derive(Clone, Copy, PartialEq)]
enum Answer {
    /// With the tag of this version of the file.
    Whole(u32),
    /// Ends in the middle of the body.
    Cut,
    /// Ends at once.
    Nothing,
}

/// Serves one file, to the end of the program; its URL.
fn serve(
    name: &str,
    content: Vec<u8>,
    behaviour: impl Fn(usize) -> Answer + Send + Sync + 'static,
) -> String {
    let behaviour: Behaviour = Arc::new(behaviour);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/data/{name}", listener.local_addr().expect("an address"));
    let (content, requests) = (Arc::new(content), Arc::new(AtomicUsize::new(0)));
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (content, requests) = (content.clone(), requests.clone());
            let behaviour = behaviour.clone();
            std::thread::spawn(move || answer_all(stream, &content, &requests, &behaviour));
        }
    });
    url
}

fn answer_all(stream: TcpStream, content: &[u8], requests: &AtomicUsize, behaviour: &Behaviour) {
    let mut reader = BufReader::new(stream.try_clone().expect("a stream"));
    while let Some((is_head, range)) = request(&mut reader) {
        // A question about the file is none for its content.
        let answer = match is_head {
            true => Answer::Whole(1),
            false => behaviour(requests.fetch_add(1, Ordering::Relaxed)),
        };
        if answer == Answer::Nothing || respond(&stream, content, is_head, range, answer).is_none()
        {
            return;
        }
    }
}

/// Whether it is `HEAD`, and the range that it asks for.
fn request(reader: &mut impl BufRead) -> Option<(bool, Option<(usize, usize)>)> {
    let lines = reader.lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let lines: Vec<String> = lines.collect();
    let range = lines.iter().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        let range = name.eq_ignore_ascii_case("range").then_some(value)?;
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    });
    Some((lines.first()?.starts_with("HEAD"), range))
}

/// `None` if nothing can come after it.
fn respond(
    mut stream: &TcpStream,
    content: &[u8],
    is_head: bool,
    range: Option<(usize, usize)>,
    answer: Answer,
) -> Option<()> {
    let (first, last) = range.unwrap_or((0, content.len() - 1));
    let body = &content[first..=last.min(content.len() - 1)];
    let version = if let Answer::Whole(version) = answer { version } else { 1 };
    let mut head = match range {
        Some(_) => format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{}/{}\r\n",
            first + body.len() - 1,
            content.len()
        ),
        None => "HTTP/1.1 200 OK\r\n".to_owned(),
    };
    let time = "Thu, 26 Nov 2026 12:00:00 GMT";
    write!(
        head,
        "Content-Length: {}\r\nETag: \"v{version}\"\r\nLast-Modified: {time}\r\n\r\n",
        body.len()
    )
    .expect("text");
    stream.write_all(head.as_bytes()).ok()?;
    if is_head {
        return Some(());
    }
    if answer == Answer::Cut {
        stream.write_all(&body[..body.len() / 2]).ok()?;
        return None;
    }
    stream.write_all(body).ok()
}

fn parquet() -> Vec<u8> {
    fs::read(example("digits-1.parquet")).expect("read")
}

fn expected() -> arrow::record_batch::RecordBatch {
    let path = example("digits-1.parquet");
    let dataset = Dataset::read_parquet(path.to_str().expect("UTF-8"));
    dataset.and_then(|dataset| dataset.collect()).expect("rows")
}

fn a_file_is_read_by_its_url() {
    let url = serve("digits.parquet", parquet(), |_| Answer::Whole(1));
    assert_eq!(Dataset::read(&url).and_then(|found| found.collect()).expect("rows"), expected());
    let mut csv = String::from("id,text\n");
    (0..50_000).for_each(|i| writeln!(csv, "{i},row {i}").expect("text"));
    let url = serve("rows.csv", csv.clone().into(), |_| Answer::Whole(1));
    let rows = Dataset::read(&url).expect("dataset");
    assert_eq!(
        rows.filter("text = concat('row ', id)").and_then(|r| r.count()).expect("count"),
        50_000
    );
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zipped.write_all(csv.as_bytes()).expect("write");
    let url = serve("zipped.csv", zipped.finish().expect("gzip"), |_| Answer::Whole(1));
    assert_eq!(Dataset::read(&url).and_then(|r| r.count()).expect("count"), 50_000);
}

fn answers_that_are_cut_off_are_asked_again() {
    let url = serve("digits.parquet", parquet(), |request| match request % 2 {
        0 => Answer::Cut,
        _ => Answer::Whole(1),
    });
    assert_eq!(Dataset::read(&url).and_then(|found| found.collect()).expect("rows"), expected());
}

fn a_file_that_changes_is_an_error() {
    let url = serve("digits.parquet", parquet(), |request| Answer::Whole(1 + (request / 2) as u32));
    let found = Dataset::read(&url).and_then(|found| found.collect());
    assert!(matches!(found, Err(Error::FileChanged { .. })), "{found:?}");
}

fn a_server_that_ends_is_no_damaged_file() {
    for (name, content) in
        [("digits.parquet", parquet()), ("rows.csv", b"a,b\n1,2\n".repeat(20_000))]
    {
        let url = serve(name, content, |request| match request {
            0 => Answer::Whole(1),
            _ => Answer::Nothing,
        });
        let found = Dataset::read(&url).and_then(|found| found.collect());
        assert!(matches!(found, Err(Error::ObjectStore { .. })), "{found:?}");
    }
}

fn no_url_is_guessed() {
    let url = serve("digits.parquet", parquet(), |_| Answer::Whole(1));
    let text = message(Dataset::read_parquet(format!("{url}?download=true")));
    assert!(text.contains("query"), "{text}");
    let text = message(Dataset::read(format!("{url}?signature=secret")));
    assert!(text.contains("query") && !text.contains("secret"), "{text}");
    let text = message(Dataset::read(url.replace("http://", "http://ann:secret@")));
    assert!(text.contains("password") && !text.contains("secret"), "{text}");
    let text = message(Dataset::read_parquet(url.replace("digits.parquet", "*.parquet")));
    assert!(text.contains("cannot list"), "{text}");
}

/// The server answers when four ask for a part of the file: more than this machine may have processors.
fn blocks_wait_at_the_same_time() {
    let dir = tempfile::tempdir().expect("a folder");
    let sink = ParquetSink::default().with_row_group_rows(100);
    let rows = Dataset::range(2000).expect("rows");
    rows.write(dir.path().join("rows"), sink, WriteOptions::default()).expect("write");
    let file = fs::read(dir.path().join("rows/part-00000.parquet")).expect("read");
    let (waiting, many) = (Mutex::new(0), Condvar::new());
    let url = serve("rows.parquet", file, move |request| {
        let mut waiting = waiting.lock().expect("a count");
        *waiting += usize::from(request > 0);
        many.notify_all();
        let few = |count: &mut usize| (1..4).contains(count);
        let waited = many.wait_timeout_while(waiting, Duration::from_secs(20), few);
        match waited.expect("a count").1.timed_out() {
            true => Answer::Nothing,
            false => Answer::Whole(1),
        }
    });
    let found = Dataset::read(&url).expect("dataset");
    assert_eq!(found.collect().expect("rows"), rows.collect().expect("rows"));
}
