//! Files in object stores: a real S3 server (s3s-fs, which is a folder to the other side), and HTTP
//! servers that do what networks do.

mod http;
mod s3;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use mobula_data::Error;
use std::path::PathBuf;
use std::process::ExitCode;

type Test = (&'static str, fn());

fn main() -> ExitCode {
    if let Some(url) = std::env::var_os(s3::ASKER) {
        return s3::ask(&url.to_string_lossy());
    }
    let arguments = Arguments::from_args();
    let server = if arguments.list { Err("not started to list tests".into()) } else { s3::start() };
    let missing = server.as_ref().err().cloned();
    let s3 = s3::TESTS.iter().map(|&(name, test)| {
        let missing = missing.clone();
        Trial::ignorable_test(name, move || if_there(missing, test))
    });
    let http = http::TESTS.iter().map(|&(name, test)| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    });
    let conclusion = libtest_mimic::run(&arguments, s3.chain(http).collect());
    drop(server);
    conclusion.exit_code()
}

/// Where a server is not installed its tests are ignored; continuous integration must have it.
fn if_there(missing: Option<String>, test: fn()) -> Result<Completion, Failed> {
    match missing {
        None => {
            test();
            Ok(Completion::Completed)
        }
        Some(reason) if std::env::var_os("CI").is_some() => Err(reason.into()),
        Some(reason) => Ok(Completion::ignored_with(reason)),
    }
}

/// The data of the examples.
fn example(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples/data").join(name)
}

/// What an error says, with its causes.
fn message<T>(result: Result<T, Error>) -> String {
    let error: mobula_core::Error = result.err().expect("an error").into();
    mobula_core::error::chain(&error)
}
