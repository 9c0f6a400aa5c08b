//! One rule for errors: the text of an error neither repeats its source nor hides it, and whoever shows an error shows
//! it by `report::chain`, with its sources.
//!
//! Types are not known here. An error is what is called one: a field by its type, a variable by its name.

use std::collections::BTreeSet;

use proc_macro2::{Delimiter, Span, TokenStream, TokenTree};
use quote::ToTokens;
use syn::visit_mut::{self, VisitMut};
use syn::{Attribute, Field, Fields, GenericArgument, Item, LitStr, Meta, PathArguments, Type};

use crate::module::{Breach, plain};

/// Names that variables and fields have which hold an error.
const NAMES: &[&str] = &[
    "cause", "e", "err", "error", "failure", "fault", "refusal", "refused", "source",
];

/// Macros that format their arguments.
const FORMATS: &[&str] = &[
    "assert",
    "eprint",
    "eprintln",
    "format",
    "format_args",
    "panic",
    "print",
    "println",
    "unreachable",
];

/// Macros that format their arguments but the first, to which they write.
const WRITES: &[&str] = &["write", "writeln"];

/// Macros of `tracing`.
const LOGS: &[&str] = &["debug", "error", "event", "info", "trace", "warn"];

/// Finds the breaches in an item.
pub(crate) fn scan(item: &mut Item) -> Vec<Breach> {
    let mut definitions = Definitions(Vec::new());
    definitions.visit_item_mut(item);
    let mut found = definitions.0;
    uses(item.to_token_stream(), &mut found);
    found
}

/// Looks at the types that derive `thiserror::Error`.
struct Definitions(Vec<Breach>);

impl VisitMut for Definitions {
    fn visit_item_struct_mut(&mut self, item: &mut syn::ItemStruct) {
        self.check(&item.attrs, &item.fields);
        visit_mut::visit_item_struct_mut(self, item);
    }

    fn visit_variant_mut(&mut self, variant: &mut syn::Variant) {
        self.check(&variant.attrs, &variant.fields);
        visit_mut::visit_variant_mut(self, variant);
    }
}

impl Definitions {
    /// Looks at the fields of what has a text of its own; a transparent error shows another's text and sources.
    fn check(&mut self, attributes: &[Attribute], fields: &Fields) {
        let Some(Meta::List(text)) = attributes
            .iter()
            .find(|attribute| attribute.path().is_ident("error"))
            .map(|attribute| &attribute.meta)
        else {
            return;
        };
        if text.tokens.to_string() == "transparent" {
            return;
        }
        let shown = shown(text.tokens.clone());
        let has_source = fields.iter().any(is_source);
        for (index, field) in fields.iter().enumerate() {
            let (name, at) = match &field.ident {
                Some(ident) => (plain(ident), ident.span()),
                None => (index.to_string(), span_of(&field.ty)),
            };
            if is_source(field) {
                if shown.contains(&name) {
                    let what = format!("the text of an error repeats its source `{name}`");
                    self.0.push(Breach::new(at, what));
                }
            } else if is_error(&field.ty) && !(has_source && shown.contains(&name)) {
                // Of two errors one is the source, and the text shows the other.
                let what = format!("`{name}` is an error, and no source of the one that has it");
                self.0.push(Breach::new(at, what));
            }
        }
    }
}

fn span_of(tokens: &impl ToTokens) -> Span {
    let first = tokens.to_token_stream().into_iter().next();
    first.map_or_else(Span::call_site, |token| token.span())
}

/// What `thiserror` takes for the source.
fn is_source(field: &Field) -> bool {
    field.ident.as_ref().is_some_and(|ident| ident == "source")
        || field.attrs.iter().any(|attribute| {
            attribute.path().is_ident("source") || attribute.path().is_ident("from")
        })
}

/// Whether a type is called an error, also where it is boxed.
fn is_error(of: &Type) -> bool {
    let path = match of {
        Type::Path(of) => &of.path,
        Type::TraitObject(of) => {
            return of.bounds.iter().any(|bound| match bound {
                syn::TypeParamBound::Trait(bound) => is_error_path(&bound.path),
                _ => false,
            });
        }
        _ => return false,
    };
    let boxed = path.segments.last().and_then(|last| match &last.arguments {
        PathArguments::AngleBracketed(arguments) if last.ident != "PhantomData" => {
            arguments.args.first()
        }
        _ => None,
    });
    is_error_path(path) || matches!(boxed, Some(GenericArgument::Type(inner)) if is_error(inner))
}

fn is_error_path(path: &syn::Path) -> bool {
    path.segments.last().is_some_and(|last| {
        let name = last.ident.to_string();
        name.ends_with("Error") || name.ends_with("Refusal") || name == "Errno"
    })
}

