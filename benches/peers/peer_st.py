"""sentence-transformers on the CPU. `embed` runs its model object, token ids in, token embeddings out."""

from worker import Worker, arguments, package_folder

args = arguments(__doc__, default=None)

import sentence_transformers
import torch

torch.set_num_threads(args.threads)
dtype = torch.float32 if args.precision == "f32" else torch.bfloat16
folder = str(args.model or package_folder())
model = sentence_transformers.SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})


class SentenceTransformers(Worker):
    name, version = "sentence-transformers", sentence_transformers.__version__

    def embed(self, inputs):
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}

        def run():
            with torch.inference_mode():
                return model(dict(tensors))["token_embeddings"].float().numpy()

        return run

    def texts(self, lines):
        return lambda: model.encode(lines, batch_size=32, normalize_embeddings=True, show_progress_bar=False)


SentenceTransformers().serve(args.threads)
