//! Small rules about files that no other tool checks.

use crate::command;
use anyhow::{Result, bail};
use std::path::Path;
use std::process::Command;

/// Text that must not stand in Rust code, where it may stand, and what to do instead.
// Written in halves, so that this file obeys its own rules.
const FORBIDDEN: &[(&str, Allowed, &str)] = &[
    (
        concat!("todo", "!("),
        Allowed::InTests,
        "write it, or return an error that says what is missing",
    ),
    (concat!("unimplemented", "!("), Allowed::InTests, "return an error that says what is missing"),
    (concat!("dbg", "!("), Allowed::Nowhere, "use tracing"),
    (
        concat!("#[", "ignore"),
        Allowed::Nowhere,
        "a test that does not run guards nothing: repair or delete it",
    ),
];

#[derive(Clone, Copy, PartialEq)]
enum Allowed {
    Nowhere,
    InTests,
}

pub(crate) fn check() -> Result<String> {
    let root = command::root();
    let files = tracked(&root)?;
    let mut complaints = Vec::new();
    for file in &files {
        // A tracked file may be deleted in the working tree, or be no text.
        let Ok(text) = std::fs::read_to_string(root.join(file)) else {
            continue;
        };
        complaints.extend(complaints_about(file, &text, &|link| root.join(link).exists()));
    }
    if !complaints.is_empty() {
        bail!("{}", complaints.join("\n"));
    }
    Ok(format!("{} files", files.len()))
}

/// The files of the repository, new ones included.
fn tracked(root: &Path) -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "--cached", "--others", "--exclude-standard"]);
    Ok(command::output(git)?.lines().map(String::from).collect())
}

fn complaints_about(file: &str, text: &str, exists: &dyn Fn(&Path) -> bool) -> Vec<String> {
    match file.rsplit_once('.') {
        Some((_, "rs")) => rust(file, text),
        Some((_, "md")) => markdown(file, text, exists),
        _ if file == "Cargo.toml" || file.ends_with("/Cargo.toml") => manifest(file, text),
        _ => Vec::new(),
    }
}

fn rust(file: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    if file.ends_with("lib.rs") && !text.starts_with("//!") {
        complaints.push(format!(
            "{file}:1: start with `//!`: what the crate is, how to use it, what it will not do"
        ));
    }
    let mut in_tests = file.contains("tests");
    for (number, line) in text.lines().enumerate() {
        in_tests |= line.trim() == "#[cfg(test)]";
        for (word, allowed, instead) in FORBIDDEN {
            if line.contains(word) && !(in_tests && *allowed == Allowed::InTests) {
                complaints.push(format!("{file}:{}: `{word}…`: {instead}", number + 1));
            }
        }
    }
    complaints
}

/// Every relative link must lead to a file.
fn markdown(file: &str, text: &str, exists: &dyn Fn(&Path) -> bool) -> Vec<String> {
    let folder = Path::new(file).parent().unwrap_or(Path::new(""));
    let mut complaints = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for link in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if !target.is_empty() && !target.contains(':') && !exists(&folder.join(target)) {
                complaints
                    .push(format!("{file}:{}: the link to {target} leads nowhere", number + 1));
            }
        }
    }
    complaints
}

/// Every package obeys the lints of the workspace.
fn manifest(file: &str, text: &str) -> Vec<String> {
    let inherits = text.contains("[lints]\nworkspace = true");
    let complaint = format!("{file}: add `[lints]` with `workspace = true`");
    if inherits { Vec::new() } else { vec![complaint] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(file: &str, text: &str) -> Vec<String> {
        complaints_about(file, text, &|link| link == Path::new("docs/here.md"))
    }

    #[test]
    fn unfinished_code_is_found_outside_of_tests_only() {
        for (word, allowed, _) in FORBIDDEN {
            let bad = format!("fn f() {{\n    {word})\n}}");
            assert!(
                complaints("core/src/a.rs", &bad)[0].starts_with("core/src/a.rs:2: "),
                "{word}"
            );
            let in_test = usize::from(*allowed == Allowed::Nowhere);
            assert_eq!(complaints("core/tests/it.rs", &bad).len(), in_test, "{word}");
            let inline = format!("#[cfg(test)]\nmod tests {{ {word}) }}");
            assert_eq!(complaints("core/src/a.rs", &inline).len(), in_test, "{word}");
        }
    }

    #[test]
    fn libraries_start_with_what_they_are() {
        assert_eq!(complaints("nn/src/lib.rs", "//! Layers.\n"), Vec::<String>::new());
        assert_eq!(complaints("nn/src/lib.rs", "mod a;\n//! Layers.\n").len(), 1);
    }

    #[test]
    fn relative_links_lead_somewhere() {
        let good = "[a](here.md#part), [b](https://example.org/x), [c](#below)";
        assert_eq!(complaints("docs/a.md", good), Vec::<String>::new());
        assert_eq!(
            complaints("docs/a.md", "x\n[a](gone.md)"),
            ["docs/a.md:2: the link to gone.md leads nowhere"]
        );
    }

    #[test]
    fn packages_inherit_the_lints() {
        assert_eq!(
            complaints("nn/Cargo.toml", "[lints]\nworkspace = true\n"),
            Vec::<String>::new()
        );
        assert_eq!(complaints("nn/Cargo.toml", "[package]\n").len(), 1);
    }
}
