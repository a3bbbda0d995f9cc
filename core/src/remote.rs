//! Functions that other processes can run: registered by name, called with encoded arguments.
//!
//! What `#[mobula::remote]` expands to lives here; programs use the attribute.

use crate::group::{GroupTask, Member};
use crate::task::Task;
use crate::{BoxError, Error};
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

#[doc(hidden)]
pub use inventory;

/// A registered function: its path, and how to run it on encoded arguments.
#[derive(Debug)]
pub struct RemoteFn {
    name: &'static str,
    run: Run,
}

#[derive(Debug)]
enum Run {
    Alone(fn(Call<'_>) -> Result<Bytes, BoxError>),
    InGroup(fn(Member, Call<'_>) -> Result<Bytes, BoxError>),
}

inventory::collect!(RemoteFn);

impl RemoteFn {
    /// A function under its full path.
    pub const fn new(name: &'static str, run: fn(Call<'_>) -> Result<Bytes, BoxError>) -> Self {
        let run = Run::Alone(run);
        Self { name, run }
    }

    /// A function that group members run, under its full path.
    pub const fn member(
        name: &'static str,
        run: fn(Member, Call<'_>) -> Result<Bytes, BoxError>,
    ) -> Self {
        let run = Run::InGroup(run);
        Self { name, run }
    }

    pub(crate) fn find(name: &str) -> Result<&'static Self, Error> {
        let found = inventory::iter::<Self>.into_iter().find(|function| function.name == name);
        found.ok_or_else(|| Error::NotRegistered { name: name.to_owned(), registered: names() })
    }

    pub(crate) fn run(&self, member: Option<Member>, args: &[u8]) -> Result<Bytes, BoxError> {
        match (&self.run, member) {
            (Run::Alone(run), None) => run(Call { args }),
            (Run::InGroup(run), Some(member)) => run(member, Call { args }),
            _ => Err(Error::Internal(format!("{} was called the wrong way", self.name)).into()),
        }
    }
}

/// The names of all functions that this binary registers, sorted.
pub fn names() -> Vec<String> {
    let mut names: Vec<_> =
        inventory::iter::<RemoteFn>.into_iter().map(|f| f.name.to_owned()).collect();
    names.sort();
    names
}

/// A call as it arrives: encoded arguments.
#[derive(Debug)]
pub struct Call<'a> {
    args: &'a [u8],
}

impl Call<'_> {
    /// Decodes the arguments, runs the function, encodes its result.
    pub fn run<A, T, F>(self, function: F) -> Result<Bytes, BoxError>
    where
        A: DeserializeOwned,
        T: Serialize,
        F: FnOnce(A) -> Result<T, BoxError>,
    {
        let args = decode("the arguments", self.args)?;
        Ok(encode("the result", &function(args)?)?)
    }
}

/// A described call of a registered function that gives a `T`.
#[derive(Debug)]
pub(crate) struct RemoteCall<T> {
    pub(crate) name: &'static str,
    pub(crate) args: Result<Bytes, Error>,
    pub(crate) decode: fn(&[u8]) -> Result<T, Error>,
}

impl<T: DeserializeOwned> RemoteCall<T> {
    fn new(name: &'static str, args: &impl Serialize) -> Self {
        Self {
            name,
            args: encode("the arguments", args),
            decode: |bytes| decode("the result", bytes),
        }
    }
}

impl<T: 'static> RemoteCall<T> {
    /// Runs the call on this thread, through the same encoding as in another process.
    pub(crate) fn run_here(self) -> Result<T, BoxError> {
        let args = self.args.clone()?;
        let bytes = RemoteFn::find(self.name)?.run(None, &args)?;
        Ok((self.decode)(&bytes)?)
    }
}

/// Describes a call of the function registered as `name`.
pub fn task<A: Serialize, T: DeserializeOwned>(name: &'static str, args: A) -> Task<T> {
    Task::remote(name, RemoteCall::new(name, &args))
}

/// Describes the program of a group whose members all run the function registered as `name`.
pub fn group_task<A: Serialize, T: DeserializeOwned>(name: &'static str, args: A) -> GroupTask<T> {
    GroupTask::new(name, encode("the arguments", &args))
}

/// MessagePack with field names: self-describing, so that `flatten` and `untagged` work.
pub(crate) fn encode(what: &str, value: &impl Serialize) -> Result<Bytes, Error> {
    let bytes = rmp_serde::to_vec_named(value);
    bytes.map(Bytes::from).map_err(|error| Error::codec("encode", what, error))
}

pub(crate) fn decode<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, Error> {
    rmp_serde::from_slice(bytes).map_err(|error| Error::codec("decode", what, error))
}
