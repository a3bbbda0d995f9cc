use crate::program::{Finished, mobula};
use serde_json::json;
use std::path::Path;
use std::process::Command;

const DIGITS: &str = "examples/data/digits-0.parquet";
const PENGUINS: &str = "examples/data/penguins.csv";

fn sql(args: &[&str]) -> Finished {
    mobula(&[&["data", "sql"], args].concat())
}

#[test]
fn a_parquet_file_is_shown_with_columns_sizes_and_rows() {
    let shown = mobula(&["data", "inspect", DIGITS]);
    assert_eq!(shown.code, Some(0), "{shown:?}");
    let line = |part: &str| shown.stdout.lines().find(|l| l.contains(part)).expect(part);
    let title = line("digits-0.parquet: parquet, ");
    assert!(title.contains(" row groups of ") && title.contains("in memory"), "{title}");
    assert!(line("label").contains("column") || line("label ").contains('9'), "{shown:?}");
    assert!(line("…").contains('['), "long cells are cut: {shown:?}");
}

#[test]
fn what_a_parquet_file_says_is_json() {
    let shown = mobula(&["data", "inspect", "--json", "--rows", "2", DIGITS]).json();
    let file = &shown[0]["file"];
    let label = &file["columns"][1];
    assert_eq!(
        (&label["name"], &label["min"], &label["max"]),
        (&json!("label"), &json!(0), &json!(9))
    );
    assert_eq!((&label["nulls"], &file["format"]), (&json!(0), &json!("parquet")));
    let sum = |of: &serde_json::Value, key: &str| -> u64 {
        of.as_array().expect("a list").iter().map(|one| one[key].as_u64().expect(key)).sum()
    };
    let rows = file["rows"].as_u64().expect("rows");
    assert_eq!(sum(&file["row_groups"], "rows"), rows);
    assert_eq!(sum(&file["row_groups"], "bytes"), sum(&file["columns"], "bytes"));
    // 64 bytes and a label a row, with little beside them.
    let memory = file["memory_bytes"].as_u64().expect("bytes");
    assert!((rows * 65..rows * 80).contains(&memory), "{memory} bytes for {rows} rows");
    assert_eq!(shown[0]["head"].as_array().map(Vec::len), Some(2));
    assert_eq!(shown[0]["head"][0]["image"].as_array().map(Vec::len), Some(64));
}

#[test]
fn several_files_and_csv_are_shown() {
    let shown = mobula(&["data", "inspect", "--json", PENGUINS, DIGITS]).json();
    let file = &shown[0]["file"];
    assert_eq!((&file["rows"], &file["row_groups"]), (&json!(344), &json!([])));
    assert_eq!(file["columns"][0]["min"], json!(null));
    assert_eq!(shown[1]["file"]["format"], "parquet");
}

#[test]
fn queries_read_files_by_path_and_by_name() {
    let query = format!("SELECT species, count(*) AS n FROM '{PENGUINS}' GROUP BY 1 ORDER BY 1");
    let printed = sql(&[&query]);
    let lines: Vec<_> = printed.stdout.lines().map(str::trim).collect();
    assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), ["species", "n"], "{printed:?}");
    assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["Adelie", "152"]);
    let both = "SELECT (SELECT count(*) FROM p) AS p, (SELECT count(*) FROM d) AS d, NULL AS none";
    let tables = ["p=examples/data/penguins.csv", "d=examples/data/digits-*.parquet"];
    let counted = sql(&["--json", both, tables[0], tables[1]]).json();
    assert_eq!(counted, json!([{"p": 344, "d": 1797, "none": null}]));
    let none = format!("SELECT species FROM '{PENGUINS}' WHERE false");
    assert_eq!(sql(&["--json", &none]).json(), json!([]));
}

/// More than is held at once; what comes later may need wider columns.
#[test]
fn large_results_are_printed_as_they_come() {
    let query =
        "SELECT CASE WHEN row_number() OVER () > 5000 THEN 'a long text' ELSE 'x' END AS t, label
                 FROM d CROSS JOIN (SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3)";
    let digits = "d=examples/data/digits-*.parquet";
    let printed = sql(&[query, digits]);
    let lines: Vec<_> = printed.stdout.lines().collect();
    assert_eq!((lines.len(), lines[0]), (1 + 3 * 1797, "t  label"));
    assert!(lines[1].starts_with("x  ") && lines[1].len() == 4, "{:?}", lines[1]);
    let last = lines.last().expect("the last");
    assert!(last.starts_with("a long text  ") && last.len() == 14, "{last:?}");
    // Longer than a table can be wide.
    let query_of_wide = "SELECT CASE WHEN row_number() OVER () IN (10, 5000) THEN repeat('x', 70000) ELSE 'x' END AS t, label
                         FROM d CROSS JOIN (SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3)";
    let wide = sql(&[query_of_wide, digits]);
    assert_eq!((wide.code, wide.stdout.matches("xxxxx").count() > 20_000), (Some(0), true));
    assert!(wide.stdout.lines().count() > 3 * 1797);
    let rows = sql(&["--json", query, digits]).json();
    assert_eq!(rows.as_array().map(Vec::len), Some(3 * 1797));
    assert_eq!(rows[0]["t"], "x");
}

