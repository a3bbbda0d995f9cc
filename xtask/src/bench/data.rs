//! Layer `data`: from Parquet to batches of tensors, ours against the readers of Python.
//!
//! The data are the rows of TPC-H's `lineitem` at scale factor 1, which `tpchgen-cli` writes: six
//! million, in 53 row groups, of which four decimal columns are read. Peers that pick row by row have the
//! tenth of them that there is at scale factor 0.1. A side answers each line that it reads:
//!
//! * `epoch COLUMNS ORDER RANKS` reads all rows, in batches of 8192 × columns of `f32`, `in-order` or
//!   `shuffled`, on so many ranks at once: `{"seconds": s, "cpu": s, "rows": n, "peak": bytes}`;
//! * `check …`, the same, with the `"sum"` of all values;
//! * `first COLUMNS ORDER` is from the name of the file to the first batch: `{"seconds": s, "rows": n}`;
//! * `query N` runs the Nth query of TPC-H over all its tables, and `plain N` the same in the query engine
//!   that ours is made of, as it comes: `{"seconds": s, "cpu": s, "rows": n, "sum": of all numbers}`;
//! * `large WORK` sorts, shuffles or groups all columns within a budget of memory that the process was
//!   started with: the same with the `"peak"`;
//! * `images FOLDER` is an epoch of Fashion-MNIST, cropped, mirrored and normalised at random;
//! * `features` writes 20 columns with missing values, and `prepare` fits a chain of preprocessors on
//!   them and applies it;
//! * `resume COLUMNS ORDER SHARE` is from a state at that share of the epoch to the next batch.

use super::worker::Worker;
use super::{Case, build_of, case, median, peers};
use crate::command;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Command;

const COLUMNS: &str = "l_quantity,l_extendedprice,l_discount,l_tax";
/// The rows at scale factors 1 and 0.1. The latter are even: none is padding for a second rank.
const ROWS: [(&str, u64); 2] = [("1", 6_001_215), ("0.1", 600_572)];
/// By how much the sums of the sides may differ: they add in different orders.
const SAME: f64 = 1e-9;

/// The same of answers to queries, in which sums of decimals are divided.
const SAME_ANSWER: f64 = 1e-6;
/// Where Debian's package of Fashion-MNIST puts it.
const IMAGES: &str = "/usr/share/datasets/fashion-mnist";

/// Peers that read all rows in order.
const READERS: &[&str] = &["duckdb", "pyarrow", "polars", "datasets", "torch", "ray"];
/// Peers that shuffle over two ranks.
const SHUFFLERS: &[&str] = &["datasets", "ray"];
/// Those that pick row by row, and would take minutes.
const PICKERS: &[&str] = &["mosaic", "torch+datasets"];

#[derive(Debug, Deserialize)]
struct Pass {
    seconds: f64,
    /// Missing where the work is done by processes that cannot be asked.
    cpu: Option<f64>,
    rows: u64,
    sum: Option<f64>,
    peak: Option<f64>,
}

struct Sides {
    ours: PathBuf,
    file: PathBuf,
    rows: u64,
    folder: PathBuf,
    rounds: usize,
}

pub(super) fn run(quick: bool, only: &str) -> Result<Vec<Case>> {
    let folder = command::root().join("bench");
    let ours = build_of("mobula-bench-data", "bench-data")?;
    let rounds = if quick { 3 } else { 9 };
    let at_scale = |(scale, rows)| -> Result<Sides> {
        let (ours, folder) = (ours.clone(), folder.clone());
        Ok(Sides { file: lineitem(&folder, scale)?, ours, rows, folder, rounds })
    };
    let sides = at_scale(ROWS[0])?;
    let mut cases = Vec::new();
    let is_wanted = |name: &str| name.contains(only);
    if is_wanted("in order") {
        cases.extend(sides.passes("in order", &format!("{COLUMNS} in-order 1"), READERS)?);
    }
    if is_wanted("shuffled") {
        let request = format!("{COLUMNS} shuffled 2");
        cases.extend(sides.passes("shuffled, 2 ranks", &request, SHUFFLERS)?);
        let name = "a tenth shuffled, 2 ranks";
        cases.extend(at_scale(ROWS[1])?.passes(name, &request, PICKERS)?);
    }
    if is_wanted("first batch") {
        cases.extend(sides.first("in-order", READERS)?);
        cases.extend(sides.first("shuffled", &["datasets", "ray"])?);
    }
    if is_wanted("resume") {
        cases.extend(sides.resume()?);
    }
    if is_wanted("TPC-H") {
        cases.extend(sides.queries()?);
    }
    if is_wanted("beyond memory") {
        // DuckDB has too little for a sort with a tenth of the data, and enough with a fifth.
        for (budget, share) in [(100_000_000, "a tenth"), (200_000_000, "a fifth")] {
            for work in ["sort", "group", "join", "shuffle"] {
                let has_peer = share == "a fifth" && work != "shuffle";
                cases.extend(sides.large(work, budget, share, has_peer)?);
            }
        }
    }
    if is_wanted("images") {
        cases.extend(sides.images()?);
    }
    if is_wanted("preprocessors") {
        cases.extend(sides.preprocessors()?);
    }
    Ok(cases)
}

