"""ONNX Runtime on the CPU: MiniLM in f32. --model: the file written by export_minilm_onnx.py."""

from worker import Worker, arguments, package_folder

args = arguments(__doc__, required=True)
if args.precision != "f32":
    raise SystemExit("peer_ort.py runs f32 only")

import onnxruntime

from padded import Padded

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = args.threads
options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(str(args.model), options, providers=["CPUExecutionProvider"])


class Ort(Worker):
    name, version = "onnxruntime", onnxruntime.__version__

    def embed(self, inputs):
        return lambda: session.run(None, inputs)[0]

    def texts(self, lines):
        padded = Padded(package_folder(), lambda inputs: session.run(None, inputs)[0])
        return lambda: padded.run(lines)


Ort().serve(args.threads)
