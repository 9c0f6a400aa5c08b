//! Finds the paths in a piece of code, those within macros too.

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};

use crate::module::{Mention, Module, plain};

/// Records in `module` every path and every single name of `tokens`.
pub(crate) fn scan(module: &mut Module, tokens: TokenStream) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        at = step(module, &tokens, at);
    }
}

/// Scans the path or token that begins at `at`, and returns where it ends.
fn step(module: &mut Module, tokens: &[TokenTree], at: usize) -> usize {
    match &tokens[at] {
        TokenTree::Group(group) => {
            scan(module, group.stream());
            at + 1
        }
        TokenTree::Punct(punct) if punct.as_char() == '#' => attribute(module, tokens, at + 1),
        TokenTree::Ident(ident) if ident == "use" => {
            use_declaration(module, tokens, at).unwrap_or(at + 1)
        }
        // `pub(in path)` limits visibility, and imports nothing.
        TokenTree::Ident(ident) if ident == "pub" => match tokens.get(at + 1) {
            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Parenthesis => at + 2,
            _ => at + 1,
        },
        TokenTree::Ident(_) => path(module, tokens, at),
        TokenTree::Punct(_) | TokenTree::Literal(_) => at + 1,
    }
}

/// Scans an attribute. Documentation is skipped; serde's attributes name functions and modules in strings.
fn attribute(module: &mut Module, tokens: &[TokenTree], mut at: usize) -> usize {
    if matches!(tokens.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == '!') {
        at += 1;
    }
    let Some(TokenTree::Group(group)) = tokens.get(at) else {
        return at;
    };
    let name = group
        .stream()
        .into_iter()
        .next()
        .map(|first| first.to_string());
    match name.as_deref() {
        Some("doc" | "cfg" | "cfg_attr" | "expect" | "allow") => {}
        Some("serde") => {
            strings(module, group.stream());
            scan(module, group.stream());
        }
        _ => scan(module, group.stream()),
    }
    at + 1
}

fn strings(module: &mut Module, tokens: TokenStream) {
    for token in tokens {
        match token {
            TokenTree::Group(group) => strings(module, group.stream()),
            TokenTree::Literal(literal) => {
                let Ok(text) = syn::parse_str::<syn::LitStr>(&literal.to_string()) else {
                    continue;
                };
                let Ok(path) = syn::parse_str::<syn::Path>(&text.value()) else {
                    continue;
                };
                let segments: Vec<_> = path
                    .segments
                    .iter()
                    .map(|part| plain(&part.ident))
                    .collect();
                note(module, segments, literal.span().start().line);
            }
            TokenTree::Ident(_) | TokenTree::Punct(_) => {}
        }
    }
}

/// Scans a `use` within a function.
fn use_declaration(module: &mut Module, tokens: &[TokenTree], at: usize) -> Option<usize> {
    let is_end =
        |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ';');
    let end = at + tokens[at..].iter().position(is_end)? + 1;
    // The bound `use<'a>` of a return type is no declaration.
    let declared = syn::parse2(tokens[at..end].iter().cloned().collect()).ok()?;
    module.add_use(&declared);
    Some(end)
}

fn path(module: &mut Module, tokens: &[TokenTree], at: usize) -> usize {
    let TokenTree::Ident(first) = &tokens[at] else {
        return at + 1;
    };
    let mut segments = vec![plain(first)];
    let mut end = at + 1;
    while is_double_colon(tokens, end) {
        let Some(TokenTree::Ident(next)) = tokens.get(end + 2) else {
            break;
        };
        segments.push(plain(next));
        end += 3;
    }
    let before = at.checked_sub(1).map(|before| &tokens[before]);
    let after_punct =
        |of: char| matches!(before, Some(TokenTree::Punct(punct)) if punct.as_char() == of);
    // `::name` and `<Type>::name` begin elsewhere; `.name` is a field or a method, `'name` a lifetime.
    if after_punct(':') && at >= 2 && is_double_colon(tokens, at - 2) || after_punct('\'') {
        return end;
    }
    if after_punct('.') && !(at >= 2 && is_range(&tokens[at - 2])) {
        return end;
    }
    let is_call = matches!(tokens.get(end), Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Parenthesis);
    let is_defined = matches!(before, Some(TokenTree::Ident(keyword)) if keyword == "fn");
    let is_variable = segments[0].starts_with(|first: char| first.is_lowercase() || first == '_');
    // A single small name is a variable, as long as it is not called.
    if segments.len() > 1 || !is_variable || is_call && !is_defined {
        note(module, segments, first.span().start().line);
    }
    end
}

fn note(module: &mut Module, segments: Vec<String>, line: usize) {
    if let [name] = segments.as_slice() {
        module.names.entry(name.clone()).or_insert(line);
    } else {
        module.mentions.push(Mention { segments, line });
    }
}

fn is_double_colon(tokens: &[TokenTree], at: usize) -> bool {
    let is_colon = |at: usize, spacing: Option<Spacing>| {
        matches!(tokens.get(at), Some(TokenTree::Punct(punct))
            if punct.as_char() == ':' && spacing.is_none_or(|wanted| punct.spacing() == wanted))
    };
    is_colon(at, Some(Spacing::Joint)) && is_colon(at + 1, None)
}

/// Whether a dot before the last one makes a range of it: `..name`.
fn is_range(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == '.')
}
