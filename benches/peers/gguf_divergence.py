"""How far quantised GGUF files move the next-token distributions, in RLX and in llama.cpp.

    python benches/peers/gguf_divergence.py LOGITS_BINARY REFERENCE.gguf FILE.gguf ...

REFERENCE.gguf is the model in f32; its distributions by llama.cpp are what both are compared with. LOGITS_BINARY as for
`gguf_logits.py`. For each file: mean KL divergence in nats and the share of positions with the same likeliest token, of each;
their difference with its standard error; the divergence between the two.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf_logits import softmax
from llama_cpp import Llama

TOKENS = 256


def theirs(path, ids):
    llama = Llama(str(path), n_ctx=TOKENS, n_batch=TOKENS, n_threads=2, logits_all=True, verbose=False, flash_attn=False,
                  type_k=0, type_v=0)
    llama.eval(ids)
    return softmax(np.array(llama.scores[:TOKENS], dtype=np.float32))


def ours(binary, path, ids):
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run([binary, path, out.name, ",".join(map(str, ids))], check=True)
        return softmax(np.fromfile(out.name, dtype="<f4").reshape(TOKENS, -1))


def divergence(reference, found):
    return (np.exp(reference) * (reference - found)).sum(axis=-1)


def report(reference, found):
    same = float((reference.argmax(-1) == found.argmax(-1)).mean())
    return f"KL {divergence(reference, found).mean():.3e}, same top {same:.2f}"


if __name__ == "__main__":
    binary, reference, *files = sys.argv[1:]
    ids = [int(i) for i in np.random.default_rng(5).integers(0, 40000, TOKENS)]
    expected = theirs(reference, ids)
    for file in files:
        mine, other = ours(binary, file, ids), theirs(file, ids)
        gap = divergence(expected, mine) - divergence(expected, other)
        print(f"{Path(file).name}: rlx {report(expected, mine)}; llama.cpp {report(expected, other)}; rlx less llama.cpp "
              f"{gap.mean():+.1e} +- {gap.std() / len(gap) ** 0.5:.1e}; between them {divergence(other, mine).mean():.3e}", flush=True)
