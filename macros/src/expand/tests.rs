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
        quote!(pub fn remote(a: i64, b: Vec<f32>) -> ::mobula::Task<f32>),
        quote!(::mobula::remote::task(NAME, (a, b,))),
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
        quote!(pub fn remote(config: Config) -> mobula_core::GroupTask<()>).to_string(),
        quote!(mobula_core::remote::group_task(NAME, (config,))).to_string(),
        "RemoteFn :: member (NAME , | member , call :".into(),
        quote!(super::worker(member, config)).to_string(),
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
    let expected = quote! {
        pub fn remote(a: super::A, b: Vec<super::super::super::B>, c: crate::C, d: std::D)
            -> super::fake::Task<()>
    };
    assert!(text.contains(&expected.to_string()), "{text}");
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
    let expected = quote!(pub fn remote(arg0: (u8, u8), arg1: u8));
    assert!(text.contains(&expected.to_string()), "{text}");
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
        ("struct S;", "#[remote] goes on a function"),
    ] {
        let got = refused(quote!(), item);
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
