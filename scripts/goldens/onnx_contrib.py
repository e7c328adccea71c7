"""Small models of the ops that ONNX Runtime adds, with what ONNX Runtime makes of them: `crates/rlx-onnx/data/contrib`.

    python scripts/goldens/onnx_contrib.py crates/rlx-onnx/data/contrib

A case is a folder as the ONNX backend tests lay it out: `model.onnx`, `test_data_set_0/input_N.pb` and `output_N.pb`. Needs numpy, onnx
and onnxruntime.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"
rng = np.random.default_rng(6)


def floats(*dims):
    return rng.standard_normal(dims).astype(np.float32)


def ints(*values, dtype=np.int32):
    return np.array(values, dtype)


def quantised(*dims, dtype=np.uint8):
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, dims).astype(dtype)


def rotary_caches(tokens, half):
    angles = np.outer(np.arange(tokens), 1.0 / 10000 ** (np.arange(half) / half))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def activations():
    x, bias = floats(3, 8), floats(8)
    yield "gelu", "Gelu", [x], 1, {}
    yield "bias_gelu", "BiasGelu", [x, bias], 1, {}
    yield "fast_gelu", "FastGelu", [x], 1, {}
    yield "fast_gelu_bias", "FastGelu", [x, bias], 1, {}
    yield "quick_gelu", "QuickGelu", [x], 1, {"alpha": 1.3}


def products():
    yield "fused_matmul", "FusedMatMul", [floats(2, 3, 4), floats(2, 4, 5)], 1, {"alpha": 0.5}
    yield "fused_matmul_trans", "FusedMatMul", [floats(2, 4, 3), floats(2, 5, 4)], 1, {"transA": 1, "transB": 1}
    for bits in (4, 8):
        for block, k in ((32, 64), (16, 40)):
            n, blocks = 6, -(-k // block)
            packed = quantised(n, blocks, block * bits // 8)
            scales = np.abs(floats(n * blocks)) * np.float32(0.1)
            zeros = quantised(n * -(-blocks * bits // 8))
            attrs = {"K": k, "N": n, "bits": bits, "block_size": block}
            x = floats(2, 3, k)
            yield f"matmul_nbits_{bits}_{block}", "MatMulNBits", [x, packed, scales], 1, attrs
            yield f"matmul_nbits_{bits}_{block}_zero", "MatMulNBits", [x, packed, scales, zeros], 1, attrs


def norms():
    x, skip, gamma, beta, bias = floats(2, 3, 8), floats(2, 3, 8), floats(8), floats(8), floats(8)
    yield "skip_layer_norm", "SkipLayerNormalization", [x, skip, gamma, beta, bias], (0, 3), {"epsilon": 1e-5}
    yield "skip_layer_norm_plain", "SkipLayerNormalization", [x, skip, gamma], 1, {}
    yield "skip_rms_norm", "SkipSimplifiedLayerNormalization", [x, skip, gamma, bias], (0, 3), {"epsilon": 1e-6}


def attention():
    batch, tokens, width, heads = 2, 5, 8, 2
    x, w, b = floats(batch, tokens, width), floats(width, 3 * width), floats(3 * width)
    plain = {"num_heads": heads}
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
    yield "attention", "Attention", [x, w, b], 1, plain
    yield "attention_causal", "Attention", [x, w, b], 1, {**plain, "unidirectional": 1}
    yield "attention_lengths", "Attention", [x, w, b, ints(5, 3)], 1, plain
    yield "attention_mask", "Attention", [x, w, b, mask], 1, plain
    yield "attention_scale", "Attention", [x, w, b], 1, {**plain, "scale": 0.3}
    yield "attention_bias", "Attention", [x, w, b, None, None, floats(batch, heads, tokens, tokens)], 1, plain
    yield "attention_sizes", "Attention", [x, floats(width, 20), floats(20)], 1, {**plain, "qkv_hidden_sizes": [8, 8, 4]}
    past = floats(2, batch, heads, 3, width // heads)
    yield "attention_past", "Attention", [x, w, b, None, past], 2, {**plain, "unidirectional": 1}
    scale = [np.float32(0.02), np.float32(0.01)]
    qx, qw = quantised(batch, tokens, width), quantised(width, 3 * width, dtype=np.int8)
    operands = [qx, qw, b, *map(np.array, scale), None, np.array(128, np.uint8), np.array(1, np.int8)]
    yield "qattention", "QAttention", operands, 1, plain


def multi_head():
    batch, tokens, keys, width, heads = 2, 4, 6, 8, 2
    q, k, v, bias = floats(batch, tokens, width), floats(batch, keys, width), floats(batch, keys, width), floats(3 * width)
    plain = {"num_heads": heads}
    padding = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.int32)
    yield "mha", "MultiHeadAttention", [q, k, v], 1, plain
    yield "mha_bias", "MultiHeadAttention", [q, k, v, bias], 1, plain
    yield "mha_padding", "MultiHeadAttention", [q, k, v, None, padding], 1, plain
    yield "mha_attention_bias", "MultiHeadAttention", [q, k, v, None, None, floats(1, heads, tokens, keys)], 1, plain
    own = floats(batch, tokens, width)
    yield "mha_causal", "MultiHeadAttention", [q, own, floats(batch, tokens, width)], 1, {**plain, "unidirectional": 1}
    past = [floats(batch, heads, 3, width // heads), floats(batch, heads, 3, width // heads)]
    yield "mha_past", "MultiHeadAttention", [q, own, floats(batch, tokens, width), None, None, None, *past], 3, plain
    heads_of = lambda n: floats(batch, heads, n, width // heads)
    yield "mha_cross", "MultiHeadAttention", [q, heads_of(keys), heads_of(keys)], 1, plain


def group_query():
    batch, heads, kv, dim, tokens, most = 2, 4, 2, 16, 5, 12
    plain = {"num_heads": heads, "kv_num_heads": kv}
    q, k, v = floats(batch, tokens, heads * dim), floats(batch, tokens, kv * dim), floats(batch, tokens, kv * dim)
    nothing = np.zeros((batch, kv, 0, dim), np.float32)
    total, same = np.array(tokens, np.int32), ints(tokens - 1, tokens - 1)
    caches = rotary_caches(most, dim // 2)
    yield "gqa", "GroupQueryAttention", [q, k, v, nothing, nothing, same, total], 3, plain
    packed = np.concatenate([q, k, v], 2)
    yield "gqa_packed", "GroupQueryAttention", [packed, None, None, nothing, nothing, same, total], 3, plain
    rotary = {**plain, "do_rotary": 1}
    yield "gqa_rotary", "GroupQueryAttention", [q, k, v, nothing, nothing, same, total, *caches], 3, rotary
    yield "gqa_interleaved", "GroupQueryAttention", [q, k, v, nothing, nothing, same, total, *caches], 3, {**rotary, "rotary_interleaved": 1}
    yield "gqa_window", "GroupQueryAttention", [q, k, v, nothing, nothing, same, total], 3, {**plain, "local_window_size": 2}
    yield "gqa_softcap", "GroupQueryAttention", [q, k, v, nothing, nothing, same, total], 3, {**plain, "softcap": 2.0}
    past = [floats(batch, kv, 4, dim), floats(batch, kv, 4, dim)]
    one = [floats(batch, 1, heads * dim), floats(batch, 1, kv * dim), floats(batch, 1, kv * dim)]
    yield "gqa_decode", "GroupQueryAttention", [*one, *past, ints(4, 4), np.array(5, np.int32), *caches], 3, rotary


def rotary():
    batch, tokens, heads, dim = 2, 3, 2, 8
    caches = rotary_caches(10, dim // 2)
    x = floats(batch, tokens, heads * dim)
    yield "rotary", "RotaryEmbedding", [x, np.array([[0, 1, 2], [4, 5, 6]]), *caches], 1, {}
    yield "rotary_offset", "RotaryEmbedding", [x, np.array([3]), *caches], 1, {}
    yield "rotary_interleaved", "RotaryEmbedding", [x, np.array([[0, 1, 2], [4, 5, 6]]), *caches], 1, {"interleaved": 1}
    four = floats(batch, heads, tokens, dim)
    yield "rotary_heads", "RotaryEmbedding", [four, np.array([[0, 1, 2], [4, 5, 6]]), *caches], 1, {}
    part = rotary_caches(10, dim // 4)
    yield "rotary_part", "RotaryEmbedding", [x, np.array([[0, 1, 2], [4, 5, 6]]), *part], 1, {"num_heads": heads, "rotary_embedding_dim": dim // 2}


FAMILIES = [activations, products, norms, attention, multi_head, group_query, rotary]


def write(folder, op, operands, results, attrs):
    names = ["" if value is None else f"x{i}" for i, value in enumerate(operands)]
    wanted = range(results) if isinstance(results, int) else results
    outputs = [f"y{i}" if i in wanted else "" for i in range(max(wanted) + 1)]
    node = helper.make_node(op, names, outputs, domain=MICROSOFT, **attrs)
    kind = lambda value: helper.np_dtype_to_tensor_dtype(value.dtype)
    inputs = [helper.make_tensor_value_info(n, kind(v), v.shape) for n, v in zip(names, operands) if n]
    declared = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs if n]
    graph = helper.make_graph([node], op, inputs, declared)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {n: v for n, v in zip(names, operands) if n}
    values = session.run(None, feed)
    data = folder / "test_data_set_0"
    data.mkdir(parents=True)
    model.producer_name = ""
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    for stem, arrays in (("input", feed.values()), ("output", values)):
        for i, array in enumerate(arrays):
            (data / f"{stem}_{i}.pb").write_bytes(numpy_helper.from_array(np.asarray(array)).SerializeToString())


def main():
    root = Path(sys.argv[1])
    shutil.rmtree(root, ignore_errors=True)
    for family in FAMILIES:
        for name, op, operands, results, attrs in family():
            try:
                write(root / name, op, operands, results, attrs)
            except Exception as error:
                print(f"{name}: ONNX Runtime refuses: {str(error).splitlines()[0]}")
    print(len(list(root.glob("*/model.onnx"))), "cases")


if __name__ == "__main__":
    main()
