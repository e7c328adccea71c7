"""Interleaved comparison of workers that speak worker.py's protocol.

    python compare.py --onnx minilm.onnx --rlx "target/release/rlx bench MODEL --worker --threads 2"
    python compare.py --onnx minilm.onnx --peers ort openvino --shapes 1x16 32x128 --rounds 9

Every round asks each worker once for each shape, in an order that turns from round to round, so that a change in the
machine's load meets all of them. Printed per shape and worker: median ms, spread, tokens/s, the ratio to the base worker
(the median over rounds of peer's median ms over base's median ms: above 1 the base is faster), and the largest
difference of the outputs' first values. The base is --rlx where given, else the first peer.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Worker:
    def __init__(self, label, command):
        self.label = label
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label}: the worker ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"{self.label}: {answer['error']}")
        if len(answer["ms"]) != request["n"]:
            raise SystemExit(f"{self.label}: asked for {request['n']} timings, got {len(answer['ms'])}")
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)


def start(args):
    workers = []
    if args.rlx:
        workers.append(Worker("rlx", shlex.split(args.rlx)))
    for peer in args.peers:
        command = [sys.executable, str(HERE / f"peer_{peer}.py"), "--threads", str(args.threads), "--precision", args.precision]
        if peer in ("ort", "openvino"):
            command += ["--model", str(args.onnx)]
        elif args.model:
            command += ["--model", str(args.model)]
        workers.append(Worker(peer, command))
    return workers


def measure(workers, batch, seq, rounds, budget_ms):
    """Per worker: a list of rounds, each a list of ms; and the last answer."""
    counts, last = {}, {}
    for worker in workers:
        worker.ask(batch=batch, seq=seq, n=2)
        probe = statistics.median(worker.ask(batch=batch, seq=seq, n=3)["ms"])
        counts[worker.label] = max(3, min(200, int(budget_ms / max(probe, 1e-3))))
    times = {worker.label: [] for worker in workers}
    for turn in range(rounds):
        for step in range(len(workers)):
            worker = workers[(turn + step) % len(workers)]
            time.sleep(0.03)
            worker.ask(batch=batch, seq=seq, n=1)
            answer = worker.ask(batch=batch, seq=seq, n=counts[worker.label])
            times[worker.label].append(answer["ms"])
            last[worker.label] = answer
    return times, last


def report(shape, workers, times, last):
    batch, seq = shape
    base = workers[0].label
    rows = []
    for worker in workers:
        rounds = times[worker.label]
        every = sorted(value for part in rounds for value in part)
        medians = [statistics.median(part) for part in rounds]
        ratio = statistics.median(m / statistics.median(b) for m, b in zip(medians, times[base]))
        answer = last[worker.label]
        rows.append(
            {
                "shape": f"{batch}x{seq}",
                "worker": worker.label,
                "version": answer.get("version", ""),
                "median_ms": round(statistics.median(every), 4),
                "p10_ms": round(every[len(every) // 10], 4),
                "p90_ms": round(every[len(every) * 9 // 10], 4),
                "tokens_per_s": round(batch * seq / statistics.median(every) * 1e3),
                "ratio_to_" + base: round(ratio, 3),
                "first_difference": max(abs(a - b) for a, b in zip(answer["first"], last[base]["first"])),
                "rss_mb": answer.get("rss_mb"),
                "n": len(every),
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rlx", help="command of RLX's worker")
    parser.add_argument("--peers", nargs="*", default=["ort", "openvino", "st"], choices=["ort", "openvino", "st"])
    parser.add_argument("--onnx", type=Path, help="file written by export_minilm_onnx.py")
    parser.add_argument("--model", type=Path, help="MiniLM folder for st (default: the installed package's)")
    parser.add_argument("--shapes", nargs="*", default=["1x16", "1x128", "32x128"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget-ms", type=float, default=400.0, help="time a worker gets for a shape in a round")
    parser.add_argument("--json", type=Path, help="also write all rows here")
    args = parser.parse_args()
    if not args.onnx and {"ort", "openvino"} & set(args.peers):
        parser.error("--onnx is needed for ort and openvino")
    workers = start(args)
    if not workers:
        parser.error("nothing to compare")
    rows = []
    base = workers[0].label
    print(f"{'shape':8} {'worker':10} {'median ms':>10} {'p10':>9} {'p90':>9} {'tokens/s':>9} {'x ' + base:>8} {'difference':>11}")
    for shape in (tuple(map(int, text.split("x"))) for text in args.shapes):
        times, last = measure(workers, *shape, args.rounds, args.budget_ms)
        for row in report(shape, workers, times, last):
            rows.append(row)
            print(
                f"{row['shape']:8} {row['worker']:10} {row['median_ms']:10.3f} {row['p10_ms']:9.3f} {row['p90_ms']:9.3f} "
                f"{row['tokens_per_s']:9} {row['ratio_to_' + base]:8.3f} {row['first_difference']:11.1e}",
                flush=True,
            )
    for worker in workers:
        worker.close()
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "precision": args.precision, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
