//! `cargo xtask verify`: what must hold before a change goes in, in the order of what is quickest.

use crate::{command, dependencies, features, imports, tidy};
use anyhow::{Result, bail, ensure};
use cargo_metadata::Message;
use std::process::Command;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run only these steps: format, tidy, imports, dependencies, clippy, features, doc, tests
    #[arg(value_name = "STEP")]
    only: Vec<String>,
    /// Run the remaining steps after one failed
    #[arg(long)]
    keep_going: bool,
}

struct Step {
    name: &'static str,
    /// Returns a few words for the table.
    run: fn(&mut Tests) -> Result<String>,
}

const STEPS: &[Step] = &[
    Step { name: "format", run: |_| command::cargo("fmt --all --check").map(|()| String::new()) },
    Step { name: "tidy", run: |_| tidy::check() },
    Step { name: "imports", run: |_| imports::check() },
    Step { name: "dependencies", run: |_| dependencies::check() },
    Step { name: "clippy", run: |_| clippy() },
    Step { name: "features", run: |_| features::check() },
    Step { name: "doc", run: |_| doc() },
    Step { name: "tests", run: tests },
];

/// What the test runners reported, added up.
#[derive(Default, Debug, PartialEq)]
struct Tests {
    passed: usize,
    failed: usize,
    /// What they told of each failure, to be shown once more at the end.
    failures: Vec<String>,
    /// The lines that come next are of failures.
    in_failures: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let (mut table, mut tests, mut broken) = (Vec::new(), Tests::default(), 0);
    let steps = selected(&options.only)?;
    for step in &steps {
        if broken > 0 && !options.keep_going {
            table.push((step.name, "not run", Duration::ZERO, String::new()));
            continue;
        }
        eprintln!("\n== {}", step.name);
        let start = Instant::now();
        let outcome = (step.run)(&mut tests);
        let time = start.elapsed();
        eprintln!("== {}: {:.1} s", step.name, time.as_secs_f64());
        broken += usize::from(outcome.is_err());
        table.push(row(step.name, time, outcome));
    }
    print_table(&table);
    // A broken step counts, unless it is the tests themselves, whose failures count one by one.
    println!("{} passed, {} failed", tests.passed, tests.failed.max(broken));
    ensure!(broken == 0, "{broken} of {} steps failed", steps.len());
    Ok(())
}

/// All steps, or the ones that were named, in the usual order.
fn selected(names: &[String]) -> Result<Vec<&'static Step>> {
    for name in names {
        let known = STEPS.iter().map(|step| step.name).collect::<Vec<_>>();
        ensure!(known.contains(&name.as_str()), "no step {name:?}; there are {}", known.join(", "));
    }
    let wanted = |step: &&Step| names.is_empty() || names.iter().any(|name| name == step.name);
    Ok(STEPS.iter().filter(wanted).collect())
}

/// Name, outcome, time, details.
type Row = (&'static str, &'static str, Duration, String);

/// A failure is shown where it happens; the table only marks it.
fn row(name: &'static str, time: Duration, outcome: Result<String>) -> Row {
    match outcome {
        Ok(detail) => (name, "ok", time, detail),
        Err(error) => {
            eprintln!("error: {error:#}");
            (name, "FAILED", time, String::new())
        }
    }
}

fn print_table(rows: &[Row]) {
    println!();
    for (name, outcome, time, detail) in rows {
        println!("{name:<14} {outcome:<8} {:>7.1} s  {detail}", time.as_secs_f64());
    }
    let total: Duration = rows.iter().map(|row| row.2).sum();
    println!("{:<14} {:<8} {:>7.1} s", "all", "", total.as_secs_f64());
}

fn clippy() -> Result<String> {
    command::cargo("clippy --workspace --all-targets -- -D warnings")?;
    // What is compiled only with these, tests included; the step `features` sees no tests.
    for feature in ["mobula-core --features tls", "mobula-data --features backend"] {
        command::cargo(&format!("clippy --package {feature} --all-targets -- -D warnings"))?;
    }
    Ok(String::new())
}

fn doc() -> Result<String> {
    for what in ["--workspace", "--package mobula-data --features backend"] {
        let mut doc = command::cargo_command(&format!("doc --no-deps {what}"));
        doc.env("RUSTDOCFLAGS", "-D warnings");
        command::run(doc)?;
    }
    Ok(String::new())
}

