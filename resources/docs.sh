#!/usr/bin/env bash
# docs.sh check: every link of the documentation leads somewhere, and every page is in the book.
# docs.sh build: the same, and the book in target/book.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$HOME/.cargo/bin:$PATH

# Offline: whether other sites are there is not this tree's to say. Fragments are headings.
check_links() {
    target/python/bin/lychee --offline --include-fragments --no-progress --quiet --quiet "$@"
}

check() {
    check_links README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs
    local status=0 page
    # The book has what SUMMARY.md names, and nothing outside docs/.
    while IFS= read -r page; do
        grep -qF "($page)" docs/SUMMARY.md || { echo "docs: docs/$page is not in docs/SUMMARY.md" >&2; status=1; }
    done < <(cd docs && find . -name '*.md' ! -name SUMMARY.md -printf '%P\n')
    if grep -rn --include='*.md' '](\(\.\./\)\{2,\}' docs; then
        echo "docs: these links lead out of the book" >&2
        status=1
    fi
    return $status
}

build() {
    local mdbook=0.5.4
    if [ "$(mdbook --version 2>/dev/null)" != "mdbook v$mdbook" ]; then
        echo "docs: installing mdbook $mdbook, which takes a minute or two"
        # Unoptimised, as the book is small and compiling is not.
        CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=64 \
            cargo install --locked --force "mdbook@$mdbook" --no-default-features --features search
    fi
    mdbook build docs
    # The page for errors is made for a server's root.
    check_links --exclude-path 404.html target/book
    echo "docs: target/book/index.html"
}

case ${1-} in
    check) check ;;
    build) check && build ;;
    *) echo "usage: docs.sh check|build" >&2; exit 2 ;;
esac
