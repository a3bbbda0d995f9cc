//! The thread that looks at the stages at work.

use super::{Stage, all};
use mobula_core::console::{Progress, is_terminal};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

/// How often it looks.
const INTERVAL: Duration = Duration::from_millis(200);

/// What takes less is not worth a bar.
const SHOWN_AFTER: Duration = Duration::from_secs(2);

/// Without news for so long, somebody should know.
const STALLED_AFTER: Duration = Duration::from_secs(60);

static IS_AWAKE: AtomicBool = AtomicBool::new(false);

/// What `MOBULA_STALL_SECONDS` says, or else a minute.
static LIMIT: LazyLock<Duration> = LazyLock::new(|| {
    let said = std::env::var("MOBULA_STALL_SECONDS").ok().and_then(|text| text.parse().ok());
    said.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).unwrap_or(STALLED_AFTER)
});

/// Has the thread run, for as long as a stage is at work.
pub(super) fn wake() {
    if !IS_AWAKE.swap(true, Ordering::Relaxed) {
        let thread = std::thread::Builder::new().name("mobula-data-watch".to_owned());
        if thread.spawn(watch).is_err() {
            IS_AWAKE.store(false, Ordering::Relaxed);
        }
    }
}

fn watch() {
    let (mut bars, mut warned) = (HashMap::new(), HashSet::new());
    loop {
        std::thread::sleep(INTERVAL);
        let now = Instant::now();
        let at_work: Vec<_> =
            all().iter().filter(|stage| !stage.counts().at_work.is_empty()).cloned().collect();
        if at_work.is_empty() {
            IS_AWAKE.store(false, Ordering::Relaxed);
            // One that began meanwhile took this thread to be awake, unless it has begun another.
            let is_idle = all().iter().all(|stage| stage.counts().at_work.is_empty());
            if is_idle || IS_AWAKE.swap(true, Ordering::Relaxed) {
                return;
            }
        }
        warn(&mut warned, &at_work, now);
        show(&mut bars, &at_work, now);
    }
}

/// Says once of each block that nothing comes of it.
fn warn(warned: &mut HashSet<(*const Stage, usize)>, at_work: &[Arc<Stage>], now: Instant) {
    let mut stalled = HashSet::new();
    for stage in at_work {
        for (block, waited) in stage.stalls(now, *LIMIT) {
            let key = (Arc::as_ptr(stage), block);
            stalled.insert(key);
            if !warned.contains(&key) {
                let (stage, block) = (&stage.name, stage.block_name.name(block));
                tracing::warn!(stage, block, ?waited, "no rows come");
            }
        }
    }
    *warned = stalled;
}

type Bars = HashMap<*const Stage, Progress>;

/// A bar for each stage that takes long and has an end, on a terminal.
fn show(bars: &mut Bars, at_work: &[Arc<Stage>], now: Instant) {
    bars.retain(|stage, _| at_work.iter().any(|other| Arc::as_ptr(other) == *stage));
    for stage in at_work {
        let report = stage.report(now);
        let since = stage.counts().first.map_or(Duration::ZERO, |first| now.duration_since(first));
        let Some(total) = report.blocks_of_all.filter(|_| is_terminal()) else { continue };
        if since < SHOWN_AFTER || stage.is_endless.load(Ordering::Relaxed) {
            continue;
        }
        let bar = bars.entry(Arc::as_ptr(stage));
        let bar = bar.or_insert_with(|| Progress::new(short(&stage.name), total as u64));
        let rate = report.rows as f64 / since.as_secs_f64() / 1e6;
        let megabytes = report.bytes as f64 / 1e6;
        bar.update(
            report.blocks.min(total as u64),
            format!("{megabytes:.0} MB, {rate:.2} M rows/s"),
        );
    }
}

/// What fits before a bar.
fn short(name: &str) -> String {
    const MOST: usize = 40;
    match name.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}
