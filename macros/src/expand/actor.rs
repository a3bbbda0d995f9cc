//! From an annotated `impl` to an actor: its constructor, its methods, its handle.

use super::described;
use crate::signature::{Output, Signature};
use proc_macro2::{Ident, TokenStream};
use quote::{format_ident, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Error, FnArg, ImplItem, ImplItemFn, ItemImpl, Result, Type, Visibility};

/// The `impl` itself, the registrations and the handle.
pub(super) fn expand(krate: &TokenStream, item: &ItemImpl) -> Result<TokenStream> {
    let actor = actor_name(item)?;
    let methods = methods(item);
    let constructor = constructor(item, &methods)?;
    let visibility = &constructor.vis;
    let handle = format_ident!("{actor}Handle");
    let remote = describe(krate, actor, constructor)?;
    let calls = methods.iter().filter(|method| takes_self(method));
    let calls = calls.map(|method| call(krate, actor, method)).collect::<Result<Vec<_>>>()?;
    let (senders, registrations): (Vec<_>, Vec<_>) = calls.into_iter().unzip();
    let doc =
        format!("Sends calls to a `{actor}`, wherever it lives. Clones send to the same one.");
    let handle = handle_item(krate, &doc, visibility, actor, &handle, &senders);
    Ok(quote! { #item #remote #handle #(#registrations)* })
}

fn handle_item(
    krate: &TokenStream,
    doc: &str,
    visibility: &Visibility,
    actor: &Ident,
    handle: &Ident,
    senders: &[TokenStream],
) -> TokenStream {
    quote! {
        #[doc = #doc]
        #[derive(Clone, Debug)]
        #visibility struct #handle(#krate::ActorRef);

        impl ::core::convert::From<#krate::ActorRef> for #handle {
            fn from(actor: #krate::ActorRef) -> Self {
                Self(actor)
            }
        }

        impl ::core::convert::AsRef<#krate::ActorRef> for #handle {
            fn as_ref(&self) -> &#krate::ActorRef {
                &self.0
            }
        }

        impl #krate::RemoteActor for #actor {
            type Handle = #handle;
        }

        #[allow(dead_code)]
        impl #handle {
            /// The actor, for what is not one of its own methods.
            #visibility fn actor(&self) -> &#krate::ActorRef {
                &self.0
            }

            #(#senders)*
        }
    }
}

fn actor_name(item: &ItemImpl) -> Result<&Ident> {
    if let Some((_, path, _)) = &item.trait_ {
        return Err(Error::new(
            path.span(),
            "#[remote] goes on an actor's own impl, not on one of a trait",
        ));
    }
    if !item.generics.params.is_empty() {
        let message = "an actor cannot be generic: it is registered once, by name";
        return Err(Error::new(item.generics.span(), message));
    }
    match &*item.self_ty {
        Type::Path(path) if path.path.get_ident().is_some() => Ok(&path.path.segments[0].ident),
        other => Err(Error::new(other.span(), "write the actor's plain name here")),
    }
}

fn methods(item: &ItemImpl) -> Vec<&ImplItemFn> {
    let mut methods = Vec::new();
    for item in &item.items {
        if let ImplItem::Fn(function) = item {
            methods.push(function);
        }
    }
    methods
}

fn takes_self(method: &ImplItemFn) -> bool {
    matches!(method.sig.inputs.first(), Some(FnArg::Receiver(_)))
}

fn constructor<'a>(item: &ItemImpl, methods: &[&'a ImplItemFn]) -> Result<&'a ImplItemFn> {
    let new = methods.iter().find(|method| method.sig.ident == "new" && !takes_self(method));
    new.copied().ok_or_else(|| {
        let message = "an actor needs a constructor: fn new(..) -> Self, or -> Result<Self, E>";
        Error::new(item.self_ty.span(), message)
    })
}

fn read(sig: &syn::Signature) -> Result<Signature> {
    let signature = Signature::read(sig)?;
    if let Some(yields) = &signature.yields {
        let message = "an actor's method cannot yield values: make it a remote function, or give \
            a part of them with each call";
        return Err(Error::new_spanned(yields, message));
    }
    Ok(signature)
}

