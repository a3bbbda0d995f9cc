//! Shared descriptions, written as ones of their own: sharing saves copies, and means nothing.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::sync::Arc;

pub(crate) fn serialize<T: ?Sized + Serialize, S: Serializer>(
    of: &Arc<T>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    of.as_ref().serialize(serializer)
}

pub(crate) fn deserialize<'de, T: ?Sized, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Arc<T>, D::Error>
where
    Box<T>: Deserialize<'de>,
{
    Ok(Box::<T>::deserialize(deserializer)?.into())
}
