//! Functions that other processes can run: registered by name, called with encoded arguments.
//!
//! What `#[mobula::remote]` expands to lives here; programs use the attribute.

use crate::actor::remote::{ChangeFn, LookFn};
use crate::actor::stage::State;
use crate::group::{GroupTask, Member};
use crate::object::AnyObject;
use crate::parcel::{Outgoing, Parcel};
use crate::stream::{Intake, Yield};
use crate::task::Task;
use crate::value::{self, Encoded};
use crate::{BoxError, Error, ObjectRef};
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

#[doc(hidden)]
pub use crate::actor::remote::{
    ActorCall, Keep, KeepLocal, KeepShared, Method, actor, state_of, state_of_mut,
};
#[doc(hidden)]
pub use crate::stream::{Outlet, stream_task};
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
    Alone(fn(Call<'_>) -> Result<Outgoing, BoxError>),
    Stream(fn(Outlet, Call<'_>) -> Result<(), BoxError>),
    InGroup(fn(Member, Call<'_>) -> Result<Outgoing, BoxError>),
    Actor(fn(Call<'_>) -> Result<State, BoxError>, Option<Checkpoint>),
    /// A method that takes `&self`.
    Look(LookFn),
    /// A method that takes `&mut self`.
    Change(ChangeFn),
}

/// How an actor's state is saved, and made of what was saved: names of registered functions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checkpoint {
    pub(crate) save: &'static str,
    pub(crate) load: &'static str,
}

inventory::collect!(RemoteFn);

/// `None`: two functions have this name, as two of one name inside different functions would.
static BY_NAME: LazyLock<HashMap<&'static str, Option<&'static RemoteFn>>> = LazyLock::new(|| {
    let mut by_name = HashMap::new();
    for function in inventory::iter::<RemoteFn> {
        let entry = by_name.entry(function.name);
        entry.and_modify(|known| *known = None).or_insert(Some(function));
    }
    by_name
});

impl RemoteFn {
    /// A function under its full path.
    pub const fn new(name: &'static str, run: fn(Call<'_>) -> Result<Outgoing, BoxError>) -> Self {
        let run = Run::Alone(run);
        Self { name, run }
    }

    /// A function that gives many values, under its full path.
    pub const fn stream(
        name: &'static str,
        run: fn(Outlet, Call<'_>) -> Result<(), BoxError>,
    ) -> Self {
        let run = Run::Stream(run);
        Self { name, run }
    }

    /// A function that group members run, under its full path.
    pub const fn member(
        name: &'static str,
        run: fn(Member, Call<'_>) -> Result<Outgoing, BoxError>,
    ) -> Self {
        let run = Run::InGroup(run);
        Self { name, run }
    }

    /// The constructor of an actor, under its full path.
    pub const fn actor(name: &'static str, run: fn(Call<'_>) -> Result<State, BoxError>) -> Self {
        let run = Run::Actor(run, None);
        Self { name, run }
    }

    /// The same constructor of an actor whose state the method `save` saves, and of what it gave
    /// the constructor `load` makes the state again.
    pub const fn with_checkpoint(self, save: &'static str, load: &'static str) -> Self {
        let run = match self.run {
            Run::Actor(run, _) => Run::Actor(run, Some(Checkpoint { save, load })),
            other => other,
        };
        Self { name: self.name, run }
    }

    /// A method of an actor that takes `&self`, under its full path.
    pub const fn look_method(name: &'static str, run: LookFn) -> Self {
        let run = Run::Look(run);
        Self { name, run }
    }

    /// A method of an actor that takes `&mut self`, under its full path.
    pub const fn change_method(name: &'static str, run: ChangeFn) -> Self {
        let run = Run::Change(run);
        Self { name, run }
    }

    pub(crate) fn find(name: &str) -> Result<&'static Self, Error> {
        match BY_NAME.get(name) {
            Some(Some(function)) => Ok(function),
            Some(None) => Err(Error::RegisteredTwice { name: name.to_owned() }),
            None => Err(Error::NotRegistered { name: name.to_owned(), registered: names() }),
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn run(
        &self,
        member: Option<Member>,
        args: &[Encoded],
    ) -> Result<Outgoing, BoxError> {
        match (&self.run, member) {
            (Run::Alone(run), None) => run(Call { args }),
            (Run::InGroup(run), Some(member)) => run(member, Call { args }),
            _ => Err(self.misused()),
        }
    }

    /// Runs a function that puts its values there.
    pub(crate) fn yields(&self, outlet: Outlet, args: &[Encoded]) -> Result<(), BoxError> {
        match &self.run {
            Run::Stream(run) => run(outlet, Call { args }),
            _ => Err(self.misused()),
        }
    }

    pub(crate) fn build(&self, args: &[Encoded]) -> Result<State, BoxError> {
        match &self.run {
            Run::Actor(build, _) => build(Call { args }),
            _ => Err(self.misused()),
        }
    }

    /// How the actor that it constructs is saved, if it is.
    pub(crate) fn checkpoint(&self) -> Option<Checkpoint> {
        match self.run {
            Run::Actor(_, checkpoint) => checkpoint,
            _ => None,
        }
    }

    /// Whether it is a method that may change its actor's state.
    pub(crate) fn is_exclusive(&self) -> bool {
        matches!(self.run, Run::Change(_))
    }

    /// Runs a method on a state that others may be looking at.
    pub(crate) fn look(&self, state: &dyn Any, args: &[Encoded]) -> Result<Outgoing, BoxError> {
        match &self.run {
            Run::Look(run) => run(state, Call { args }),
            _ => Err(self.misused()),
        }
    }

    /// Runs a method on a state that nobody else sees.
    pub(crate) fn change(
        &self,
        state: &mut dyn Any,
        args: &[Encoded],
    ) -> Result<Outgoing, BoxError> {
        match &self.run {
            Run::Look(run) => run(state, Call { args }),
            Run::Change(run) => run(state, Call { args }),
            _ => Err(self.misused()),
        }
    }

    fn misused(&self) -> BoxError {
        Error::Internal(format!("{} was called the wrong way", self.name)).into()
    }
}

/// The names of all functions that this binary registers, sorted.
pub fn names() -> Vec<String> {
    let mut names: Vec<_> = BY_NAME.keys().map(|name| (*name).to_owned()).collect();
    names.sort();
    names
}

/// A call as it arrives: one encoded part an argument.
#[derive(Debug)]
pub struct Call<'a> {
    args: &'a [Encoded],
}

impl Call<'_> {
    /// Decodes the arguments, runs the function, encodes its result.
    pub fn run<A, T, F>(self, function: F) -> Result<Outgoing, BoxError>
    where
        A: Arguments,
        T: Serialize,
        F: FnOnce(A) -> Result<T, BoxError>,
    {
        Ok(Outgoing::new("the result", &function(A::decode(self.args)?)?)?)
    }

    /// Decodes the arguments and runs a function that gives many values.
    pub fn stream<A, T, F>(self, outlet: Outlet, function: F) -> Result<(), BoxError>
    where
        A: Arguments,
        T: Value,
        F: FnOnce(A, Yield<T>) -> Result<(), BoxError>,
    {
        function(A::decode(self.args)?, outlet.open()?)
    }

    /// Decodes the arguments and makes an actor's state of them.
    pub fn build<A, S, F>(self, keep: fn(S) -> State, constructor: F) -> Result<State, BoxError>
    where
        A: Arguments,
        S: 'static,
        F: FnOnce(A) -> Result<S, BoxError>,
    {
        Ok(keep(constructor(A::decode(self.args)?)?))
    }
}

/// What a call is described with where a `T` is expected: a `T`, or a reference to one.
#[derive(Debug)]
pub enum Arg<T> {
    /// The value itself.
    Value(T),
    /// What a task will give; the call waits for it.
    Object(ObjectRef<T>),
}

impl<T> From<T> for Arg<T> {
    fn from(value: T) -> Self {
        Self::Value(value)
    }
}

impl<T> From<ObjectRef<T>> for Arg<T> {
    fn from(object: ObjectRef<T>) -> Self {
        Self::Object(object)
    }
}

impl<T> From<&ObjectRef<T>> for Arg<T> {
    fn from(object: &ObjectRef<T>) -> Self {
        Self::Object(object.clone())
    }
}

impl<T: Value> Arg<T> {
    fn encode(&self, position: usize) -> Result<Parcel, Error> {
        match self {
            Self::Value(value) => Parcel::new(ARGUMENTS[position], value),
            Self::Object(object) => object.parcel().unwrap_or_else(|| Err(not_there(object))),
        }
    }

    fn object(&self) -> Option<Arc<dyn AnyObject>> {
        match self {
            Self::Value(_) => None,
            Self::Object(object) => Some(object.object()),
        }
    }
}

fn not_there<T: Send + Sync + 'static>(object: &ObjectRef<T>) -> Error {
    Error::Internal(format!("{} was used before it was there", object.task()))
}

/// What can be an argument: any owned serde value that threads can share.
pub trait Value: Serialize + DeserializeOwned + Send + Sync + 'static {}

impl<T: Serialize + DeserializeOwned + Send + Sync + 'static> Value for T {}

/// The arguments of a call, as a tuple of values.
pub trait Arguments: Sized + Send + 'static {
    /// The same tuple, of [`Arg`]s.
    type Described: Send + 'static;

    #[doc(hidden)]
    fn decode(parts: &[Encoded]) -> Result<Self, Error>;

    #[doc(hidden)]
    fn encode(described: &Self::Described) -> Result<Vec<Parcel>, Error>;

    #[doc(hidden)]
    fn inputs(described: &Self::Described) -> Inputs;
}

/// The objects that a call waits for.
#[derive(Clone, Default)]
pub struct Inputs(pub(crate) Vec<Arc<dyn AnyObject>>);

impl std::fmt::Debug for Inputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|object| object.name())).finish()
    }
}