/// `Actor::remote(..)`, and the constructor's registration.
fn describe(krate: &TokenStream, actor: &Ident, new: &ImplItemFn) -> Result<TokenStream> {
    let signature = read(&new.sig)?;
    let (names, types) = arguments(&signature);
    let name = registered(actor, &new.sig.ident);
    let result = result(&signature, quote!(#actor::new(#(#names),*)));
    let visibility = &new.vis;
    let doc = format!("Describes a `{actor}`, to be started wherever the runtime places it.");
    let described = described(&names);
    Ok(quote! {
        #[allow(dead_code)]
        impl #actor {
            #[doc = #doc]
            #visibility fn remote(
                #(#names: impl ::core::convert::Into<#krate::remote::Arg<#types>>),*
            ) -> #krate::remote::ActorCall<Self> {
                #krate::remote::actor::<(#(#types,)*), Self>(#name, #described)
            }
        }

        #krate::remote::inventory::submit! {
            #krate::remote::RemoteFn::actor(#name, |call: #krate::remote::Call<'_>| {
                call.build::<(#(#types,)*), #actor, _>(move |(#(#names,)*): (#(#types,)*)| #result)
            })
        }
    })
}

/// A method of the handle, and the method's registration.
fn call(
    krate: &TokenStream,
    actor: &Ident,
    method: &ImplItemFn,
) -> Result<(TokenStream, TokenStream)> {
    if let Some(FnArg::Receiver(receiver)) = method.sig.inputs.first()
        && receiver.reference.is_none()
    {
        return Err(Error::new(receiver.span(), "an actor's methods take &self or &mut self"));
    }
    let mut sig = method.sig.clone();
    sig.inputs = sig.inputs.into_iter().skip(1).collect();
    let signature = read(&sig)?;
    let (names, types) = arguments(&signature);
    let (visibility, ident) = (&method.vis, &method.sig.ident);
    let name = registered(actor, ident);
    let value = signature.output.value();
    // No argument can be called so.
    let state = format_ident!("__mobula_actor");
    let result = result(&signature, quote!(#state.#ident(#(#names),*)));
    let docs = method.attrs.iter().filter(|attribute| attribute.path().is_ident("doc"));
    let docs: Vec<_> = docs.collect();
    let try_ident = format_ident!("try_{ident}");
    let try_doc = format!("[`{ident}`](Self::{ident}), or `Error::MailboxFull`.");
    let described = described(&names);
    let sender = quote! {
        #(#docs)*
        #visibility fn #ident(
            &self,
            #(#names: impl ::core::convert::Into<#krate::remote::Arg<#types>>),*
        ) -> #krate::ObjectRef<#value> {
            self.0.call::<(#(#types,)*), #value>(#name, #described)
        }

        #[doc = #try_doc]
        #visibility fn #try_ident(
            &self,
            #(#names: impl ::core::convert::Into<#krate::remote::Arg<#types>>),*
        ) -> ::core::result::Result<#krate::ObjectRef<#value>, #krate::Error> {
            self.0.try_call::<(#(#types,)*), #value>(#name, #described)
        }
    };
    let registration = quote! {
        #krate::remote::inventory::submit! {
            #krate::remote::RemoteFn::method(#name, |state, call: #krate::remote::Call<'_>| {
                let #state = #krate::remote::state_of::<#actor>(state)?;
                call.run::<(#(#types,)*), #value, _>(move |(#(#names,)*): (#(#types,)*)| #result)
            })
        }
    };
    Ok((sender, registration))
}

/// The call's value as a `Result` of a boxed error.
fn result(signature: &Signature, call: TokenStream) -> TokenStream {
    match &signature.output {
        // Spanned, so that an error type that does not convert is reported where it stands.
        Output::Fallible(ty) => quote_spanned! { ty.span() =>
            ::core::result::Result::map_err(#call, ::core::convert::Into::into)
        },
        Output::Plain(_) => quote!(::core::result::Result::Ok(#call)),
    }
}

/// The name under which worker processes know a method.
fn registered(actor: &Ident, method: &Ident) -> TokenStream {
    let path = format!("::{actor}::{method}");
    quote!(::core::concat!(::core::module_path!(), #path))
}

fn arguments(signature: &Signature) -> (Vec<&Ident>, Vec<&Type>) {
    signature.arguments.iter().map(|(name, ty)| (name, ty)).unzip()
}
