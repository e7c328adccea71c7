"""Compile the CUDA text of every kernel for several architectures, without a GPU.

    cargo test -p rlx-gpu --lib every_kernel_as_cuda -- --ignored
    pip install nvidia-cuda-nvrtc
    python3 scripts/gpu/nvrtc.py

Prints a line for each architecture (kernels, most registers, spilled bytes) and ends with 1 if a kernel does not compile or spills. With
`--table NAME`, also a line for each kernel whose name begins with NAME: registers, shared bytes and spilled bytes on each architecture.
Kernels for matrix units are not compiled for sm_75, which has none for these operands.
"""

import ctypes
import glob
import importlib.util
import os
import re
import sys

ARCHITECTURES = ["sm_75", "sm_80", "sm_90a", "sm_120"]
FOLDER = os.path.join(os.path.dirname(__file__), "../../target/cuda")


def library():
    """NVRTC of the Python package."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations) if spec else []
    found = [f for folder in folders for f in glob.glob(folder + "/**/libnvrtc.so.*", recursive=True)]
    if not found:
        sys.exit("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    return ctypes.CDLL(found[0])


def compiled(nvrtc, text, name, architecture):
    """Whether a text compiles, and the compiler's log."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"--ptxas-options=-v", b"--std=c++17"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return status == 0, log.value.decode()


def numbers(log, pattern):
    """All numbers that a pattern finds in a compiler's log."""
    return [int(n) for n in re.findall(pattern, log)]


def main():
    nvrtc = library()
    files = sorted(glob.glob(os.path.join(FOLDER, "*.cu")))
    if not files:
        sys.exit(f"no kernels in {FOLDER}: write them first, see above")
    table = sys.argv[2] if sys.argv[1:2] == ["--table"] else None
    bad, rows = False, {}
    for architecture in ARCHITECTURES:
        most, spilled, failed, count = 0, 0, [], 0
        for path in files:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            if architecture == "sm_75" and "mma.sync" in text:
                continue
            count += 1
            name = os.path.basename(path)
            ok, log = compiled(nvrtc, text, name, architecture)
            registers, spills = numbers(log, r"Used (\d+) registers"), numbers(log, r"(\d+) bytes spill stores")
            most, spilled = max([most, *registers]), spilled + sum(spills)
            if not ok or not registers:
                failed.append(f"{name}: {log.strip()[:400]}")
            elif sum(spills):
                print(f"{architecture}: {name} spills {sum(spills)} bytes")
            shared = max(numbers(log, r"(\d+) bytes smem"), default=0)
            rows.setdefault(name, []).append(f"{max(registers, default=0)} / {shared} / {sum(spills)}")
        print(f"{architecture}: {count} kernels, at most {most} registers, {spilled} bytes spilled, {len(failed)} failed")
        print("\n".join(failed[:3]), end="\n" if failed else "")
        bad = bad or bool(failed) or spilled > 0
    for name, cells in rows.items():
        if table is not None and name.startswith(table):
            print(f"| {name} | {' | '.join(cells)} |")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
