"""llama.cpp through llama-cpp-python's low-level interface: one sequence. --model: a GGUF file. Options: `flash` turns
flash attention on, `f32-cache` and `q8-cache` make the KV cache f32 or Q8_0 instead of f16."""

import ctypes

from worker import Worker, arguments

args = arguments(__doc__, required=True)

import llama_cpp
import numpy as np

NOTHING = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(NOTHING, None)
llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(str(args.model).encode(), llama_cpp.llama_model_default_params())
if not model:
    raise SystemExit(f"{args.model}: llama.cpp cannot load it")
vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))


class Context:
    """A context for up to `most` tokens; prompts are evaluated as one batch of up to 512 rows."""

    def __init__(self, most):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max(most, 64), max(most, 64), 512
        params.n_threads = params.n_threads_batch = args.threads
        params.flash_attn_type = 1 if "flash" in args.option else 0
        if "f32-cache" in args.option:
            params.type_k = params.type_v = 0
        if "q8-cache" in args.option:
            params.type_k = params.type_v = 8
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def __del__(self):
        llama_cpp.llama_free(self.context)

    def keep(self, length):
        llama_cpp.llama_memory_seq_rm(self.memory, 0, length, -1)

    def eval(self, ids):
        values = (ctypes.c_int32 * len(ids))(*ids)
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(values, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), shape=(vocab,))


class Cache:
    def __init__(self, ids):
        self.length, self.context = len(ids), Context(len(ids) + 64)
        self.context.eval([int(token) for token in ids])

    def rewind(self):
        self.context.keep(self.length)

    def step(self, token):
        return self.context.eval([token])


class Llama(Worker):
    name = "llama.cpp"
    version = "llama-cpp-python " + llama_cpp.__version__

    def prefill(self, ids):
        context, ids = Context(len(ids)), [int(token) for token in ids]

        def run():
            context.keep(0)
            return context.eval(ids)

        return run

    def decode(self, ids):
        return Cache(ids)


Llama().serve(args.threads)
