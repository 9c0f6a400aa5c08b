//! The page with the guests, for people: one file without anything from elsewhere.
//!
//! The `Content-Security-Policy` allows a browser to run the script in the page and no other, so that no name of a
//! guest, however it is written, becomes a program.

use std::sync::LazyLock;

use axum::http::header::{
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::IntoResponse;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

const PAGE: &str = include_str!("page.html");

/// The hash of what is in an element, as the policy names it.
fn hash_of(element: &str) -> String {
    let inside = PAGE
        .split_once(&format!("<{element}>"))
        .and_then(|(_, rest)| rest.split_once(&format!("</{element}>")))
        .map_or("", |(inside, _)| inside);
    format!("'sha256-{}'", STANDARD.encode(Sha256::digest(inside)))
}

static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash_of("script"),
        hash_of("style")
    )
});

/// `GET /`.
pub async fn page() -> impl IntoResponse {
    let policy = HeaderValue::from_str(&POLICY);
    // Base64 is ASCII. If it were not, nothing may run.
    let policy = policy.unwrap_or(HeaderValue::from_static("default-src 'none'"));
    let headers = [
        (
            CONTENT_TYPE,
            HeaderValue::from_static("text/html; charset=utf-8"),
        ),
        (CONTENT_SECURITY_POLICY, policy),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    (headers, PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_from_elsewhere_and_no_text_is_markup() {
        let text = PAGE.replace("<!doctype html>", "");
        for word in [
            "http:",
            "https:",
            "src=",
            "href=",
            "@import",
            "url(",
            "innerHTML",
            "onclick",
            "eval(",
        ] {
            assert!(!text.contains(word), "{word}");
        }
        assert_eq!(text.matches("<script>").count(), 1);
        assert_ne!(hash_of("script"), hash_of("style"));
    }
}
