"""PyTorch with transformers on the CPU: a BERT encoder or a causal LM, by the folder's config. --option compile uses
torch.compile with frozen weights (encoders: every shape compiles by itself; the first call of a shape takes half a minute)."""

import json

from worker import Worker, arguments, package_folder

args = arguments(__doc__, default=None)

import torch
import transformers

torch.set_num_threads(args.threads)
torch.set_grad_enabled(False)
folder = args.model or package_folder()
compiled = "compile" in args.option
kind = json.loads((folder / "config.json").read_text())["model_type"]
load = transformers.BertModel if kind == "bert" else transformers.AutoModelForCausalLM
more = {"add_pooling_layer": False} if kind == "bert" else {}
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.precision]
model = load.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype, **more).eval()
if compiled:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    model = torch.compile(model, dynamic=False)


def logits_of(ids, **cache):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)


class Cache:
    def __init__(self, ids):
        self.length = len(ids)
        self.past = logits_of(torch.from_numpy(ids)[None]).past_key_values

    def rewind(self):
        beyond = self.past.get_seq_length() - self.length
        if beyond:
            self.past.crop(-beyond)

    def step(self, token):
        return logits_of(torch.tensor([[token]]), past_key_values=self.past).logits.float().numpy()


class Torch(Worker):
    name, version = "torch.compile" if compiled else "torch", torch.__version__

    def embed(self, inputs):
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}

        def run():
            with torch.no_grad():
                return model(**tensors).last_hidden_state.float().numpy()

        return run

    def prefill(self, ids):
        ids = torch.from_numpy(ids)[None]
        return lambda: logits_of(ids).logits.float().numpy()

    def decode(self, ids):
        return Cache(ids)


Torch().serve(args.threads)
