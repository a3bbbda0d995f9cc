//! What the command prints: text and tables on stdout, one line for an error.

use bytesize::ByteSize;
use comfy_table::{ColumnConstraint, Table, Width, presets};
use mobula_core::Flow;
use mobula_core::error::chain;
use serde::Serialize;
use std::io::{ErrorKind, Write};

/// Prints `text` and a newline, if anybody reads it.
pub(crate) fn print(text: impl AsRef<str>) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    heard(writeln!(stdout, "{}", text.as_ref()).and_then(|()| stdout.flush())).map(drop)
}

/// Prints `value` as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(serde_json::to_string_pretty(value)?)
}

/// A table without lines; columns are two spaces apart.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    lines(header.map(str::to_owned).to_vec(), rows.into_iter().map(Vec::from))
}

/// The same with any number of columns.
pub(crate) fn lines(header: Vec<String>, rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = plain(rows);
    table.set_header(header);
    text_of(&mut table, &[])
}

pub(super) fn plain(rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.add_rows(rows);
    table
}

/// Columns are at least as wide as these.
pub(super) fn text_of(table: &mut Table, widths: &[u16]) -> String {
    let needed = table.column_max_content_widths();
    for column in table.column_iter_mut() {
        column.set_padding((0, GAP));
        // Beside a constraint a table adds the gap to what it needs, and knows no larger numbers.
        if let (Some(least), Some(needed)) = (widths.get(column.index), needed.get(column.index))
            && least.max(needed).checked_add(GAP).is_some()
        {
            let least = Width::Fixed(least + GAP);
            column.set_constraint(ColumnConstraint::LowerBoundary(least));
        }
    }
    let lines = table.to_string();
    lines.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// Between columns.
const GAP: u16 = 2;

/// Whether a reader is still there: that it has gone, as `head` has after its lines, is no error.
pub(super) fn heard(printed: std::io::Result<()>) -> anyhow::Result<Flow> {
    match printed {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Flow::Stop),
        printed => Ok(printed.map(|()| Flow::Continue)?),
    }
}

/// `1.5 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// An error with its causes on one line. Parsers draw their errors on several.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let chain = chain(error.as_ref());
    let lines = chain.lines().map(str::trim);
    let said = lines.filter(|line| !line.is_empty() && !line.starts_with('|'));
    said.fold(String::new(), |text, line| match text.chars().last() {
        None => line.to_owned(),
        Some(':' | ',' | ';') => format!("{text} {line}"),
        Some(_) => format!("{text}; {line}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_at_a_glance() {
        let check = |n, expected: &str| assert_eq!(bytes(n), expected);
        check(0, "0 B");
        check(1023, "1023 B");
        check(1536, "1.5 KiB");
        check(64 << 20, "64.0 MiB");
        check(u64::MAX, "16.0 EiB");
    }

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        let error = anyhow::anyhow!("on line 3:\n\n  no such field").context("bad file");
        assert_eq!(one_line(&error), "bad file: on line 3: no such field");
        let drawn = anyhow::anyhow!("TOML error at line 2\n  |\n2 | x =\n  |    ^\nno value");
        assert_eq!(one_line(&drawn), "TOML error at line 2; 2 | x =; no value");
    }
}