/// The file at a scale factor, written when it is not there.
fn lineitem(bench: &Path, scale: &str) -> Result<PathBuf> {
    let folder = peers::cache()?.join(format!("tpch-sf{scale}"));
    let file = folder.join("lineitem.parquet");
    if !file.exists() || !folder.join("supplier.parquet").exists() {
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("creating {}", folder.display()))?;
        let python = peers::python(&bench.join("data/requirements.txt"))?;
        let mut generate = Command::new(python.with_file_name("tpchgen-cli"));
        generate.args(["parquet", "-s", scale, "-o"]).arg(&folder);
        command::run(generate)?;
    }
    Ok(file)
}

impl Sides {
    fn ours(&self) -> Result<Worker> {
        let mut command = Command::new(&self.ours);
        command.arg(&self.file);
        Worker::start(command)
    }

    fn peer(&self, library: &str) -> Result<Worker> {
        let python = peers::python(&self.folder.join("data/requirements.txt"))?;
        let mut command = Command::new(&python);
        command.arg(self.folder.join("data/peer.py")).arg(library).arg(&self.file);
        let others: &[&str] = match library {
            "torch" | "torch+datasets" => &["nn"],
            "ray" => &["core", "nn"],
            "mosaic" => &["data/streaming", "nn"],
            _ => &[],
        };
        let packages = others.iter().map(|other| {
            let list = self.folder.join(other).join("requirements.txt");
            packages(&peers::python(&list)?)
        });
        let packages = packages.collect::<Result<Vec<_>>>()?;
        if !packages.is_empty() {
            command.env("PYTHONPATH", packages.join(":"));
        }
        Worker::start(command)
    }