macro_rules! arguments {
    ($($name:ident $position:tt),*) => {
        impl<$($name: Value),*> Arguments for ($($name,)*) {
            type Described = ($(Arg<$name>,)*);

            fn decode(parts: &[Encoded]) -> Result<Self, Error> {
                let expected = [$($position),*].len() as usize;
                check_count(parts, expected)?;
                Ok(($(value::decode::<$name>(ARGUMENTS[$position], &parts[$position])?,)*))
            }

            #[allow(unused_variables)]
            fn encode(described: &Self::Described) -> Result<Vec<Parcel>, Error> {
                Ok(vec![$(described.$position.encode($position)?),*])
            }

            #[allow(unused_variables)]
            fn inputs(described: &Self::Described) -> Inputs {
                let objects: Vec<Option<Arc<dyn AnyObject>>> = vec![$(described.$position.object()),*];
                Inputs(objects.into_iter().flatten().collect())
            }
        }
    };
}

impl Arguments for () {
    type Described = ();

    fn decode(parts: &[Encoded]) -> Result<Self, Error> {
        check_count(parts, 0)
    }

    fn encode((): &()) -> Result<Vec<Parcel>, Error> {
        Ok(Vec::new())
    }

    fn inputs((): &()) -> Inputs {
        Inputs::default()
    }
}

