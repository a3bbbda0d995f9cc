//! Where an actor's state is made and worked on, whatever the place.

use super::remote::State;
use crate::parcel::Outgoing;
use crate::remote::RemoteFn;
use crate::value::Encoded;
use crate::{Error, panics};

/// The state of one actor, and how it was made.
#[derive(Default)]
pub(crate) struct Stage {
    state: Option<State>,
    made_by: Option<(String, Vec<Encoded>)>,
}

impl Stage {
    /// Makes the state; the same again after a panic.
    pub(crate) fn build(&mut self, constructor: &str, args: Vec<Encoded>) -> Result<(), Error> {
        self.state = Some(build(constructor, &args)?);
        self.made_by = Some((constructor.to_owned(), args));
        Ok(())
    }

    /// Runs a method. A state that a panic has left behind cannot be trusted: it is made anew
    /// before the next call.
    pub(crate) fn invoke(&mut self, method: &str, args: &[Encoded]) -> Result<Outgoing, Error> {
        let result = match self.state()? {
            Some(state) => panics::catch(method, || RemoteFn::find(method)?.invoke(state, args)),
            None => Err(Error::Internal(format!("{method} was called before its actor was built"))),
        };
        if matches!(result, Err(Error::TaskPanicked { .. })) {
            self.state = None;
        }
        result
    }

    fn state(&mut self) -> Result<Option<&mut State>, Error> {
        if let (None, Some((constructor, args))) = (&self.state, &self.made_by) {
            self.state = Some(build(constructor, args)?);
        }
        Ok(self.state.as_mut())
    }
}

fn build(constructor: &str, args: &[Encoded]) -> Result<State, Error> {
    panics::catch(constructor, || RemoteFn::find(constructor)?.build(args))
}
