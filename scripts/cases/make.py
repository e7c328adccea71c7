"""Writes crates/rlx-conformance/cases/<op>.json: inputs, attributes and expected results of ops, computed with NumPy in
float64 and independently of the Rust code. Run: python scripts/cases/make.py (needs numpy)."""

import json
import math
from pathlib import Path

import numpy as np

import codes
import images

CASES = Path(__file__).resolve().parents[2] / "crates" / "rlx-conformance" / "cases"
rng = np.random.default_rng(20240607)
cases = {}


def f32(*dims, scale=1.0):
    return (rng.standard_normal(dims) * scale).astype(np.float32)


def i32(values):
    return np.asarray(values, dtype=np.int32)


NAMES = {"float32": "f32", "int32": "i32", "int64": "i64", "bool": "bool", "float64": "f32", "uint8": "u8", "int8": "i8"}


def number(v):
    v = float(v)
    if math.isnan(v):
        return "nan"
    if math.isinf(v):
        return "inf" if v > 0 else "-inf"
    return int(v) if v == int(v) and abs(v) < 2**53 else v


def tensor(a, dtype=None):
    a = np.asarray(a)
    dtype = dtype or NAMES[a.dtype.name]
    if dtype == "f32":
        a = a.astype(np.float32)
    return {"dtype": dtype, "dims": list(a.shape), "data": [number(v) for v in a.reshape(-1)]}


def case(op, name, attrs, inputs, outputs, terms=1, states=()):
    cases.setdefault(op, []).append({
        "name": name, "attrs": attrs, "terms": terms,
        "inputs": [tensor(x) for x in inputs], "states": list(states), "outputs": [tensor(y) for y in outputs],
    })


def wide(x):
    return np.asarray(x, dtype=np.float64)


