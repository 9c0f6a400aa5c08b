//! Circles of modules, at every level of the tree: a folder counts as one with all that lies in it.

use std::collections::{BTreeMap, BTreeSet};

use crate::imports::Edge;
use crate::module::Module;

/// Modules of one parent that use each other in a circle, themselves or through what lies below them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Circle {
    /// The members, as indices into the crate's list. The parent's own code can be one of them.
    pub members: BTreeSet<usize>,
    /// The module whose children they are.
    pub parent: usize,
    /// The uses that make the circle.
    pub edges: Vec<Edge>,
}

/// Finds every circle among the modules of a crate.
///
/// For each module, its own code and the subtrees of its children are looked at as one node each: two folders that use
/// each other are a circle even where no two files do.
pub fn find(modules: &[Module], edges: &[Edge]) -> Vec<Circle> {
    let mut found = Vec::new();
    for parent in 0..modules.len() {
        let nodes: Vec<_> = (0..modules.len())
            .map(|at| node_of(modules, parent, at))
            .collect();
        let node = |module: usize| nodes[module];
        let mut graph: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for edge in edges {
            if let (Some(from), Some(to)) = (node(edge.from), node(edge.to))
                && from != to
            {
                graph.entry(from).or_default().insert(to);
            }
        }
        for members in components(&graph) {
            let is_within = |module| node(module).filter(|node| members.contains(node));
            let edges = edges
                .iter()
                .filter(|edge| match (is_within(edge.from), is_within(edge.to)) {
                    (Some(from), Some(to)) => from != to,
                    _ => false,
                })
                .cloned()
                .collect();
            found.push(Circle {
                members,
                parent,
                edges,
            });
        }
    }
    found
}

/// The node that stands for `module` among the children of `parent`: the child it lies in, or the parent's own code.
fn node_of(modules: &[Module], parent: usize, module: usize) -> Option<usize> {
    let mut at = module;
    while at != parent {
        let above = modules[at].parent?;
        if above == parent {
            return Some(at);
        }
        at = above;
    }
    Some(parent)
}

/// The sets of nodes of which each reaches each other, of two nodes and more.
fn components(graph: &BTreeMap<usize, BTreeSet<usize>>) -> Vec<BTreeSet<usize>> {
    let reached: BTreeMap<usize, BTreeSet<usize>> = graph
        .keys()
        .map(|from| (*from, reach(graph, *from)))
        .collect();
    let mut found: Vec<BTreeSet<usize>> = Vec::new();
    for (from, there) in &reached {
        if found.iter().any(|members| members.contains(from)) {
            continue;
        }
        let members: BTreeSet<usize> = there
            .iter()
            .copied()
            .filter(|to| reached.get(to).is_some_and(|back| back.contains(from)))
            .collect();
        if members.len() > 1 {
            found.push(members);
        }
    }
    found
}

fn reach(graph: &BTreeMap<usize, BTreeSet<usize>>, from: usize) -> BTreeSet<usize> {
    let mut reached = BTreeSet::new();
    let mut waiting = vec![from];
    while let Some(at) = waiting.pop() {
        for next in graph.get(&at).into_iter().flatten() {
            if reached.insert(*next) {
                waiting.push(*next);
            }
        }
    }
    reached
}
