//! Words for a shell.

use anyhow::{Context, ensure};
use std::ffi::OsStr;

/// Joins words so that a POSIX shell takes them apart again as they were.
pub(super) fn join(words: &[impl AsRef<OsStr>]) -> anyhow::Result<String> {
    let words = words.iter().map(|word| quote(word.as_ref()));
    Ok(words.collect::<anyhow::Result<Vec<_>>>()?.join(" "))
}

/// One word.
pub(super) fn quote(word: &OsStr) -> anyhow::Result<String> {
    let word = word.to_str().with_context(|| format!("{} is not UTF-8", word.display()))?;
    ensure!(!word.contains('\0'), "{word:?} has a NUL in it, which no argument can have");
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return Ok(word.to_owned());
    }
    Ok(format!("'{}'", word.replace('\'', r"'\''")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn plain_words_stay_plain() {
        assert_eq!(
            join(&["./program", "--lr=0.1", "a b", ""]).expect("words"),
            "./program --lr=0.1 'a b' ''"
        );
    }

    #[test]
    fn a_shell_reads_them_as_they_were() {
        let words = [
            "",
            " ",
            "a b",
            "it's",
            "''",
            "\"",
            "$HOME",
            "`id`",
            "\\",
            "a\\'b",
            "*",
            "~",
            "#x",
            "-n",
            "a\nb",
            "!!",
            "{a,b}",
            "ä€🐠",
            "x=1",
            "&",
            ";",
            "(",
            "\t",
            "--",
            "a=~",
        ];
        for shell in ["sh", "bash"] {
            let script = format!("printf '%s\\0' {}", join(&words).expect("words"));
            let output = Command::new(shell).args(["-c", &script]).output().expect("a shell");
            let text = String::from_utf8(output.stdout).expect("UTF-8");
            let read: Vec<_> = text.split_terminator('\0').collect();
            assert_eq!(read, words, "{shell}");
        }
    }
}
