"""The rows of `cargo xtask gpu-bench` in PyTorch, where it has CUDA: one JSON object a line with work, column and ms.

    python3 scripts/gpu/torch_rows.py
"""

import json
import statistics
import time

import torch
from torch.nn import functional as F

WIDTH = 4096
DECODERS = {
    "Qwen2.5-0.5B shape": dict(layers=24, width=896, heads=14, kv=2, dim=64, inner=4864, vocab=151936),
    "7B shape": dict(layers=28, width=3584, heads=28, kv=4, dim=128, inner=18944, vocab=152064),
}


def timed(run, budget=0.7):
    """Median seconds of a run, after three that are not timed."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times, begun = [], time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begun < budget and len(times) < 200):
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def show(work, run, compiled=True):
    forms = [("torch eager", run)] + ([("torch compile", torch.compile(run))] if compiled else [])
    for column, form in forms:
        try:
            print(json.dumps({"work": work, "column": column, "ms": timed(form) * 1e3}), flush=True)
        except RuntimeError as error:
            print(json.dumps({"work": work, "column": column, "error": str(error)[:200]}), flush=True)


def weight(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype) * 0.02


def attention(q, k, v, heads, kv, dim, causal):
    shape = lambda x, h: x.view(x.shape[0], x.shape[1], h, dim).transpose(1, 2)
    q, k, v = shape(q, heads), shape(k, kv), shape(v, kv)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal and q.shape[2] > 1, enable_gqa=heads != kv)
    return mixed.transpose(1, 2).reshape(q.shape[0], -1, heads * dim)


def minilm(batch, tokens):
    width, inner, heads, dtype = 384, 1536, 12, torch.float32
    layers = [[weight(width, width, dtype=dtype) for _ in range(4)] + [weight(inner, width, dtype=dtype), weight(width, inner, dtype=dtype)] for _ in range(6)]
    x0 = weight(batch, tokens, width, dtype=dtype)

    def run():
        x = x0
        for q, k, v, o, up, down in layers:
            x = F.layer_norm(x + attention(x @ q.T, x @ k.T, x @ v.T, heads, heads, 32, False) @ o.T, (width,))
            x = F.layer_norm(x + F.gelu(x @ up.T) @ down.T, (width,))
        return x.mean(1)

    return run


def decoder(layers, width, heads, kv, dim, inner, vocab, rows, past):
    parts = lambda: [weight(heads * dim, width), weight(kv * dim, width), weight(kv * dim, width), weight(width, heads * dim),
                     weight(inner, width), weight(inner, width), weight(width, inner)]
    blocks, head = [parts() for _ in range(layers)], weight(vocab, width)
    caches = [(weight(1, past, kv * dim), weight(1, past, kv * dim)) for _ in range(layers)]
    x0 = weight(1, rows, width)

    def run():
        x = x0
        for (q, k, v, o, gate, up, down), (k0, v0) in zip(blocks, caches):
            y = F.rms_norm(x, (width,))
            keys, values = (torch.cat([k0, y @ k.T], 1), torch.cat([v0, y @ v.T], 1)) if past else (y @ k.T, y @ v.T)
            x = x + attention(y @ q.T, keys, values, heads, kv, dim, True) @ o.T
            y = F.rms_norm(x, (width,))
            x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
        return F.rms_norm(x[:, -1:], (width,)) @ head.T

    return run


@torch.inference_mode()
def main():
    x = weight(1 << 15, WIDTH, dtype=torch.float32)
    show("copy", lambda: x.clone(), compiled=False)
    show("fused elementwise", lambda: F.gelu(x * 3 + 1).abs())
    show("rms norm", lambda: F.rms_norm(x, (WIDTH,)))
    vectors, v = [weight(WIDTH, WIDTH) for _ in range(16)], weight(1, WIDTH)

    def gemv():
        y = v
        for w in vectors:
            y = y @ w.T
        return y

    show("decode GEMV bf16", gemv)
    a, b = weight(8192, 8192), weight(8192, 8192)
    show("GEMM bf16 8192^3", lambda: a @ b.T, compiled=False)
    a, b = weight(8192, 8192, dtype=torch.float32), weight(8192, 8192, dtype=torch.float32)
    show("GEMM f32 8192^3", lambda: a @ b.T, compiled=False)
    for batch in (32, 256):
        show(f"MiniLM {batch}x128", minilm(batch, 128))
    for name, sizes in DECODERS.items():
        show(f"{name}, prefill 512", decoder(**sizes, rows=512, past=0))
        show(f"{name}, decode 512", decoder(**sizes, rows=1, past=512))


main()
