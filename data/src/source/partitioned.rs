//! Files in folders named `column=value`: the folders' columns beside those of the files.

use super::{BatchIter, Blocks, Source, hash, paths};
use crate::Dataset;
use crate::error::{Error, Result};
use crate::hive;
use crate::remote;
use arrow::array::{Array, ArrayRef, Int64Array, RecordBatchOptions, StringArray, UInt64Array};
use arrow::compute::take;
use arrow::datatypes::{Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use mobula_core::error::AtPath;
use serde::{Deserialize, Serialize};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// The dataset that `source` makes of the files of a pattern, and of the names of the folders that
/// the pattern leaves open. Of a folder these are its `*.extension` files or, where it has folders
/// named `column=value`, those at any depth.
pub(crate) fn read<S: Source + 'static>(
    pattern: &str,
    extension: &str,
    source: impl FnOnce(Vec<PathBuf>) -> Result<S>,
) -> Result<Dataset> {
    let (files, folders): (Vec<_>, Vec<_>) = if remote::is_url(Path::new(pattern)) {
        expand_url(Path::new(pattern), extension)?.into_iter().unzip()
    } else {
        let (files, root) = expand(pattern, extension)?;
        let names = |file| folders(file, &root).map(str::to_owned).collect();
        let names = files.iter().map(|file: &PathBuf| names(file)).collect();
        (files, names)
    };
    let rows = folders.iter().map(|names| Row::of(names)).collect::<Result<Vec<_>>>()?;
    let columns = columns(&files, &rows)?;
    let source = source(files)?;
    if columns.is_empty() {
        return Dataset::from_source(source);
    }
    Dataset::from_source(Partitioned { files: Arc::new(source), columns })
}

/// The files, and the folder below which the pattern leaves open where they lie.
fn expand(pattern: &str, extension: &str) -> Result<(Vec<PathBuf>, PathBuf)> {
    let path = std::path::absolute(pattern).at("resolve", Path::new(pattern))?;
    if path.is_file() || (path.is_dir() && !has_partitions(&path)?) {
        let root = if path.is_file() { path.parent().unwrap_or(&path).to_owned() } else { path };
        return Ok((paths::expand(pattern, extension)?, root));
    }
    if !path.is_dir() {
        return Ok((paths::expand(pattern, extension)?, fixed(&path)));
    }
    let mut files = paths::expand_in(pattern, &format!("**/*.{extension}"))?;
    files.retain(|file| folders(file, &path).all(is_data));
    if files.is_empty() { Err(Error::NoFiles { pattern: path }) } else { Ok((files, path)) }
}

/// The same of an object store, by one look.
fn expand_url(url: &Path, extension: &str) -> Result<Vec<(PathBuf, Vec<String>)>> {
    let files = remote::expand(url, &format!("**/*.{extension}"))?;
    let is_folder = remote::is_folder(url, &files)?;
    let folders = |file: PathBuf| Ok((remote::folders_of(&file, url)?, file));
    let mut files = files.into_iter().map(folders).collect::<Result<Vec<_>>>()?;
    if is_folder {
        let is_partition = |name: &String| hive::parse(name).is_some();
        let has_partitions = files.iter().any(|(names, _)| names.iter().any(is_partition));
        files.retain(|(names, _)| match has_partitions {
            true => names.iter().all(|name| is_data(name)),
            false => names.is_empty(),
        });
    }
    match files.is_empty() {
        true => Err(Error::NoFiles { pattern: url.into() }),
        false => Ok(files.into_iter().map(|(names, file)| (file, names)).collect()),
    }
}

/// Whether a folder is not such as Spark's `_temporary` and Delta's `_delta_log`.
fn is_data(folder: &str) -> bool {
    !folder.starts_with('_') || folder.contains('=')
}

/// The part of a pattern in front of its first wildcard.
fn fixed(pattern: &Path) -> PathBuf {
    let is_fixed = |part: &Component<'_>| {
        !part.as_os_str().as_encoded_bytes().iter().any(|byte| b"*?[".contains(byte))
    };
    pattern.components().take_while(is_fixed).collect()
}