#[test]
fn mistakes_are_named_with_the_way_out() {
    let wrong = |args: &[&str], parts: &[&str]| {
        let ran = sql(args);
        parts.iter().for_each(|part| assert!(ran.error().contains(part), "{part}: {ran:?}"));
    };
    wrong(&[&format!("SELECT specie FROM '{PENGUINS}'")], &["\"specie\"", "species"]);
    wrong(&["SELECT 1 FROM birds"], &["no table \"birds\"", "birds=path.parquet"]);
    wrong(&["SELECT 1 FROM birds", &format!("p={PENGUINS}")], &["known: p"]);
    wrong(&["SELECT 1 FROM 'absent.parquet'"], &["no file matches", "absent.parquet"]);
    wrong(&["SELECT 1 FROM 'README.md'"], &["README.md", "known endings: .parquet, .csv"]);
    wrong(&["SELEC 1"], &["\"SELEC 1\"", "found: SELEC at Line: 1, Column: 1"]);
    assert_eq!(sql(&["SELEC 1"]).error().matches("found: SELEC").count(), 1, "said once");
    wrong(&["DROP TABLE t", &format!("t={PENGUINS}")], &["DROP TABLE t"]);
    wrong(&["SELECT 1 FROM a", &format!("a={PENGUINS}"), &format!("a={DIGITS}")], &["named a"]);
    wrong(&["SELECT 1 FROM a", "a=absent.csv"], &["table a", "absent.csv"]);
    let unnamed = sql(&["SELECT 1", PENGUINS]);
    assert_eq!(unnamed.code, Some(2));
    assert!(unnamed.stderr.contains("a name and a path"), "{unnamed:?}");

    let absent = mobula(&["data", "inspect", "absent.parquet"]);
    assert!(absent.error().contains("no file matches"), "{absent:?}");
    let folder = tempfile::tempdir().expect("temporary folder");
    let broken = folder.path().join("broken.parquet");
    std::fs::write(&broken, "PAR1, it says").expect("a file");
    let broken = mobula(&["data", "inspect", broken.to_str().expect("UTF-8")]);
    assert!(broken.error().contains("broken.parquet is not a valid Parquet file"), "{broken:?}");
}

#[test]
fn files_are_converted_sorted_and_cut() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let to = folder.path().join("birds");
    let to = to.to_str().expect("UTF-8");
    let convert = |more: &[&str]| mobula(&[&["data", "convert", PENGUINS, to], more].concat());
    let sort = ["--sort-by", "body_mass_g DESC NULLS LAST", "--rows-per-file", "200"];
    let written = convert(&[&sort[..], &["--json"]].concat()).json();
    let rows: Vec<_> =
        written["files"].as_array().expect("files").iter().map(|f| &f["rows"]).collect();
    assert_eq!(rows, [&json!(200), &json!(144)]);
    let heaviest = format!("SELECT body_mass_g FROM '{to}/*.parquet' LIMIT 1");
    assert_eq!(sql(&["--json", &heaviest]).json(), json!([{"body_mass_g": 6300}]));

    let again = convert(&[]);
    assert!(again.error().contains("overwrite"), "{again:?}");
    for format in ["csv", "jsonl", "arrow", "parquet"] {
        let written = convert(&["--overwrite", "--format", format]);
        assert!(written.stdout.contains(&format!("part-00000.{format}")), "{written:?}");
        let count = format!("SELECT count(*) AS n FROM '{to}/*.{format}'");
        assert_eq!(sql(&["--json", &count]).json(), json!([{"n": 344}]));
    }
    let written = convert(&["--overwrite", "--partition-by", "species,island"]);
    assert!(
        written.stdout.contains("species=Gentoo/island=Biscoe/part-00000.parquet"),
        "{written:?}"
    );
    let count = format!("SELECT count(*) AS n FROM '{to}/**/*.parquet' WHERE species = 'Gentoo'");
    assert_eq!(sql(&["--json", &count]).json(), json!([{"n": 124}]));
    let wrong = convert(&["--overwrite", "--format", "csv", "--compression", "lz4"]);
    assert!(wrong.error().contains("are for Parquet"), "{wrong:?}");
    let wrong = convert(&["--overwrite", "--sort-by", "wieght"]);
    assert!(wrong.error().contains("wieght"), "{wrong:?}");
}

/// The commands of `docs/guides/data.md`, as they stand there.
#[test]
fn the_commands_of_the_guide_run() {
    let guide = include_str!("../../docs/guides/data.md");
    let lines: Vec<_> = guide.lines().filter(|line| line.starts_with("mobula data ")).collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
    let binary = Path::new(env!("CARGO_BIN_EXE_mobula")).parent().expect("a folder");
    for line in lines {
        let path = std::env::var("PATH").expect("a path");
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).env("PATH", format!("{}:{path}", binary.display()));
        let ran = crate::program::finish(shell);
        assert_eq!(ran.code, Some(0), "{line}: {ran:?}");
        assert!(ran.stdout.lines().count() > 2, "{line}: {ran:?}");
    }
}
