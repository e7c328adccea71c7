"""ONNX models beside ONNX Runtime: interleaved runs, medians, their ratio, largest difference of the first output.

    python make_vision.py --out models/onnx
    python compare_onnx.py --worker target/release/examples/onnx_worker models/onnx/*.onnx

A ratio is ONNX Runtime's median over RLX's in each round, then the median over rounds: above 1 RLX is faster. A process that is
not asked is stopped meanwhile. The difference is relative to the largest magnitude of ONNX Runtime's output.
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
model, data, out, threads = sys.argv[1:5]
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
options.log_severity_level = 3
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
feed = {session.get_inputs()[0].name: np.load(data)}
np.save(out, session.run(None, feed)[0])
print("ready", flush=True)
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
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{command[0]} ended with status {self.process.wait()}")
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--worker", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each model, about")
    args = parser.parse_args()
    import numpy as np
    import onnx

    env = {**os.environ, "RLX_THREADS": str(args.threads), "OMP_NUM_THREADS": str(args.threads)}
    print(f"{'model':20} {'rlx ms':>9} {'ort ms':>9} {'ratio':>7}  {'difference':>10}")
    for path in args.models:
        graph = onnx.load(path, load_external_data=False).graph
        dims = [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
        with tempfile.TemporaryDirectory() as folder:
            data, ours, theirs = (os.path.join(folder, f"{n}.npy") for n in ("x", "rlx", "ort"))
            np.save(data, np.random.default_rng(1).standard_normal(dims).astype(np.float32))
            rlx = Worker([args.worker, str(path), data, ours], env)
            ort = Worker([sys.executable, "-c", ORT, str(path), data, theirs, str(args.threads)], env)
            a, b = np.load(ours), np.load(theirs)
            difference = float(np.abs(a - b).max() / np.abs(b).max())
            n = max(1, int(args.seconds * 1e3 / args.rounds / (rlx.ask(1) + ort.ask(1))))
            rounds = []
            for i in range(args.rounds):
                order = (rlx, ort) if i % 2 == 0 else (ort, rlx)
                times = {id(w): w.ask(n) for w in order}
                rounds.append((times[id(rlx)], times[id(ort)]))
            rlx.close()
            ort.close()
        ratio = statistics.median(o / r for r, o in rounds)
        medians = [statistics.median(column) for column in zip(*rounds)]
        print(f"{path.stem:20} {medians[0]:9.2f} {medians[1]:9.2f} {ratio:7.2f}  {difference:10.1e}", flush=True)


if __name__ == "__main__":
    main()