erf = np.vectorize(math.erf)
ACT = {
    "identity": lambda x: x,
    "relu": lambda x: np.where(np.isnan(x), x, np.maximum(x, 0)),
    "gelu": lambda x: x / 2 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def elementwise():
    x = f32(3, 5)
    unary = {
        "neg": np.negative, "abs": np.abs, "exp": np.exp, "tanh": np.tanh, "erf": erf, "sigmoid": ACT["sigmoid"],
        "sin": np.sin, "cos": np.cos, "floor": np.floor, "ceil": np.ceil, "round": np.round, "sign": np.sign,
    }
    for kind, f in unary.items():
        case("unary", kind, f"kind={kind}", [x], [f(wide(x))])
    p = np.abs(x) + np.float32(0.1)
    for kind, f in {"log": np.log, "sqrt": np.sqrt, "rsqrt": lambda v: v**-0.5, "reciprocal": lambda v: 1 / v}.items():
        case("unary", kind, f"kind={kind}", [p], [f(wide(p))])
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 2.5], np.float32)
    case("unary", "abs of special values", "kind=abs", [special], [np.abs(special)])
    case("unary", "empty", "kind=exp", [f32(0, 3)], [f32(0, 3)])
    case("unary", "not", "kind=not", [np.array([True, False])], [np.array([False, True])])
    a, b = f32(2, 1, 4), f32(3, 1)
    for kind, f in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.minimum,
                    "max": np.maximum, "rem": np.fmod}.items():
        case("binary", f"{kind} broadcast", f"kind={kind}", [a, b], [f(wide(a), wide(b))])
    case("binary", "pow", "kind=pow", [np.abs(a), b], [np.abs(wide(a)) ** wide(b)])
    for kind, f in {"equal": np.equal, "less": np.less, "less_equal": np.less_equal, "greater": np.greater,
                    "greater_equal": np.greater_equal}.items():
        case("binary", f"{kind} of i32", f"kind={kind}", [i32([1, 2, 3]), i32([2, 2, 2])], [f([1, 2, 3], [2, 2, 2])])
    t, u = np.array([True, True, False, False]), np.array([True, False, True, False])
    for kind, f in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
        case("binary", kind, f"kind={kind}", [t, u], [f(t, u)])
    case("binary", "i64 beyond 2^52", "kind=add", [np.array([2**52], np.int64), np.array([1], np.int64)],
         [np.array([2**52 + 1], np.int64)])
    for kind, f in ACT.items():
        activation(kind, f)
    case("cast", "f32 to i32 truncates and saturates", "to=i32", [np.array([1.9, -1.9, 1e20, np.nan], np.float32)],
         [i32([1, -1, 2**31 - 1, 0])])
    case("cast", "f32 to i8", "to=i8", [np.array([1.9, -1.9, 1e20, np.nan, -300], np.float32)],
         [np.array([1, -1, 127, 0, -128], np.int8)])
    case("cast", "i8 to f32", "to=f32", [np.array([-128, 0, 127], np.int8)], [np.float32([-128, 0, 127])])
    case("cast", "i32 to i8 wraps", "to=i8", [i32([-129, 300, 7])], [np.array([127, 44, 7], np.int8)])
    case("cast", "i32 to f32", "to=f32", [i32([-3, 0, 7])], [np.array([-3, 0, 7], np.float32)])
    case("select", "broadcast condition", "", [np.array([[True], [False]]), f32(2, 3) * 0 + 1, f32(1, 3) * 0 + 2],
         [np.array([[1, 1, 1], [2, 2, 2]], np.float32)])
    inf = np.array([np.inf, 1], np.float32)
    case("select", "the value not taken does not leak", "", [np.array([False, True]), inf, inf[::-1].copy()],
         [np.array([1, 1], np.float32)])
    x, y = f32(3, 4), f32(4)
    want = ACT["gelu"](wide(x) * wide(y)) + 0.5
    case("fused_elementwise", "scaled gelu", 'program="t0=mul i0 i1; t1=gelu t0; t2=add t1 0.5"', [x, y], [want], terms=3)
    case("fused_elementwise", "select", 'program="t0=greater i0 0.0; t1=select t0 i0 i1"', [x, y],
         [np.where(x > 0, x, y)])
    a, b = np.array([[0, 7, 255], [128, 131, 1]], np.uint8), np.array([[-128, 0, 127], [5, -1, 64]], np.int8)
    want = (a.astype(np.float32) - np.float32(131)) * np.float32(0.25) + b.astype(np.float32) * np.float32(0.5)
    case("fused_elementwise", "codes to numbers", 'program="t0=sub i0 131.0; t1=mul t0 0.25; t2=mul i1 0.5; t3=add t1 t2"',
         [a, b], [want], terms=3)
    for to, low, high in ((np.uint8, 0, 255), (np.int8, -128, 127)):
        code = np.clip(np.round(want) + 3, low, high).astype(to)
        program = f"t0=sub i0 131.0; t1=mul t0 0.25; t2=mul i1 0.5; t3=add t1 t2; t4=round t3; t5=add t4 3.0; t6={NAMES[np.dtype(to).name]} t5"
        case("fused_elementwise", f"sums of {NAMES[np.dtype(to).name]}", f'program="{program}"', [a, b], [code])
    odd = np.array([np.nan, np.inf, -np.inf, 1.9, -1.9], np.float32)
    case("fused_elementwise", "numbers that are no codes", 'program="t0=mul i0 1.0; t1=i8 t0"', [odd],
         [np.array([0, 127, -128, 1, -1], np.int8)])


def activation(kind, f):
    x = f32(4, 3, scale=3)
    case("activation", kind, f"kind={kind}", [x], [f(wide(x))])


