"""Start-up of ONNX models beside ONNX Runtime: import or session creation, and the end of the first run.

    python startup_onnx.py --worker target/release/examples/onnx_worker models/onnx/*_b1.onnx

Cold: the file's pages are dropped from memory first and RLX has an empty cache; warm: the file was read, and an earlier process left what it
keeps. Each process is started anew, the engines in turns; medians in milliseconds from the opening of the file on.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from compare_onnx import ORT, Worker, made_up


def drop(path):
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--worker", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dim", action="append", default=[], metavar="NAME=N", help="size of a named dim")
    args = parser.parse_args()
    import onnx

    sizes = {name: int(size) for name, size in (pair.split("=") for pair in args.dim)}
    env = {**os.environ, "RLX_THREADS": str(args.threads), "OMP_NUM_THREADS": str(args.threads)}
    print("| model | RLX cold: import, first result | warm | ONNX Runtime cold: session, first result | warm |")
    print("|---|---|---|---|---|")
    for path in args.models:
        graph = onnx.load(path, load_external_data=False).graph
        columns = {(engine, state): [] for engine in ("rlx", "ort") for state in ("cold", "warm")}
        with tempfile.TemporaryDirectory() as folder:
            out, cache = os.path.join(folder, "out.npy"), os.path.join(folder, "cache")
            given = made_up(graph, folder, sizes)
            ours = [args.worker, str(path), out, *given]
            theirs = [sys.executable, "-c", ORT, str(path), out, str(args.threads), *given]
            for _ in range(args.rounds):
                for engine, command in (("rlx", ours), ("ort", theirs)):
                    shutil.rmtree(cache, ignore_errors=True)
                    drop(path)
                    for state in ("cold", "warm"):
                        worker = Worker(command, {**env, "RLX_CACHE_DIR": cache})
                        worker.close()
                        columns[engine, state].append((worker.opened_ms, worker.first_ms))
        medians = {key: [statistics.median(column) for column in zip(*times)] for key, times in columns.items()}
        cells = [f"{opened:.0f}, {first:.0f}" for opened, first in medians.values()]
        print(f"| {path.stem} | {cells[0]} | {cells[1]} | {cells[2]} | {cells[3]} |", flush=True)


if __name__ == "__main__":
    main()
