//! `mobula data`: what is in files of data, and the same rows in other files.

mod convert;
mod printer;

use super::output::{bytes, lines, print, print_json, table};
use anyhow::{Context, bail};
use mobula::data::inspect::{ColumnInfo, FileInfo, inspect};
use mobula::data::{Dataset, query_batches, rows};
use printer::Printer;
use serde::Serialize;
use serde_json::Value;
use std::path::PathBuf;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Show what files have: columns with types, sizes and ranges, row groups, the first rows
    Inspect(Inspect),
    /// Run a query over files, and print its result
    ///
    /// A file is a table by its path in quotes, `FROM 'data/part-*.parquet'`, or by a name that is
    /// given to it: `mobula data sql "SELECT * FROM t LIMIT 5" t=data/digits.parquet`.
    Sql(Sql),
    /// Write the rows of files in another format, order or cut
    Convert(convert::Convert),
}

#[derive(clap::Args)]
pub(crate) struct Inspect {
    /// Files; their endings say what they are
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// How many rows to show
    #[arg(long, default_value_t = 3)]
    rows: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct Sql {
    /// The query, in the SQL of DataFusion
    query: String,
    /// Names for files or patterns, such as digits=data/digits-*.parquet
    #[arg(value_name = "NAME=PATH", value_parser = named)]
    tables: Vec<(String, String)>,
    /// Print JSON: an array of rows, each an object
    #[arg(long)]
    json: bool,
}

fn named(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), path.to_owned()))
        }
        _ => Err("expected a name and a path, such as digits=data/digits-*.parquet".to_owned()),
    }
}

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Inspect(options) => show_files(options),
        Command::Sql(options) => show_result(options),
        Command::Convert(options) => convert::convert(options),
    }
}

/// A file of `data inspect --json`.
#[derive(Serialize)]
struct Report {
    file: FileInfo,
    /// The first rows.
    head: Value,
}

fn show_files(options: &Inspect) -> anyhow::Result<()> {
    let files = options.files.iter().map(inspect).collect::<Result<Vec<_>, _>>()?;
    if options.json {
        let report =
            |file: FileInfo| Ok(Report { head: rows::json(&file.head(options.rows)?)?, file });
        return print_json(&files.into_iter().map(report).collect::<anyhow::Result<Vec<_>>>()?);
    }
    let shown = files.iter().map(|file| text_of(file, options.rows));
    print(shown.collect::<anyhow::Result<Vec<_>>>()?.join("\n\n"))
}

fn text_of(file: &FileInfo, rows: usize) -> anyhow::Result<String> {
    let groups = match file.row_groups.len() {
        0 => String::new(),
        1 => " in 1 row group".to_owned(),
        n => format!(" in {n} row groups of {}", group_rows(file)),
    };
    let title = format!(
        "{}: {}, {} rows{groups}, {}, about {} in memory",
        file.path.display(),
        file.format,
        file.rows,
        bytes(file.bytes),
        bytes(file.memory_bytes)
    );
    let header = ["column", "type", "nulls", "min", "max", "bytes", "stored as"];
    let mut parts = vec![title, table(header, file.columns.iter().map(column_row))];
    if rows > 0 {
        parts.push(first_rows(file, rows)?);
    }
    Ok(parts.join("\n\n"))
}

/// "1000 rows", or "17 to 1000 rows".
fn group_rows(file: &FileInfo) -> String {
    let rows = || file.row_groups.iter().map(|group| group.rows);
    match (rows().min().unwrap_or_default(), rows().max().unwrap_or_default()) {
        (least, most) if least == most => format!("{most} rows"),
        (least, most) => format!("{least} to {most} rows"),
    }
}

fn column_row(column: &ColumnInfo) -> [String; 7] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let value = |value: &Option<Value>| {
        let text = value.as_ref().map(|v| v.as_str().map_or(v.to_string(), str::to_owned));
        or_dash(text.map(|text| cut(&text, 24)))
    };
    let stored = [&column.compression[..], &column.encodings[..]].concat();
    [
        column.name.clone(),
        column.data_type.clone(),
        or_dash(column.nulls.map(|nulls| nulls.to_string())),
        value(&column.min),
        value(&column.max),
        or_dash(column.bytes.map(bytes)),
        or_dash((!stored.is_empty()).then(|| stored.join(" "))),
    ]
}

fn first_rows(file: &FileInfo, count: usize) -> anyhow::Result<String> {
    let header = file.columns.iter().map(|column| column.name.clone()).collect();
    let short = |row: Vec<String>| row.iter().map(|cell| cut(cell, 40)).collect();
    let rows = rows::text(&file.head(count)?)?;
    Ok(lines(header, rows.into_iter().map(short)))
}

/// At most so many characters, and a mark where more are left out.
fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn show_result(options: &Sql) -> anyhow::Result<()> {
    let open = |(name, path): &(String, String)| {
        let dataset = Dataset::read(path).with_context(|| format!("table {name}"))?;
        Ok((name.clone(), dataset))
    };
    let tables = options.tables.iter().map(open).collect::<anyhow::Result<Vec<_>>>()?;
    if let Some(name) = twice(&options.tables) {
        bail!("two tables are named {name}; give each a name of its own");
    }
    let batches = query_batches(&options.query, tables)?;
    let header = batches.schema().fields().iter().map(|field| field.name().clone()).collect();
    let mut printer = if options.json { Printer::json() } else { Printer::table(header) };
    for batch in batches {
        let batch = batch?;
        let printed = match options.json {
            true => printer.objects(rows::json(&batch)?),
            false => printer.rows(rows::text(&batch)?),
        };
        if printed?.is_stop() {
            break;
        }
    }
    printer.end()
}

fn twice(tables: &[(String, String)]) -> Option<&str> {
    let names = || tables.iter().map(|(name, _)| name.as_str());
    names().enumerate().find(|(i, name)| names().take(*i).any(|n| n == *name)).map(|(_, name)| name)
}