def moving():
    x = f32(2, 3, 4)
    case("reshape", "merge", "dims=dims[6, 4]", [x], [x.reshape(6, 4)])
    case("transpose", "rotate axes", "perm=[2, 0, 1]", [x], [x.transpose(2, 0, 1)])
    case("transpose", "empty", "perm=[1, 0]", [f32(0, 3)], [f32(3, 0)])
    case("broadcast", "new and repeated axes", "dims=dims[2, 3, 4]", [x[0, :, :1].copy()],
         [np.broadcast_to(x[0, :, :1], (2, 3, 4))])
    case("slice", "middle axis", "axis=1, start=dims[1], len=dims[2], step=1", [x], [x[:, 1:3]])
    case("slice", "columns", "axis=none, start=dims[1], len=dims[2], step=1", [x], [x[:, :, 1:3]])
    case("slice", "every other", "axis=2, start=dims[1], len=dims[2], step=2", [x], [x[:, :, 1::2]])
    case("slice", "nothing", "axis=0, start=dims[2], len=dims[0], step=1", [x], [x[2:]])
    case("concat", "two of unequal extent", "axis=1", [x, x[:, :1].copy()], [np.concatenate([x, x[:, :1]], axis=1)])
    case("pad", "two axes", "before=dims[1, 0], after=dims[0, 2], value=-1.5", [x[0]],
         [np.pad(x[0], ((1, 0), (0, 2)), constant_values=-1.5)])
    at = i32([[2, 0], [1, 1]])
    case("gather", "middle axis", "axis=1", [x, at], [np.take(x, at, axis=1)])
    case("gather", "i64 rows", "axis=0", [x, np.array([1, 1, 0], np.int64)], [x[[1, 1, 0]]])
    case("embedding", "repeated ids", "", [i32([3, 0, 3]), t := f32(5, 6)], [t[[3, 0, 3]]])
    case("embedding", "no rows", "", [i32([]), f32(5, 6)], [f32(0, 6)])
    case("iota", "along rows", "dims=dims[2, 3], axis=1, dtype=i32", [], [i32([[0, 1, 2], [0, 1, 2]])])
    case("topk", "ties take the lower index", "k=2", [np.array([[1, 3, 3, 2], [5, 5, 5, 5]], np.float32)],
         [np.array([[3, 3], [5, 5]], np.float32), i32([[1, 2], [0, 1]])])
    case("topk", "nan is largest", "k=2", [np.array([1, np.nan, np.inf], np.float32)],
         [np.array([np.nan, np.inf], np.float32), i32([1, 2])])
    r = f32(3, 6)
    order = np.argsort(-r, axis=-1, kind="stable")[:, :4]
    case("topk", "rows", "k=4", [r], [np.take_along_axis(r, order, -1), i32(order)])


def reducing():
    x = f32(2, 3, 4)
    w = wide(x)
    for kind, f in {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min, "prod": np.prod}.items():
        case("reduce", f"{kind} of two axes", f"kind={kind}, axes=[0, 2], keep_dims=false", [x], [f(w, axis=(0, 2))], terms=8)
        case("reduce", f"{kind} kept", f"kind={kind}, axes=[1], keep_dims=true", [x], [f(w, axis=1, keepdims=True)], terms=3)
    case("reduce", "sum of nothing", "kind=sum, axes=[1], keep_dims=false", [f32(2, 0)], [np.zeros(2, np.float32)])
    case("cumsum", "inclusive", "axis=1, exclusive=false, reverse=false", [x], [np.cumsum(w, axis=1)], terms=3)
    case("cumsum", "exclusive", "axis=0, exclusive=true, reverse=false", [i32([1, 2, 3])], [i32([0, 1, 3])])
    case("cumsum", "reverse", "axis=0, exclusive=false, reverse=true", [i32([1, 2, 3])], [i32([6, 5, 3])])
    case("softmax", "last axis", "axis=2", [x], [softmax(w)], terms=4)
    case("softmax", "middle axis, large", "axis=1", [x * 100], [softmax(wide(x * np.float32(100)), 1)], terms=3)
    m = np.array([[-np.inf, 0, 1]], np.float32)
    case("softmax", "a masked element", "axis=1", [m], [softmax(wide(m))], terms=3)
    a, b = f32(2, 3, 4), f32(4, 5)
    case("matmul", "batched", "transpose_a=false, transpose_b=false", [a, b], [wide(a) @ wide(b)], terms=4)
    case("matmul", "b transposed", "transpose_a=false, transpose_b=true", [a, b.T.copy()], [wide(a) @ wide(b)], terms=4)
    case("matmul", "a transposed", "transpose_a=true, transpose_b=false", [a.transpose(0, 2, 1).copy(), b],
         [wide(a) @ wide(b)], terms=4)
    case("matmul", "nothing to sum", "transpose_a=false, transpose_b=false", [f32(2, 0), f32(0, 3)],
         [np.zeros((2, 3), np.float32)])


