//! Which module of a crate uses which: every path is followed, through re-exports, to the module that defines what it
//! names.

use crate::module::{Mention, Module};

/// One use of another module's item.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    /// The module that uses, as an index into the crate's list.
    pub from: usize,
    /// The module that defines.
    pub to: usize,
    /// The item.
    pub item: String,
    /// Line of the using module's file that names it first.
    pub line: usize,
}

/// What a path leads to: a module, or an item that one defines.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    module: usize,
    item: Option<String>,
}

/// Re-exports that lead in a circle are the compiler's to refuse; a longer chain than this is one.
const MOST_HOPS: usize = 32;

/// Every use of one module's item by another, sorted. To import a module is no use of it until something of it is
/// named, and so is the re-export of a descendant's item.
pub fn edges(modules: &[Module]) -> Vec<Edge> {
    let mut found = Vec::new();
    for (from, module) in modules.iter().enumerate() {
        let mut add = |mention: &Mention| {
            for target in resolve(modules, from, &mention.segments, MOST_HOPS) {
                if let Some(item) = target.item
                    && target.module != from
                {
                    found.push(Edge {
                        from,
                        to: target.module,
                        item,
                        line: mention.line,
                    });
                }
            }
        };
        for import in module.imports.values().flatten() {
            let is_facade = import.is_reexport
                && resolve(modules, from, &import.mention.segments, MOST_HOPS)
                    .iter()
                    .all(|target| is_below(modules, target.module, from));
            if !is_facade {
                add(&import.mention);
            }
        }
        for mention in &module.mentions {
            add(mention);
        }
        for (name, line) in &module.names {
            add(&Mention {
                segments: vec![name.clone()],
                line: *line,
            });
        }
    }
    found.sort();
    // The first mention of an item stands for the others.
    found.dedup_by(|next, first| {
        (next.from, next.to, &next.item) == (first.from, first.to, &first.item)
    });
    found
}

/// Whether `module` lies somewhere below `ancestor`.
fn is_below(modules: &[Module], module: usize, ancestor: usize) -> bool {
    std::iter::successors(modules[module].parent, |at| modules[*at].parent).any(|at| at == ancestor)
}

fn resolve(modules: &[Module], from: usize, segments: &[String], hops: usize) -> Vec<Target> {
    let Some((first, rest)) = segments.split_first() else {
        return Vec::new();
    };
    let start = match first.as_str() {
        "crate" => vec![Target {
            module: 0,
            item: None,
        }],
        "self" => vec![Target {
            module: from,
            item: None,
        }],
        "super" => modules[from]
            .parent
            .map(|module| Target { module, item: None })
            .into_iter()
            .collect(),
        // A name that is not known here is another crate's, the language's or a variable.
        name => look_up(modules, from, name, hops),
    };
    follow_each(modules, start, rest, hops)
}

/// Follows what one name can be. Where more names come after it, a module of that name is meant, and no function.
fn follow_each(
    modules: &[Module],
    mut found: Vec<Target>,
    rest: &[String],
    hops: usize,
) -> Vec<Target> {
    if !rest.is_empty() && found.iter().any(|target| target.item.is_none()) {
        found.retain(|target| target.item.is_none());
    }
    found
        .into_iter()
        .flat_map(|target| follow(modules, target, rest, hops))
        .collect()
}

fn follow(modules: &[Module], target: Target, rest: &[String], hops: usize) -> Vec<Target> {
    // What follows an item is a variant, an associated function or a constant.
    let (None, Some((name, rest))) = (&target.item, rest.split_first()) else {
        return vec![target];
    };
    let module = target.module;
    let found = match name.as_str() {
        "super" => modules[module]
            .parent
            .map(|module| Target { module, item: None })
            .into_iter()
            .collect(),
        "self" => vec![target],
        name => look_up(modules, module, name, hops),
    };
    // What is neither defined nor imported here was made by a macro.
    if found.is_empty() && !modules[module].imports.contains_key(name) {
        return vec![Target {
            module,
            item: Some(name.clone()),
        }];
    }
    follow_each(modules, found, rest, hops)
}

/// What `name` is within a module. It can be several things at once: a module and a function, for one.
fn look_up(modules: &[Module], module: usize, name: &str, hops: usize) -> Vec<Target> {
    let here = &modules[module];
    let mut found = Vec::new();
    if here.items.contains(name) {
        found.push(Target {
            module,
            item: Some(name.to_owned()),
        });
    }
    if let Some(child) = here.children.get(name) {
        found.push(Target {
            module: *child,
            item: None,
        });
    }
    let Some(hops) = hops.checked_sub(1) else {
        return found;
    };
    for import in here.imports.get(name).into_iter().flatten() {
        // `use name;` and `use name::x as name` begin with another crate's name.
        let is_of_crate = import.mention.segments[0] == name;
        if !is_of_crate {
            found.extend(resolve(modules, module, &import.mention.segments, hops));
        } else if let Some(child) = here.children.get(name) {
            let target = Target {
                module: *child,
                item: None,
            };
            found.extend(follow(modules, target, &import.mention.segments[1..], hops));
        }
    }
    if found.is_empty() {
        for glob in &here.globs {
            for target in resolve(modules, module, &glob.segments, hops) {
                if target.item.is_none() && target.module != module {
                    found.extend(look_up(modules, target.module, name, hops));
                }
            }
        }
    }
    found
}
