//! Thread actors: order, bounds, panics.

use crate::Test;
use mobula_core::{ActorOptions, Error, Resources, Runtime};
use std::sync::mpsc::channel;

pub(crate) const TESTS: &[Test] = &[
    ("actors::messages_of_one_sender_keep_their_order", order),
    ("actors::a_full_mailbox_refuses", full_mailbox),
    ("actors::a_panic_is_the_callers_and_the_state_is_rebuilt", rebuilt_after_panic),
    ("actors::a_constructor_that_fails_is_an_error", failing_constructor),
    ("actors::the_last_handle_gives_the_resources_back", resources_come_back),
];

fn local() -> Runtime {
    Runtime::local(Resources::cpus(1.0)).expect("runtime")
}

fn order(_: &Runtime) {
    let actor = local().spawn_actor(ActorOptions::new("list"), || Ok(Vec::new())).expect("spawn");
    let replies: Vec<_> = (0..100)
        .map(|i| actor.try_call(move |list: &mut Vec<i32>| list.push(i)).expect("room"))
        .collect();
    let list = actor.call_blocking(|list| list.clone()).expect("call");
    assert_eq!(list, (0..100).collect::<Vec<_>>());
    drop(replies);
}

fn full_mailbox(_: &Runtime) {
    let options = ActorOptions::new("slow").with_mailbox(1);
    let actor = local().spawn_actor(options, || Ok(())).expect("spawn");
    let (release, gate) = channel::<()>();
    let (entered, running) = channel::<()>();
    let block = move |_: &mut ()| {
        entered.send(()).expect("the test listens");
        gate.recv().expect("the test releases");
    };
    let _blocked = actor.try_call(block).expect("room");
    running.recv().expect("the actor runs the first message");
    let _waiting = actor.try_call(|_| ()).expect("room for one");
    let refused = actor.try_call(|_| ()).expect_err("no room for two");
    assert!(refused.is_overloaded(), "{refused}");
    release.send(()).expect("the actor waits");
}

fn rebuilt_after_panic(_: &Runtime) {
    let mut built = 0;
    let build = move || {
        built += 1;
        Ok(built)
    };
    let actor = local().spawn_actor(ActorOptions::new("fragile"), build).expect("spawn");
    let error = actor.call_blocking(|_: &mut i32| panic!("broken")).expect_err("panics");
    assert!(matches!(&error, Error::TaskPanicked { task, .. } if task == "fragile"), "{error}");
    assert_eq!(actor.call_blocking(|n| *n).expect("alive"), 2);
}

fn failing_constructor(_: &Runtime) {
    let error = local()
        .spawn_actor::<()>(ActorOptions::new("bad"), || Err("no model file".into()))
        .expect_err("must fail");
    assert_eq!(error.to_string(), "bad failed: no model file");
}

fn resources_come_back(_: &Runtime) {
    let runtime = local();
    let first = runtime.spawn_actor(ActorOptions::new("first"), || Ok(())).expect("spawn");
    assert_eq!(runtime.free_resources().cpus, 0.0);
    drop(first);
    // Waits until the first actor's thread has ended.
    runtime.spawn_actor(ActorOptions::new("second"), || Ok(())).expect("spawn");
}