def layers():
    x, w1, w2, b1, b2 = f32(3, 6), f32(4, 6), f32(5, 6), f32(4), f32(5)
    attrs = "parts={}, transposed={}, bias={}, activation={}, gated={}, residual={}"
    y1, y2 = wide(x) @ wide(w1).T, wide(x) @ wide(w2).T
    case("linear", "plain", attrs.format(1, "false", "false", "identity", "false", "false"), [x, w1], [y1], terms=6)
    case("linear", "transposed with bias", attrs.format(1, "true", "true", "gelu", "false", "false"),
         [x, w1.T.copy(), b1], [ACT["gelu"](y1 + b1)], terms=6)
    case("linear", "two parts", attrs.format(2, "false", "true", "identity", "false", "false"), [x, w1, w2, b1, b2],
         [np.concatenate([y1 + b1, y2 + b2], 1)], terms=6)
    r, u = f32(3, 4), f32(4, 6)
    case("linear", "gated with residual", attrs.format(2, "false", "false", "silu", "true", "true"), [x, w1, u, r],
         [r + ACT["silu"](y1) * (wide(x) @ wide(u).T)], terms=6)
    w, b, r = f32(6), f32(6), f32(3, 6)

    def norm(v):
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)

    case("layer_norm", "with bias", "eps=1e-5, bias=true, residual=false", [x, w, b], [norm(wide(x)) * w + b], terms=6)
    s = wide(x) + r
    case("layer_norm", "with residual", "eps=1e-5, bias=false, residual=true", [x, w, r], [norm(s) * w, s], terms=6)

    def rms(v):
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-6)

    case("rms_norm", "plain", "eps=1e-6, unit_offset=false, groups=1, residual=false", [x, w], [rms(wide(x)) * w], terms=6)
    case("rms_norm", "unit offset and residual", "eps=1e-6, unit_offset=true, groups=1, residual=true", [x, w, r],
         [rms(s) * (1 + wide(w)), s], terms=6)
    g = w[:3].copy()
    case("rms_norm", "groups", "eps=1e-6, unit_offset=false, groups=2, residual=false", [x, g],
         [(rms(wide(x).reshape(3, 2, 3)) * g).reshape(3, 6)], terms=3)
    z = x.copy()
    z[1] = 0
    length = np.maximum(np.sqrt((wide(z) ** 2).sum(-1, keepdims=True)), 1e-12)
    case("l2_normalize", "a row of zeros stays", "eps=1e-12", [z], [wide(z) / length], terms=6)
    case("gated", "swiglu", "activation=silu", [x, r], [ACT["silu"](wide(x)) * r])
    case("gated", "geglu", "activation=gelu_tanh", [x, r], [ACT["gelu_tanh"](wide(x)) * r])


def rotating():
    positions = i32([0, 1, 7, 500])
    freq = (10000.0 ** (-np.arange(0, 6, 2) / 6)).astype(np.float32)
    angle = (positions.astype(np.float32)[:, None] * freq).astype(np.float64)
    table = np.concatenate([np.cos(angle), np.sin(angle)], 1)
    case("rope_angles", "plain", "scale=1.0", [positions, freq], [table])
    case("rope_angles", "scaled", "scale=1.25", [positions, freq], [table * 1.25])
    x, table = f32(4, 16), table.astype(np.float32)
    cos, sin = wide(table[:, None, :3]), wide(table[:, None, 3:])
    heads = wide(x).reshape(4, 2, 8)
    neox, gptj = heads.copy(), heads.copy()
    a, b = heads[..., 0:3], heads[..., 3:6]
    neox[..., 0:3], neox[..., 3:6] = a * cos - b * sin, b * cos + a * sin
    a, b = heads[..., 0:6:2], heads[..., 1:6:2]
    gptj[..., 0:6:2], gptj[..., 1:6:2] = a * cos - b * sin, b * cos + a * sin
    for style, y in (("neox", neox), ("gptj", gptj)):
        case("rope", f"{style}, part of a head", f"heads=2, head_dim=8, rotary_dim=6, style={style}", [x, table],
             [y.reshape(4, 16)], terms=2)


