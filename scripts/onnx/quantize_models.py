"""Writes models of eight bits from ONNX files, by onnxruntime.quantization: static ones between QuantizeLinear and DequantizeLinear, calibrated on
random numbers, and dynamic ones.

    python quantize_models.py --out models/quantised models/onnx/resnet50_b1.onnx models/onnx/bert_mini_b1.onnx
    python ../../benches/peers/compare_onnx.py --worker target/release/examples/onnx_worker models/quantised/*.onnx

Files are named NAME_qdq.onnx (activations of U8, weights of I8 by output), NAME_qdq_s8.onnx (both of I8, weights by tensor) and NAME_dynamic.onnx.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

rng = np.random.default_rng(8)


class Random(CalibrationDataReader):
    """Some runs' inputs: normal numbers, or whole ones below 1,000, as an input's type asks."""

    def __init__(self, model, runs):
        inputs = onnx.load(model, load_external_data=False).graph.input
        self.left = [{i.name: self.value(i.type.tensor_type) for i in inputs} for _ in range(runs)]

    @staticmethod
    def value(kind):
        dims = [d.dim_value or 1 for d in kind.shape.dim]
        if kind.elem_type == onnx.TensorProto.FLOAT:
            return rng.standard_normal(dims).astype(np.float32)
        return rng.integers(0, 1000, dims).astype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))

    def get_next(self):
        return self.left.pop() if self.left else None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        target = lambda kind: str(args.out / f"{model.stem}_{kind}.onnx")
        for kind, activations, per_channel in (("qdq", QuantType.QUInt8, True), ("qdq_s8", QuantType.QInt8, False)):
            quantize_static(str(model), target(kind), Random(model, args.runs), quant_format=QuantFormat.QDQ,
                            activation_type=activations, weight_type=QuantType.QInt8, per_channel=per_channel)
        quantize_dynamic(str(model), target("dynamic"), weight_type=QuantType.QInt8)
        print(f"{model.stem}: written", flush=True)


if __name__ == "__main__":
    main()
