//! What a dataset will do, as text.

use crate::Dataset;
use crate::dataset::{Op, fold_blocks};
use crate::error::{Error, Result};
use crate::plan::Compiled;
use crate::query::{bare, frame};
use crate::runtime::block_on;
use crate::session::Mode;
use crate::split::Side;
use crate::{stage, tables};
use datafusion::physical_plan::displayable;
use datafusion::prelude::DataFrame;
use std::fmt::Write;
use std::time::Instant;

impl Dataset {
    /// What is done to the rows, the last step first, down to where they come from. Below each query
    /// and each chain of operations is what the engine makes of it: the logical plan, the same
    /// optimised, and the physical plan. Reads no more than finding out the columns takes.
    pub fn explain(&self) -> Result<String> {
        let mut text = String::new();
        self.explain_into(&mut text, 0)?;
        Ok(text)
    }

    /// Computes all rows, and says what that took: a line a stage (see [`stages`](crate::stages)), also of
    /// those before it that were run for it, and the physical plan with the rows and the time of each of
    /// its parts.
    pub fn explain_analyze(&self) -> Result<String> {
        let begun = Instant::now();
        let compiled = self.compile()?;
        fold_blocks(compiled.clone(), |_, _| Ok(()), (), |(), ()| ())?;
        let mut text = String::new();
        for stage in stage::since(begun) {
            line(&mut text, 0, &stage.to_string());
        }
        line(&mut text, 0, "physical plan:");
        lines(&mut text, 1, compiled.metrics().trim_end());
        Ok(text)
    }

    fn explain_into(&self, text: &mut String, depth: usize) -> Result<()> {
        for op in self.ops().iter().rev() {
            line(text, depth, &op.to_string());
        }
        if !self.ops().is_empty() {
            let plans = Compiled::explain(self)?;
            lines(text, depth + 2, &plans);
        }
        let source = self.source();
        let mut title = format!("source {}", source.typetag_name());
        if !source.summary().is_empty() {
            let _ = write!(title, ": {}", source.summary());
        }
        if let Some(opened) = self.opened() {
            let rows: u64 = opened.blocks().iter().map(|block| block.rows).sum();
            let _ = write!(title, " ({} blocks, {rows} rows)", opened.blocks().len());
        }
        line(text, depth, &title);
        if let Some(plans) = source.plans()? {
            lines(text, depth + 2, &plans);
        }
        for (name, input) in source.inputs() {
            line(text, depth + 1, &format!("{name}:"));
            input.explain_into(text, depth + 2)?;
        }
        Ok(())
    }
}

fn line(text: &mut String, depth: usize, line: &str) {
    let _ = writeln!(text, "{:1$}{line}", "", depth * 2);
}

fn lines(text: &mut String, depth: usize, lines: &str) {
    lines.lines().for_each(|of| line(text, depth, of));
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Select { columns } => write!(f, "select {}", columns.join(", ")),
            Self::Filter { predicate } => write!(f, "filter {predicate}"),
            Self::WithColumn { name, expression } => write!(f, "with_column {name} = {expression}"),
            Self::Rename { from, to } => write!(f, "rename {from} to {to}"),
            Self::Split(split) => {
                let (side, test) = match split.side {
                    Side::Train => ("train", 1.0 - split.test_fraction),
                    Side::Test => ("test", split.test_fraction),
                };
                write!(f, "split {side}: a share of {test} by seed {}", split.seed)
            }
            Self::Preprocess(preprocessor) => write!(f, "preprocess {}", preprocessor.kind()),
            Self::Resample(by) => write!(f, "resample {} copies by seed {}", by.copies, by.seed),
            Self::DrawKeys(_) => f.write_str("draw keys"),
            Self::RowKeys(_) => f.write_str("name rows"),
            Self::MapBatches { function } => write!(f, "map_batches {function:?}"),
        }
    }
}

/// The engine's plans of a frame.
pub(crate) async fn plans(frame: DataFrame) -> Result<String> {
    let failed = Error::engine("explain");
    let logical = frame.logical_plan().display_indent().to_string();
    let optimized = frame.clone().into_optimized_plan().map_err(&failed)?;
    let physical = frame.create_physical_plan().await.map_err(&failed)?;
    let physical = displayable(physical.as_ref()).indent(false).to_string();
    let (optimized, physical) = (optimized.display_indent().to_string(), physical);
    let mut text = String::new();
    for (title, plan) in [("logical", logical), ("optimized", optimized), ("physical", physical)] {
        line(&mut text, 0, &format!("{title} plan:"));
        // The engine's name for what has none.
        lines(&mut text, 1, &plan.trim_end().replace("?table?", "blocks"));
    }
    Ok(text)
}

/// The engine's plans of a query: as it runs, if it is known how many rows there are.
pub(crate) fn query_plans(inputs: &[(String, Dataset)], query: &str) -> Result<String> {
    let is_known = inputs.iter().all(|(_, input)| input.opened().is_some());
    let (inputs, query) = (bare(inputs), query.to_owned());
    let mode = if is_known { tables::mode(&inputs)? } else { Mode::HashJoin(1) };
    let tables = if is_known { tables::all(&inputs, mode)? } else { tables::empty(&inputs)? };
    block_on(async move { plans(frame(tables, &query, mode).await?).await })
}