    /// Whole epochs: the time, the CPU time and the memory, against each of the peers.
    fn passes(&self, name: &str, request: &str, libraries: &[&str]) -> Result<Vec<Case>> {
        let mut sides = vec![self.ours()?];
        for library in libraries {
            sides.push(self.peer(library)?);
        }
        let check = format!("check {request}");
        let sums = sides.iter_mut().map(|side| side.ask(&check)).collect::<Result<Vec<Pass>>>()?;
        for (side, pass) in sides.iter().zip(&sums) {
            let (first, sum) = (sums[0].sum.context("a sum")?, pass.sum.context("a sum")?);
            let rows = self.rows;
            ensure!(pass.rows == rows, "{}: {} rows, expected {rows}", side.name, pass.rows);
            ensure!(
                (sum / first - 1.0).abs() < SAME,
                "{}: the values add up to {sum}, those of ours to {first}",
                side.name
            );
        }
        let mut passes: Vec<Vec<Pass>> = sides.iter().map(|_| Vec::new()).collect();
        for _ in 0..self.rounds {
            for (side, passes) in sides.iter_mut().zip(&mut passes) {
                passes.push(side.ask(&format!("epoch {request}"))?);
            }
        }
        let names: Vec<&str> = sides.iter().map(|side| side.name.as_str()).collect();
        let mut cases = Vec::new();
        type Figure = fn(&Pass) -> Option<f64>;
        let figures: [(&str, &'static str, Figure); 3] = [
            ("wall", "s", |pass| Some(pass.seconds)),
            ("CPU", "s", |pass| pass.cpu),
            ("peak memory", "MiB", |pass| pass.peak.map(|bytes| bytes / 1048576.0)),
        ];
        for (what, unit, figure) in figures {
            let of = |passes: &[Pass]| {
                let values: Option<Vec<f64>> = passes.iter().map(figure).collect();
                values.map(|values| median(&values))
            };
            let ours = of(&passes[0]).context("ours tells all")?;
            for (name_of, passes) in names.iter().zip(&passes).skip(1) {
                let Some(theirs) = of(passes) else { continue };
                let theirs = Some((theirs, (*name_of).to_owned()));
                cases.push(case(format!("Parquet {name}, {what}"), unit, ours, theirs, false));
            }
        }
        Ok(cases)
    }

    /// The first batch of a new process, which has yet to load its library, and the next time.
    fn first(&self, order: &str, libraries: &[&str]) -> Result<Vec<Case>> {
        let ours = self.firsts(order, &|| self.ours())?;
        let mut cases = Vec::new();
        for library in libraries {
            let theirs = self.firsts(order, &|| self.peer(library))?;
            for (at, when) in ["of a process", "when loaded"].into_iter().enumerate() {
                let name = format!("first batch {when}, {order}");
                let theirs = Some((theirs[at], (*library).to_owned()));
                cases.push(case(name, "ms", ours[at], theirs, false));
            }
        }
        Ok(cases)
    }

    /// In milliseconds, the first time and the second.
    fn firsts(&self, order: &str, start: &dyn Fn() -> Result<Worker>) -> Result<[f64; 2]> {
        let request = format!("first {COLUMNS} {order}");
        let mut seconds = [Vec::new(), Vec::new()];
        for _ in 0..self.rounds.min(3) {
            let mut side = start()?;
            for seconds in &mut seconds {
                seconds.push(side.ask::<Pass>(&request)?.seconds);
            }
        }
        Ok(seconds.map(|seconds| median(&seconds) * 1e3))
    }

    /// All queries, one after another, against the engine as it comes and DuckDB.
    fn queries(&self) -> Result<Vec<Case>> {
        let mut ours = self.ours()?;
        let mut peer = self.peer("duckdb")?;
        let mut sums = [[0.0; 2]; 3];
        for number in 1..=22 {
            let mut seconds: [Vec<Pass>; 3] = Default::default();
            for _ in 0..self.rounds {
                seconds[0].push(ours.ask(&format!("query {number}"))?);
                seconds[1].push(ours.ask(&format!("plain {number}"))?);
                seconds[2].push(peer.ask(&format!("query {number}"))?);
            }
            let sum = |side: &[Pass]| side[0].sum.context("a sum");
            let first = sum(&seconds[0])?;
            for side in &seconds {
                let near = (sum(side)? - first).abs() <= first.abs() * SAME_ANSWER;
                let rows = (side[0].rows, seconds[0][0].rows);
                ensure!(
                    near && rows.0 == rows.1,
                    "query {number}: {} rows of sum {}, ours {} of {first}",
                    rows.0,
                    sum(side)?,
                    rows.1
                );
            }
            for (total, side) in sums.iter_mut().zip(&seconds) {
                let of =
                    |figure: fn(&Pass) -> f64| median(&side.iter().map(figure).collect::<Vec<_>>());
                total[0] += of(|pass| pass.seconds);
                total[1] += of(|pass| pass.cpu.unwrap_or(f64::NAN));
            }
        }
        let mut cases = Vec::new();
        for (at, what) in ["wall", "CPU"].into_iter().enumerate() {
            for (side, name) in [(1, "DataFusion"), (2, "duckdb")] {
                let peer = Some((sums[side][at], name.to_owned()));
                cases.push(case(
                    format!("22 TPC-H queries, {what}"),
                    "s",
                    sums[0][at],
                    peer,
                    false,
                ));
            }
        }
        Ok(cases)
    }

    /// All columns of all rows, with this much memory, a share of what they would take.
    fn large(&self, work: &str, budget: u64, share: &str, has_peer: bool) -> Result<Vec<Case>> {
        let (mut ours, mut theirs) = (Vec::<Pass>::new(), Vec::<Pass>::new());
        for _ in 0..self.rounds.min(3) {
            let mut command = Command::new(&self.ours);
            command.arg(&self.file).env("MOBULA_DATA_BYTES", budget.to_string());
            ours.push(Worker::start(command)?.ask(&format!("large {work}"))?);
            if has_peer {
                theirs.push(self.peer("duckdb")?.ask(&format!("large {work} {budget}"))?);
            }
        }
        if let Some(theirs) = theirs.first() {
            let (sum, peer) = (ours[0].sum.context("a sum")?, theirs.sum.context("a sum")?);
            ensure!(
                (sum / peer - 1.0).abs() < SAME && ours[0].rows == theirs.rows,
                "{work}: {} rows of sum {sum}, duckdb {} of {peer}",
                ours[0].rows,
                theirs.rows
            );
        }
        let mut cases = Vec::new();
        type Figure = fn(&Pass) -> f64;
        let figures: [(&str, &'static str, Figure); 3] = [
            ("wall", "s", |pass| pass.seconds),
            ("CPU", "s", |pass| pass.cpu.unwrap_or(f64::NAN)),
            ("peak memory", "MiB", |pass| pass.peak.unwrap_or(f64::NAN) / 1048576.0),
        ];
        for (what, unit, figure) in figures {
            let of = |side: &[Pass]| median(&side.iter().map(figure).collect::<Vec<_>>());
            let peer = has_peer.then(|| (of(&theirs), "duckdb".to_owned()));
            let name = format!("{work} beyond memory ({share}), {what}");
            cases.push(case(name, unit, of(&ours), peer, false));
        }
        Ok(cases)
    }

    /// An epoch of augmented images, if they are there.
    fn images(&self) -> Result<Vec<Case>> {
        if !Path::new(IMAGES).exists() {
            println!("no images: apt-get install dataset-fashion-mnist");
            return Ok(Vec::new());
        }
        let (mut ours, mut peer) = (self.ours()?, self.peer("torch")?);
        let mut seconds = [Vec::new(), Vec::new()];
        for _ in 0..self.rounds {
            for (side, seconds) in [&mut ours, &mut peer].into_iter().zip(&mut seconds) {
                let pass: Pass = side.ask(&format!("images {IMAGES}"))?;
                ensure!(pass.rows == 60_000, "{}: {} images", side.name, pass.rows);
                seconds.push(pass.seconds);
            }
        }
        let peer = Some((median(&seconds[1]), "torch, 2 workers".to_owned()));
        Ok(vec![case("60,000 augmented images".into(), "s", median(&seconds[0]), peer, false)])
    }

    /// Fit and apply, against scikit-learn.
    fn preprocessors(&self) -> Result<Vec<Case>> {
        let mut ours = self.ours()?;
        let _: Pass = ours.ask("features")?;
        let mut peer = self.peer("sklearn")?;
        let mut passes: [Vec<Pass>; 2] = Default::default();
        for _ in 0..self.rounds {
            passes[0].push(ours.ask("prepare")?);
            passes[1].push(peer.ask("prepare")?);
        }
        let sums = [&passes[0], &passes[1]].map(|side| side[0].sum.unwrap_or(f64::NAN));
        ensure!((sums[0] / sums[1] - 1.0).abs() < 1e-6, "the values add up to {sums:?}");
        let of = |side: &[Pass], figure: fn(&Pass) -> f64| {
            median(&side.iter().map(figure).collect::<Vec<_>>())
        };
        type Figure = fn(&Pass) -> f64;
        let figures: [(&str, Figure); 2] =
            [("wall", |pass| pass.seconds), ("CPU", |pass| pass.cpu.unwrap_or(f64::NAN))];
        let row = |(what, figure): (&str, Figure)| {
            let peer = Some((of(&passes[1], figure), "scikit-learn".to_owned()));
            let name = format!("preprocessors of 20 columns, {what}");
            case(name, "s", of(&passes[0], figure), peer, false)
        };
        Ok(figures.map(row).into())
    }

    /// The next batch of a training that goes on, at several places of the epoch.
    fn resume(&self) -> Result<Vec<Case>> {
        let mut side = self.ours()?;
        let mut cases = Vec::new();
        for order in ["in-order", "shuffled"] {
            for share in [0.1, 0.5, 0.9] {
                let mut seconds = Vec::new();
                for _ in 0..self.rounds {
                    let pass: Pass = side.ask(&format!("resume {COLUMNS} {order} {share}"))?;
                    seconds.push(pass.seconds);
                }
                let name = format!("resume at {share} of the epoch, {order}");
                cases.push(case(name, "ms", median(&seconds) * 1e3, None, false));
            }
        }
        Ok(cases)
    }
}

/// Where the packages of a Python are.
fn packages(python: &Path) -> Result<String> {
    let mut ask = Command::new(python);
    ask.args(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]);
    Ok(command::output(ask)?.trim().to_owned())
}
