"""OpenVINO on the CPU. --model: the file written by export_minilm_onnx.py (encoder), or by make_openvino.py (decoder)."""

from worker import Worker, arguments, package_folder

args = arguments(__doc__, required=True)

import numpy as np
import openvino

from padded import Padded

settings = {
    "INFERENCE_NUM_THREADS": args.threads,
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": args.precision,
}
decoder = args.model.suffix == ".xml"
if decoder:
    settings["KV_CACHE_PRECISION"] = args.precision
compiled = openvino.Core().compile_model(str(args.model), "CPU", settings)
request = compiled.create_infer_request()


def evaluate(ids, past):
    ids = np.asarray(ids, dtype=np.int64)[None]
    positions = np.arange(past, past + ids.shape[1], dtype=np.int64)[None]
    inputs = {"input_ids": ids, "position_ids": positions, "beam_idx": np.zeros(1, dtype=np.int32)}
    return request.infer(inputs, share_inputs=True, share_outputs=True)[0]


class Cache:
    """The plugin keeps the cache inside: going back means to read the tokens again."""

    def __init__(self, ids):
        self.ids, self.past = ids, len(ids)

    def rewind(self):
        request.reset_state()
        evaluate(self.ids, 0)
        self.past = len(self.ids)

    def step(self, token):
        self.past += 1
        return evaluate([token], self.past - 1)


class OpenVino(Worker):
    name, version = "openvino", openvino.__version__.split("-")[0]

    def embed(self, inputs):
        return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[0]

    def texts(self, lines):
        padded = Padded(package_folder(), lambda inputs: request.infer(inputs, share_inputs=True, share_outputs=True)[0])
        return lambda: padded.run(lines)

    def prefill(self, ids):
        def run():
            request.reset_state()
            return evaluate(ids, 0)

        return run

    def decode(self, ids):
        return Cache(ids)


OpenVino().serve(args.threads)
