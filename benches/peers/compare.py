"""Interleaved comparison of RLX with other engines: same model, same inputs, same threads.

    python compare.py minilm-f32 --models models                       # a table of tables.py
    python compare.py qwen-bf16 --models models --only rlx llama.cpp --works decode:128x16 --threads 1
    python compare.py --model FOLDER --worker "rlx=rlx bench FOLDER --worker" --worker "mine=./mine" --works embed:32x128

Workers speak worker.py's protocol. Every round asks each worker once for each work, in an order that turns from round to
round, so that a change in the machine's load meets all of them; those that are not asked are stopped meanwhile. Printed per
work and worker: median, tokens/s, the ratio to the first worker (the median over rounds of the quotient of the round's
medians: above 1 the first is faster), the part of this machine's limit (multiply-adds, products of bytes for the linear layers of
quantised files, or reading the weights and the cache once) as `rlx doctor` measures it between works, the largest difference of the outputs' first values to the first
worker's over their mean magnitude, and peak resident memory.
"""

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import floors
import tables


class Worker:
    """A worker process. It runs only while it answers."""

    def __init__(self, label, command, log):
        self.label = label
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=tables.HERE)

    def ask(self, **request):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label}: the worker ended with status {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self.label}: {answer['error']}")
        if len(answer["ms"]) != request["n"]:
            raise SystemExit(f"{self.label}: asked for {request['n']} timings, got {len(answer['ms'])}")
        return answer

    def close(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def parse_work(text):
    """embed:BxS, texts:FILE, prefill:S, decode:CxT."""
    kind, _, rest = text.partition(":")
    if kind == "texts":
        return {"work": kind, "file": str(Path(rest).resolve())}
    numbers = [int(number) for number in rest.split("x")]
    names = {"embed": ("batch", "seq"), "prefill": ("seq",), "decode": ("ctx", "steps")}[kind]
    return {"work": kind, **dict(zip(names, numbers, strict=True))}


def tokens_of(work, lengths):
    return sum(lengths) if lengths else work.get("batch", 1) * work.get("seq", 1)


def measure(workers, work, rounds, budget_ms):
    """Per worker: a list of rounds, each a list of ms; and the last answer. Workers that refuse are left out."""
    counts, times, last, probes = {}, {}, {}, {}
    for worker in workers:
        try:
            first = worker.ask(**work, n=1)["ms"][0]
            probes[worker.label] = min(first, *worker.ask(**work, n=2 if first < 2 * budget_ms else 1)["ms"])
        except ValueError as error:
            print(f"  {error}", file=sys.stderr)
    for worker in workers:
        if worker.label in probes:
            spent = probes[worker.label] * work.get("steps", 1)
            counts[worker.label] = max(1 if spent > budget_ms else 3, min(200, int(budget_ms / max(spent, 1e-3))))
            times[worker.label] = []
    asked = [worker for worker in workers if worker.label in counts]
    for turn in range(rounds):
        for step in range(len(asked)):
            worker = asked[(turn + step) % len(asked)]
            if probes[worker.label] < 100:
                worker.ask(**work, n=1)
            answer = worker.ask(**work, n=counts[worker.label])
            times[worker.label].append(answer["ms"])
            last[worker.label] = answer
    return asked, times, last


def rows_of(text, work, asked, times, last, lengths):
    base, rows = asked[0].label, []
    for worker in asked:
        rounds = times[worker.label]
        every = sorted(value for part in rounds for value in part)
        quotients = [statistics.median(m) / statistics.median(b) for m, b in zip(rounds, times[base])]
        answer, expected = last[worker.label], last[base]
        off = max(abs(a - b) for a, b in zip(answer["first"], expected["first"])) / expected["mean_abs"]
        row = {
            "work": text,
            "worker": worker.label,
            "version": answer.get("version", ""),
            "median_ms": round(statistics.median(every), 4),
            "p10_ms": round(every[len(every) // 10], 4),
            "p90_ms": round(every[len(every) * 9 // 10], 4),
            "tokens_per_s": round(tokens_of(work, lengths) / statistics.median(every) * 1e3, 1),
            "ratio_to_first": round(statistics.median(quotients), 3),
            "difference": off,
            "peak_rss_mb": answer.get("rss_mb"),
            "n": len(every),
        }
        if "token_ids" in answer:
            pairs = list(zip(answer["token_ids"], expected["token_ids"]))
            row["tokens_agree"] = f"{sum(a == b for a, b in pairs)}/{len(pairs)}"
        rows.append(row)
    return rows


HEADER = ["work", "worker", "median ms", "p10", "tokens/s", "x first", "of limit", "difference", "tokens", "peak MB"]


def cells(row):
    limit = row.get("of_limit")
    return [
        "texts" if row["work"].startswith("texts:") else row["work"],
        row["worker"],
        f"{row['median_ms']:.2f}",
        f"{row['p10_ms']:.2f}",
        f"{row['tokens_per_s']:.0f}" if row["tokens_per_s"] >= 100 else f"{row['tokens_per_s']:.1f}",
        f"{row['ratio_to_first']:.3f}",
        f"{limit:.0%}" if limit else "",
        f"{row['difference']:.0e}",
        row.get("tokens_agree", ""),
        f"{row['peak_rss_mb']:.0f}" if row["peak_rss_mb"] else "",
    ]


def limits_of(rlx, threads, known, times=3):
    """The best of what was measured so far: other load only takes away."""
    for _ in range(times):
        report = subprocess.run([rlx, "doctor", "--json", "-t", str(threads)], capture_output=True, text=True, check=True)
        for name, value in json.loads(report.stdout)["limits"].items():
            known[name] = max(known.get(name, 0), value or 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="?", choices=sorted(tables.TABLES), help="a table of tables.py")
    parser.add_argument("--models", type=Path, help="folder that the make_ scripts wrote to")
    parser.add_argument("--rlx", type=Path, default=tables.HERE.parents[1] / "target/release/rlx", help="the binary, also for the limits")
    parser.add_argument("--worker", action="append", default=[], metavar="LABEL=COMMAND")
    parser.add_argument("--model", type=Path, help="folder whose config.json gives the floors (with --worker)")
    parser.add_argument("--only", nargs="*", help="labels of the table to run")
    parser.add_argument("--works", nargs="*", help="embed:BxS, texts:FILE, prefill:S, decode:CxT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("f32", "bf16"), help="whose limit applies (default: the table's, else f32)")
    parser.add_argument("--isa", help="RLX_ISA for RLX, say avx2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget-ms", type=float, default=300.0, help="time a worker gets for a work in a round")
    parser.add_argument("--json", type=Path, help="also write all rows here")
    args = parser.parse_args()
    args.rlx = args.rlx.resolve()
    plan = tables.plan(args)
    lengths = {}
    for text in plan.works:
        if text.startswith("texts:"):
            lengths[text] = tables.lengths(Path(text.removeprefix("texts:")))
    log = open("/dev/null", "w")
    limits = {}
    limits_of(args.rlx, args.threads, limits)
    workers = [Worker(label, shlex.split(command), log) for label, command in plan.workers]
    config = floors.config_of(plan.folder) if plan.folder else None
    rows = []
    try:
        for text in plan.works:
            work = parse_work(text)
            asked, times, last = measure(workers, work, args.rounds, args.budget_ms)
            rows += rows_of(text, work, asked, times, last, lengths.get(text))
            limits_of(args.rlx, args.threads, limits)
    finally:
        for worker in workers:
            worker.close()
    for row in rows:
        least = config and floors.seconds(config, parse_work(row["work"]), plan.precision, limits, plan.weight_bytes.get(row["worker"]), lengths.get(row["work"]), plan.cache_width.get(row["worker"]))
        row["of_limit"] = round(least * 1e3 / row["median_ms"], 4) if least else None
    print(f"{args.table or 'workers'}, {args.threads} threads{', ' + args.isa if args.isa else ''}: " + ", ".join(f"{name} {value / 1e9:.1f}e9" for name, value in sorted(limits.items())))
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for row in rows:
        print("| " + " | ".join(cells(row)) + " |")
    if args.json:
        report = {"table": args.table, "threads": args.threads, "precision": plan.precision, "isa": args.isa, "limits": limits, "rows": rows}
        args.json.write_text(json.dumps({**report, "date": time.strftime("%Y-%m-%d %H:%M")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