arguments!(A 0);
arguments!(A 0, B 1);
arguments!(A 0, B 1, C 2);
arguments!(A 0, B 1, C 2, D 3);
arguments!(A 0, B 1, C 2, D 3, E 4);
arguments!(A 0, B 1, C 2, D 3, E 4, F 5);
arguments!(A 0, B 1, C 2, D 3, E 4, F 5, G 6);
arguments!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7);
arguments!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8);
arguments!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9);
arguments!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10);
arguments!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9, K 10, L 11);

/// How an argument that cannot be decoded is called.
const ARGUMENTS: [&str; 12] = [
    "argument 0",
    "argument 1",
    "argument 2",
    "argument 3",
    "argument 4",
    "argument 5",
    "argument 6",
    "argument 7",
    "argument 8",
    "argument 9",
    "argument 10",
    "argument 11",
];

fn check_count(parts: &[Encoded], expected: usize) -> Result<(), Error> {
    if parts.len() == expected {
        return Ok(());
    }
    let got = parts.len();
    Err(Error::Internal(format!("a call came with {got} arguments, expected {expected}")))
}

/// A described call of a registered function that gives a `T`.
pub(crate) struct RemoteCall<T> {
    pub(crate) name: &'static str,
    pub(crate) inputs: Inputs,
    pub(crate) decode: fn(&Parcel) -> Result<T, Error>,
    /// Encodes the arguments; all inputs must be there.
    pub(crate) encode: Box<dyn Fn() -> Result<Vec<Parcel>, Error> + Send>,
    /// Where its values go, if it gives many.
    pub(crate) values: Option<Arc<dyn Intake>>,
}

impl<T: DeserializeOwned> RemoteCall<T> {
    pub(crate) fn new<A: Arguments>(name: &'static str, args: A::Described) -> Self {
        Self {
            name,
            values: None,
            inputs: A::inputs(&args),
            decode: |parcel| parcel.decode("the result"),
            encode: Box::new(move || A::encode(&args)),
        }
    }
}

impl RemoteCall<Parcel> {
    /// A call whose arguments are encoded, and whose result is to stay so.
    pub(crate) fn raw(name: &'static str, args: Vec<Parcel>) -> Self {
        Self {
            name,
            values: None,
            inputs: Inputs::default(),
            decode: |parcel| Ok(parcel.clone()),
            encode: Box::new(move || Ok(args.clone())),
        }
    }
}

/// Describes a call of the function registered as `name`.
pub fn task<A: Arguments, T>(name: &'static str, args: A::Described) -> Task<T>
where
    T: DeserializeOwned + Send + Sync + 'static,
{
    Task::remote(name, RemoteCall::new::<A>(name, args))
}

/// Describes the program of a group whose members all run the function registered as `name`.
pub fn group_task<A: Arguments, T: DeserializeOwned>(
    name: &'static str,
    args: A::Described,
) -> GroupTask<T>
where
    A::Described: Sync,
{
    GroupTask::new(name, A::inputs(&args), move || A::encode(&args))
}

/// MessagePack with field names: self-describing, so that `flatten` and `untagged` work.
pub(crate) fn encode<T: Serialize + ?Sized>(what: &str, value: &T) -> Result<Bytes, Error> {
    let bytes = rmp_serde::to_vec_named(value);
    bytes.map(Bytes::from).map_err(|error| Error::codec("encode", what, error))
}

pub(crate) fn decode<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, Error> {
    rmp_serde::from_slice(bytes).map_err(|error| Error::codec("decode", what, error))
}
