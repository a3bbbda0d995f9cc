//! Ctrl-C and its kin: everything ends within two seconds, and the user reads how to go on.

use crate::process::ProcessHost;
use crate::{console, nodes, status, timeline};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The program is gone after this, whatever its hooks do.
const DEADLINE: Duration = Duration::from_millis(1500);

type Hook = Box<dyn FnOnce() -> Option<String> + Send>;

static UNDER_WAY: AtomicBool = AtomicBool::new(false);
static HOOKS: Mutex<Vec<(u64, Hook)>> = Mutex::new(Vec::new());

/// Registers what to do when the program is interrupted: record the state of a run, and say in
/// one line how to resume. Holds until the guard is dropped.
pub fn on_interrupt(hook: impl FnOnce() -> Option<String> + Send + 'static) -> InterruptGuard {
    let mut hooks = HOOKS.lock().unwrap_or_else(PoisonError::into_inner);
    let id = hooks.iter().map(|(id, _)| id + 1).max().unwrap_or(0);
    hooks.push((id, Box::new(hook)));
    InterruptGuard { id }
}

/// Takes its hook back when dropped.
#[derive(Debug)]
pub struct InterruptGuard {
    id: u64,
}

impl Drop for InterruptGuard {
    fn drop(&mut self) {
        let mut hooks = HOOKS.lock().unwrap_or_else(PoisonError::into_inner);
        hooks.retain(|(id, _)| *id != self.id);
    }
}

/// Whether the program is being ended by a signal: what happens to its workers now is no news.
pub(crate) fn is_under_way() -> bool {
    UNDER_WAY.load(Ordering::SeqCst)
}

/// Whether the signal was ignored when the program started, as `nohup` has it: then it stays so.
pub(crate) fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (kind.as_raw_value() - 1)) != 0
}

/// Listens for SIGINT, SIGTERM and SIGHUP from now on.
pub(crate) fn listen(host: ProcessHost) -> std::io::Result<()> {
    let tokio = host.tokio().clone();
    let _entered = tokio.enter();
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    for kind in kinds.into_iter().filter(|kind| !is_ignored(*kind)) {
        tokio.spawn(end_on(signal(kind)?, kind, host.clone()));
    }
    Ok(())
}

async fn end_on(mut signal: Signal, kind: SignalKind, host: ProcessHost) {
    signal.recv().await;
    let code = 128 + kind.as_raw_value();
    std::thread::spawn(move || {
        std::thread::sleep(DEADLINE);
        std::process::exit(code);
    });
    std::thread::spawn(move || {
        UNDER_WAY.store(true, Ordering::SeqCst);
        console::note("Interrupted: stopping.");
        host.kill_all();
        run_hooks();
        nodes::say_goodbye();
        host.shutdown();
        status::leave();
        timeline::finish();
        std::process::exit(code);
    });
}

/// The newest first: what was begun last is wound up first.
fn run_hooks() {
    let hooks = std::mem::take(&mut *HOOKS.lock().unwrap_or_else(PoisonError::into_inner));
    for (_, hook) in hooks.into_iter().rev() {
        if let Some(line) = hook() {
            console::note(line);
        }
    }
}
