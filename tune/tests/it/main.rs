//! Behaviour of whole studies through the public interface.

mod regret;
mod sweep;
mod tuner;
