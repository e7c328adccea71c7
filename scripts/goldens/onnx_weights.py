"""Small models whose weights are known before a run, with what ONNX Runtime makes of them: `crates/rlx-onnx/data/weights`.

    python scripts/goldens/onnx_weights.py crates/rlx-onnx/data/weights

The node tests of the `onnx` package give weights as inputs, so that they do not reach what is done with known ones: exact sums of codes,
transposed convolutions by phases, recurrent layers over packed weights, scattering to known places. Folders are laid out as there.
Needs numpy, onnx and onnxruntime.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

rng = np.random.default_rng(7)


def floats(*dims, scale=1.0):
    return (rng.standard_normal(dims) * scale).astype(np.float32)


def codes(*dims, dtype=np.uint8):
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, dims).astype(dtype)


def number(value, dtype=np.float32):
    return np.array(value, dtype)


def products():
    for name, k, w_type in (("", 24, np.int8), ("_deep", 1200, np.int8), ("_unsigned", 600, np.uint8)):
        x, w = codes(2, 3, k), codes(k, 5, dtype=w_type)
        zero = number(7, w_type)
        yield f"matmul_integer{name}", "MatMulInteger", {0: x}, {1: w, 2: number(121, np.uint8), 3: zero}, {}
        rest = {1: number(0.02), 2: number(121, np.uint8), 3: w, 4: number(0.01), 5: zero}
        out = {6: number(0.3), 7: number(100, np.uint8)}
        yield f"qlinear_matmul{name}", "QLinearMatMul", {0: x}, rest | out, {}
    x, w = codes(3, 24, dtype=np.int8), codes(24, 5, dtype=np.int8)
    scales, zeros = np.abs(floats(5)) * np.float32(0.01), np.zeros(5, np.int8)
    rest = {1: number(0.02), 2: number(-3, np.int8), 3: w, 4: scales, 5: zeros, 6: number(0.3), 7: number(5, np.int8)}
    yield "qlinear_matmul_columns", "QLinearMatMul", {0: x}, rest, {}


def convolutions():
    pads = {"pads": [1, 1, 1, 1]}
    shapes = [("", 3, (6, 3, 3, 3), 1, {}), ("_deep", 160, (4, 160, 3, 3), 1, {"strides": [2, 2]})]
    shapes += [("_groups", 8, (8, 4, 3, 3), 2, {}), ("_depthwise", 8, (8, 1, 3, 3), 8, {"strides": [2, 1]})]
    for name, channels, dims, groups, attrs in shapes:
        x, w = codes(1, channels, 7, 6), codes(*dims, dtype=np.int8)
        attrs = {**pads, **attrs, "group": groups}
        outputs = dims[0]
        zero = number(0, np.int8)
        yield f"conv_integer{name}", "ConvInteger", {0: x}, {1: w, 2: number(9, np.uint8)}, attrs
        rest = {1: number(0.05), 2: number(9, np.uint8), 3: w, 4: number(0.02), 5: zero, 6: number(2.0), 7: number(120, np.uint8)}
        yield f"qlinear_conv{name}", "QLinearConv", {0: x}, rest, attrs
        channelwise = {4: np.abs(floats(outputs)) * np.float32(0.02), 5: np.zeros(outputs, np.int8)}
        bias = {8: rng.integers(-90000, 90000, outputs).astype(np.int32)}
        yield f"qlinear_conv{name}_bias", "QLinearConv", {0: x}, rest | channelwise | bias, attrs


def transposed():
    two = [
        ("", (4, 3, 3, 3), {}),
        ("_stride", (4, 3, 4, 4), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("_odd", (4, 3, 3, 2), {"strides": [2, 3], "pads": [1, 0, 0, 1]}),
        ("_extra", (4, 3, 3, 3), {"strides": [3, 2], "output_padding": [2, 1]}),
        ("_groups", (4, 2, 3, 3), {"strides": [2, 2], "group": 2}),
        ("_dilated", (4, 3, 3, 3), {"strides": [2, 2], "dilations": [2, 3], "pads": [1, 2, 1, 2]}),
        ("_same", (4, 3, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ("_narrow", (4, 3, 1, 1), {"strides": [2, 2]}),
    ]
    for name, dims, attrs in two:
        outputs = dims[1] * attrs.get("group", 1)
        yield f"conv_transpose{name}", "ConvTranspose", {0: floats(2, 4, 5, 4)}, {1: floats(*dims)}, attrs
        yield f"conv_transpose{name}_bias", "ConvTranspose", {0: floats(1, 4, 3, 6)}, {1: floats(*dims), 2: floats(outputs)}, attrs
    line = {"strides": [4], "pads": [2, 2]}
    yield "conv_transpose_line", "ConvTranspose", {0: floats(2, 4, 9)}, {1: floats(4, 6, 8), 2: floats(6)}, line


def recurrent():
    steps, batch, inputs, hidden = 7, 3, 5, 6
    lengths = np.array([7, 3, 5], np.int32)
    for op, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4)):
        for name, directions, attrs in (
            ("", 1, {}),
            ("_reverse", 1, {"direction": "reverse"}),
            ("_both", 2, {"direction": "bidirectional"}),
            ("_clip", 1, {"clip": 0.5}),
        ):
            attrs = {"hidden_size": hidden, **attrs}
            w, r = floats(directions, gates * hidden, inputs, scale=0.5), floats(directions, gates * hidden, hidden, scale=0.5)
            b = floats(directions, 2 * gates * hidden, scale=0.5)
            known = {1: w, 2: r, 3: b}
            x = floats(steps, batch, inputs)
            yield f"{op.lower()}{name}", op, {0: x}, known, attrs
            states = {5: floats(directions, batch, hidden)}
            if op == "LSTM":
                states[6] = floats(directions, batch, hidden)
            yield f"{op.lower()}{name}_lengths", op, {0: x, 4: lengths} | states, known, attrs
            if op == "GRU":
                yield f"gru{name}_after", op, {0: x, 4: lengths} | states, known, {**attrs, "linear_before_reset": 1}
            if op == "LSTM":
                peepholes = {7: floats(directions, 3 * hidden)}
                yield f"lstm{name}_peepholes", op, {0: x}, known | peepholes, attrs


def scattered():
    x = floats(4, 5, 3)
    at = np.array([[[0, 2, -1]], [[3, 3, 1]]])
    yield "scatter_elements", "ScatterElements", {0: x, 2: floats(2, 1, 3)}, {1: at}, {"axis": 0}
    again = np.array([[[1, 1, 0], [1, 2, 0]], [[4, 1, 4], [0, 1, 4]]])
    yield "scatter_elements_add", "ScatterElements", {0: x, 2: floats(2, 2, 3)}, {1: again}, {"axis": 1, "reduction": "add"}
    rows = np.array([[0, 1], [3, -1], [0, 1]])
    yield "scatter_nd", "ScatterND", {0: x, 2: floats(3, 3)}, {1: rows}, {}
    yield "scatter_nd_add", "ScatterND", {0: x, 2: floats(3, 3)}, {1: rows}, {"reduction": "add"}
    yield "scatter_nd_rows", "ScatterND", {0: x, 2: floats(2, 5, 3)}, {1: np.array([[1], [2]])}, {}


def coded_weights():
    w = codes(300, 70, dtype=np.int8)
    yield "dequantize_tensor", "DequantizeLinear", {}, {0: w, 1: number(0.01), 2: number(3, np.int8)}, {}
    scales = np.abs(floats(70)) * np.float32(0.01)
    yield "dequantize_columns", "DequantizeLinear", {}, {0: w, 1: scales, 2: codes(70, dtype=np.int8)}, {"axis": 1}


FAMILIES = [products, convolutions, transposed, recurrent, scattered, coded_weights]
RESULTS = {"RNN": 2, "GRU": 2, "LSTM": 3}


def write(folder, op, given, known, attrs):
    """Operands by position: `given` in a run, `known` as initialisers. What dequantises a weight is followed by a product with it."""
    count = max([*given, *known]) + 1
    names = [f"x{i}" if i in given else f"w{i}" if i in known else "" for i in range(count)]
    outputs = [f"y{i}" for i in range(RESULTS.get(op, 1))]
    nodes = [helper.make_node(op, names, outputs, **attrs)]
    feed = {names[i]: value for i, value in sorted(given.items())}
    if not feed:
        feed = {"x": floats(3, known[0].shape[0])}
        nodes.append(helper.make_node("MatMul", ["x", "y0"], ["y"]))
        outputs = ["y"]
    kind = lambda value: helper.np_dtype_to_tensor_dtype(value.dtype)
    inputs = [helper.make_tensor_value_info(n, kind(v), v.shape) for n, v in feed.items()]
    weights = [numpy_helper.from_array(value, names[i]) for i, value in sorted(known.items())]
    declared = [onnx.ValueInfoProto(name=n) for n in outputs]
    graph = helper.make_graph(nodes, op, inputs, declared, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
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
        for name, op, given, known, attrs in family():
            try:
                write(root / name, op, given, known, attrs)
            except Exception as error:
                print(f"{name}: ONNX Runtime refuses: {str(error).splitlines()[0]}")
    print(len(list(root.glob("*/model.onnx"))), "cases")


if __name__ == "__main__":
    main()