def attend(q, keys, values, past, heads, kv_heads, scale, causal, window=None, softcap=None, mask=None):
    """One sequence: q [rows, heads, d]; keys, values [past + rows, kv_heads, d]."""
    out = np.zeros_like(wide(q))
    for h in range(heads):
        g = h // (heads // kv_heads)
        for i in range(len(q)):
            s = wide(keys)[:, g] @ wide(q)[i, h] * scale
            if softcap:
                s = softcap * np.tanh(s / softcap)
            if mask is not None:
                s = s + mask[min(h, mask.shape[0] - 1), i, : len(s)]
            j, p = np.arange(len(s)), past + i
            s = np.where((j > p) & causal, -np.inf, s)
            if window:
                s = np.where(j <= p - window, -np.inf, s)
            if np.isfinite(s).any():
                out[i, h] = softmax(s) @ wide(values)[:, g]
    return out


def attention():
    text = "heads={}, kv_heads={}, head_dim=4, scale=0.5, causal={}, window={}, softcap={}, mask={}, cache={}"

    def ragged(name, heads, kv, lengths, causal, window=None, softcap=None, masked=False):
        rows = sum(lengths)
        q, k, v = f32(rows, heads, 4), f32(rows, kv, 4), f32(rows, kv, 4)
        starts = i32(np.concatenate([[0], np.cumsum(lengths)]))
        mask = f32(1, heads, max(lengths), max(lengths)) if masked else None
        if masked:
            mask[0, 0, 1, :] = -np.inf
        y = [attend(q[a:b], k[a:b], v[a:b], 0, heads, kv, 0.5, causal, window, softcap, None if mask is None else mask[0])
             for a, b in zip(starts, starts[1:])]
        word = lambda x: "none" if x is None else x
        attrs = text.format(heads, kv, str(causal).lower(), word(window), word(softcap), str(masked).lower(), "false")
        inputs = [q.reshape(rows, -1), k.reshape(rows, -1), v.reshape(rows, -1), starts] + ([mask] if masked else [])
        case("attention", name, attrs, inputs, [np.concatenate(y).reshape(rows, -1)], terms=max(lengths) + 4)

    ragged("bidirectional, ragged", 2, 2, [3, 0, 5], False)
    ragged("causal, grouped", 4, 2, [4, 2], True)
    ragged("causal, window", 2, 1, [6], True, window=3)
    ragged("soft cap", 2, 2, [3], False, softcap=1.5)
    ragged("a mask that hides a whole row", 2, 2, [3, 2], False, masked=True)
    cached(text)
    cached_integers()


def groups(x):
    """Scales and integers of 32 values each, as a cache of integers stores them."""
    x = wide(x).reshape(-1, 32)
    scale = (np.abs(x).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)).astype(np.float16)
    return scale, np.clip(np.round(x / wide(scale)), -127, 127).astype(np.int8)


