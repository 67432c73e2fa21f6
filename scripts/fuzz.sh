#!/usr/bin/env bash
# Runs every fuzz target for a hundred thousand cases, or as many as the first argument says. A panic, a case that takes
# more than 100 MB (the tests count what they allocate), or a target that does not end, fails.
set -euo pipefail
cd "$(dirname "$0")/.."
export PROPTEST_CASES="${1:-100000}"
# Of a panic its message is enough; backtraces of a hundred thousand expected errors take hours.
export RUST_BACKTRACE=0

run() {
    echo "== $* ($PROPTEST_CASES cases each)"
    # Far more than any target needs: past it something hangs.
    timeout 4h cargo test "$@"
}

run --test fuzz
run --package sconce-models --test hostile_files
run --lib -- marks detokenizer tokenizer stop cache_file
