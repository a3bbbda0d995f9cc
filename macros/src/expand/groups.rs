//! `#[group("name")]` on an actor's methods: which of them wait for each other.

use proc_macro2::{Ident, Span, TokenStream};
use quote::quote_spanned;
use syn::spanned::Spanned;
use syn::{Error, ImplItem, ItemImpl, LitStr, Result};

/// As many as the runtime keeps account of.
const MOST_GROUPS: usize = 64;

/// Which methods are in which group.
pub(super) struct Groups {
    methods: Vec<(Ident, LitStr)>,
}

impl Groups {
    /// Each group once, in the order of its first method.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for (_, group) in &self.methods {
            if !names.contains(&group.value()) {
                names.push(group.value());
            }
        }
        names
    }

    /// A method's group: 0 is the nameless one.
    pub(super) fn of(&self, method: &Ident) -> usize {
        let group = self.methods.iter().find(|(name, _)| name == method);
        let at = |name: String| self.names().iter().position(|other| *other == name);
        group.and_then(|(_, group)| at(group.value())).map_or(0, |at| at + 1)
    }

    /// Calls of different groups run at the same time, which not every state allows.
    pub(super) fn must_be_shared(&self, actor: &Ident) -> Option<TokenStream> {
        let (_, group) = self.methods.first()?;
        Some(quote_spanned! { group.span() =>
            const _: () = {
                const fn an_actor_with_groups_is_shared_by_threads<A: Send + Sync>() {}
                an_actor_with_groups_is_shared_by_threads::<#actor>();
            };
        })
    }
}

/// The `impl` without the attributes, which the compiler does not know, and what they say.
pub(super) fn without_groups(item: &ItemImpl) -> Result<(ItemImpl, Groups)> {
    let mut item = item.clone();
    let mut methods = Vec::new();
    for part in &mut item.items {
        let ImplItem::Fn(method) = part else { continue };
        let is_group = |attribute: &syn::Attribute| attribute.path().is_ident("group");
        let (groups, rest): (Vec<_>, Vec<_>) = method.attrs.drain(..).partition(is_group);
        method.attrs = rest;
        let Some(attribute) = groups.first() else { continue };
        let span = attribute.span();
        let refuse = |message| Err(Error::new(span, message));
        if groups.len() > 1 {
            return refuse("a method is in one group");
        }
        if method.sig.receiver().is_none() {
            return refuse("only methods are in a group: this function takes no self");
        }
        match attribute.parse_args::<LitStr>() {
            Ok(name) if !name.value().is_empty() => methods.push((method.sig.ident.clone(), name)),
            _ => return refuse("name the group: #[group(\"io\")]"),
        }
    }
    let groups = Groups { methods };
    if groups.names().len() > MOST_GROUPS {
        let message = format!("an actor has at most {MOST_GROUPS} groups");
        return Err(Error::new(Span::call_site(), message));
    }
    Ok((item, groups))
}