def cached_integers():
    own = np.random.default_rng(8)
    random = lambda *dims: own.standard_normal(dims).astype(np.float32)
    heads, kv, dim, lengths, past = 2, 1, 32, [2, 1], [1, 0]
    table, total = i32([[1], [0]]), [3, 1]
    parts = {}
    for name, keys in (("k", True), ("v", False)):
        scales, integers = np.zeros((2, 64), np.float16), np.zeros((2, 64, dim), np.int8)
        scales[:], integers[:] = 0.01, own.integers(-127, 128, integers.shape)
        parts[name] = (keys, scales, integers)

    def stored(part):
        keys, scales, integers = part
        order = np.swapaxes(integers, 1, 2) if keys else integers
        blocks = [scales[b].tobytes() + order[b].tobytes() for b in range(2)]
        return np.frombuffer(b"".join(blocks), np.uint8).reshape(2, kv, 64, 34)

    before = {name: stored(part) for name, part in parts.items()}
    q, k, v = random(3, heads, dim), random(3, kv, dim), random(3, kv, dim)
    out, row = [], 0
    for s, n in enumerate(lengths):
        b = table[s][0]
        for name, rows in (("k", k), ("v", v)):
            _, scales, integers = parts[name]
            for i in range(n):
                scale, codes = groups(rows[row + i])
                scales[b, past[s] + i], integers[b, past[s] + i] = scale[0, 0], codes[0]
        keys, values = ((wide(part[1])[b, :total[s], None] * part[2][b, :total[s]])[:, None] for part in parts.values())
        out.append(attend(q[row:row + n], keys, values, past[s], heads, kv, 0.25, True))
        row += n
    attrs = "heads=2, kv_heads=1, head_dim=32, scale=0.25, causal=true, window=none, softcap=none, mask=false, cache=true"
    inputs = [q.reshape(3, -1), k.reshape(3, -1), v.reshape(3, -1), i32([0, 2, 3]), i32(past), table, before["k"], before["v"]]
    case("attention", "a cache of integers", attrs, inputs,
         [np.concatenate(out).reshape(3, -1), stored(parts["k"]), stored(parts["v"])], terms=40, states=[6, 7])


