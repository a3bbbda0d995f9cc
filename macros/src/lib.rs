//! The `#[mobula::remote]` attribute, which gives a function a name that worker processes know.
//!
//! The function stays what it is. Beside it appears a module of the same name (functions and
//! modules do not share a namespace) with two items: `NAME`, under which the function is
//! registered in every process that runs this binary, and `remote(..)`, which takes the same
//! arguments and describes a call instead of making one.
//!
//! ```ignore
//! #[mobula::remote]
//! pub fn square(x: i64) -> Result<i64, String> {
//!     x.checked_mul(x).ok_or_else(|| format!("{x}² does not fit"))
//! }
//!
//! assert_eq!(square(7), Ok(49)); // a call, here and now
//! let task: mobula::Task<i64> = square::remote(7); // a description, for `Runtime::submit`
//! ```
//!
//! On the `impl` of a type it makes an actor of it: `SomeActor::remote(..)` describes one, and
//! `SomeActorHandle` sends calls to it.
//!
//! What it will not do: ship code (driver and workers are one binary), take closures, references
//! or generics (arguments travel as serde values), or work on a function inside another
//! function's body (the module could not name it).
#![forbid(unsafe_code)]

mod expand;
mod signature;

/// Registers a function, or an actor's constructor and methods, by name, so that other processes
/// can run them.
///
/// * Arguments and the result are owned serde values; at most 12 arguments.
/// * A function that returns `Result<T, E>` needs `E: Into<Box<dyn Error + Send + Sync>>`; any
///   other return type `T` counts as `Ok`.
/// * A first parameter of type `Member` makes it a group member: `remote(..)` leaves that
///   parameter out and describes a whole group.
/// * A last parameter of type `Yield<T>` makes it a producer of many values: `remote(..)` leaves
///   that parameter out and describes a `StreamTask<T>`. It returns `()` or `Result<(), E>`.
/// * Each argument of `remote(..)` is a value or an `ObjectRef` to one.
/// * On an `impl` with a constructor `fn new(..) -> Self` (or `Result<Self, E>`) and methods that
///   take `&self` or `&mut self`: the handle has the same methods, which give an `ObjectRef` and
///   wait for room in the mailbox, and `try_` twins that do not wait.
/// * `#[group("name")]` on a method of an actor: its calls wait for those of their own group, and
///   run beside those of others unless one of them takes `&mut self`. The actor must be
///   `Send + Sync` then.
/// * `#[checkpoint] fn save(&self) -> Saved` (or `Result<Saved, E>`) and
///   `#[restore] fn load(saved: Saved) -> Self` (or `Result<Self, E>`), both or neither, of any
///   name: the state of the actor is saved after calls that take `&mut self`
///   (`ActorOptions::checkpoint_every`, default: after each), before they are answered. When its
///   process was lost and is started again, or a panic makes the state untrusted, `load` makes it of
///   the newest saved one instead of `new`. `Saved` travels as an argument does. They are not
///   methods of the handle. A save that fails leaves the older one in place, and the call its
///   result; it is noted once an actor, counted (`ActorStatus::failed_checkpoints`), and tried again
///   after the next change. A `load` that fails ends an actor whose process was lost, as a
///   constructor does; after a panic the next call tries it again.
/// * `#[remote(crate = path)]` says where Mobula lives, for crates that do not depend on the
///   facade: the default is `::mobula`.
#[proc_macro_attribute]
pub fn remote(
    attribute: proc_macro::TokenStream,
    item: proc_macro::TokenStream,
) -> proc_macro::TokenStream {
    expand::expand(attribute.into(), item.into())
        .unwrap_or_else(|error| error.into_compile_error())
        .into()
}
