//! Prints results of any length: rows of a table or JSON objects, some at a time.

use crate::cli::output::{heard, plain, text_of};
use mobula_core::Flow;
use serde_json::Value;
use std::io::{BufWriter, StdoutLock, Write};

/// Rows that are put in columns together.
const TOGETHER: usize = 4096;

/// Prints rows some at a time: as text there may be more than fit into memory.
pub(crate) struct Printer {
    out: BufWriter<StdoutLock<'static>>,
    header: Option<Vec<String>>,
    /// Rows that are not printed yet.
    pending: Vec<Vec<String>>,
    /// What the columns of a table have needed so far.
    widths: Vec<u16>,
    /// Whether a JSON array has begun, and whether it has objects.
    array: Option<bool>,
}

impl Printer {
    fn new(header: Option<Vec<String>>, array: Option<bool>) -> Self {
        let out = BufWriter::new(std::io::stdout().lock());
        Self { out, header, pending: Vec::new(), widths: Vec::new(), array }
    }

    /// A table whose columns are as wide as the rows so far need.
    pub(crate) fn table(header: Vec<String>) -> Self {
        Self::new(Some(header), None)
    }

    /// A JSON array.
    pub(crate) fn json() -> Self {
        Self::new(None, Some(false))
    }

    /// Prints some rows of the table, soon. The reader may have had enough.
    pub(crate) fn rows(&mut self, rows: Vec<Vec<String>>) -> anyhow::Result<Flow> {
        self.pending.extend(rows);
        if self.pending.len() < TOGETHER { Ok(Flow::Continue) } else { self.print_pending() }
    }

    fn print_pending(&mut self) -> anyhow::Result<Flow> {
        let mut table = plain(std::mem::take(&mut self.pending));
        if let Some(header) = self.header.take() {
            table.set_header(header);
        }
        let text = text_of(&mut table, &self.widths);
        self.widths.resize(table.column_count(), 0);
        let needed = self.widths.iter_mut().zip(table.column_max_content_widths());
        needed.for_each(|(width, needed)| *width = needed.max(*width));
        self.write(&format!("{text}\n"))
    }

    /// Prints some objects of the array.
    pub(crate) fn objects(&mut self, objects: Value) -> anyhow::Result<Flow> {
        let Value::Array(objects) = objects else { return Ok(Flow::Continue) };
        for object in objects {
            let before = if self.array.replace(true) == Some(true) { ",\n  " } else { "[\n  " };
            let object = serde_json::to_string_pretty(&object)?.replace('\n', "\n  ");
            if self.write(&format!("{before}{object}"))?.is_stop() {
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::Continue)
    }

    /// What is still to be printed.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        let printed = match self.array {
            Some(true) => self.write("\n]\n")?,
            Some(false) => self.write("[]\n")?,
            None if self.pending.is_empty() && self.header.is_none() => Flow::Continue,
            None => self.print_pending()?,
        };
        if printed.is_stop() { Ok(()) } else { heard(self.out.flush()).map(drop) }
    }

    fn write(&mut self, text: &str) -> anyhow::Result<Flow> {
        heard(self.out.write_all(text.as_bytes()))
    }
}
