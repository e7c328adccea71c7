"""How far quantised GGUF files move the next-token distributions, in RLX and in llama.cpp.

    python benches/peers/gguf_divergence.py [--seeds 5,6,..] LOGITS_BINARY REFERENCE.gguf FILE.gguf ...

REFERENCE.gguf is the model in f32; its distributions by llama.cpp are what both are compared with. LOGITS_BINARY as for
`gguf_logits.py`. For each file: mean KL divergence in nats and the share of positions with the same likeliest token, of each;
their difference with its standard error; the divergence between the two. Each seed draws other tokens: positions of one text share
what is before them, so the error that a text's positions show is too small, and only the spread over texts tells one.
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
    arguments, seeds = sys.argv[1:], [5]
    if arguments[0] == "--seeds":
        seeds, arguments = [int(seed) for seed in arguments[1].split(",")], arguments[2:]
    binary, reference, *files = arguments
    gaps = {file: [] for file in files}
    for seed in seeds:
        ids = [int(i) for i in np.random.default_rng(seed).integers(0, 40000, TOKENS)]
        expected = theirs(reference, ids)
        for file in files:
            mine, other = ours(binary, file, ids), theirs(file, ids)
            gap = divergence(expected, mine) - divergence(expected, other)
            gaps[file].append(gap.mean() / divergence(expected, other).mean())
            print(f"{Path(file).name}, seed {seed}: rlx {report(expected, mine)}; llama.cpp {report(expected, other)}; rlx less "
                  f"llama.cpp {gap.mean():+.1e} +- {gap.std() / len(gap) ** 0.5:.1e}; between them "
                  f"{divergence(other, mine).mean():.3e}", flush=True)
    for file, found in gaps.items():
        if len(found) > 1:
            error = np.std(found, ddof=1) / len(found) ** 0.5
            print(f"{Path(file).name}: rlx less llama.cpp {np.mean(found):+.2%} +- {error:.2%} over {len(found)} texts", flush=True)
