"""Watches a server while a load test runs, prints what it saw, and fails where the server did not stay as it was.

Called by soak.sh; everything after `--` is the load test's command.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

EVERY = 3.0  # seconds between samples
SETTLE = 40.0  # seconds in which the server must be idle again
ROWS = 12  # of the table

# A proxy in the environment is not asked.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--report", required=True, help="the JSON report that the load test writes")
    parser.add_argument("--memory-mib", type=float, required=True)
    parser.add_argument("--latency-factor", type=float, required=True)
    parser.add_argument("load", nargs="+")
    return parser.parse_args()


def sample(pid, url, began):
    """The server's state: its process from /proc, the rest from /metrics."""
    metrics = {}
    for line in OPENER.open(f"{url}/metrics", timeout=30).read().decode().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            metrics[name] = float(value)
    with open(f"/proc/{pid}/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "seconds": time.monotonic() - began,
        "rss": resident / 2**20,
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "held": metrics['sconce_kv_blocks{state="held"}'],
        "waiting": metrics["sconce_waiting"],
        "running": metrics["sconce_running"],
        "failed": metrics['sconce_sequences_total{outcome="failed"}'],
        "ended": metrics["sconce_request_seconds_count"],
        "latency": metrics["sconce_request_seconds_sum"],
        "tpot_count": metrics["sconce_time_per_output_token_seconds_count"],
        "tpot_sum": metrics["sconce_time_per_output_token_seconds_sum"],
    }


def is_idle(now, idle):
    quiet = now["held"] == now["waiting"] == now["running"] == 0
    return quiet and now["fds"] <= idle["fds"] and now["threads"] <= idle["threads"]


def settle(pid, url, began, idle=None):
    """Waits until nothing runs and, given an earlier idle sample, descriptors and threads are back at its level."""
    deadline = time.monotonic() + SETTLE
    while True:
        now = sample(pid, url, began)
        if is_idle(now, idle or now) or time.monotonic() > deadline:
            return now
        time.sleep(1)


def means(samples):
    """Mean seconds a request and milliseconds an output token between two samples, `None` where nothing ended."""

    def mean(total, count, scale):
        first, last = samples[0], samples[-1]
        ended = last[count] - first[count]
        return (last[total] - first[total]) / ended * scale if ended else None

    return mean("latency", "ended", 1), mean("tpot_sum", "tpot_count", 1000)


def table(samples):
    print("seconds   RSS MiB  fds  threads  held blocks  waiting  running  ended")
    step = max(1, len(samples) // ROWS)
    shown = samples[::step] + ([samples[-1]] if (len(samples) - 1) % step else [])
    for s in shown:
        print(
            f"{s['seconds']:7.0f} {s['rss']:9.1f} {s['fds']:4} {s['threads']:8} {s['held']:12.0f} "
            f"{s['waiting']:8.0f} {s['running']:8.0f} {s['ended']:6.0f}"
        )


def faults(samples, idle, after, load_status, report, options):
    """What did not stay as it was, in words."""
    third = len(samples) // 3
    growth = samples[-1]["rss"] - samples[third]["rss"]
    print(f"memory grew by {growth:.1f} MiB after the first third (at most {options.memory_mib:g})")
    if growth > options.memory_mib:
        yield f"memory grew by {growth:.1f} MiB"
    names = ("seconds a request", "ms an output token")
    for name, first, last in zip(names, means(samples[: third + 1]), means(samples[-third - 1 :])):
        if first is None or last is None:
            yield f"too few answers to compare {name}"
            continue
        print(f"{name}: {first:.2f} in the first third, {last:.2f} in the last (at most {options.latency_factor:g} times)")
        if last > first * options.latency_factor:
            yield f"{name} rose from {first:.2f} to {last:.2f}"
    print(f"idle before: {idle['fds']} fds, {idle['threads']} threads; after: {after['fds']} fds, {after['threads']} threads")
    if not is_idle(after, idle):
        yield f"the server is not idle again: {after}"
    if after["failed"]:
        yield f"{after['failed']:.0f} sequences failed"
    requests = report["runs"][0]["requests"] if report else {}
    print(f"requests: {json.dumps(requests)}")
    if load_status or not requests or requests["failed"] or requests["unfinished"]:
        yield f"the load test ended with status {load_status} and these requests: {requests}"


def main():
    options = arguments()
    began = time.monotonic()
    idle = settle(options.pid, options.url, began)
    # Descriptors and threads of the warm-up go away within seconds.
    time.sleep(12)
    idle = sample(options.pid, options.url, began)
    load = subprocess.Popen(options.load, stdout=subprocess.DEVNULL)
    samples = []
    # Told to end, it unwinds as it does when interrupted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while load.poll() is None:
            samples.append(sample(options.pid, options.url, began))
            time.sleep(EVERY)
    finally:
        # Where the server is gone, nobody waits for the load test.
        load.terminate()
    after = settle(options.pid, options.url, began, idle)
    if len(samples) < 9:
        sys.exit("FAILED: too short to judge; give it more seconds")
    table([idle, *samples, after])
    report = json.load(open(options.report)) if os.path.exists(options.report) else None
    found = list(faults(samples, idle, after, load.returncode, report, options))
    for fault in found:
        print(f"FAILED: {fault}", file=sys.stderr)
    sys.exit(bool(found))


main()
