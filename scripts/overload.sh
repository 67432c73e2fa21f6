#!/usr/bin/env bash
# Overload: what a server holds, and what becomes of it at three times as much.
#
#   scripts/overload.sh URL RATE [PID]
#
# RATE is the highest rate, in requests a second, at which the server keeps the SLO (`sconce loadtest --rubric` finds it).
# Runs Poisson arrivals at 0.8, 1, 1.2 and 3 times RATE for DURATION each, every request with DEADLINE in the header
# `x-request-timeout-ms` (servers that do not know it ignore it), and prints for each run the goodput, the latencies of
# what was answered, and how long refused requests waited to hear it. With the server's PID its resident memory, children
# included, is printed every five seconds of the last run.
#
# Environment: DEADLINE (6s), DURATION (60s), WORKLOAD (random: 64 to 192 tokens in, 32 to 96 out), SCONCE (sconce),
# OUT (a folder for the reports), LOADS (0.8 1 1.2 3)
set -euo pipefail
url=${1:?the address of a server} rate=${2:?the highest rate that it holds} pid=${3:-}
deadline=${DEADLINE:-6s} duration=${DURATION:-60s} sconce=${SCONCE:-sconce} out=${OUT:-overload}
mkdir -p "$out"

descendants() { # the process, its children, and theirs
  echo "$1"
  for child in $(pgrep -P "$1"); do descendants "$child"; done
}

memory() { # megabytes of the process and its descendants
  for process in $(descendants "$1"); do grep VmRSS "/proc/$process/status" 2>/dev/null || true; done |
    awk '{ sum += $2 } END { printf "%.0f\n", sum / 1024 }'
}

seed=0
run() { # times RATE
  local offered
  seed=$((seed + 1)) # other prompts for each load, so that none finds another's in a prefix cache
  offered=$(awk "BEGIN { print $rate * $1 }")
  echo "== $1 x $rate = $offered requests/s for $duration, deadline $deadline"
  "$sconce" loadtest --url "$url" --workload "${WORKLOAD:-random}" --arrivals poisson --rate "$offered" \
    --duration "$duration" --warmup 5s --seed "$seed" --deadline "$deadline" --timeout 2m --slo "e2e.p99=$deadline" \
    --save-json "$out/$1.json"
}

sampler=
trap '[[ -z $sampler ]] || kill "$sampler"' EXIT
for load in ${LOADS:-0.8 1 1.2 3}; do
  if [[ -n $pid ]]; then
    while sleep 5; do memory "$pid"; done >"$out/$load.memory" &
    sampler=$!
  fi
  run "$load" || true # a server that answers nobody in time is a result too
  if [[ -n $sampler ]]; then
    kill "$sampler"
    wait "$sampler" 2>/dev/null || true
    sampler=
    echo "memory in MB, every 5 s: $(tr '\n' ' ' <"$out/$load.memory")"
  fi
done
