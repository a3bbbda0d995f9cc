//! The worker's side of groups that its driver has.

use super::wire::{Ask, Wanted};
use super::worker::{Nested, Up};
use crate::parcel::Parcel;
use crate::remote::encode;
use crate::{Error, GroupOptions};
use std::sync::Arc;

impl Nested {
    /// Has the driver start a group, and waits until all of its members have been started.
    pub(crate) fn start_group(
        &self,
        options: &GroupOptions,
        function: &str,
        args: &[Parcel],
    ) -> Result<Arc<Up>, Error> {
        let (name, function) = (&options.name, function.to_owned());
        // Here: what cannot be encoded, as some paths cannot, is to be no broken frame.
        let options = encode("the options of a group", options)?;
        self.ask(name, args, Wanted::Group { function, options })
    }
}

/// Of a group.
impl Up {
    /// Waits for the driver's answer.
    pub(crate) fn ask_group(&self, ask: Ask) -> Result<Arc<Self>, Error> {
        self.nested.ask("a group", &[], Wanted::Ask { group: self.ticket, ask })
    }
}
