#!/usr/bin/env bash
# Runs the tests of the kernels and of all else in `models/` under AddressSanitizer, which sees accesses behind a buffer and
# memory that leaks, with checks of overflow. The compiler has it for Linux, as an unstable option, so it is told to allow
# those. It takes some minutes: everything is compiled once more.
set -euo pipefail
cd "$(dirname "$0")/.."
# With a target named, programs that only build something are left as they are.
target=$(rustc -vV | sed -n 's/^host: //p')
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/sanitize"
cargo test --package sconce-models --lib --target "$target" "$@"