/// All tests, and once more those that change with TLS, or with other engines.
const TEST_RUNS: &[&str] = &[
    "test --workspace --no-fail-fast",
    "test --package mobula-core --features tls --no-fail-fast --lib --test it -- nodes",
    "test --package mobula-data --features backend --no-fail-fast --test it -- backend",
    "test --package mobula-data --features backend --no-fail-fast --doc -- backend",
];

fn tests(tests: &mut Tests) -> Result<String> {
    let mut good = true;
    for run in TEST_RUNS {
        good &= tests.run(command::cargo_command(run))?;
    }
    for run in without_avx512()? {
        good &= tests.run(run)?;
    }
    let summary = format!("{} passed, {} failed", tests.passed, tests.failed);
    match good {
        true => Ok(summary),
        false => bail!("tests failed: {summary}\n{}", tests.failures.join("\n")),
    }
}

/// The tests of the kernels, as on processors that lack it. By the programs of the first run: for one package
/// cargo would compile what is below it anew, with other features.
fn without_avx512() -> Result<Vec<Command>> {
    let built = command::cargo_command("test --workspace --no-run --quiet --message-format json");
    let messages = command::output(built)?;
    let folder = command::root().join("nn");
    let mut runs = Vec::new();
    for message in Message::parse_stream(messages.as_bytes()) {
        if let Message::CompilerArtifact(artifact) = message?
            && artifact.manifest_path.parent().is_some_and(|parent| parent == folder)
            && let Some(program) = artifact.executable.filter(|_| artifact.profile.test)
        {
            let mut run = Command::new(program);
            run.current_dir(&folder).env("MOBULA_AVX512", "0");
            runs.push(run);
        }
    }
    ensure!(!runs.is_empty(), "the tests of {} have no programs", folder.display());
    Ok(runs)
}

impl Tests {
    /// Says whether all went well.
    fn run(&mut self, command: Command) -> Result<bool> {
        let (before, told) = (self.passed + self.failed, self.failures.len());
        let shown = command::show(&command);
        self.in_failures = false;
        let is_good = command::run_seeing(command, |line| self.see(line))?;
        if !is_good && self.failures.len() == told {
            self.failures.push(format!("{shown}: a test ended without a word; see above"));
        }
        // A filter that fits nothing any more would go unnoticed.
        let is_empty = is_good && self.passed + self.failed == before;
        ensure!(!is_empty, "not one test ran: {shown}");
        Ok(is_good)
    }

    fn see(&mut self, line: &str) {
        self.count(line);
        self.keep_failure(line);
    }

    /// Keeps what stands between `failures:` and `test result:`. Thousands of lines of tests that
    /// pass follow it, and whoever reads a log from its end would not find it.
    fn keep_failure(&mut self, line: &str) {
        match line {
            "failures:" => self.in_failures = true,
            _ if line.starts_with("test result: ") => self.in_failures = false,
            _ if self.in_failures && !line.is_empty() => self.failures.push(line.into()),
            _ => {}
        }
    }

    /// Adds up lines like `test result: ok. 9 passed; 0 failed; 0 ignored; …`.
    fn count(&mut self, line: &str) {
        let Some(("test result: ok" | "test result: FAILED", numbers)) = line.split_once(". ")
        else {
            return;
        };
        for part in numbers.split("; ") {
            match part.split_once(' ') {
                Some((n, "passed")) => self.passed += n.parse().unwrap_or(0),
                Some((n, "failed")) => self.failed += n.parse().unwrap_or(0),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_runners_are_added_up() {
        let mut tests = Tests::default();
        for line in [
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s",
            "my test prints 5 passed; 7 failed",
        ] {
            tests.see(line);
        }
        assert_eq!(tests, Tests { passed: 7, failed: 2, ..Default::default() });
    }

    #[test]
    fn failures_are_kept_for_the_end() {
        let mut tests = Tests::default();
        let output = "test a ... ok\ntest b::c ... FAILED\n\nfailures:\n\n---- b::c stdout ----\nwhy\n\n\
                      failures:\n    b::c\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n\
                      test d ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored";
        output.lines().for_each(|line| tests.see(line));
        assert_eq!(tests.failures, ["---- b::c stdout ----", "why", "    b::c"]);
        assert_eq!((tests.passed, tests.failed), (2, 1));
    }
}
