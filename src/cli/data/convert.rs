//! `mobula data convert`: the rows of files in another format, order or cut.

use crate::cli::output::{bytes, print, print_json, table};
use anyhow::bail;
use mobula::data::{
    CsvSink, Dataset, IpcSink, JsonSink, ParquetCompression, ParquetSink, WriteOptions, Written,
};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Convert {
    /// A file, or a pattern in quotes such as 'data/part-*.csv'; its ending says what it is
    input: String,
    /// The folder to make
    output: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value_t = Format::Parquet)]
    format: Format,
    #[arg(long, value_enum, help = "How Parquet is compressed [default: zstd]")]
    compression: Option<Compression>,
    /// Rows of a row group of Parquet: a shuffle mixes whole ones [default: 8192]
    #[arg(long, value_name = "ROWS")]
    row_group_rows: Option<usize>,
    /// The most rows of a file
    #[arg(long, default_value_t = WriteOptions::default().rows_per_file, value_name = "ROWS")]
    rows_per_file: u64,
    /// Sort by these columns, such as "day, price DESC"; what has no room in memory is put on disk
    #[arg(long, value_name = "COLUMNS")]
    sort_by: Option<String>,
    /// Put rows into folders by these columns, such as year,city: year=2024/city=Oslo/…
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',')]
    partition_by: Vec<String>,
    /// Replace a folder that was written before
    #[arg(long)]
    overwrite: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Format {
    Parquet,
    Csv,
    /// JSON, a row a line
    Jsonl,
    /// Arrow IPC
    Arrow,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Compression {
    None,
    Snappy,
    Lz4,
    Zstd,
}

impl From<Compression> for ParquetCompression {
    fn from(compression: Compression) -> Self {
        match compression {
            Compression::None => Self::None,
            Compression::Snappy => Self::Snappy,
            Compression::Lz4 => Self::Lz4,
            Compression::Zstd => Self::Zstd,
        }
    }
}

pub(super) fn convert(options: &Convert) -> anyhow::Result<()> {
    let written = write(&sorted(options)?, options)?;
    if options.json {
        return print_json(&written);
    }
    let files = written.files.iter();
    let rows = files
        .map(|file| [file.name.display().to_string(), file.rows.to_string(), bytes(file.bytes)]);
    let title = format!(
        "{}: {} rows in {}",
        options.output.display(),
        written.rows(),
        bytes(written.bytes())
    );
    print(format!("{title}\n\n{}", table(["file", "rows", "bytes"], rows)))
}

fn sorted(options: &Convert) -> anyhow::Result<Dataset> {
    let dataset = Dataset::read(&options.input)?;
    match &options.sort_by {
        None => Ok(dataset),
        Some(columns) if columns.trim().is_empty() => bail!("--sort-by names no column"),
        Some(columns) => Ok(dataset.sort([columns])?),
    }
}

fn parquet(options: &Convert) -> ParquetSink {
    let default = ParquetSink::default();
    ParquetSink {
        compression: options.compression.map_or(default.compression, Into::into),
        row_group_rows: options.row_group_rows.unwrap_or(default.row_group_rows),
    }
}

fn write(dataset: &Dataset, options: &Convert) -> anyhow::Result<Written> {
    let to = &options.output;
    let how = WriteOptions::default()
        .with_rows_per_file(options.rows_per_file)
        .with_overwrite(options.overwrite)
        .with_partition_by(&options.partition_by);
    let is_tuned = options.compression.is_some() || options.row_group_rows.is_some();
    if is_tuned && options.format != Format::Parquet {
        bail!("--compression and --row-group-rows are for Parquet; leave them out, or --format");
    }
    Ok(match options.format {
        Format::Parquet => dataset.write(to, parquet(options), how)?,
        Format::Csv => dataset.write(to, CsvSink::default(), how)?,
        Format::Jsonl => dataset.write(to, JsonSink::default(), how)?,
        Format::Arrow => dataset.write(to, IpcSink::default(), how)?,
    })
}
