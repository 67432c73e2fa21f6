#!/usr/bin/env bash
# Holds a server under a chat load and fails unless it stays as it was: memory, file descriptors, threads, KV blocks,
# errors and latency.
#
#   scripts/soak.sh [SECONDS] [RATE]
#
# SECONDS is 1800 where it is not given; RATE, in requests a second, is then 80 % of what the server does with all that
# it can batch. The program is $SCONCE, or built here. Bounds: $SOAK_MEMORY_MIB (64) is the most that memory may grow after
# the first third; $SOAK_LATENCY_FACTOR (1.5) how much slower the last third may be than the first.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-1800}
rate=${2:-}

if [[ -z ${SCONCE:-} ]]; then
    cargo build --release
    SCONCE=${CARGO_TARGET_DIR:-target}/release/sconce
fi

work=$(mktemp -d)
server=
cleanup() {
    if [[ -n $server ]]; then
        kill "$server" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap cleanup EXIT

fail() {
    echo "FAILED: $*; the server said:" >&2
    tail -n 50 "$work/server.log" >&2
    exit 1
}

"$SCONCE" serve --port 0 >"$work/server.log" 2>&1 &
server=$!

for _ in $(seq 600); do
    kill -0 "$server" 2>/dev/null || fail "the server ended before it was ready"
    if grep -q "is ready" "$work/server.log"; then
        break
    fi
    sleep 0.5
done
url=$(grep -o -m 1 'http://[0-9.:]*' "$work/server.log") || fail "the server did not say where it listens"

# All at once: the most that the server does, and every part of its memory is used once. The lowest of three counts,
# since what it does changes with what else the machine does.
sustained=
for burst in 1 2 3; do
    echo "== warm-up $burst: 64 chats at once"
    "$SCONCE" loadtest --url "$url" --workload chat --rate inf --requests 64 --seed "$burst" \
        --save-json "$work/warm.json" >"$work/warm.log" 2>&1 || { cat "$work/warm.log" >&2; fail "the warm-up failed"; }
    sustained=$(python3 -c '
import json, sys
achieved = json.load(open(sys.argv[1]))["runs"][0]["achieved_rate"]
print(round(min(achieved, float(sys.argv[2] or achieved)), 3))' "$work/warm.json" "$sustained")
    [[ -z $rate ]] || break
done
rate=${rate:-$(awk "BEGIN { print 0.8 * $sustained }")}

echo "== $seconds s of chats at $rate requests/s"
python3 scripts/soak_watch.py --pid "$server" --url "$url" --report "$work/report.json" \
    --memory-mib "${SOAK_MEMORY_MIB:-64}" --latency-factor "${SOAK_LATENCY_FACTOR:-1.5}" -- \
    "$SCONCE" loadtest --url "$url" --workload chat --rate "$rate" --duration "${seconds}s" \
    --save-json "$work/report.json" || fail "the server did not stay as it was"

kill -TERM "$server"
status=0
wait "$server" || status=$?
server=
[[ $status == 0 ]] || fail "the server ended with status $status when it was told to stop"
