//! From the annotated function to the function, its module and its registration.

mod actor;
mod checkpoint;
mod groups;

use crate::signature::{Output, Signature};
use proc_macro2::{Group, Ident, TokenStream, TokenTree};
use quote::{ToTokens, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::parse::{ParseStream, Parser};
use syn::spanned::Spanned;
use syn::{Error, Item, ItemFn, Path, Result, Token};

/// The whole attribute, on plain tokens so that tests can call it.
pub(crate) fn expand(attribute: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let krate = options.parse2(attribute)?;
    match syn::parse2::<Item>(item)? {
        Item::Fn(function) => {
            let signature = Signature::read(&function.sig)?;
            let module = module(&krate, &function, &signature);
            Ok(quote! { #function #module })
        }
        Item::Impl(item) => actor::expand(&krate, &item),
        other => Err(Error::new(
            other.span(),
            "#[remote] goes on a function, fn name(a: A, b: B) -> Result<T, E>, or on the impl of an actor",
        )),
    }
}

/// Parses `crate = path`, the only option.
fn options(input: ParseStream<'_>) -> Result<TokenStream> {
    let mut krate = None;
    while !input.is_empty() {
        let option = input.call(Ident::parse_any)?;
        if option != "crate" {
            return Err(Error::new(
                option.span(),
                format!("unknown option `{option}`, expected `crate = path`"),
            ));
        }
        if krate.is_some() {
            return Err(Error::new(option.span(), "`crate` is given twice"));
        }
        input.parse::<Token![=]>()?;
        krate = Some(input.call(Path::parse_mod_style)?);
        if !input.is_empty() {
            input.parse::<Token![,]>()?;
        }
    }
    Ok(krate.map_or_else(|| quote!(::mobula), ToTokens::into_token_stream))
}

/// The module beside the function.
fn module(krate: &TokenStream, function: &ItemFn, signature: &Signature) -> TokenStream {
    let krate = &one_module_down(krate.clone());
    let (name, visibility) = (&function.sig.ident, &function.vis);
    // The module must come and go with the function.
    let cfgs = function.attrs.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    let describe = describe(krate, name, signature);
    let register = register(krate, name, signature);
    quote! {
        #(#cfgs)*
        #[doc(hidden)]
        #[allow(
            dead_code, missing_docs, non_snake_case, unreachable_pub, unused_imports,
            unused_qualifications, clippy::all
        )]
        #visibility mod #name {
            use super::*;

            /// The name under which worker processes know the function.
            // This module is called what the function is called, so the paths are equal too.
            pub const NAME: &str = ::core::module_path!();

            #describe

            #register
        }
    }
}

/// `fn remote(..) -> Task<T>`, or `GroupTask<T>` for a group member.
fn describe(krate: &TokenStream, name: &Ident, signature: &Signature) -> TokenStream {
    let (names, types) = arguments(signature);
    let value = one_module_down(signature.output.value().to_token_stream());
    let yields = signature.yields.as_ref().map(|ty| one_module_down(ty.to_token_stream()));
    let (task, build) = match (signature.is_member, &yields) {
        (true, _) => (quote!(GroupTask), quote!(group_task)),
        (false, Some(_)) => (quote!(StreamTask), quote!(stream_task)),
        (false, None) => (quote!(Task), quote!(task)),
    };
    let value = yields.unwrap_or(value);
    let doc = format!("Describes a call of `{name}`, to be run wherever the runtime places it.");
    let described = described(&names);
    quote! {
        #[doc = #doc]
        pub fn remote(
            #(#names: impl ::core::convert::Into<#krate::remote::Arg<#types>>),*
        ) -> #krate::#task<#value> {
            #krate::remote::#build::<(#(#types,)*), #value>(NAME, #described)
        }
    }
}

/// The entry in the registry: decode the arguments, call, encode the result.
fn register(krate: &TokenStream, name: &Ident, signature: &Signature) -> TokenStream {
    let (names, types) = arguments(signature);
    let value = one_module_down(signature.output.value().to_token_stream());
    let member = signature.is_member.then(|| quote!(member));
    let out = signature.yields.is_some().then(|| quote!(__mobula_out));
    let passed = names.iter().map(|name| quote!(#name));
    let passed = member.into_iter().chain(passed).chain(out.clone());
    let call = quote!(super::#name(#(#passed),*));
    let result = match &signature.output {
        // Spanned, so that an error type that does not convert is reported where it stands.
        Output::Fallible(ty) => quote_spanned! { ty.span() =>
            ::core::result::Result::map_err(#call, ::core::convert::Into::into)
        },
        Output::Plain(_) => quote!(::core::result::Result::Ok(#call)),
    };
    if let Some(yields) = &signature.yields {
        let item = one_module_down(yields.to_token_stream());
        return quote! {
            #krate::remote::inventory::submit! {
                #krate::remote::RemoteFn::stream(NAME, |outlet, call: #krate::remote::Call<'_>| {
                    call.stream::<(#(#types,)*), #item, _>(
                        outlet,
                        move |(#(#names,)*): (#(#types,)*), #out| #result,
                    )
                })
            }
        };
    }
    let run = quote! {
        call.run::<(#(#types,)*), #value, _>(move |(#(#names,)*): (#(#types,)*)| #result)
    };
    let entry = match signature.is_member {
        true => quote!(member(NAME, |member, call: #krate::remote::Call<'_>| #run)),
        false => quote!(new(NAME, |call: #krate::remote::Call<'_>| #run)),
    };
    quote! {
        #krate::remote::inventory::submit! { #krate::remote::RemoteFn::#entry }
    }
}

/// The tuple of what was passed, each a value or an object.
pub(super) fn described(names: &[&Ident]) -> TokenStream {
    quote!((#(::core::convert::Into::into(#names),)*))
}

fn arguments(signature: &Signature) -> (Vec<&Ident>, Vec<TokenStream>) {
    signature
        .arguments
        .iter()
        .map(|(name, ty)| (name, one_module_down(ty.to_token_stream())))
        .unzip()
}

/// The same paths, seen from a child module: `self::A` is `super::A` there, and `super::A` is
/// `super::super::A`. Everything else reaches the child through `use super::*`.
fn one_module_down(tokens: TokenStream) -> TokenStream {
    let mut after_path_separator = false;
    let mut moved = TokenStream::new();
    for token in tokens {
        let starts_path = !after_path_separator;
        after_path_separator = matches!(&token, TokenTree::Punct(punct) if punct.as_char() == ':');
        match token {
            TokenTree::Ident(ident) if starts_path && ident == "self" => {
                moved.extend(quote_spanned!(ident.span() => super));
            }
            TokenTree::Ident(ident) if starts_path && ident == "super" => {
                moved.extend(quote_spanned!(ident.span() => super::super));
            }
            TokenTree::Group(group) => {
                let inner = one_module_down(group.stream());
                moved.extend([TokenTree::Group(Group::new(group.delimiter(), inner))]);
            }
            other => moved.extend([other]),
        }
    }
    moved
}

#[cfg(test)]
mod tests;
