"""Blocks of every GGUF type with the values that the Python package `gguf` gives for them.

    python scripts/goldens/gguf_blocks.py

Writes crates/rlx-conformance/data/quant/: TYPE.decode.bin (blocks, then their f32 values) and, for types whose rounding
defines them, TYPE.encode.bin (f32 values, then their blocks).
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

ROOT = Path(__file__).resolve().parents[2] / "crates/rlx-conformance/data/quant"
# Byte offsets of half-precision fields.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0], "MXFP4": [],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_XS": [0],
    "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0], "IQ1_S": [0], "IQ1_M": [],
}
ENCODED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def random_blocks(rng, name, count):
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES[name]:
        halves = (rng.standard_normal(count) * 0.05).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(count, 2)
    if name == "IQ1_M":
        # The scale is made of the upper four bits of four words.
        words = blocks[:, 48:56].view(np.uint16)
        halves = (rng.standard_normal(count) * 0.05).astype(np.float16).view(np.uint16)
        for i in range(4):
            words[:, i] = (words[:, i] & 0x0FFF) | ((halves >> (4 * i) & 15) << 12)
        blocks[:, 48:56] = words.view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = [0, 1, 2, 120, 127, 130, 140, 254][:count]
    return blocks


def main():
    rng = np.random.default_rng(20)
    ROOT.mkdir(parents=True, exist_ok=True)
    for name in HALVES:
        kind = GGMLQuantizationType[name]
        elements, _ = GGML_QUANT_SIZES[kind]
        blocks = random_blocks(rng, name, 8 if elements == 32 else 4)
        values = quants.dequantize(blocks, kind).astype("<f4")
        (ROOT / f"{name}.decode.bin").write_bytes(blocks.tobytes() + values.tobytes())
    values = (rng.standard_normal((16, 32)) * rng.lognormal(0, 1, (16, 1))).astype(np.float32)
    values[0] = 0
    values[1] = 1.5
    values[2, :16] = 0
    for name in ENCODED:
        blocks = quants.quantize(values, GGMLQuantizationType[name])
        (ROOT / f"{name}.encode.bin").write_bytes(values.tobytes() + blocks.tobytes())


if __name__ == "__main__":
    main()
