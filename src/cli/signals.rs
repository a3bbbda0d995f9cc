//! Ctrl-C and its kin, for commands that have to end other programs before they end themselves.

use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

/// Calls `heard` for each SIGINT, SIGTERM and SIGHUP from now on, until it says that nobody listens
/// any more.
pub(crate) fn listen(
    heard: impl Fn(Signal) -> bool + Clone + Send + 'static,
) -> anyhow::Result<()> {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let entered = tokio.enter();
    let kinds = [
        (SignalKind::interrupt(), Signal::INT),
        (SignalKind::terminate(), Signal::TERM),
        (SignalKind::hangup(), Signal::HUP),
    ];
    for (kind, name) in kinds.into_iter().filter(|(kind, _)| !is_ignored(*kind)) {
        let (mut signals, heard) = (signal(kind)?, heard.clone());
        tokio.spawn(async move { while signals.recv().await.is_some() && heard(name) {} });
    }
    drop(entered);
    std::thread::spawn(move || tokio.block_on(std::future::pending::<()>()));
    Ok(())
}

/// Whether the signal was ignored when the program started, as `nohup` has it: then it stays so.
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (kind.as_raw_value() - 1)) != 0
}