fn has_partitions(folder: &Path) -> Result<bool> {
    for entry in folder.read_dir().at("list", folder)? {
        let entry = entry.at("list", folder)?;
        let name = entry.file_name();
        let is_named = name.to_str().is_some_and(|name| hive::parse(name).is_some());
        if is_named && !name.as_encoded_bytes().starts_with(b".") && entry.path().is_dir() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The names of the folders between `root` and a file.
fn folders<'a>(file: &'a Path, root: &Path) -> impl Iterator<Item = &'a str> {
    let below = file.strip_prefix(root).ok().and_then(Path::parent);
    below.into_iter().flat_map(Path::components).filter_map(|part| part.as_os_str().to_str())
}

/// What the folders of a file say, the outermost first.
struct Row(Vec<(String, Option<String>)>);

impl Row {
    fn of(folders: &[String]) -> Result<Self> {
        let values: Vec<_> = folders.iter().filter_map(|name| hive::parse(name)).collect();
        for (at, (column, _)) in values.iter().enumerate() {
            if values[..at].iter().any(|(other, _)| other == column) {
                return Err(Error::ColumnTwice { column: column.clone() });
            }
        }
        Ok(Self(values))
    }

    fn names(&self) -> Vec<String> {
        self.0.iter().map(|(column, _)| column.clone()).collect()
    }

    fn value(&self, column: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == column)?.1.as_deref()
    }
}

/// The columns of the folders' names, with a value a file; an error if files differ in them.
fn columns(files: &[PathBuf], rows: &[Row]) -> Result<Vec<Column>> {
    let names = rows.first().map(Row::names).unwrap_or_default();
    for (file, row) in files.iter().zip(rows) {
        let got = row.names();
        if got.len() != names.len() || !names.iter().all(|name| got.contains(name)) {
            let (path, expected) = (file.clone(), names);
            return Err(Error::FoldersDiffer { path, expected, got });
        }
    }
    let column = |name: String| {
        let values = rows.iter().map(|row| row.value(&name).map(str::to_owned)).collect();
        Column { values, name }
    };
    Ok(names.into_iter().map(column).collect())
}

/// A column that has one value in all rows of a file.
#[derive(Debug, Serialize, Deserialize)]
struct Column {
    name: String,
    /// Of each file.
    values: Vec<Option<String>>,
}

impl Column {
    /// Whole numbers, if all are; text otherwise.
    fn array(&self) -> ArrayRef {
        let is_known = self.values.iter().any(Option::is_some);
        let number = |value: &Option<String>| value.as_deref().map(whole_number).transpose();
        match self.values.iter().map(number).collect::<Result<Vec<_>, _>>() {
            Ok(numbers) if is_known => Arc::new(Int64Array::from(numbers)),
            _ => Arc::new(self.values.iter().map(Option::as_deref).collect::<StringArray>()),
        }
    }
}

/// Zeros in front do no harm: months have them.
fn whole_number(text: &str) -> Result<i64, ()> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let are_digits = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if are_digits { text.parse().map_err(drop) } else { Err(()) }
}

/// Files, and what their folders say of each.
#[derive(Debug, Serialize, Deserialize)]
struct Partitioned {
    #[serde(with = "crate::shared")]
    files: Arc<dyn Source>,
    columns: Vec<Column>,
}

#[typetag::serde(name = "partitioned")]
impl Source for Partitioned {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        Ok(Arc::new(PartitionedBlocks::new(self.files.open()?, &self.columns)?))
    }

    fn summary(&self) -> String {
        let names: Vec<_> = self.columns.iter().map(|column| column.name.as_str()).collect();
        format!("{}, in folders by {}", self.files.summary(), names.join(", "))
    }
}

#[derive(Debug)]
struct PartitionedBlocks {
    files: Arc<dyn Blocks>,
    schema: SchemaRef,
    /// Columns of the files.
    own: usize,
    /// Those of the folders that the files do not have, a row a block.
    folders: RecordBatch,
}

impl PartitionedBlocks {
    fn new(files: Arc<dyn Blocks>, columns: &[Column]) -> Result<Self> {
        let own = files.schema();
        // What the files have themselves has its type there.
        let new = columns.iter().filter(|column| own.index_of(&column.name).is_err());
        let folders = values(&*files, new)?;
        let all = own.fields().iter().chain(folders.schema_ref().fields());
        let schema = Arc::new(Schema::new(all.cloned().collect::<Vec<_>>()));
        Ok(Self { files, schema, own: own.fields().len(), folders })
    }

