"""Writes the grids of GGUF's IQ types (data of the format; MIT licence, the ggml authors) as packed tables.

    python scripts/goldens/gguf_grids.py

Points of 8 take two bits an element, points of 4 take four; low bits first.
"""

from pathlib import Path

import numpy as np
from gguf import quants

ROOT = Path(__file__).resolve().parents[2] / "crates/rlx-tensor/src/quant/grids"
BITS = {8: 2, 4: 4}


def pack(kind):
    kind.init_grid()
    points = kind.grid.reshape(kind.grid_shape)
    codes = np.array([[kind.grid_map.index(int(value)) for value in point] for point in points], dtype=np.uint8)
    bits = BITS[kind.grid_shape[1]]
    groups = codes.reshape(-1, 8 // bits)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (groups << shifts).sum(axis=1).astype(np.uint8).tobytes()


def main():
    ROOT.mkdir(parents=True, exist_ok=True)
    for kind in (quants.IQ2_XXS, quants.IQ2_XS, quants.IQ2_S, quants.IQ3_XXS, quants.IQ3_S, quants.IQ1_S):
        (ROOT / f"{kind.__name__.lower()}.bin").write_bytes(pack(kind))


if __name__ == "__main__":
    main()
