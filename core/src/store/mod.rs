#![cfg_attr(not(test), allow(dead_code))]
mod budget;
mod reader;
mod segment;
use serde::{Deserialize, Serialize};
/// Names an object in the store that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct ObjectId(pub(crate) u64);
