//! From what the user typed to a sorted list of absolute paths.

use crate::error::{Error, Result};
use crate::remote;
use glob::MatchOptions;
use mobula_core::error::AtPath;
use std::path::{Path, PathBuf};

/// The files of a pattern: a path, a folder (its `*.extension` files) or a glob such as
/// `data/part-*.parquet`; or URLs of the same. Sorted, absolute, at least one.
pub(crate) fn expand(pattern: &str, extension: &str) -> Result<Vec<PathBuf>> {
    expand_in(pattern, &format!("*.{extension}"))
}

/// The same with a pattern for the files of a folder, such as `**/*`.
pub(crate) fn expand_in(pattern: &str, in_folder: &str) -> Result<Vec<PathBuf>> {
    if remote::is_url(Path::new(pattern)) {
        return remote::expand(Path::new(pattern), in_folder);
    }
    let mut path = absolute(pattern)?;
    if path.is_file() {
        return Ok(vec![path]);
    }
    let is_folder = path.is_dir();
    if is_folder {
        // Whatever is in its own name is no pattern.
        path = glob::Pattern::escape(&path.to_string_lossy()).into();
        path.push(in_folder);
    }
    // A folder's files are known by their endings, in whatever case.
    let files = matching(&path, !is_folder)?;
    if files.is_empty() { Err(Error::NoFiles { pattern: path }) } else { Ok(files) }
}

/// The images of a pattern; of a folder, those with an image's extension, at any depth.
pub(crate) fn expand_images(pattern: &str) -> Result<Vec<PathBuf>> {
    let files = expand_in(pattern, "**/*")?;
    let pattern = absolute(pattern)?;
    // What is named itself is taken as it is.
    if !pattern.is_dir() && !remote::is_folder(&pattern, &files)? {
        return Ok(files);
    }
    let is_image = |path: &PathBuf| {
        let extension = path.extension().map(|extension| extension.to_ascii_lowercase());
        extension.is_some_and(|extension| ["jpeg", "jpg", "png"].iter().any(|e| *e == extension))
    };
    let files: Vec<_> = files.into_iter().filter(is_image).collect();
    let pattern = pattern.join("**/*.{jpeg,jpg,png}");
    if files.is_empty() { Err(Error::NoFiles { pattern }) } else { Ok(files) }
}

/// A path that must be a file, made absolute.
pub(crate) fn existing(path: &Path) -> Result<PathBuf> {
    let path = absolute(path)?;
    if remote::is_url(&path) || path.is_file() {
        Ok(path)
    } else {
        Err(Error::NoFiles { pattern: path })
    }
}

fn absolute(path: impl AsRef<Path>) -> Result<PathBuf> {
    if remote::is_url(path.as_ref()) {
        return Ok(path.as_ref().to_owned());
    }
    Ok(std::path::absolute(&path).at("resolve", &path)?)
}

fn matching(pattern: &Path, case_sensitive: bool) -> Result<Vec<PathBuf>> {
    let invalid = |reason: String| Error::InvalidOption {
        option: "the file pattern",
        expected: "a path with the wildcards *, ? and [...]".to_owned(),
        got: format!("{:?}: {reason}", pattern.display()),
    };
    let text = pattern.to_str().ok_or_else(|| invalid("not UTF-8".to_owned()))?;
    // A folder that is being written is hidden until it is whole.
    let visible = MatchOptions {
        case_sensitive,
        require_literal_leading_dot: true,
        require_literal_separator: false,
    };
    let paths = glob::glob_with(text, visible).map_err(|error| invalid(error.msg.to_owned()))?;
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

/// The first of the files, and how many there are.
pub(crate) fn listed(files: &[PathBuf]) -> String {
    let first = files.first().map(|path| path.display().to_string()).unwrap_or_default();
    match files.len() {
        0 | 1 => first,
        n => format!("{n} files from {first} on"),
    }
}