    fn with_folders(
        &self,
        block: usize,
        projection: &[usize],
        read: impl FnOnce(&[usize]) -> Result<BatchIter>,
    ) -> Result<BatchIter> {
        let own: Vec<_> = projection.iter().copied().filter(|at| *at < self.own).collect();
        let batches = read(&own)?;
        let (own, folders) = (self.own, self.folders.slice(block, 1));
        let wanted = Wanted { own, folders, projection: projection.to_vec() };
        Ok(Box::new(batches.map(move |batch| wanted.of(&batch?))))
    }
}

/// The columns that are wanted of a block.
struct Wanted {
    own: usize,
    folders: RecordBatch,
    projection: Vec<usize>,
}

impl Wanted {
    /// Puts those of the folders between those of the file, which `batch` has.
    fn of(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let (rows, mut next) = (batch.num_rows(), 0);
        let (mut fields, mut columns) = (Vec::new(), Vec::new());
        for at in &self.projection {
            let (from, at) = match at.checked_sub(self.own) {
                Some(at) => (&self.folders, at),
                None => (batch, next),
            };
            let (field, column) = (from.schema_ref().fields()[at].clone(), from.column(at));
            let is_own = std::ptr::eq(from, batch);
            columns.push(if is_own { column.clone() } else { repeated(column, rows)? });
            fields.push(field);
            next += usize::from(is_own);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let schema = Arc::new(Schema::new(fields));
        Ok(RecordBatch::try_new_with_options(schema, columns, &options)?)
    }
}

/// A row for each block, with what its file has in these columns.
fn values<'a>(
    files: &dyn Blocks,
    columns: impl Iterator<Item = &'a Column>,
) -> Result<RecordBatch> {
    let blocks = files.rows().len();
    let of = (0..blocks).map(|block| files.file(block).map(|file| file as u64));
    let of = of.collect::<UInt64Array>();
    if of.null_count() > 0 {
        return Err(Error::Internal("a block does not know its file".to_owned()));
    }
    let (mut fields, mut values) = (Vec::new(), Vec::new());
    for column in columns {
        let array = column.array();
        fields.push(Field::new(&column.name, array.data_type().clone(), true));
        values.push(take(&array, &of, None)?);
    }
    let options = RecordBatchOptions::new().with_row_count(Some(blocks));
    Ok(RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), values, &options)?)
}

/// The only value of an array, so many times.
fn repeated(value: &ArrayRef, rows: usize) -> Result<ArrayRef> {
    Ok(take(value, &UInt64Array::from(vec![0; rows]), None)?)
}

impl Blocks for PartitionedBlocks {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.files.rows()
    }

    fn fingerprint(&self) -> Result<String> {
        let mut parts = vec![self.files.fingerprint()?];
        for (field, values) in self.folders.schema_ref().fields().iter().zip(self.folders.columns())
        {
            parts.push(field.to_string());
            let text = ArrayFormatter::try_new(values, &FormatOptions::new().with_null("/"))?;
            parts.extend((0..values.len()).map(|block| text.value(block).to_string()));
        }
        Ok(hash(parts.iter().map(String::as_bytes)))
    }

    fn waits(&self) -> bool {
        self.files.waits()
    }

    fn name(&self, block: usize) -> String {
        self.files.name(block)
    }

    fn file(&self, block: usize) -> Option<usize> {
        self.files.file(block)
    }

    fn constants(&self) -> Option<&RecordBatch> {
        Some(&self.folders)
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        self.with_folders(block, projection, |own| self.files.read(block, own))
    }

    fn read_narrow(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        self.with_folders(block, projection, |own| self.files.read_narrow(block, own))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_what_they_look_like() {
        let number = |text| whole_number(text).ok();
        assert_eq!(["07", "-3", "0"].map(number), [Some(7), Some(-3), Some(0)]);
        assert_eq!(["", "-", "+1", "1.0", "1e3", "9223372036854775808"].map(number), [None; 6]);
    }

    #[test]
    fn a_pattern_is_fixed_up_to_its_first_wildcard() {
        assert_eq!(fixed(Path::new("/a/b=1/c=*/d.csv")), Path::new("/a/b=1"));
        assert_eq!(fixed(Path::new("/a/b/**")), Path::new("/a/b"));
    }
}
