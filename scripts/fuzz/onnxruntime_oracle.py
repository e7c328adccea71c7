"""Runs ONNX models that come on standard input with ONNX Runtime, unoptimised; results go to standard output.

Started by `cargo xtask onnx-fuzz --python PYTHON`. All numbers are little-endian. A request is the model's length (u32) and bytes, the
number of inputs (u32), and for each its name (u32, bytes) and an array. An array is the ONNX number of its type (u8), its rank (u32),
its extents (u64 each) and its elements. An answer is a byte: 0, then the number of outputs (u32) and an array for each; or 1, then the
length of a message (u32) and the message.
"""

import struct
import sys

import numpy as np
import onnxruntime as ort

TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_, 11: np.float64}
CODES = {np.dtype(dtype): code for code, dtype in TYPES.items()}
SOURCE, SINK = sys.stdin.buffer, sys.stdout.buffer


def read(count):
    data = SOURCE.read(count)
    if len(data) != count:
        sys.exit(0)
    return data


def number(form):
    return struct.unpack("<" + form, read(struct.calcsize("<" + form)))[0]


def read_array():
    dtype = np.dtype(TYPES[number("B")])
    dims = [number("Q") for _ in range(number("I"))]
    count = int(np.prod(dims, dtype=np.int64))
    return np.frombuffer(read(count * dtype.itemsize), dtype).reshape(dims)


def write_array(array):
    array = np.asarray(array, order="C")
    SINK.write(struct.pack("<BI", CODES[array.dtype], array.ndim))
    SINK.write(struct.pack(f"<{array.ndim}Q", *array.shape))
    SINK.write(array.tobytes())


def answer(model, feed, options):
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        results = session.run(None, feed)
    except Exception as error:
        message = str(error).encode()[:2000]
        SINK.write(struct.pack("<BI", 1, len(message)) + message)
        return
    SINK.write(struct.pack("<BI", 0, len(results)))
    for result in results:
        write_array(result)


def main():
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    while True:
        model = read(number("I"))
        feed = {}
        for _ in range(number("I")):
            name = read(number("I")).decode()
            feed[name] = read_array()
        answer(model, feed, options)
        SINK.flush()


if __name__ == "__main__":
    main()
