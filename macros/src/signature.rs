//! What a remote function looks like from outside, or why it cannot be remote.

use proc_macro2::{Span, TokenStream, TokenTree};
use quote::{ToTokens, format_ident};
use syn::spanned::Spanned;
use syn::{Error, FnArg, GenericArgument, Ident, Pat, PathArguments, Result, ReturnType, Type};

/// serde implements its traits for tuples of up to 16; twelve leaves room and is plenty.
const MAX_ARGUMENTS: usize = 12;

/// The parts of a function that its remote twin needs.
pub(crate) struct Signature {
    /// Whether the first parameter is the group's `Member`, which the worker supplies.
    pub(crate) is_member: bool,
    /// What goes into the last parameter, if that is a `Yield`, which the worker supplies.
    pub(crate) yields: Option<Type>,
    /// Name and type of each argument that travels.
    pub(crate) arguments: Vec<(Ident, Type)>,
    pub(crate) output: Output,
}

/// What the function returns.
pub(crate) enum Output {
    /// `Result<T, E>`, holding `T`.
    Fallible(Type),
    /// Anything else.
    Plain(Type),
}

impl Output {
    /// The type of a successful result.
    pub(crate) fn value(&self) -> &Type {
        match self {
            Output::Fallible(value) | Output::Plain(value) => value,
        }
    }
}

impl Signature {
    pub(crate) fn read(signature: &syn::Signature) -> Result<Self> {
        refuse_qualifiers(signature)?;
        let mut arguments = signature
            .inputs
            .iter()
            .enumerate()
            .map(|(position, input)| argument(position, input))
            .collect::<Result<Vec<_>>>()?;
        let is_member = arguments.first().is_some_and(|(_, ty)| is_named(ty, "Member"));
        if is_member {
            arguments.remove(0);
        }
        let yields = yields(&mut arguments, is_member)?;
        if let Some((name, _)) = arguments.get(MAX_ARGUMENTS) {
            let got = arguments.len();
            return Err(Error::new(
                name.span(),
                format!(
                    "a remote function takes at most {MAX_ARGUMENTS} arguments, this one has {got}: group them in a struct"
                ),
            ));
        }
        let output = output(&signature.output)?;
        if let Some(yields) = &yields {
            refuse_output(yields, &output)?;
        }
        Ok(Self { is_member, yields, arguments, output })
    }
}

/// Takes the `Yield<T>` out of the arguments: its `T`.
fn yields(arguments: &mut Vec<(Ident, Type)>, is_member: bool) -> Result<Option<Type>> {
    let is_yield = |(_, ty): &(Ident, Type)| is_named(ty, "Yield");
    let last = arguments.pop_if(|argument| is_yield(argument)).map(|(_, ty)| ty);
    if let Some((name, _)) = arguments.iter().find(|argument| is_yield(argument)) {
        return refuse(name.span(), "a `Yield` is the last parameter, and there is one at most");
    }
    let Some(ty) = last else { return Ok(None) };
    if is_member {
        return refuse(ty.span(), "a group member cannot yield values: report them instead");
    }
    match first_generic(&ty) {
        Some(value) => Ok(Some(value)),
        None => refuse(ty.span(), "cannot see what this `Yield` takes: write it out as `Yield<T>`"),
    }
}

/// What a function yields is all that it gives.
fn refuse_output(yields: &Type, output: &Output) -> Result<()> {
    if matches!(output.value(), Type::Tuple(tuple) if tuple.elems.is_empty()) {
        return Ok(());
    }
    let message =
        "a function that yields values gives nothing else: it returns () or Result<(), E>";
    Err(Error::new_spanned(yields, message))
}

fn refuse_qualifiers(signature: &syn::Signature) -> Result<()> {
    let generics = &signature.generics;
    if !generics.params.is_empty() || generics.where_clause.is_some() {
        let span = if generics.params.is_empty() {
            generics.where_clause.span()
        } else {
            generics.params.span()
        };
        return refuse(
            span,
            "a remote function cannot be generic: it is registered once, by name; write one function per type",
        );
    }
    if let Some(token) = &signature.asyncness {
        return refuse(
            token.span(),
            "a remote function cannot be async: it runs on its own thread and may block",
        );
    }
    if let Some(token) = &signature.unsafety {
        return refuse(
            token.span(),
            "a remote function cannot be unsafe: its caller is another process",
        );
    }
    if let Some(token) = &signature.variadic {
        return refuse(token.span(), "a remote function cannot be variadic");
    }
    Ok(())
}

/// Name and type of one parameter. A pattern that is no plain name gets the name `arg<position>`.
fn argument(position: usize, input: &FnArg) -> Result<(Ident, Type)> {
    let parameter = match input {
        FnArg::Typed(parameter) => parameter,
        FnArg::Receiver(receiver) => {
            return refuse(
                receiver.span(),
                "a remote function cannot take self: make it a free function that takes the value as an argument",
            );
        }
    };
    refuse_borrows(parameter.ty.to_token_stream(), "takes")?;
    let name = match &*parameter.pat {
        Pat::Ident(pattern) if pattern.subpat.is_none() => pattern.ident.clone(),
        pattern => format_ident!("arg{position}", span = pattern.span()),
    };
    Ok((name, (*parameter.ty).clone()))
}

fn output(declared: &ReturnType) -> Result<Output> {
    let ty = match declared {
        ReturnType::Default => return Ok(Output::Plain(syn::parse_quote!(()))),
        ReturnType::Type(_, ty) => ty,
    };
    if let Type::Never(never) = &**ty {
        return refuse(
            never.span(),
            "a remote function must return: its caller waits for the value",
        );
    }
    refuse_borrows(ty.to_token_stream(), "returns")?;
    if !is_named(ty, "Result") {
        return Ok(Output::Plain((**ty).clone()));
    }
    match first_generic(ty) {
        Some(value) => Ok(Output::Fallible(value)),
        None => {
            refuse(ty.span(), "cannot see what this `Result` holds: write it out as `Result<T, E>`")
        }
    }
}

/// Refuses what has no owned serde form, wherever it sits in the type.
fn refuse_borrows(tokens: TokenStream, verb: &str) -> Result<()> {
    for token in tokens {
        match &token {
            TokenTree::Group(group) => refuse_borrows(group.stream(), verb)?,
            TokenTree::Punct(punct) if punct.as_char() == '&' => {
                return refuse(
                    token.span(),
                    &format!(
                        "a remote function {verb} owned values, not references: they cross process borders"
                    ),
                );
            }
            TokenTree::Ident(ident) if ident == "impl" => {
                return refuse(
                    token.span(),
                    &format!("a remote function {verb} concrete types, not `impl Trait`"),
                );
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether `ty` is a path whose last segment is `name`.
fn is_named(ty: &Type, name: &str) -> bool {
    matches!(ty, Type::Path(path) if path.path.segments.last().is_some_and(|last| last.ident == name))
}

/// The `T` of `path::Name<T, ..>`.
fn first_generic(ty: &Type) -> Option<Type> {
    let Type::Path(path) = ty else { return None };
    let PathArguments::AngleBracketed(generics) = &path.path.segments.last()?.arguments else {
        return None;
    };
    generics.args.iter().find_map(|argument| match argument {
        GenericArgument::Type(ty) => Some(ty.clone()),
        _ => None,
    })
}

fn refuse<T>(span: Span, message: &str) -> Result<T> {
    Err(Error::new(span, message))
}
