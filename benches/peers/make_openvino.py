"""OpenVINO graphs of the folders that make_models.py wrote: decoders whose KV cache is state inside the plugin.

    python make_openvino.py models models/openvino       # SHAPE-f32/model.xml, SHAPE-bf16/model.xml

Built op by op in the form that the CPU plugin fuses: RMS norm, rotary positions, scaled dot product attention over a cache
that is read, reordered by `beam_idx` and appended to. Weights keep the folder's dtype.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation


class Weights:
    def __init__(self, path):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self.header = json.loads(file.read(size))
        self.data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)

    def __contains__(self, name):
        return name in self.header

    def __getitem__(self, name):
        entry = self.header[name]
        first, last = entry["data_offsets"]
        if entry["dtype"] == "F32":
            return ops.constant(np.array(self.data[first:last]).view(np.float32).reshape(entry["shape"]))
        tensor = ov.Tensor(ov.Type.bf16, ov.Shape(entry["shape"]))
        tensor.data.view(np.uint8).reshape(-1)[:] = self.data[first:last]
        return ops.convert(ov.op.Constant(tensor), "f32")


def whole(values):
    return ops.constant(np.array(values, dtype=np.int64))


def norm(x, weight, epsilon):
    mean = ops.reduce_mean(ops.power(x, np.float32(2.0)), whole([-1]), True)
    return ops.multiply(ops.multiply(x, ops.divide(np.float32(1.0), ops.sqrt(ops.add(mean, np.float32(epsilon))))), weight)


def linear(x, weights, name):
    y = ops.matmul(x, weights[name + ".weight"], False, True)
    return ops.add(y, weights[name + ".bias"]) if name + ".bias" in weights else y


def heads_of(x, count, dim):
    return ops.transpose(ops.reshape(x, whole([0, 0, count, dim]), True), whole([0, 2, 1, 3]))


def rotated(x, cos, sin, dim):
    low = ops.slice(x, whole([0]), whole([dim // 2]), whole([1]), whole([3]))
    high = ops.slice(x, whole([dim // 2]), whole([np.iinfo(np.int64).max]), whole([1]), whole([3]))
    turned = ops.concat([ops.multiply(high, np.float32(-1.0)), low], -1)
    return ops.add(ops.multiply(x, cos), ops.multiply(turned, sin))


def repeated(x, groups):
    """Each KV head for `groups` query heads, in the form that attention sees through."""
    if groups == 1:
        return x
    wide = ops.unsqueeze(x, whole([2]))
    shape = ops.concat(
        [
            ops.gather(ops.shape_of(x), whole([0, 1]), whole(0)),
            whole([groups]),
            ops.gather(ops.shape_of(x), whole([2, 3]), whole(0)),
        ],
        0,
    )
    return ops.reshape(ops.broadcast(wide, shape, "BIDIRECTIONAL"), merged(x, groups), False)


def merged(x, groups):
    shape = ops.shape_of(x)
    heads = ops.multiply(ops.gather(shape, whole([1]), whole(0)), whole([groups]))
    return ops.concat([ops.gather(shape, whole([0]), whole(0)), heads, ops.gather(shape, whole([2, 3]), whole(0))], 0)


def build(folder):
    config = json.loads((folder / "config.json").read_text())
    weights = Weights(folder / "model.safetensors")
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    dim, epsilon = hidden // heads, config["rms_norm_eps"]
    ids = ops.parameter([-1, -1], ov.Type.i64, name="input_ids")
    positions = ops.parameter([-1, -1], ov.Type.i64, name="position_ids")
    beam = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    table = weights["model.embed_tokens.weight"]
    x = ops.gather(table, ids, whole(0))
    rates = (config["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)
    angles = ops.multiply(ops.unsqueeze(ops.convert(positions, "f32"), whole([2])), ops.constant(rates[None, None]))
    angles = ops.unsqueeze(ops.concat([angles, angles], -1), whole([1]))
    cos, sin = ops.cos(angles), ops.sin(angles)
    parameters, results, mask = [], [], None
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        h = norm(x, weights[prefix + "input_layernorm.weight"], epsilon)
        q, k, v = (
            heads_of(linear(h, weights, f"{prefix}self_attn.{part}_proj"), count, dim)
            for part, count in (("q", heads), ("k", kv), ("v", kv))
        )
        q, k = rotated(q, cos, sin, dim), rotated(k, cos, sin, dim)
        past = [ops.parameter([-1, kv, -1, dim], ov.Type.f32, name=f"past_{part}{layer}") for part in "kv"]
        parameters += past
        k, v = (ops.concat([ops.gather(old, beam, whole(0)), new], 2) for old, new in zip(past, (k, v)))
        for part, made in zip("kv", (k, v)):
            result = ops.result(made)
            result.output(0).set_names({f"present_{part}{layer}"})
            results.append(result)
        if mask is None:
            count = ops.gather(ops.shape_of(k), whole(2), whole(0))
            keys = ops.range(whole(0), count, whole(1), "i64")
            seen = ops.less_equal(ops.unsqueeze(keys, whole([0, 1, 2])), ops.unsqueeze(positions, whole([1, 3])))
            mask = ops.select(seen, np.float32(0.0), np.float32(np.finfo(np.float32).min))
        groups = heads // kv
        out = ops.scaled_dot_product_attention(q, repeated(k, groups), repeated(v, groups), mask)
        out = ops.reshape(ops.transpose(out, whole([0, 2, 1, 3])), whole([0, 0, hidden]), True)
        x = ops.add(x, linear(out, weights, prefix + "self_attn.o_proj"))
        h = norm(x, weights[prefix + "post_attention_layernorm.weight"], epsilon)
        gate = ops.swish(linear(h, weights, prefix + "mlp.gate_proj"))
        x = ops.add(x, linear(ops.multiply(gate, linear(h, weights, prefix + "mlp.up_proj")), weights, prefix + "mlp.down_proj"))
    last = ops.slice(x, whole([-1]), whole([np.iinfo(np.int64).max]), whole([1]), whole([1]))
    logits = ops.result(ops.matmul(norm(last, weights["model.norm.weight"], epsilon), table, False, True))
    logits.output(0).set_names({"logits"})
    for parameter in (ids, positions, beam, *parameters):
        parameter.output(0).set_names({parameter.friendly_name})
    model = ov.Model([logits, *results], [ids, positions, beam, *parameters], folder.name)
    pairs = {p.friendly_name: p.friendly_name.replace("past", "present") for p in parameters}
    apply_make_stateful_transformation(model, pairs)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="*", default=["SmolLM2-135M", "Qwen2.5-0.5B"])
    parser.add_argument("--dtypes", nargs="*", default=["f32", "bf16"])
    args = parser.parse_args()
    for shape in args.shapes:
        for dtype in args.dtypes:
            path = args.out / f"{shape}-{dtype}" / "model.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            ov.save_model(build(args.models / f"{shape}-{dtype}"), path, compress_to_fp16=False)
            print(path, flush=True)


if __name__ == "__main__":
    main()
