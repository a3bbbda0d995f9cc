//! From what the user typed to a sorted list of absolute paths.

use crate::error::{Error, Result};
use mobula_core::error::AtPath;
use std::path::{Path, PathBuf};

/// The files of a pattern: a path, a folder (its `*.extension` files) or a glob such as
/// `data/part-*.parquet`. Sorted, absolute, at least one.
pub(crate) fn expand(pattern: &str, extension: &str) -> Result<Vec<PathBuf>> {
    let mut path = absolute(pattern)?;
    if path.is_file() {
        return Ok(vec![path]);
    }
    if path.is_dir() {
        path.push(format!("*.{extension}"));
    }
    let files = matching(&path)?;
    if files.is_empty() { Err(Error::NoFiles { pattern: path }) } else { Ok(files) }
}

/// A path that must be a file, made absolute.
pub(crate) fn existing(path: &Path) -> Result<PathBuf> {
    let path = absolute(path)?;
    if path.is_file() { Ok(path) } else { Err(Error::NoFiles { pattern: path }) }
}

fn absolute(path: impl AsRef<Path>) -> Result<PathBuf> {
    Ok(std::path::absolute(&path).at("resolve", &path)?)
}

fn matching(pattern: &Path) -> Result<Vec<PathBuf>> {
    let invalid = |reason: String| Error::InvalidOption {
        option: "the file pattern",
        expected: "a path with the wildcards *, ? and [...]".to_owned(),
        got: format!("{:?}: {reason}", pattern.display()),
    };
    let text = pattern.to_str().ok_or_else(|| invalid("not UTF-8".to_owned()))?;
    let paths = glob::glob(text).map_err(|error| invalid(error.msg.to_owned()))?;
    // `glob` yields paths in alphabetical order.
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(std::io::Error::from).at("list", pattern)?;
        if path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}
