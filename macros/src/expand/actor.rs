//! From an annotated `impl` to an actor: its constructor, its methods, its handle.

use super::checkpoint::{Checkpoint, without_checkpoint};
use super::described;
use super::groups::{Groups, without_groups};
use crate::signature::{Output, Signature};
use proc_macro2::{Group, Ident, TokenStream, TokenTree};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Attribute, Error, FnArg, ImplItem, ImplItemFn, ItemImpl, Result, Type, Visibility};

/// The `impl` itself, the registrations and the handle.
pub(super) fn expand(krate: &TokenStream, item: &ItemImpl) -> Result<TokenStream> {
    let actor = actor_name(item)?;
    let (item, checkpoint) = without_checkpoint(actor, item.clone())?;
    let (item, groups) = without_groups(&item)?;
    let (item, checkpoint) = (&item, checkpoint.as_ref());
    let mut methods = methods(item);
    // Not a method of the handle.
    methods.retain(|method| !checkpoint.is_some_and(|checkpoint| checkpoint.is(method)));
    refuse_clashes(&methods)?;
    let constructor = constructor(item, &methods)?;
    let visibility = &constructor.vis;
    let handle = format_ident!("{actor}Handle");
    let remote = describe(krate, actor, constructor, checkpoint)?;
    let calls = methods.iter().filter(|method| takes_self(method));
    let calls = calls.map(|method| call(krate, actor, method, &groups));
    let calls = calls.collect::<Result<Vec<_>>>()?;
    let (senders, registrations): (Vec<_>, Vec<_>) = calls.into_iter().unzip();
    let doc =
        format!("Sends calls to a `{actor}`, wherever it lives. Clones send to the same one.");
    let handle = handle_item(krate, &doc, visibility, actor, &handle, &senders, &groups);
    let shared = groups.must_be_shared(actor);
    let saving = checkpoint.map(|checkpoint| checkpoint.registrations(krate, actor)).transpose()?;
    Ok(quote! { #item #remote #handle #(#registrations)* #saving #shared })
}

fn handle_item(
    krate: &TokenStream,
    doc: &str,
    visibility: &Visibility,
    actor: &Ident,
    handle: &Ident,
    senders: &[TokenStream],
    groups: &Groups,
) -> TokenStream {
    let groups = groups.names();
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
            const GROUPS: &'static [&'static str] = &[#(#groups),*];
        }

        #[allow(dead_code)]
        impl #handle {
            /// The actor, for what is not one of its own methods.
            #visibility fn actor(&self) -> &#krate::ActorRef {
                &self.0
            }

            /// A handle to the same actor whose calls overtake those that wait in their group.
            #visibility fn urgent(&self) -> Self {
                Self(self.0.urgent())
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

pub(super) fn read(sig: &syn::Signature) -> Result<Signature> {
    let signature = Signature::read(sig)?;
    if let Some(yields) = &signature.yields {
        let message = "an actor's method cannot yield values: make it a remote function, or give \
            a part of them with each call";
        return Err(Error::new_spanned(yields, message));
    }
    Ok(signature)
}

/// `Actor::remote(..)`, and the constructor's registration.
fn describe(
    krate: &TokenStream,
    actor: &Ident,
    new: &ImplItemFn,
    checkpoint: Option<&Checkpoint>,
) -> Result<TokenStream> {
    let signature = read(&naming(actor, &new.sig)?)?;
    let (names, types) = arguments(&signature);
    let name = registered(actor, &new.sig.ident);
    let result = result(&signature, quote!(#actor::new(#(#names),*)));
    let visibility = &new.vis;
    let doc = format!("Describes a `{actor}`, to be started wherever the runtime places it.");
    let described = described(&names);
    let saved = checkpoint.map(|checkpoint| checkpoint.mention(actor));
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
                #[allow(unused_imports)]
                use #krate::remote::{KeepLocal as _, KeepShared as _};
                let keep = (&#krate::remote::Keep::<#actor>::new()).keep();
                call.build::<(#(#types,)*), #actor, _>(keep, move |(#(#names,)*): (#(#types,)*)| #result)
            }) #saved
        }
    })
}

