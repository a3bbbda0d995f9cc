//! `#[checkpoint]` and `#[restore]` in an actor's `impl`: how its state outlives its process.

use super::actor::{naming, read, registered, result};
use proc_macro2::{Ident, TokenStream};
use quote::{format_ident, quote};
use syn::spanned::Spanned;
use syn::{Attribute, Error, ImplItem, ImplItemFn, ItemImpl, Result, Type};

/// The functions that save the state, and make it of what was saved.
pub(super) struct Checkpoint {
    save: ImplItemFn,
    load: ImplItemFn,
    /// What is saved.
    saved: Type,
}

/// The `impl` without the attributes, which the compiler does not know, and what they mark.
pub(super) fn without_checkpoint(
    actor: &Ident,
    mut item: ItemImpl,
) -> Result<(ItemImpl, Option<Checkpoint>)> {
    let save = take_marked(&mut item, "checkpoint")?;
    let load = take_marked(&mut item, "restore")?;
    let checkpoint = match (save, load) {
        (None, None) => None,
        (Some(save), Some(load)) => Some(Checkpoint::new(actor, save, load)?),
        (Some(save), None) => {
            let message = "an actor with #[checkpoint] needs a #[restore] too: \
                fn(saved: Saved) -> Self, or -> Result<Self, E>";
            return Err(Error::new(save.sig.ident.span(), message));
        }
        (None, Some(load)) => {
            let message = "an actor with #[restore] needs a #[checkpoint] too: \
                fn(&self) -> Saved, or -> Result<Saved, E>";
            return Err(Error::new(load.sig.ident.span(), message));
        }
    };
    Ok((item, checkpoint))
}

/// The only function that carries the attribute, which is taken off.
fn take_marked(item: &mut ItemImpl, name: &str) -> Result<Option<ImplItemFn>> {
    let mut marked = None;
    for part in &mut item.items {
        let ImplItem::Fn(function) = part else { continue };
        let is_mark = |attribute: &Attribute| attribute.path().is_ident(name);
        let (marks, rest): (Vec<_>, Vec<_>) = function.attrs.drain(..).partition(is_mark);
        function.attrs = rest;
        let Some(mark) = marks.first() else { continue };
        if mark.meta.require_path_only().is_err() {
            return Err(Error::new(mark.span(), format!("#[{name}] takes no options")));
        }
        if marks.len() > 1 || marked.is_some() {
            return Err(Error::new(mark.span(), format!("an actor has one #[{name}]")));
        }
        let has = |name| function.attrs.iter().any(|attribute| attribute.path().is_ident(name));
        if has("cfg") || has("group") {
            let message = format!("a function with #[{name}] has no #[cfg] and no #[group]");
            return Err(Error::new(mark.span(), message));
        }
        marked = Some(function.clone());
    }
    Ok(marked)
}

impl Checkpoint {
    fn new(actor: &Ident, save: ImplItemFn, load: ImplItemFn) -> Result<Self> {
        let looks = |receiver: &syn::Receiver| {
            receiver.reference.is_some() && receiver.mutability.is_none()
        };
        if save.sig.inputs.len() != 1 || !save.sig.receiver().is_some_and(looks) {
            let message = "#[checkpoint] goes on a function that takes &self and nothing else";
            return Err(Error::new(save.sig.ident.span(), message));
        }
        let message = "#[restore] goes on a function that takes what was saved and nothing else: \
            fn(saved: Saved) -> Self";
        let refused = || Error::new(load.sig.ident.span(), message);
        let is_alone = load.sig.inputs.len() == 1 && load.sig.receiver().is_none();
        if !is_alone || load.sig.ident == "new" {
            return Err(refused());
        }
        let mut arguments = read(&naming(actor, &load.sig)?)?.arguments;
        let (_, saved) = arguments.pop().ok_or_else(refused)?;
        Ok(Self { save, load, saved })
    }

    pub(super) fn is(&self, method: &ImplItemFn) -> bool {
        method.sig.ident == self.save.sig.ident
    }

    /// What a registration of a constructor says of it.
    pub(super) fn mention(&self, actor: &Ident) -> TokenStream {
        let save = registered(actor, &self.save.sig.ident);
        let load = registered(actor, &self.load.sig.ident);
        quote!(.with_checkpoint(#save, #load))
    }

    /// The registrations of the two functions: a method, and another constructor.
    pub(super) fn registrations(&self, krate: &TokenStream, actor: &Ident) -> Result<TokenStream> {
        let (saved, mention) = (&self.saved, self.mention(actor));
        let (save, load) = (&self.save.sig.ident, &self.load.sig.ident);
        let (save_name, load_name) = (registered(actor, save), registered(actor, load));
        let mut sig = naming(actor, &self.save.sig)?;
        sig.inputs.clear();
        let state = format_ident!("__mobula_actor");
        let saving = result(&read(&sig)?, quote!(#state.#save()));
        let loading = result(&read(&naming(actor, &self.load.sig)?)?, quote!(#actor::#load(saved)));
        Ok(quote! {
            #krate::remote::inventory::submit! {
                #krate::remote::RemoteFn::look_method(#save_name, |state, call: #krate::remote::Call<'_>| {
                    let #state = #krate::remote::state_of::<#actor>(state)?;
                    call.run::<(), #saved, _>(move |()| #saving)
                })
            }

            #krate::remote::inventory::submit! {
                #krate::remote::RemoteFn::actor(#load_name, |call: #krate::remote::Call<'_>| {
                    #[allow(unused_imports)]
                    use #krate::remote::{KeepLocal as _, KeepShared as _};
                    let keep = (&#krate::remote::Keep::<#actor>::new()).keep();
                    call.build::<(#saved,), #actor, _>(keep, move |(saved,): (#saved,)| #loading)
                }) #mention
            }
        })
    }
}
