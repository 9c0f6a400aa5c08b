//! One module: the items that it defines, the names that it imports, and the paths that it uses.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proc_macro2::Span;
use syn::{UseTree, Visibility};

/// A path as it is written, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mention {
    /// Its names, `crate`, `self` and `super` among them.
    pub segments: Vec<String>,
    /// Line of its module's file, from 1.
    pub line: usize,
}

/// A name that a `use` brings into a module.
#[derive(Debug)]
pub struct Import {
    /// The path after `use`.
    pub mention: Mention,
    /// Whether others can take the name from this module: `pub use`.
    pub is_reexport: bool,
}

/// A place where the rule for errors is broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breach {
    /// Line of its module's file, from 1.
    pub line: usize,
    /// What is wrong.
    pub what: String,
}

impl Breach {
    pub(crate) fn new(at: Span, what: String) -> Self {
        Self {
            line: at.start().line,
            what,
        }
    }
}

/// One module: a file, or a `mod` with a body.
#[derive(Debug)]
pub struct Module {
    /// Its name after the crate's: empty for the root, `serve::jail` below.
    pub path: Vec<String>,
    /// The file it is written in.
    pub file: PathBuf,
    /// The module that declares it; `None` for the root.
    pub parent: Option<usize>,
    /// The modules that it declares.
    pub children: BTreeMap<String, usize>,
    /// Names of what it defines.
    pub items: BTreeSet<String>,
    /// What it imports, by the name that it gives it. A name can stand for a type and for a function, so it has a list.
    pub imports: BTreeMap<String, Vec<Import>>,
    /// What it imports as `path::*`.
    pub globs: Vec<Mention>,
    /// Paths of two or more names in its code.
    pub mentions: Vec<Mention>,
    /// Single names in its code, with the first line of each.
    pub names: BTreeMap<String, usize>,
    /// Where it breaks the rule for errors.
    pub breaches: Vec<Breach>,
}

impl Module {
    pub(crate) fn new(path: Vec<String>, file: &Path, parent: Option<usize>) -> Self {
        Self {
            path,
            file: file.to_owned(),
            parent,
            children: BTreeMap::new(),
            items: BTreeSet::new(),
            imports: BTreeMap::new(),
            globs: Vec::new(),
            mentions: Vec::new(),
            names: BTreeMap::new(),
            breaches: Vec::new(),
        }
    }

    /// Its name, as code of its crate would write it.
    pub fn name(&self) -> String {
        std::iter::once("crate")
            .chain(self.path.iter().map(String::as_str))
            .collect::<Vec<_>>()
            .join("::")
    }

    /// Takes what a `use` imports, also one within a function: there its name is taken for the whole module's.
    pub(crate) fn add_use(&mut self, declared: &syn::ItemUse) {
        // `use ::name` is another crate's.
        if declared.leading_colon.is_some() {
            return;
        }
        let is_reexport = !matches!(declared.vis, Visibility::Inherited);
        add_tree(self, &declared.tree, &mut Vec::new(), is_reexport);
    }
}

fn add_tree(module: &mut Module, tree: &UseTree, prefix: &mut Vec<String>, is_reexport: bool) {
    let mut add = |segments: Vec<String>, ident: &syn::Ident, name: String| {
        let mention = Mention {
            segments,
            line: ident.span().start().line,
        };
        module.imports.entry(name).or_default().push(Import {
            mention,
            is_reexport,
        });
    };
    let with = |last: &syn::Ident| {
        let mut segments = prefix.clone();
        // `use path::{self}` is the path itself.
        if last != "self" || segments.is_empty() {
            segments.push(plain(last));
        }
        segments
    };
    match tree {
        UseTree::Path(path) => {
            prefix.push(plain(&path.ident));
            add_tree(module, &path.tree, prefix, is_reexport);
            prefix.pop();
        }
        UseTree::Name(name) => {
            let segments = with(&name.ident);
            let known_as = segments.last().cloned().unwrap_or_default();
            add(segments, &name.ident, known_as);
        }
        UseTree::Rename(renamed) => {
            let known_as = match plain(&renamed.rename) {
                // `use Trait as _` imports methods and no name, so each gets an entry of its own in the table.
                name if name == "_" => format!("_{}", with(&renamed.ident).join("::")),
                name => name,
            };
            add(with(&renamed.ident), &renamed.ident, known_as);
        }
        UseTree::Glob(star) => {
            let line = star.star_token.spans[0].start().line;
            module.globs.push(Mention {
                segments: prefix.clone(),
                line,
            });
        }
        UseTree::Group(group) => {
            for tree in &group.items {
                add_tree(module, tree, prefix, is_reexport);
            }
        }
    }
}

/// An identifier without the `r#` that makes a name of a keyword.
pub(crate) fn plain(ident: &syn::Ident) -> String {
    let written = ident.to_string();
    written
        .strip_prefix("r#")
        .map_or(written.clone(), str::to_owned)
}
