"""sentence-transformers' own model object on the CPU, token ids in, token embeddings out (no tokenizer in the loop)."""

from worker import arguments, package_folder, serve

args = arguments(__doc__, default=None)

import sentence_transformers
import torch

torch.set_num_threads(args.threads)
dtype = torch.float32 if args.precision == "f32" else torch.bfloat16
model = sentence_transformers.SentenceTransformer(str(args.model or package_folder()), device="cpu", model_kwargs={"dtype": dtype})


def prepare(inputs):
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}

    def run():
        with torch.inference_mode():
            return model(dict(tensors))["token_embeddings"].float().numpy()

    return run


name = "sentence-transformers" if args.precision == "f32" else "sentence-transformers-bf16"
serve(name, sentence_transformers.__version__, args.threads, prepare)
