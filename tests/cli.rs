//! The `mobula` command as a user meets it: the real binary, its output, its exit codes.
#![cfg(all(feature = "data", feature = "serve", feature = "train", feature = "tune"))]

#[path = "cli/data.rs"]
mod data;
#[path = "cli/doctor.rs"]
mod doctor;
#[path = "cli/new.rs"]
mod new;
#[path = "cli/plot.rs"]
mod plot;
#[path = "cli/program.rs"]
mod program;
#[path = "cli/runs.rs"]
mod runs;
#[path = "cli/serve.rs"]
mod serve;
#[path = "cli/sweep.rs"]
mod sweep;
