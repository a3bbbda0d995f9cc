//! Hyperparameter search: which settings make a model best, found with few and short trials.
//!
//! A [`Tuner`] draws parameters from a [`SearchSpace`] with a [`Sampler`] (TPE by default), runs
//! trials at the same time within the machine's resources, lets a [`Scheduler`] such as
//! [`AshaScheduler`] stop the hopeless ones early, and records everything in a journal from which
//! a study that was stopped or killed goes on.
//!
//! ```
//! use mobula_core::{Resources, Runtime};
//! use mobula_tune::{AshaScheduler, Error, Flow, Metric, SearchSpace, Trial, Tuner};
//!
//! fn train(trial: &mut Trial) -> Result<(), Error> {
//!     let lr = trial.params.float("lr")?;
//!     for epoch in 1..=9 {
//!         let accuracy = 1.0 - (lr.log10() + 2.0).abs() / epoch as f64; // train a model here
//!         if trial.report(epoch, accuracy)? == Flow::Stop {
//!             break;
//!         }
//!     }
//!     Ok(())
//! }
//!
//! let runtime = Runtime::local(Resources::cpus(2.0))?; // programs: mobula::init()?
//! let space = SearchSpace::new().log_uniform("lr", 1e-4, 1e-1).choice("width", [32, 64]);
//! let results = Tuner::new(space, Metric::maximize("accuracy"))
//!     .with_scheduler(AshaScheduler::new(9).with_reduction_factor(3.0))
//!     .with_trials(16)
//!     .with_seed(7)
//!     .quiet()
//!     .run(&runtime, train)?;
//! assert!(results.best()?.value > 0.9);
//! # Ok::<(), Error>(())
//! ```
//!
//! A [`Sweep`] does the same for any program, from a YAML file. This crate knows nothing of
//! models, data or training; trials run on this machine only; it searches one metric, and its
//! parameters do not depend on each other.
#![forbid(unsafe_code)]

mod coordinator;
mod display;
mod error;
pub mod history;
mod journal;
mod metric;
mod params;
mod record;
mod result;
pub mod sampler;
pub mod scheduler;
mod session;
mod space;
mod study;
pub mod sweep;
mod trial;
mod tuner;

pub use error::Error;
pub use history::TrialState;
pub use metric::{Goal, Metric};
pub use mobula_core::Flow;
pub use params::{ParamValue, Params};
pub use result::{ResultGrid, TrialResult};
pub use sampler::{GridSampler, RandomSampler, Sampler, TpeSampler};
pub use scheduler::{AshaScheduler, Decision, Fifo, Scheduler};
pub use space::{Domain, Parameter, SearchSpace};
pub use sweep::Sweep;
pub use trial::{StopHandle, Trial};
pub use tuner::Tuner;