def cached(text):
    heads, kv, lengths, past = 2, 1, [3, 1], [63, 2]
    table = i32([[2, 0], [3, 1]])
    k_cache, v_cache = f32(4, kv, 4, 64), f32(4, kv, 64, 4)
    q, k, v = f32(4, heads, 4), f32(4, kv, 4), f32(4, kv, 4)
    k_new, v_new, out, row = k_cache.copy(), v_cache.copy(), [], 0
    for s, n in enumerate(lengths):
        for i in range(n):
            block, at = table[s][(past[s] + i) // 64], (past[s] + i) % 64
            k_new[block, :, :, at], v_new[block, :, at] = k[row + i], v[row + i]
        keys = np.array([k_new[table[s][p // 64], :, :, p % 64] for p in range(past[s] + n)])
        values = np.array([v_new[table[s][p // 64], :, p % 64] for p in range(past[s] + n)])
        out.append(attend(q[row:row + n], keys, values, past[s], heads, kv, 0.5, True))
        row += n
    attrs = text.format(heads, kv, "true", "none", "none", "false", "true")
    inputs = [q.reshape(4, -1), k.reshape(4, -1), v.reshape(4, -1), i32([0, 3, 4]), i32(past), table, k_cache, v_cache]
    case("attention", "paged cache across a block's end", attrs, inputs,
         [np.concatenate(out).reshape(4, -1), k_new, v_new], terms=70, states=[6, 7])


def experts():
    for renormalize in (False, True):
        x, logits = f32(4, 5), f32(4, 3)
        logits[0] = 1
        weights = [(f32(6, 5), f32(6, 5), f32(5, 6)) for _ in range(3)]
        p, y = softmax(wide(logits)), np.zeros((4, 5))
        for r in range(4):
            chosen = np.argsort(-p[r], kind="stable")[:2]
            scale = p[r][chosen].sum() if renormalize else 1
            for e in chosen:
                gate, up, down = (wide(w) for w in weights[e])
                y[r] += p[r][e] / scale * (down @ (ACT["silu"](gate @ x[r]) * (up @ x[r])))
        attrs = f"experts=3, top_k=2, renormalize={str(renormalize).lower()}, activation=silu"
        name = "renormalised" if renormalize else "plain weights"
        case("moe", name, attrs, [x, logits] + [w for trio in weights for w in trio], [y], terms=11)
    x, starts = f32(6, 3), i32([0, 2, 2, 6])
    for kind, f in {"mean": lambda v: v.mean(0), "cls": lambda v: v[0], "last": lambda v: v[-1], "max": lambda v: v.max(0)}.items():
        rows = [f(wide(x[a:b])) if b > a else np.zeros(3) for a, b in zip(starts, starts[1:])]
        case("pool", f"{kind}, one sequence empty", f"kind={kind}", [x, starts], [np.array(rows)], terms=4)


def adapters():
    """Its own stream, so that the cases above stay as they are."""
    own = np.random.default_rng(20251125)

    def values(*dims):
        return own.standard_normal(dims).astype(np.float32)

    attrs = ("parts={}, transposed={}, bias={}, activation={}, gated={}, residual={}, slots={}, sites={}, columns={}")

    def update(x, slots, scales, adapters, site, column, n):
        y, k = np.zeros((len(x), n)), x.shape[1]
        for row, slot in enumerate(slots):
            if slot >= 0:
                factors = wide(adapters[slot])[:, column:column + k + n]
                y[row] = float(scales[slot, site]) * ((wide(x[row]) @ factors[:, :k].T) @ factors[:, k:])
        return y

    x, w1, w2, b1, b2 = values(5, 6), values(4, 6), values(5, 6), values(4), values(5)
    slots, scales = i32([1, -1, 0, 1, 1]), values(2, 3)
    bank = [values(3, 30), values(2, 30)]
    y1 = wide(x) @ wide(w1).T + update(x, slots, scales, bank, 1, 2, 4)
    case("lora_linear", "two adapters and none", attrs.format(1, "false", "false", "identity", "false", "false", 2, "[1]", "[2]"),
         [x, w1, slots, scales] + bank, [y1], terms=20)
    case("lora_linear", "transposed with bias and activation",
         attrs.format(1, "true", "true", "gelu", "false", "false", 2, "[1]", "[2]"),
         [x, w1.T.copy(), b1, slots, scales] + bank, [ACT["gelu"](y1 + b1)], terms=20)
    y2 = wide(x) @ wide(w2).T + update(x, slots, scales, bank, 2, 16, 5)
    case("lora_linear", "two parts with biases", attrs.format(2, "false", "true", "identity", "false", "false", 2, "[1, 2]", "[2, 16]"),
         [x, w1, w2, b1, b2, slots, scales] + bank, [np.concatenate([y1 + b1, y2 + b2], 1)], terms=20)
    u, r = values(4, 6), values(5, 4)
    up = wide(x) @ wide(u).T + update(x, slots, scales, bank, 0, 18, 4)
    case("lora_linear", "gated with residual", attrs.format(2, "false", "false", "silu", "true", "true", 2, "[1, 0]", "[2, 18]"),
         [x, w1, u, r, slots, scales] + bank, [r + ACT["silu"](y1) * up], terms=20)
    none = i32([-1] * 5)
    case("lora_linear", "no row has an adapter", attrs.format(1, "false", "false", "identity", "false", "false", 2, "[1]", "[2]"),
         [x, w1, none, scales] + bank, [wide(x) @ wide(w1).T], terms=20)
    x, w = values(3, 40), values(33, 40)
    one, slots, scales = values(5, 73), i32([0, 0, -1]), np.float32([[0.25]])
    case("lora_linear", "odd widths", attrs.format(1, "false", "false", "identity", "false", "false", 1, "[0]", "[0]"),
         [x, w, slots, scales, one], [wide(x) @ wide(w).T + update(x, slots, scales, [one], 0, 0, 33)], terms=250)


elementwise()
moving()
reducing()
layers()
rotating()
attention()
experts()
adapters()
ACT["relu6"] = lambda x: np.where(np.isnan(x), x, np.clip(x, 0, 6))
activation("relu6", ACT["relu6"])
images.convolutions(case, ACT)
images.pooling(case)
images.transposed(case)
codes.products(case)
CASES.mkdir(parents=True, exist_ok=True)
for op, entries in cases.items():
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    (CASES / f"{op}.json").write_text(f"[\n{lines}\n]\n")
