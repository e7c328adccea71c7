"""Compile the CUDA text of every kernel for several architectures, without a GPU.

    cargo xtask nvrtc [--write] [ARCHITECTURE..]

runs this after it has installed the compiler and written the texts. By hand:

    cargo test -p rlx-gpu --lib every_kernel_as_cuda -- --ignored
    pip install nvidia-cuda-nvrtc
    python3 scripts/gpu/nvrtc.py [--expect FILE [--write]] [--table NAME] [ARCHITECTURE..]

Prints a line for each architecture (kernels, most registers and who uses them, spilled bytes) and ends with 1 if a kernel does not
compile or spills more than FILE says: `architecture kernel bytes` a line, none for a kernel that spills nothing. `--write` makes FILE
anew. `--table` adds a line for each kernel whose name begins with NAME: registers, shared bytes and spilled bytes on each architecture.
Kernels for matrix units, and those that pack bfloat16, are not compiled for sm_75, which has neither.
"""

import argparse
import ctypes
import glob
import importlib.util
import multiprocessing
import os
import re
import sys

ARCHITECTURES = ["sm_75", "sm_80", "sm_90a", "sm_120"]
FOLDER = os.path.join(os.path.dirname(__file__), "../../target/cuda")
HEAD = "# Bytes that NVRTC spills, `architecture kernel bytes`; a kernel without a line spills none. `cargo xtask nvrtc --write` makes it.\n"

nvrtc = None


def load():
    """NVRTC of the Python package."""
    global nvrtc
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations) if spec else []
    found = sorted(f for folder in folders for f in glob.glob(folder + "/**/libnvrtc.so.*", recursive=True))
    if not found:
        sys.exit("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    nvrtc = ctypes.CDLL(found[0])


def version():
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def numbers(log, pattern):
    """All numbers that a pattern finds in a compiler's log."""
    return [int(n) for n in re.findall(pattern, log)]


class Row:
    """A kernel on an architecture; `failed` is the compiler's log if it does not compile."""

    def __init__(self, architecture, path, ok, log):
        self.architecture, self.file = architecture, os.path.basename(path)
        self.kernel = self.file.rsplit("_", 1)[0]
        registers = numbers(log, r"Used (\d+) registers")
        self.registers = max(registers, default=0)
        self.shared = max(numbers(log, r"(\d+) bytes smem"), default=0)
        self.spilled = sum(numbers(log, r"(\d+) bytes spill stores"))
        self.failed = None if ok and registers else f"{architecture} {self.file}: {log.strip()[:400]}"


def compiled(job):
    """The row of a kernel on an architecture; nothing if that has no matrix units for it."""
    architecture, path = job
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if architecture == "sm_75" and ("mma.sync" in text or text.count("pack_brains(") > 1):
        return None
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"--ptxas-options=-v", b"--std=c++17"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return Row(architecture, path, status == 0, log.value.decode())


def read(path):
    rows = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip() and not line.startswith("#"):
                architecture, kernel, spilled = line.split()
                rows[architecture, kernel] = int(spilled)
    return rows


def held(spills, expected):
    """A line for each kernel that spills more than expected."""
    return [
        f"{' '.join(key)}: {spilled} bytes spilled, expected {expected.get(key, 0)}"
        for key, spilled in sorted(spills.items())
        if spilled > expected.get(key, 0)
    ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--expect")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--table")
    args = parser.parse_args()
    files = sorted(glob.glob(os.path.join(FOLDER, "*.cu")))
    if not files:
        sys.exit(f"no kernels in {FOLDER}: write them first, see above")
    load()
    print(f"NVRTC {version()}, {len(files)} kernels")
    jobs = [(architecture, path) for architecture in args.architectures for path in files]
    with multiprocessing.Pool(os.cpu_count(), load) as pool:
        rows = [row for row in pool.map(compiled, jobs, chunksize=4) if row]
    spills, wrong = {}, []
    for architecture in args.architectures:
        own = [row for row in rows if row.architecture == architecture]
        most = max(own, key=lambda row: row.registers)
        failed = [row.failed for row in own if row.failed]
        total = sum(row.spilled for row in own)
        registers = f"at most {most.registers} registers ({most.kernel})"
        print(f"{architecture}: {len(own)} kernels, {registers}, {total} bytes spilled, {len(failed)} failed")
        wrong += failed
        for row in own:
            if row.spilled:
                key = architecture, row.kernel
                spills[key] = spills.get(key, 0) + row.spilled
    for file in sorted({row.file for row in rows if args.table is not None and row.kernel.startswith(args.table)}):
        cells = [f"{row.registers} / {row.shared} / {row.spilled}" for row in rows if row.file == file]
        print(f"| {file} | {' | '.join(cells)} |")
    if args.write and not wrong:
        others = {key: n for key, n in read(args.expect).items() if key[0] not in args.architectures}
        spills.update(others)
        with open(args.expect, "w", encoding="utf-8") as file:
            file.write(HEAD + "".join(f"{a} {k} {n}\n" for (a, k), n in sorted(spills.items())))
    else:
        wrong += held(spills, read(args.expect) if args.expect else {})
    print("\n".join(wrong), end="\n" if wrong else "")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
