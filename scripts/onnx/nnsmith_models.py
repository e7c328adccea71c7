"""Writes random models of NNSmith as cases of the ONNX test runner, with ONNX Runtime's results, or torch's where ONNX Runtime has no kernel.

    nnsmith_models.py OUT [--seeds 500] [--first 0] [--nodes 12]
    nnsmith_models.py OUT --apart seed7 seed12 ..

Needs nnsmith 0.1.0, torch (whose exporter is told to take the TorchScript path), onnx and onnxruntime. OUT/nnsmith/seedN holds
`model.onnx` and `test_data_set_0` with numbered inputs and outputs. A seed gives the same model and inputs again. Seeds that
NNSmith or torch's exporter does not take are listed in OUT/nnsmith/refused.txt with the reason.

`--apart` writes every node of a case as a case of its own (OUT/nnsmith-apart/seedN_K), with the operands it has in ONNX Runtime (in onnx's own
evaluator where that has no kernel): where all of them agree, a difference of the whole model is rounding that grew.
"""

import argparse
import pathlib
import random
import warnings

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

warnings.filterwarnings("ignore")


def set_exporter():
    """NNSmith calls the exporter without choosing; models are traced, so its newer path loses them."""
    export = torch.onnx.export

    def traced(*args, **kwargs):
        kwargs.pop("verbose", None)
        return export(*args, **kwargs, dynamo=False)

    torch.onnx.export = traced


def session(model):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def write_case(folder, model, inputs, outputs):
    data = folder / "test_data_set_0"
    data.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    for kind, arrays in (("input", inputs), ("output", outputs)):
        for i, (name, array) in enumerate(arrays):
            tensor = numpy_helper.from_array(np.asarray(array), name)
            (data / f"{kind}_{i}.pb").write_bytes(tensor.SerializeToString())


def named_inputs(model, array_of):
    return [(value.name, array_of(value)) for value in model.graph.input]


def random_array(value, source):
    kind = value.type.tensor_type
    dims = [dim.dim_value for dim in kind.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if dtype == np.bool_:
        return source.integers(0, 2, dims).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return source.integers(1, 5, dims).astype(dtype)
    return source.uniform(0.1, 2.0, dims).astype(dtype)


def generate(seed, nodes):
    from nnsmith.abstract.extension import activate_ext
    from nnsmith.graph_gen import model_gen
    from nnsmith.materialize import Model
    from nnsmith.narrow_spec import auto_opset

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    kind = Model.init("onnx", backend_target="cpu")
    kind.add_seed_setter()
    opset = auto_opset(kind, None)
    activate_ext(opset=opset, factory=None)
    made = model_gen(
        opset=opset, method="symbolic-cinit", seed=seed, max_elem_per_tensor=4096, max_nodes=nodes, timeout_ms=10000
    )
    model = kind.from_gir(made.make_concrete())
    model.refine_weights()
    return model.native_model, model.torch_model


def results_of(model, network, inputs):
    try:
        return session(model).run(None, dict(inputs))
    except Exception:
        with torch.no_grad():
            results = network(*[torch.from_numpy(np.array(array)) for _, array in inputs])
        results = results if isinstance(results, (list, tuple)) else [results]
        # The exporter declares some F64 results of torch as F32.
        declared = [helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type) for output in model.graph.output]
        return [value.detach().numpy().astype(dtype) for value, dtype in zip(results, declared)]


def make(out, seed, nodes):
    model, network = generate(seed, nodes)
    source = np.random.default_rng(seed)
    inputs = named_inputs(model, lambda value: random_array(value, source))
    results = results_of(model, network, inputs)
    names = [value.name for value in model.graph.output]
    write_case(out / "nnsmith" / f"seed{seed}", model, inputs, list(zip(names, results)))


def apart(out, name):
    folder = out / "nnsmith" / name
    model = shape_inference.infer_shapes(onnx.load(folder / "model.onnx"))
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for i, value in enumerate(model.graph.input):
        tensor = onnx.TensorProto.FromString((folder / f"test_data_set_0/input_{i}.pb").read_bytes())
        values[value.name] = numpy_helper.to_array(tensor)
    for at, node in enumerate(model.graph.node):
        given = sorted({value for value in node.input if value})
        inputs = [(value, values[value]) for value in given]
        types = [helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype) for _, array in inputs]
        declared = [helper.make_tensor_value_info(n, t, np.shape(a)) for (n, a), t in zip(inputs, types)]
        outputs = [onnx.ValueInfoProto(name=value) for value in node.output if value]
        graph = helper.make_graph([node], "apart", declared, outputs)
        single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        try:
            results = session(single).run(None, dict(inputs))
        except Exception:
            results = ReferenceEvaluator(single).run(None, dict(inputs))
        named = list(zip([value.name for value in outputs], results))
        values.update(named)
        write_case(out / "nnsmith-apart" / f"{name}_{at}_{node.op_type}", single, inputs, named)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--apart", nargs="*")
    choices = parser.parse_args()
    torch.set_num_threads(1)
    if choices.apart is not None:
        for name in choices.apart:
            apart(choices.out, name)
        return
    set_exporter()
    refused = []
    for seed in range(choices.first, choices.first + choices.seeds):
        if (choices.out / "nnsmith" / f"seed{seed}" / "model.onnx").is_file():
            continue
        try:
            make(choices.out, seed, choices.nodes)
        except Exception as error:
            refused.append(f"{seed}\t{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
    folder = choices.out / "nnsmith"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "refused.txt", "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in refused)


if __name__ == "__main__":
    main()
