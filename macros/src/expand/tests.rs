use super::*;

fn expanded(attribute: TokenStream, item: TokenStream) -> String {
    let tokens = expand(attribute, item).expect("a valid remote function");
    syn::parse2::<syn::File>(tokens.clone()).expect("the expansion parses");
    tokens.to_string()
}

/// The message with which `item` is refused.
// Spans carry no positions outside of a compiler run, so they cannot be tested here; the
// feature of proc-macro2 that adds them would rebuild every derive macro for `cargo test`.
fn refused(attribute: TokenStream, item: &str) -> String {
    let item = item.parse().expect("tokens");
    expand(attribute, item).expect_err("must be refused").to_string()
}

#[test]
fn the_function_stays_and_a_module_appears() {
    let text = expanded(
        quote!(),
        quote! {
            #[inline]
            pub(crate) fn add(a: i64, mut b: Vec<f32>) -> f32 { b.push(a as f32); 1.0 }
        },
    );
    let function = quote! {
        #[inline]
        pub(crate) fn add(a: i64, mut b: Vec<f32>) -> f32 { b.push(a as f32); 1.0 }
    };
    assert!(text.starts_with(&function.to_string()));
    for part in [
        quote!(pub(crate) mod add),
        quote!(a: impl ::core::convert::Into<::mobula::remote::Arg<i64>>),
        quote!(b: impl ::core::convert::Into),
        quote!(-> ::mobula::Task<f32>),
        quote!(::mobula::remote::task::<(i64, Vec<f32>,), f32>(
            NAME,
            (::core::convert::Into::into(a), ::core::convert::Into::into(b),)
        )),
        quote!(::mobula::remote::RemoteFn::new(NAME, |call: ::mobula::remote::Call<'_>|)),
        quote!(::core::result::Result::Ok(super::add(a, b))),
    ] {
        let part = part.to_string();
        let part = part.trim_end_matches([')', ' ']);
        assert!(text.contains(part), "{part}\nis missing in\n{text}");
    }
}

#[test]
fn results_convert_their_errors() {
    for item in [
        quote!(
            fn f() -> Result<u8, String> {
                Ok(1)
            }
        ),
        quote!(
            fn f() -> anyhow::Result<u8> {
                Ok(1)
            }
        ),
        quote!(
            fn f() -> std::result::Result<u8, MyError> {
                Ok(1)
            }
        ),
    ] {
        let text = expanded(quote!(), item);
        assert!(text.contains(&quote!(-> ::mobula::Task<u8>).to_string()), "{text}");
        assert!(text.contains("map_err (super :: f ()"), "{text}");
    }
}

#[test]
fn a_member_is_left_out_of_the_arguments() {
    let text = expanded(
        quote!(crate = mobula_core),
        quote!(
            pub fn worker(member: mobula_core::Member, config: Config) {}
        ),
    );
    for part in [
        quote!(mobula_core::remote::Arg<Config>).to_string(),
        quote!(-> mobula_core::GroupTask<()>).to_string(),
        quote!(mobula_core::remote::group_task::<(Config,), ()>).to_string(),
        "RemoteFn :: member (NAME , | member , call :".into(),
        quote!(super::worker(member, config)).to_string(),
    ] {
        assert!(text.contains(&part), "{part}\nis missing in\n{text}");
    }
}

#[test]
fn a_yield_is_left_out_of_the_arguments() {
    let text = expanded(
        quote!(crate = mobula_core),
        quote!(
            pub fn lines(file: String, out: mobula_core::Yield<self::Line>) -> Result<(), E> {
                Ok(())
            }
        ),
    );
    for part in [
        quote!(-> mobula_core::StreamTask<super::Line>).to_string(),
        quote!(mobula_core::remote::stream_task::<(String,), super::Line>).to_string(),
        "RemoteFn :: stream (NAME , | outlet , call :".into(),
        quote!(call.stream::<(String,), super::Line, _>).to_string(),
        quote!(super::lines(file, __mobula_out)).to_string(),
    ] {
        assert!(text.contains(&part), "{part}\nis missing in\n{text}");
    }
}

#[test]
fn relative_paths_are_seen_from_the_module() {
    let text = expanded(
        quote!(crate = self::fake),
        quote!(
            fn f(a: self::A, b: Vec<super::super::B>, c: crate::C, d: std::D) {}
        ),
    );
    for part in [
        quote!(super::fake::remote::Arg<super::A>),
        quote!(super::super::super::B),
        quote!(Arg<crate::C>),
        quote!(Arg<std::D>),
        quote!(super::fake::Task<()>),
    ] {
        assert!(text.contains(&part.to_string()), "{part}\nis missing in\n{text}");
    }
}

#[test]
fn cfg_attributes_follow_and_others_do_not() {
    let text = expanded(
        quote!(),
        quote! {
            /// Docs.
            #[cfg(unix)]
            fn f() {}
        },
    );
    assert_eq!(text.matches("cfg (unix)").count(), 2, "{text}");
    assert_eq!(text.matches("Docs.").count(), 1, "{text}");
}

#[test]
fn patterns_get_names() {
    let text = expanded(
        quote!(),
        quote!(
            fn f((a, b): (u8, u8), _: u8) {}
        ),
    );
    for part in [quote!(Arg<(u8, u8)>), quote!(arg0: impl), quote!(arg1: impl), quote!(Arg<u8>)] {
        assert!(text.contains(&part.to_string()), "{part}\nis missing in\n{text}");
    }
}

#[test]
fn what_cannot_be_remote_is_refused() {
    for (item, message) in [
        ("fn f<T: Copy>(x: T) {}", "cannot be generic"),
        ("fn f<'a>(x: u8) {}", "cannot be generic"),
        ("fn f() where u8: Copy {}", "cannot be generic"),
        ("async fn f() {}", "cannot be async"),
        ("unsafe fn f() {}", "cannot be unsafe"),
        ("fn f(&self) {}", "cannot take self"),
        ("fn f(x: &str) {}", "takes owned values, not references"),
        ("fn f(x: Option<&'static str>) {}", "takes owned values, not references"),
        ("fn f(x: u8, y: Vec<impl Copy>) {}", "takes concrete types, not `impl Trait`"),
        ("fn f() -> &'static str { text }", "returns owned values, not references"),
        ("fn f() -> impl Copy {}", "returns concrete types, not `impl Trait`"),
        ("fn f() -> ! { loop {} }", "must return"),
        ("fn f() -> Result { Ok }", "write it out as `Result<T, E>`"),
        ("fn f(out: Yield<u8>, x: u8) {}", "a `Yield` is the last parameter"),
        ("fn f(a: Yield<u8>, b: Yield<u8>) {}", "there is one at most"),
        ("fn f(out: Yield) {}", "write it out as `Yield<T>`"),
        ("fn f(out: Yield<u8>) -> Result<u64, E> {}", "gives nothing else"),
        ("fn f(m: Member, out: Yield<u8>) {}", "a group member cannot yield"),
        ("struct S;", "#[remote] goes on a function"),
    ] {
        let got = refused(quote!(), item);
        assert!(got.contains(message), "{item}: {got}");
    }
}

fn counter(methods: &str) -> String {
    format!("impl Counter {{ pub fn new(start: u64) -> Self {{ Self(start) }} {methods} }}")
}

#[test]
fn an_actor_gets_a_constructor_a_handle_and_registrations() {
    let item = counter("/// Adds.\npub fn add(&mut self, n: u64) -> Result<u64, String> { Ok(n) }");
    let text = expanded(quote!(crate = mobula_core), item.parse().expect("tokens"));
    for part in [
        quote!(-> mobula_core::remote::ActorCall<Self>).to_string(),
        quote!(pub struct CounterHandle(mobula_core::ActorRef)).to_string(),
        quote!(mobula_core::RemoteActor for Counter).to_string(),
        quote!(-> mobula_core::ObjectRef<u64>).to_string(),
        "pub fn try_add".to_owned(),
        "\"::Counter::add\"".to_owned(),
        "map_err (__mobula_actor . add (n)".to_owned(),
        quote!(Ok(Counter::new(start))).to_string(),
    ] {
        assert!(text.contains(&part), "{part}\nis missing in\n{text}");
    }
    assert_eq!(text.matches("Adds.").count(), 2, "the handle has the method's words: {text}");
}

#[test]
fn methods_have_groups_and_an_access() {
    let item = counter(
        "#[group(\"io\")] pub fn get(&self) {} #[group(\"ops\")] fn health(&self) {} \
         #[cfg(unix)] fn merge(&mut self, other: Self) -> Vec<Self> {} fn plain(&self) {}",
    );
    let text = expanded(quote!(crate = mobula_core), item.parse().expect("tokens"));
    for part in [
        quote!(&["io", "ops"]).to_string(),
        "\"::Counter::get\") , 1usize , false)".to_owned(),
        "\"::Counter::health\") , 2usize , false)".to_owned(),
        "\"::Counter::merge\") , 0usize , true)".to_owned(),
        "\"::Counter::plain\") , 0usize , false)".to_owned(),
        quote!(other: impl ::core::convert::Into<mobula_core::remote::Arg<Counter>>).to_string(),
        "-> mobula_core :: ObjectRef < Vec < Counter >".to_owned(),
        "RemoteFn :: look_method".to_owned(),
        "RemoteFn :: change_method".to_owned(),
    ] {
        assert!(text.contains(&part), "{part}\nis missing in\n{text}");
    }
    assert!(!text.contains("# [group"), "{text}");
    assert_eq!(text.matches("cfg (unix)").count(), 4, "method, two senders, registration");
}

#[test]
fn a_checkpoint_is_registered_and_no_method_of_the_handle() {
    let item = counter(
        "#[checkpoint] fn save(&self) -> Result<u64, String> { Ok(self.0) } \
         #[restore] fn load(saved: u64) -> Self { Self(saved) } fn get(&self) -> u64 { self.0 }",
    );
    let text = expanded(quote!(crate = mobula_core), item.parse().expect("tokens"));
    for part in [
        quote!(call.run::<(), u64, _>).to_string(),
        "map_err (__mobula_actor . save ()".to_owned(),
        quote!(call.build::<(u64,), Counter, _>).to_string(),
        quote!(Ok(Counter::load(saved))).to_string(),
    ] {
        assert!(text.contains(&part), "{part}\nis missing in\n{text}");
    }
    assert_eq!(text.matches("with_checkpoint").count(), 2, "new and load: {text}");
    assert!(text.contains("try_get") && !text.contains("try_save"), "{text}");
    assert!(!text.contains("# [checkpoint") && !text.contains("# [restore"), "{text}");
}

#[test]
fn a_state_may_be_saved_as_it_is() {
    let item = counter(
        "#[checkpoint] fn save(&self) -> Self { self.clone() } \
         #[restore] fn load(saved: Vec<Self>) -> Self { saved.pop() }",
    );
    let text = expanded(quote!(crate = mobula_core), item.parse().expect("tokens"));
    for part in [
        quote!(call.run::<(), Vec<Counter>, _>).to_string(),
        quote!(call.build::<(Vec<Counter>,), Counter, _>).to_string(),
    ] {
        assert!(text.contains(&part), "{part}\nis missing in\n{text}");
    }
}

#[test]
fn what_cannot_be_a_checkpoint_is_refused() {
    const SAVE: &str = "#[checkpoint] fn save(&self) -> u64 {}";
    const LOAD: &str = "#[restore] fn load(saved: u64) -> Self {}";
    let with = |more: &str| counter(&format!("{SAVE} {more}"));
    for (item, message) in [
        (counter(SAVE), "an actor with #[checkpoint] needs a #[restore] too"),
        (counter(LOAD), "an actor with #[restore] needs a #[checkpoint] too"),
        (
            with(&format!("{LOAD} {}", SAVE.replace("save", "again"))),
            "an actor has one #[checkpoint]",
        ),
        (with(&format!("{LOAD} {}", LOAD.replace("load", "again"))), "an actor has one #[restore]"),
        (with("#[restore] fn load() -> Self {}"), "takes what was saved and nothing else"),
        (with("#[restore] fn load(a: u64, b: u64) -> Self {}"), "takes what was saved"),
        (with("#[restore] fn load(&self) -> Self {}"), "takes what was saved"),
        (with("#[restore] fn load(saved: &str) -> Self {}"), "owned values, not references"),
        (with("#[restore(now)] fn load(saved: u64) -> Self {}"), "#[restore] takes no options"),
        (with("#[cfg(unix)] #[restore] fn load(saved: u64) -> Self {}"), "has no #[cfg]"),
        (counter(&format!("#[checkpoint] fn save(&mut self) -> u64 {{}} {LOAD}")), "takes &self"),
        (
            counter(&format!("#[checkpoint] fn save(&self, n: u8) -> u64 {{}} {LOAD}")),
            "nothing else",
        ),
        (counter(&format!("#[checkpoint] fn save() -> u64 {{}} {LOAD}")), "takes &self"),
        (counter(&format!("#[group(\"a\")] {SAVE} {LOAD}")), "no #[group]"),
    ] {
        let got = refused(quote!(), &item);
        assert!(got.contains(message), "{item}: {got}");
    }
}

#[test]
fn what_cannot_be_an_actor_is_refused() {
    for (item, message) in [
        ("impl Counter { fn add(&mut self) {} }".to_owned(), "needs a constructor"),
        ("impl<T> Counter<T> { fn new() -> Self {} }".to_owned(), "cannot be generic"),
        ("impl Clone for Counter { fn new() -> Self {} }".to_owned(), "not on one of a trait"),
        (counter("fn end(self) {}"), "take &self or &mut self"),
        (counter("fn get(&self, name: &str) {}"), "takes owned values, not references"),
        (counter("fn get(&self, out: Yield<u8>) {}"), "an actor's method cannot yield"),
        (counter("fn actor(&self) {}"), "`actor` cannot be called so"),
        (counter("fn urgent(&mut self) {}"), "the handle has a method of that name"),
        (counter("fn add(&self) {} fn try_add(&self) {}"), "`try_add` cannot be called so"),
        (counter("fn remote() {}"), "a generated function of that name"),
        (counter("#[group] fn get(&self) {}"), "name the group: #[group(\"io\")]"),
        (counter("#[group(\"\")] fn get(&self) {}"), "name the group"),
        (counter("#[group(\"a\")] #[group(\"b\")] fn get(&self) {}"), "one group"),
        (counter("#[group(\"a\")] fn help() {}"), "takes no self"),
        (counter("async fn get(&self) {}"), "cannot be async"),
    ] {
        let got = refused(quote!(), &item);
        assert!(got.contains(message), "{item}: {got}");
    }
}

#[test]
fn twelve_arguments_pass_and_a_thirteenth_is_refused() {
    let with = |count: usize| {
        let list: String = (0..count).map(|i| format!("x{i}: u8,")).collect();
        format!("fn f({list}) {{}}")
    };
    expanded(quote!(), with(12).parse().expect("tokens"));
    let got = refused(quote!(), &with(13));
    assert!(got.contains("at most 12 arguments, this one has 13"), "{got}");
}

#[test]
fn unknown_options_are_refused() {
    for (attribute, message) in [
        (quote!(cpus = 2), "unknown option `cpus`, expected `crate = path`"),
        (quote!(crate = a, crate = b), "`crate` is given twice"),
        (quote!(crate), "expected `=`"),
        (quote!(crate = "mobula"), "expected"),
    ] {
        let got = refused(attribute, "fn f() {}");
        assert!(got.contains(message), "{got}");
    }
}
