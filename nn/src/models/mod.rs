//! The architectures that come with this crate.

mod cnn;
mod ids;
mod lstm;
mod mlp;
mod resnet;
mod tabular;
mod transformer;

pub use cnn::{Cnn, CnnOptions};
pub use lstm::{CellKind, Lstm, LstmOptions};
pub use mlp::{Mlp, MlpOptions};
pub use resnet::{ResNet, ResNetOptions};
pub use tabular::{Tabular, TabularOptions};
pub use transformer::{Pooling, Positions, Transformer, TransformerOptions};

use crate::{Error, Result};

/// Refuses sizes of 0, which candle would take and train to nothing.
fn positive(sizes: &[(&'static str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| *size == 0) {
        Some((option, _)) => Err(Error::option(option, 0, "at least 1")),
        None => Ok(()),
    }
}