/// The fields that the text of an error shows, by name or number, in its literal or in what follows that. What a
/// function makes of a field is not the field.
fn shown(text: TokenStream) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for token in text {
        match token {
            TokenTree::Ident(ident) => {
                names.insert(plain(&ident));
            }
            TokenTree::Literal(literal) => match string(&literal) {
                Some(format) => names.extend(placeholders(&format).map(|(name, _)| name)),
                // `.0` is a dot and a number.
                None => {
                    names.insert(literal.to_string());
                }
            },
            TokenTree::Group(_) | TokenTree::Punct(_) => {}
        }
    }
    names
}

fn string(literal: &proc_macro2::Literal) -> Option<String> {
    let text = syn::parse_str::<LitStr>(&literal.to_string()).ok()?;
    Some(text.value())
}

/// The names in the braces of a format, and how each is formatted.
fn placeholders(format: &str) -> impl Iterator<Item = (String, String)> {
    let plain = format.replace("{{", "").replace("}}", "");
    let parts: Vec<_> = plain
        .split('{')
        .skip(1)
        .filter_map(|part| part.split_once('}'))
        .map(|(inside, _)| {
            let (name, how) = inside.split_once(':').unwrap_or((inside, ""));
            (name.trim().to_owned(), how.to_owned())
        })
        .collect();
    parts.into_iter()
}

/// Looks for errors that are shown without their sources, in macros and by `to_string`.
fn uses(tokens: TokenStream, found: &mut Vec<Breach>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (at, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Group(group) => {
                if let Some(name) = macro_name(&tokens[..at]) {
                    arguments(&name, group.stream(), found);
                }
                uses(group.stream(), found);
            }
            TokenTree::Ident(ident)
                if ident == "to_string" && follows_error(&tokens[..at], &tokens[at + 1..]) =>
            {
                found.push(without_sources(ident.span()));
            }
            TokenTree::Ident(_) | TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
}

/// The name before the `!` that stands before the arguments of a macro.
fn macro_name(before: &[TokenTree]) -> Option<String> {
    match before {
        [.., TokenTree::Ident(name), TokenTree::Punct(bang)] if bang.as_char() == '!' => {
            Some(name.to_string())
        }
        _ => None,
    }
}

/// Whether what stands between these tokens is a method that is called of an error.
fn follows_error(before: &[TokenTree], after: &[TokenTree]) -> bool {
    let is_call = matches!(after.first(), Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Parenthesis);
    match before {
        [.., TokenTree::Ident(name), TokenTree::Punct(dot)] if dot.as_char() == '.' => {
            is_call && is_error_name(name)
        }
        _ => false,
    }
}

fn is_error_name(name: &proc_macro2::Ident) -> bool {
    NAMES.contains(&plain(name).as_str())
}

fn without_sources(at: Span) -> Breach {
    Breach::new(at, "an error is shown without its sources".to_owned())
}

/// Looks at what a macro that formats is given.
fn arguments(name: &str, tokens: TokenStream, found: &mut Vec<Breach>) {
    let first = usize::from(WRITES.contains(&name));
    if first == 0 && !FORMATS.contains(&name) && !LOGS.contains(&name) {
        return;
    }
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let is_comma =
        |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ',');
    for argument in tokens.split(is_comma).skip(first) {
        match argument {
            [TokenTree::Literal(literal)] => {
                let format = string(literal).unwrap_or_default();
                let is_shown = |(name, how): (String, String)| {
                    NAMES.contains(&name.as_str()) && !how.contains('?')
                };
                if placeholders(&format).any(is_shown) {
                    found.push(without_sources(literal.span()));
                }
            }
            _ => found.extend(shown_error(argument).map(without_sources)),
        }
    }
}

/// Where an argument is an error and nothing else: a variable or a field, by its name. `%` of `tracing` shows it too,
/// `?` is for programmers.
fn shown_error(argument: &[TokenTree]) -> Option<Span> {
    let is_punct = |token: &TokenTree, of: char| matches!(token, TokenTree::Punct(punct) if punct.as_char() == of);
    let mut value = match argument {
        [TokenTree::Ident(_), equals, value @ ..] if is_punct(equals, '=') => value,
        value => value,
    };
    while let [sigil, rest @ ..] = value
        && (is_punct(sigil, '%') || is_punct(sigil, '&'))
    {
        value = rest;
    }
    // `error as &dyn Error`: in the log in JSON it has no sources.
    let is_as = |token: &TokenTree| matches!(token, TokenTree::Ident(word) if word == "as");
    let value = value.split(is_as).next().unwrap_or_default();
    let is_path = value
        .iter()
        .all(|token| matches!(token, TokenTree::Ident(_)) || is_punct(token, '.'));
    match value {
        [.., TokenTree::Ident(name)] if is_path && is_error_name(name) => Some(name.span()),
        _ => None,
    }
}
