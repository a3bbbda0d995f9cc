//! The attribute against a stand-in for core: what it expands to compiles, registers and runs.

#![allow(missing_docs)] // the functions here are the test

use mobula_macros::remote;

/// The names of core that the expansion uses, without serialization or processes.
#[allow(unreachable_pub)] // it plays a crate
mod fake_core {
    use std::marker::PhantomData;

    pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
    pub struct Member(pub usize);
    pub struct Task<T>(pub remote::Description, pub PhantomData<T>);
    pub struct GroupTask<T>(pub remote::Description, pub PhantomData<T>);

    pub mod remote {
        use super::{BoxError, GroupTask, Member, Task};
        use std::any::Any;
        use std::marker::PhantomData;

        pub struct Description {
            pub name: &'static str,
            pub args: Box<dyn Any>,
        }

        pub struct Call<'a> {
            pub args: Box<dyn Any>,
            pub log: &'a mut Vec<&'static str>,
        }

        impl Call<'_> {
            pub fn run<A: 'static, T: 'static, F>(self, f: F) -> Result<Box<dyn Any>, BoxError>
            where
                F: FnOnce(A) -> Result<T, BoxError>,
            {
                self.log.push("run");
                let args = *self.args.downcast::<A>().expect("the arguments of the task");
                f(args).map(|value| Box::new(value) as Box<dyn Any>)
            }
        }

        pub type Plain = fn(Call<'_>) -> Result<Box<dyn Any>, BoxError>;
        pub type Ranked = fn(Member, Call<'_>) -> Result<Box<dyn Any>, BoxError>;

        pub enum Body {
            Plain(Plain),
            Member(Ranked),
        }

        pub struct RemoteFn {
            pub name: &'static str,
            pub body: Body,
        }

        impl RemoteFn {
            pub const fn new(name: &'static str, body: Plain) -> Self {
                Self { name, body: Body::Plain(body) }
            }

            pub const fn member(name: &'static str, body: Ranked) -> Self {
                Self { name, body: Body::Member(body) }
            }
        }

        pub fn task<A: 'static, T>(name: &'static str, args: A) -> Task<T> {
            Task(Description { name, args: Box::new(args) }, PhantomData)
        }

        pub fn group_task<A: 'static, T>(name: &'static str, args: A) -> GroupTask<T> {
            GroupTask(Description { name, args: Box::new(args) }, PhantomData)
        }

        pub mod inventory {
            /// Where the real one collects entries in a linker section, this names a static.
            macro_rules! submit {
                ($($entry:tt)*) => {
                    pub static ENTRY: $crate::fake_core::remote::RemoteFn = $($entry)*;
                };
            }
            pub(crate) use submit;
        }
    }
}

use fake_core::remote::{Body, Call, Description, RemoteFn};
use fake_core::{BoxError, Member};

#[remote(crate = crate::fake_core)]
pub fn square(x: i64) -> Result<i64, String> {
    x.checked_mul(x).ok_or_else(|| format!("{x} is too large"))
}

#[remote(crate = crate::fake_core)]
fn nothing() {}

#[remote(crate = crate::fake_core)]
fn ranked(member: Member, scale: usize, (a, b): (u8, u8)) -> Result<usize, BoxError> {
    Ok(member.0 * scale + usize::from(a + b))
}

mod inner {
    pub(super) struct Settings(pub u8);

    #[mobula_macros::remote(crate = super::fake_core)]
    pub(super) fn double(settings: self::Settings) -> u8 {
        settings.0 * 2
    }
}

/// What a worker does with a description that reached it.
fn work<T: 'static>(entry: &RemoteFn, task: Description) -> Result<T, BoxError> {
    assert_eq!(entry.name, task.name);
    let mut log = Vec::new();
    let call = Call { args: task.args, log: &mut log };
    let value = match entry.body {
        Body::Plain(run) => run(call),
        Body::Member(run) => run(Member(3), call),
    }?;
    assert_eq!(log, ["run"]);
    Ok(*value.downcast::<T>().expect("the result of the task"))
}

#[test]
fn names_are_the_paths_of_the_functions() {
    assert_eq!(square::NAME, concat!(module_path!(), "::square"));
    assert_eq!(inner::double::NAME, concat!(module_path!(), "::inner::double"));
}

#[test]
fn a_described_call_runs_like_a_direct_one() {
    assert_eq!(square(7), Ok(49));
    assert_eq!(work::<i64>(&square::ENTRY, square::remote(7).0).expect("fits"), 49);
    work::<()>(&nothing::ENTRY, nothing::remote().0).expect("nothing fails");
    let task = inner::double::remote(inner::Settings(4));
    assert_eq!(work::<u8>(&inner::double::ENTRY, task.0).expect("small"), 8);
}

#[test]
fn errors_arrive_as_errors() {
    let error = work::<i64>(&square::ENTRY, square::remote(i64::MAX).0).expect_err("overflow");
    assert_eq!(error.to_string(), format!("{} is too large", i64::MAX));
}

#[test]
fn a_member_is_supplied_by_the_worker() {
    let group = ranked::remote(10, (1, 2));
    assert_eq!(work::<usize>(&ranked::ENTRY, group.0).expect("ranked"), 33);
}
