//! Circles that were there before the check, and are still to be cut.

use std::collections::BTreeSet;

/// A level of a crate's modules: the crate, and the module whose own code and children have circles among them.
pub type Level<'a> = (&'a str, String);

/// The levels that have circles. The list only shrinks: a circle at another level fails the check, and so does a level
/// that is listed and has none any more.
///
/// storage has one circle left: a VHDX opens its parents by `open`, which knows all formats; a refusal names an
/// identifier of a VHDX; and a `Disk` can be asked for the VHDX that it is. It is cut when the parents of a chain are
/// opened by a function that is handed in, and the identifiers lie below the format.
pub const LEVELS: &[(&str, &str)] = &[("storage", "crate")];

/// The levels that are listed and not among those found.
pub fn cut(found: &BTreeSet<Level<'_>>) -> Vec<Level<'static>> {
    let levels = LEVELS
        .iter()
        .map(|(name, parent)| (*name, (*parent).to_owned()));
    levels.filter(|level| !found.contains(level)).collect()
}

/// Whether circles are known at this level.
pub fn is_known(level: &Level<'_>) -> bool {
    LEVELS.contains(&(level.0, level.1.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_on_the_list_until_its_circles_are_cut() {
        let all: BTreeSet<_> = LEVELS
            .iter()
            .map(|(name, parent)| (*name, (*parent).to_owned()))
            .collect();
        assert_eq!(all.len(), LEVELS.len(), "a level is listed twice");
        assert_eq!(cut(&all), []);
        assert!(all.iter().all(is_known));
        let without_first: BTreeSet<_> = all.iter().skip(1).cloned().collect();
        assert_eq!(
            cut(&without_first),
            all.into_iter().take(1).collect::<Vec<_>>()
        );
    }
}
