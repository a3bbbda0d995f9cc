//! The first line of `main`: the driver gets its runtime, a worker never returns.

use crate::nodes::{self, Role};
use crate::process::spawn::{self, Inherited};
use crate::process::{ProcessHost, child, forkserver};
use crate::{Error, Resources, Runtime, allocator, interrupt, panics, status, timeline};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

static INITIALISED: AtomicBool = AtomicBool::new(false);

/// Turns this process into what it was started as.
///
/// The driver, that is the program that the user started, gets the [`Runtime`] of this machine.
/// A worker process, which is the same program started by a driver, serves its driver and exits
/// without ever returning from here. So it must be the first line of `main`.
///
/// What `main` does before is done once more for all worker processes of a machine, which are then
/// forked here. If it has started threads by then, each worker starts by itself, which takes longer
/// and more memory.
///
/// ```no_run
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     let runtime = mobula_core::init()?;
///     println!("{}", runtime.resources());
///     Ok(())
/// }
/// ```
pub fn init() -> Result<Runtime, Error> {
    init_with(Resources::of_this_machine())
}

/// [`init`] for a driver that is to account for these resources instead of all of the machine's.
pub fn init_with(total: Resources) -> Result<Runtime, Error> {
    if INITIALISED.swap(true, Ordering::SeqCst) {
        return Err(Error::InitTwice);
    }
    allocator::keep_freed_memory();
    match spawn::inherited()? {
        Some(Inherited::Worker(control)) => work(control),
        Some(Inherited::ForkServer(socket)) => work(forkserver::serve(socket)),
        None => {}
    }
    let door = match nodes::role()? {
        Role::Member(join) => std::process::exit(nodes::serve(join, &total)),
        Role::Driver(door) => Some(door),
        Role::Alone => None,
    };
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("mobula-control")
        .enable_all()
        .build()
        .map_err(|e| Error::system("starting the control threads", e))?;
    let host = ProcessHost::new(tokio.handle().clone())?;
    interrupt::listen(host.clone()).map_err(|e| Error::system("listening for signals", e))?;
    timeline::open()?;
    let runtime = Runtime::with_host(&total, host);
    status::open(&runtime, tokio.handle())?;
    // It serves until the process ends, whoever still holds a runtime.
    std::mem::forget(tokio);
    door.map(|door| nodes::open(door, &runtime)).transpose()?;
    Ok(runtime)
}

/// The life of a worker process.
fn work(mut control: UnixStream) -> ! {
    // Before its first thread, as that could read the environment.
    let Some(assignment) = child::assignment(&mut control) else { std::process::exit(0) };
    spawn::set_environment(&assignment.environment);
    // The pool that candle and rayon share in this process works for the worker's one function.
    let pool = rayon::ThreadPoolBuilder::new().start_handler(|_| panics::keep_quiet_here());
    let _ = pool.build_global();
    std::process::exit(child::serve(control))
}

/// A process that was started as a worker but reaches a runtime without `init()` would start
/// workers of its own, and those more: it stops here.
pub(crate) fn refuse_uninitialised_worker() {
    let is_worker = spawn::is_worker();
    if is_worker && !INITIALISED.load(Ordering::SeqCst) {
        eprintln!(
            "this process was started as a Mobula worker, but its main() did not call \
             mobula::init() first; make `let runtime = mobula::init()?;` the first line of main()"
        );
        std::process::exit(2);
    }
}
