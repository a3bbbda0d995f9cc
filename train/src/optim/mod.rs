//! Optimizers, learning-rate schedules, clipping and what else stands between gradients and
//! weights.
//!
//! An [`Optimizer`] is its settings and a rule; what it remembers is an [`OptimizerState`], plain
//! data with names: [`init`](Optimizer::init) makes one, [`update`](Optimizer::update) changes
//! weights and state in place. Each computes what PyTorch's of the same name computes, with the
//! same defaults.
//!
//! An [`Updater`] puts an optimizer together with a [`Schedule`], a [`Clip`], an [`Ema`] and the
//! state of all of them; a [`TrainState`](crate::TrainState) has one:
//!
//! ```
//! use mobula_train::optim::{AdamW, AdamWOptions, Clip, Grouped, ParamGroup, Schedule, Updater};
//!
//! let adamw = AdamW::new(AdamWOptions { lr: 3e-4, ..AdamWOptions::default() })?;
//! let updater = Updater::new(Grouped::new(adamw, [ParamGroup::no_decay()])?)
//!     .with_schedule(Schedule::warmup(100).then(Schedule::cosine(900)))?
//!     .with_clip(Clip::Norm(1.0))?
//!     .with_ema(0.999)?;
//! assert_eq!(updater.optimizer().name(), "adamw");
//! # Ok::<(), mobula_train::Error>(())
//! ```
//!
//! The same from a file, as sweeps write it:
//!
//! ```
//! use mobula_train::optim::UpdaterOptions;
//!
//! let options: UpdaterOptions = serde_json::from_str(
//!     r#"{"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": true},
//!         "schedule": {"name": "cosine", "steps": 1000}, "clip": {"norm": 1.0}}"#,
//! )?;
//! assert_eq!(options.build()?.lr(), 0.1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! All of it is for `f32` parameters. Bits do not depend on the number of threads. Where parameters are on a
//! GPU, an optimizer that has a [`Rule`] works there, with the same bits for the same gradients; only a
//! norm that gradients are clipped by may differ in its last bit.

mod adafactor;
mod adagrad;
mod adam;
mod check;
mod clip;
mod element;
mod elsewhere;
mod ema;
mod groups;
mod kept;
mod lion;
mod loss_scale;
mod pass;
mod plateau;
mod rmsprop;
mod rule;
mod schedule;
mod sgd;
mod spec;
mod state;
mod updater;

pub use adafactor::{Adafactor, AdafactorOptions};
pub use adagrad::{Adagrad, AdagradOptions};
pub use adam::{Adam, AdamOptions, AdamW, AdamWOptions};
pub use clip::Clip;
pub use element::{Elementwise, Number, Rule};
pub(crate) use elsewhere::scale_elsewhere;
pub use ema::Ema;
pub use groups::{Grouped, ParamGroup};
pub(crate) use kept::Kept;
pub use lion::{Lion, LionOptions};
pub use loss_scale::{LossScale, LossScaleOptions};
pub(crate) use pass::{add, in_place, read, scale};
pub use plateau::{Mode, Plateau, PlateauOptions, ThresholdMode};
pub use rmsprop::{RmsProp, RmsPropOptions};
pub(crate) use rule::update_by;
pub use rule::{Now, Optimizer, ParamOptions};
pub use schedule::{Anneal, Schedule};
pub use sgd::{Sgd, SgdOptions};
pub use spec::OptimizerSpec;
pub(crate) use state::optimizer_file;
pub use state::{OptimizerState, ParamState, Slot};
pub(crate) use updater::EMA;
pub use updater::{SavedUpdater, Updater, UpdaterOptions};
