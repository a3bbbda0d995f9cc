//! What an optimizer remembers, wherever that is.

use super::OptimizerState;
use super::elsewhere::Elsewhere;
use crate::Result;
use std::sync::Arc;

/// An optimizer's state, to be worked with or to be copied later: a clone costs little, and stays what it is
/// when the state goes on.
#[derive(Clone, Debug)]
pub(crate) enum Kept {
    /// On the CPU. While it is shared, changing it copies it first.
    Here(Arc<OptimizerState>),
    /// Where the parameters are, on another device.
    Elsewhere(Elsewhere),
}

impl Kept {
    pub(super) fn new(state: OptimizerState) -> Self {
        Self::Here(Arc::new(state))
    }

    /// Steps and learning rate; what is remembered of elements may be missing.
    pub(super) fn outline(&self) -> &OptimizerState {
        match self {
            Self::Here(state) => state,
            Self::Elsewhere(state) => state.outline(),
        }
    }

    pub(super) fn set_lr(&mut self, lr: f64) {
        match self {
            Self::Here(state) => Arc::make_mut(state).lr = lr,
            Self::Elsewhere(state) => state.set_lr(lr),
        }
    }

    /// On the CPU.
    pub(crate) fn here(&self) -> Result<Arc<OptimizerState>> {
        match self {
            Self::Here(state) => Ok(Arc::clone(state)),
            Self::Elsewhere(state) => Ok(Arc::new(state.here()?)),
        }
    }

    /// Makes another state the same, in the memory that it has.
    pub(crate) fn copy_to(&self, into: &mut OptimizerState) -> Result<()> {
        match self {
            Self::Here(state) => {
                into.copy_from(state);
                Ok(())
            }
            Self::Elsewhere(state) => state.copy_to(into),
        }
    }

    /// From here on it is on the CPU.
    pub(super) fn bring_here(&mut self) -> Result<&mut OptimizerState> {
        if let Self::Elsewhere(state) = self {
            *self = Self::new(state.here()?);
        }
        match self {
            Self::Here(state) => Ok(Arc::make_mut(state)),
            Self::Elsewhere(_) => unreachable!("it is here"),
        }
    }

    /// From here on it is where the parameters are.
    pub(super) fn leave(self) -> Elsewhere {
        match self {
            Self::Here(state) => Elsewhere::new(Arc::unwrap_or_clone(state)),
            Self::Elsewhere(state) => state,
        }
    }
}
