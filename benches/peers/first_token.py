"""Whole processes, from start to the first token of an 8-token prompt, in turns: wall time and peak resident memory.

    python first_token.py --worker "rlx=rlx generate FILE.rlx --prompt 'a b c' -n 1" --worker "llama.cpp=./llama_first FILE.gguf 2"

The first worker is the base of the ratios. Files are read once before, so that they lie in the page cache.
"""

import argparse
import json
import os
import shlex
import statistics
import time
from pathlib import Path


def once(command):
    """Milliseconds and MB of one run."""
    started = time.perf_counter()
    null = os.open("/dev/null", os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    ms = (time.perf_counter() - started) * 1e3
    os.close(null)
    if status:
        raise SystemExit(f"{shlex.join(command)}: ended with {os.waitstatus_to_exitcode(status)}")
    return ms, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", action="append", required=True, metavar="LABEL=COMMAND")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    commands = {label: shlex.split(command) for label, command in (text.split("=", 1) for text in args.worker)}
    times, peaks, labels = {}, {}, list(commands)
    for label, command in commands.items():
        once(command)
        times[label], peaks[label] = [], []
    for turn in range(args.rounds):
        for step in range(len(labels)):
            label = labels[(turn + step) % len(labels)]
            ms, mb = once(commands[label])
            times[label].append(ms)
            peaks[label].append(mb)
    rows = []
    print("| worker | median ms | least | x first | peak MB |\n|---|---|---|---|---|")
    for label in labels:
        ratio = statistics.median(a / b for a, b in zip(times[label], times[labels[0]]))
        median, least, peak = statistics.median(times[label]), min(times[label]), statistics.median(peaks[label])
        rows.append({"worker": label, "median_ms": median, "least_ms": least, "ratio_to_first": ratio, "peak_rss_mb": peak})
        print(f"| {label} | {median:.0f} | {least:.0f} | {ratio:.3f} | {peak:.0f} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
