"""ONNX Runtime on the CPU. --model: the file written by export_minilm_onnx.py."""

from worker import arguments, serve

args = arguments(__doc__, required=True)
if args.precision != "f32":
    raise SystemExit("peer_ort.py runs f32 only")

import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = args.threads
options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(str(args.model), options, providers=["CPUExecutionProvider"])


def prepare(inputs):
    return lambda: session.run(None, inputs)[0]


serve("onnxruntime", onnxruntime.__version__, args.threads, prepare)
