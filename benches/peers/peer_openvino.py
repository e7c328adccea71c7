"""OpenVINO on the CPU. --model: the file written by export_minilm_onnx.py."""

from worker import arguments, serve

args = arguments(__doc__, required=True)

import openvino

settings = {
    "INFERENCE_NUM_THREADS": args.threads,
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": args.precision,
}
compiled = openvino.Core().compile_model(str(args.model), "CPU", settings)
request = compiled.create_infer_request()


def prepare(inputs):
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[0]


serve("openvino" if args.precision == "f32" else "openvino-bf16", openvino.__version__, args.threads, prepare)
