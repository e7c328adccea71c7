"""Logits and token ids of GGUF files against llama.cpp on the same file.

    python benches/peers/gguf_logits.py LOGITS_BINARY FILE.gguf ...

LOGITS_BINARY is `target/release/examples/logits` (cargo build --release -p rlx-models --example logits). Needs llama-cpp-python
and numpy. For each file: largest difference of logits over their range, mean KL divergence of the next-token distributions in
nats, share of positions with the same likeliest token, and equal encodings of the texts below.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from llama_cpp import Llama

TEXTS = [
    "Mia and her dog Rex went to the forest.", "  two  spaces, a\ttab and\na newline\n\n",
    "Numbers: 7, 42, 2026, 1234567, ½ ² ٣ 三", "Grüße, naïve café, été, Ünïcödé", "你好，世界。日本語テキスト。한국어",
    "مرحبا بالعالم שלום", "🙂👩‍👩‍👧‍👦 flags 🇨🇭", "don't I'LL we've they'Re 'tis o'clock ''s", "e\u0301 and é, ﬁ ligature",
    "zero\u200bwidth\u00a0nbsp\u3000wide", "https://example.org/a?b=c&d=%20#e_f foo_bar::baz(qux)[0]{1}==!=", "A" * 120,
    "   ", "\n", "\n\n\n a\r\n\tb  \n", "x",
]
TOKENS = 48


def softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def compare(binary, path):
    llama = Llama(str(path), n_ctx=128, n_batch=128, n_threads=2, logits_all=True, verbose=False, flash_attn=False,
                  type_k=0, type_v=0)
    vocab = llama.n_vocab()
    ids = [int(i) for i in np.random.default_rng(5).integers(0, min(vocab, 40000), TOKENS)]
    llama.eval(ids)
    theirs = np.array(llama.scores[:TOKENS], dtype=np.float32)
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run([binary, path, out.name, ",".join(map(str, ids))], check=True)
        ours = np.fromfile(out.name, dtype="<f4").reshape(TOKENS, vocab)
    a, b = softmax(theirs), softmax(ours)
    kl = float((np.exp(a) * (a - b)).sum(axis=-1).mean())
    worst = float(np.abs(ours - theirs).max() / (theirs.max() - theirs.min()))
    same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    run = subprocess.run([binary, path], input=json.dumps(TEXTS), capture_output=True, text=True, check=True)
    encoded = json.loads(run.stdout)
    equal, differing = 0, []
    for text, found in zip(TEXTS, encoded):
        expected = llama.tokenize(text.encode(), add_bos=True, special=True)
        equal += expected == found
        if expected != found:
            differing.append((text, expected, found))
    print(f"{Path(path).name}: largest difference {worst:.1e} of the range, KL {kl:.2e}, same top {same:.3f}, "
          f"{equal} of {len(TEXTS)} encodings equal", flush=True)
    for text, expected, found in differing[:3]:
        print(f"   {text!r}: llama.cpp {expected[:16]} ours {found[:16]}")


if __name__ == "__main__":
    for file in sys.argv[2:]:
        compare(sys.argv[1], file)