/// A method of the handle, and the method's registration.
fn call(
    krate: &TokenStream,
    actor: &Ident,
    method: &ImplItemFn,
    groups: &Groups,
) -> Result<(TokenStream, TokenStream)> {
    let is_exclusive = changes(method)?;
    let mut sig = naming(actor, &method.sig)?;
    sig.inputs = sig.inputs.into_iter().skip(1).collect();
    let signature = read(&sig)?;
    let (names, types) = arguments(&signature);
    let (visibility, ident) = (&method.vis, &method.sig.ident);
    let name = registered(actor, ident);
    let value = signature.output.value();
    // No argument can be called so.
    let state = format_ident!("__mobula_actor");
    let result = result(&signature, quote!(#state.#ident(#(#names),*)));
    let docs = with_name(method, "doc");
    // They must come and go with the method.
    let cfgs = with_name(method, "cfg");
    let group = groups.of(ident);
    let id = quote!(#krate::remote::Method::new(#name, #group, #is_exclusive));
    let try_ident = format_ident!("try_{ident}");
    let try_doc = format!("[`{ident}`](Self::{ident}), or `Error::MailboxFull`.");
    let described = described(&names);
    let sender = quote! {
        #(#cfgs)*
        #(#docs)*
        #visibility fn #ident(
            &self,
            #(#names: impl ::core::convert::Into<#krate::remote::Arg<#types>>),*
        ) -> #krate::ObjectRef<#value> {
            self.0.call::<(#(#types,)*), #value>(#id, #described)
        }

        #(#cfgs)*
        #[doc = #try_doc]
        #visibility fn #try_ident(
            &self,
            #(#names: impl ::core::convert::Into<#krate::remote::Arg<#types>>),*
        ) -> ::core::result::Result<#krate::ObjectRef<#value>, #krate::Error> {
            self.0.try_call::<(#(#types,)*), #value>(#id, #described)
        }
    };
    let (entry, access) = match is_exclusive {
        true => (quote!(change_method), quote!(state_of_mut)),
        false => (quote!(look_method), quote!(state_of)),
    };
    let registration = quote! {
        #(#cfgs)*
        #krate::remote::inventory::submit! {
            #krate::remote::RemoteFn::#entry(#name, |state, call: #krate::remote::Call<'_>| {
                let #state = #krate::remote::#access::<#actor>(state)?;
                call.run::<(#(#types,)*), #value, _>(move |(#(#names,)*): (#(#types,)*)| #result)
            })
        }
    };
    Ok((sender, registration))
}

fn with_name<'a>(method: &'a ImplItemFn, name: &str) -> Vec<&'a Attribute> {
    method.attrs.iter().filter(|attribute| attribute.path().is_ident(name)).collect()
}

/// Whether the method takes `&mut self`; `&self` is the other way.
fn changes(method: &ImplItemFn) -> Result<bool> {
    match method.sig.inputs.first() {
        Some(FnArg::Receiver(receiver)) if receiver.reference.is_some() => {
            Ok(receiver.mutability.is_some())
        }
        other => Err(Error::new(other.span(), "an actor's methods take &self or &mut self")),
    }
}

/// The signature with the actor's name for `Self`, which is another type in the handle.
pub(super) fn naming(actor: &Ident, sig: &syn::Signature) -> Result<syn::Signature> {
    syn::parse2(without_self(actor, sig.to_token_stream()))
}

fn without_self(actor: &Ident, tokens: TokenStream) -> TokenStream {
    let named = |token| match token {
        TokenTree::Ident(ident) if ident == "Self" => {
            TokenTree::Ident(Ident::new(&actor.to_string(), ident.span()))
        }
        TokenTree::Group(group) => {
            let inner = without_self(actor, group.stream());
            TokenTree::Group(Group::new(group.delimiter(), inner))
        }
        other => other,
    };
    tokens.into_iter().map(named).collect()
}

/// Names that the actor or its handle has already.
fn refuse_clashes(methods: &[&ImplItemFn]) -> Result<()> {
    for method in methods {
        let name = method.sig.ident.to_string();
        let twin =
            |of: &str| methods.iter().any(|other| takes_self(other) && other.sig.ident == of);
        let reason = match name.strip_prefix("try_") {
            _ if name == "remote" => "the actor has a generated function of that name",
            _ if takes_self(method) && (name == "actor" || name == "urgent") => {
                "the handle has a method of that name"
            }
            Some(of) if takes_self(method) && twin(of) => {
                "the handle has a method of that name, which does not wait for room in the mailbox"
            }
            _ => continue,
        };
        let message = format!("`{name}` cannot be called so: {reason}; give it another name");
        return Err(Error::new(method.sig.ident.span(), message));
    }
    Ok(())
}

/// The call's value as a `Result` of a boxed error.
pub(super) fn result(signature: &Signature, call: TokenStream) -> TokenStream {
    match &signature.output {
        // Spanned, so that an error type that does not convert is reported where it stands.
        Output::Fallible(ty) => quote_spanned! { ty.span() =>
            ::core::result::Result::map_err(#call, ::core::convert::Into::into)
        },
        Output::Plain(_) => quote!(::core::result::Result::Ok(#call)),
    }
}

/// The name under which worker processes know a method.
pub(super) fn registered(actor: &Ident, method: &Ident) -> TokenStream {
    let path = format!("::{actor}::{method}");
    quote!(::core::concat!(::core::module_path!(), #path))
}

fn arguments(signature: &Signature) -> (Vec<&Ident>, Vec<&Type>) {
    signature.arguments.iter().map(|(name, ty)| (name, ty)).unzip()
}
