//! PostgreSQL as users have it: a real server, which the first test that needs it starts, and which
//! ends with the tests. Where none is installed the tests are reported as ignored; continuous integration
//! must have it.

mod failures;
mod read;
mod server;
mod write;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use server::Server;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

/// A test under its name.
type Test = (&'static str, fn(&Server));

fn main() -> ExitCode {
    if let Some(path) = std::env::var_os(read::STREAM) {
        return read::epoch(&path);
    }
    if let Ok(port) = std::env::var(read::LARGE) {
        return read::large(&port);
    }
    if let Ok(port) = std::env::var(write::ENDLESS) {
        return write::endless(&port);
    }
    let shared = Shared::default();
    let tests = [read::TESTS, write::TESTS, failures::TESTS].concat().into_iter();
    let trials = tests.map(|(name, test)| {
        let shared = shared.clone();
        Trial::ignorable_test(name, move || shared.with(test))
    });
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials.collect());
    shared.end();
    conclusion.exit_code()
}

/// The server of all tests.
#[derive(Clone, Default)]
struct Shared(Arc<OnceLock<Result<Server, String>>>);

impl Shared {
    fn with(&self, test: fn(&Server)) -> Result<Completion, Failed> {
        if let Some(reason) = Server::missing() {
            return match std::env::var_os("CI") {
                Some(_) => Err(reason.into()),
                None => Ok(Completion::ignored_with(reason)),
            };
        }
        match self.0.get_or_init(Server::start) {
            Ok(server) => {
                test(server);
                Ok(Completion::Completed)
            }
            Err(reason) => Err(reason.as_str().into()),
        }
    }

    /// Ends the server: all tests are done, and nothing else has it.
    fn end(self) {
        drop(Arc::into_inner(self.0));
    }
}
