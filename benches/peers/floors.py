"""What a work must compute and read at least, from a model folder's config.json: the scale of 'of limit'."""

import json
from pathlib import Path


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def linear_parameters(config):
    """Elements of the matrices that each token is multiplied with, without the output head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = hidden // heads * config.get("num_key_value_heads", heads)
    mlp = (2 if config["model_type"] == "bert" else 3) * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * (2 * hidden * hidden + 2 * hidden * kv + mlp)


def head_parameters(config):
    return 0 if config["model_type"] == "bert" else config["hidden_size"] * config["vocab_size"]


def attention_flops(config, lengths, causal):
    keys = sum(length * (length + 1) // 2 if causal else length * length for length in lengths)
    return config["num_hidden_layers"] * config["hidden_size"] * 4 * keys


def cache_bytes(config, ctx, width):
    dim = config["hidden_size"] // config["num_attention_heads"]
    return config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * dim * ctx * width


def seconds(config, work, precision, limits, weight_bytes=None, lengths=None, cache_width=None):
    """Seconds at the limits; `limits` as `rlx doctor --json` gives them. None where a limit is not known. Products of
    bf16 may use whichever instruction is faster: widened, they are exact in f32. `weight_bytes`: the weights are blocks of this
    size in all, whose products are of bytes. `cache_width`: bytes of an element of the cache, if not those of the precision."""
    kind, batch, seq, steps = work["work"], work.get("batch", 1), work.get("seq", 1), work.get("steps", 1)
    if kind == "decode":
        rate = limits.get("read_bytes_per_s")
        width = 4 if precision == "f32" else 2
        weights = weight_bytes or width * (linear_parameters(config) + head_parameters(config))
        mean_ctx = work["ctx"] + (steps + 1) / 2
        return (weights + cache_bytes(config, mean_ctx, cache_width or width)) / rate if rate else None
    names = ("f32_flops",) if precision == "f32" else ("f32_flops", "bf16_flops")
    rate = max(limits.get(name) or 0 for name in names)
    lengths = lengths or [seq] * batch
    causal = kind == "prefill"
    flops = 2 * linear_parameters(config) * sum(lengths) + 2 * head_parameters(config) * len(lengths)
    linear_rate = limits.get("int8_ops") if weight_bytes else rate
    return flops / linear_rate + attention_flops(config, lengths, causal) / rate if rate and linear_rate else None
