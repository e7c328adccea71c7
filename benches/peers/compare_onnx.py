"""ONNX models beside ONNX Runtime: interleaved runs, medians, their ratio, largest difference of the first output, start-up.

    python make_vision.py --out models/onnx
    python make_transformers.py --out models/onnx
    python compare_onnx.py --worker target/release/examples/onnx_worker models/onnx/*.onnx

A ratio is ONNX Runtime's median over RLX's in each round, then the median over rounds: above 1 RLX is faster. A process that is
not asked is stopped meanwhile. The difference is relative to the largest magnitude of ONNX Runtime's output. Start-up is the time
from opening the file to the end of the first run: of RLX without its cache and with what an earlier process left there, of ONNX
Runtime in a process like the second one (the file is in memory already).
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ORT = """
import sys, time, numpy as np, onnxruntime as ort
model, out, threads = sys.argv[1:4]
feed = {name: np.load(path) for name, path in (pair.split("=", 1) for pair in sys.argv[4:])}
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
options.log_severity_level = 3
start = time.perf_counter()
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
opened = (time.perf_counter() - start) * 1e3
first = session.run(None, feed)[0]
print("ready", opened, (time.perf_counter() - start) * 1e3, flush=True)
np.save(out, first)
print("written", flush=True)
for line in sys.stdin:
    times = []
    for _ in range(int(line)):
        start = time.perf_counter()
        session.run(None, feed)
        times.append((time.perf_counter() - start) * 1e3)
    print(*times, flush=True)
"""


class Worker:
    def __init__(self, command, env):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        ready = self.process.stdout.readline().split()
        if ready[:1] != ["ready"] or self.process.stdout.readline().strip() != "written":
            raise SystemExit(f"{command[0]} ended with status {self.process.wait()}")
        self.opened_ms, self.first_ms = float(ready[1]), float(ready[2])
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, n):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        times = [float(t) for t in self.process.stdout.readline().split()]
        self.process.send_signal(signal.SIGSTOP)
        return statistics.median(times)

    def close(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def made_up(graph, folder, sizes):
    """Arrays for the inputs that no initialiser gives: normal numbers, token ids below 1000 for `*_ids`, else ones."""
    import numpy as np
    import onnx

    rng, given, pairs = np.random.default_rng(1), {t.name for t in graph.initializer}, []
    for info in graph.input:
        if info.name in given:
            continue
        tensor = info.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else sizes[d.dim_param] for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype.kind == "f":
            value = rng.standard_normal(dims)
        elif info.name == "input_ids":
            value = rng.integers(0, 1000, dims)
        else:
            value = np.zeros(dims) if info.name == "token_type_ids" else np.ones(dims)
        path = os.path.join(folder, f"input{len(pairs)}.npy")
        np.save(path, value.astype(dtype))
        pairs.append(f"{info.name}={path}")
    return pairs


def rounds_of(rlx, ort, args):
    n = max(1, int(args.seconds * 1e3 / args.rounds / (rlx.ask(1) + ort.ask(1))))
    rounds = []
    for i in range(args.rounds):
        order = (rlx, ort) if i % 2 == 0 else (ort, rlx)
        times = {id(w): w.ask(n) for w in order}
        rounds.append((times[id(rlx)], times[id(ort)]))
    return rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--worker", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each model, about")
    parser.add_argument("--dim", action="append", default=[], metavar="NAME=N", help="size of a named dim")
    args = parser.parse_args()
    import numpy as np
    import onnx

    sizes = {name: int(size) for name, size in (pair.split("=") for pair in args.dim)}
    env = {**os.environ, "RLX_THREADS": str(args.threads), "OMP_NUM_THREADS": str(args.threads)}
    head = ("model", "rlx ms", "ort ms", "ratio", "difference", "cold ms", "warm ms", "ort ms")
    print("{:20} {:>9} {:>9} {:>7}  {:>10}  {:>8} {:>8} {:>8}".format(*head))
    for path in args.models:
        graph = onnx.load(path, load_external_data=False).graph
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = (os.path.join(folder, f"{n}.npy") for n in ("rlx", "ort"))
            given = made_up(graph, folder, sizes)
            warm = {**env, "RLX_CACHE_DIR": os.path.join(folder, "cache")}
            cold_worker = Worker([args.worker, str(path), ours, *given], warm)
            cold_worker.close()
            rlx = Worker([args.worker, str(path), ours, *given], warm)
            ort_command = [sys.executable, "-c", ORT, str(path), theirs, str(args.threads), *given]
            ort = Worker(ort_command, env)
            a, b = np.load(ours), np.load(theirs)
            difference = float(np.abs(a - b).max() / np.abs(b).max())
            rounds = rounds_of(rlx, ort, args)
            rlx.close()
            ort.close()
        ratio = statistics.median(o / r for r, o in rounds)
        medians = [statistics.median(column) for column in zip(*rounds)]
        print(
            f"{path.stem:20} {medians[0]:9.2f} {medians[1]:9.2f} {ratio:7.2f}  {difference:10.1e}  "
            f"{cold_worker.first_ms:8.0f} {rlx.first_ms:8.0f} {ort.first_ms:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
