//! The modules of one crate as its files declare them: what each defines, imports and names.
//!
//! Code that only tests compile is left out. Paths are read from the tokens, not from types: what a macro expands to,
//! and which type a method belongs to, is not known here.

use std::path::{Path, PathBuf};

use quote::ToTokens;
use syn::visit_mut::{self, VisitMut};
use syn::{Attribute, Item, Meta};

use crate::errors;
use crate::module::{Module, plain};
use crate::paths;

/// Why a crate's source cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: std::io::Error,
    },
    /// A file is not Rust.
    #[error("cannot parse {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        source: syn::Error,
    },
    /// A module is declared, and neither of its two possible files is there.
    #[error("no file for module {name}, declared in {}", path.display())]
    Missing {
        /// The module.
        name: String,
        /// The file that declares it.
        path: PathBuf,
    },
}

/// Reads a crate from the file of its root, `lib.rs` or `main.rs`. The root is the first of the list.
pub fn read(root: &Path) -> Result<Vec<Module>, SourceError> {
    let mut modules = vec![Module::new(Vec::new(), root, None)];
    let directory = root.parent().unwrap_or(Path::new(""));
    let items = parse(root)?;
    fill(&mut modules, 0, directory, items)?;
    Ok(modules)
}

fn parse(path: &Path) -> Result<Vec<Item>, SourceError> {
    let read = |source| SourceError::Read {
        path: path.to_owned(),
        source,
    };
    let text = std::fs::read_to_string(path).map_err(read)?;
    let parsed = syn::parse_file(&text).map_err(|source| SourceError::Parse {
        path: path.to_owned(),
        source,
    })?;
    Ok(parsed.items)
}

/// Takes the items of a module's body. `directory` is where the files of its children lie.
fn fill(
    modules: &mut Vec<Module>,
    at: usize,
    directory: &Path,
    items: Vec<Item>,
) -> Result<(), SourceError> {
    for item in items {
        if attributes(&item).is_some_and(is_test_only) {
            continue;
        }
        match item {
            Item::Mod(child) => add_child(modules, at, directory, child)?,
            Item::Use(declared) => modules[at].add_use(&declared),
            mut other => {
                if let Some(name) = defined_name(&other) {
                    modules[at].items.insert(name);
                }
                WithoutTests.visit_item_mut(&mut other);
                modules[at].breaches.extend(errors::scan(&mut other));
                paths::scan(&mut modules[at], other.into_token_stream());
            }
        }
    }
    Ok(())
}

fn add_child(
    modules: &mut Vec<Module>,
    at: usize,
    directory: &Path,
    child: syn::ItemMod,
) -> Result<(), SourceError> {
    let name = plain(&child.ident);
    let mut path = modules[at].path.clone();
    path.push(name.clone());
    let index = modules.len();
    modules[at].children.insert(name.clone(), index);
    let below = directory.join(&name);
    let declared_in = modules[at].file.clone();
    if let Some((_, items)) = child.content {
        modules.push(Module::new(path, &declared_in, Some(at)));
        return fill(modules, index, &below, items);
    }
    let candidates = match path_attribute(&child.attrs) {
        Some(given) => vec![declared_in.parent().unwrap_or(Path::new("")).join(given)],
        None => vec![directory.join(format!("{name}.rs")), below.join("mod.rs")],
    };
    let Some(file) = candidates.into_iter().find(|file| file.is_file()) else {
        return Err(SourceError::Missing {
            name,
            path: declared_in,
        });
    };
    modules.push(Module::new(path, &file, Some(at)));
    let items = parse(&file)?;
    fill(modules, index, &below, items)
}

fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes
        .iter()
        .find(|attribute| attribute.path().is_ident("path"))
        .and_then(
            |attribute| match &attribute.meta.require_name_value().ok()?.value {
                syn::Expr::Lit(syn::ExprLit {
                    lit: syn::Lit::Str(text),
                    ..
                }) => Some(text.value()),
                _ => None,
            },
        )
}

fn attributes(item: &Item) -> Option<&[Attribute]> {
    Some(match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::ForeignMod(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::TraitAlias(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => return None,
    })
}

fn defined_name(item: &Item) -> Option<String> {
    let ident = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::TraitAlias(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(plain(ident))
}

fn is_test_only(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .filter(|attribute| attribute.path().is_ident("cfg"))
        .any(|attribute| {
            attribute
                .parse_args::<Meta>()
                .is_ok_and(|meta| holds(&meta) == Some(false))
        })
}

/// Whether a condition of `cfg` holds where tests are not compiled; `None` where it depends on something else.
fn holds(meta: &Meta) -> Option<bool> {
    let list = match meta {
        Meta::Path(path) if path.is_ident("test") => return Some(false),
        Meta::List(list) => list,
        _ => return None,
    };
    let all: syn::punctuated::Punctuated<Meta, syn::Token![,]> = list
        .parse_args_with(syn::punctuated::Punctuated::parse_terminated)
        .ok()?;
    let parts: Vec<_> = all.iter().map(holds).collect();
    if list.path.is_ident("not") {
        parts.first().copied().flatten().map(|part| !part)
    } else if list.path.is_ident("all") {
        parts.contains(&Some(false)).then_some(false)
    } else if list.path.is_ident("any") {
        parts
            .iter()
            .all(|part| *part == Some(false))
            .then_some(false)
    } else {
        None
    }
}

/// Takes methods, fields, variants and statements that only tests compile out of an item.
struct WithoutTests;

impl VisitMut for WithoutTests {
    fn visit_item_impl_mut(&mut self, item: &mut syn::ItemImpl) {
        item.items.retain(|member| match member {
            syn::ImplItem::Const(member) => !is_test_only(&member.attrs),
            syn::ImplItem::Fn(member) => !is_test_only(&member.attrs),
            syn::ImplItem::Type(member) => !is_test_only(&member.attrs),
            _ => true,
        });
        visit_mut::visit_item_impl_mut(self, item);
    }

    fn visit_fields_named_mut(&mut self, fields: &mut syn::FieldsNamed) {
        fields.named = std::mem::take(&mut fields.named)
            .into_iter()
            .filter(|field| !is_test_only(&field.attrs))
            .collect();
        visit_mut::visit_fields_named_mut(self, fields);
    }

    fn visit_item_enum_mut(&mut self, item: &mut syn::ItemEnum) {
        item.variants = std::mem::take(&mut item.variants)
            .into_iter()
            .filter(|variant| !is_test_only(&variant.attrs))
            .collect();
        visit_mut::visit_item_enum_mut(self, item);
    }

    fn visit_block_mut(&mut self, block: &mut syn::Block) {
        block.stmts.retain(|statement| match statement {
            syn::Stmt::Local(local) => !is_test_only(&local.attrs),
            syn::Stmt::Macro(call) => !is_test_only(&call.attrs),
            syn::Stmt::Item(item) => !attributes(item).is_some_and(is_test_only),
            syn::Stmt::Expr(syn::Expr::Block(block), _) => !is_test_only(&block.attrs),
            syn::Stmt::Expr(..) => true,
        });
        visit_mut::visit_block_mut(self, block);
    }
}
