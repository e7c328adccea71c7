"""Perplexity of the files that `rlx quantize` writes, in llama.cpp and in RLX, beside files of llama.cpp's own quantiser.

    python benches/peers/gguf_perplexity.py train DIR                    # a small llama that knows the stories of scripts/demo
    python benches/peers/gguf_perplexity.py compare RLX LOGITS_BINARY DIR [--type Q8_0 ..]

RLX is the binary, LOGITS_BINARY as for `gguf_logits.py`. Random weights have no perplexity worth the name, so that `train` makes
a model of rows that K-quants can hold (256 and 768) in some minutes. The text is stories that training has not seen, each alone,
its end token included. Per type: perplexity of RLX's file in llama.cpp and in RLX, and of llama.cpp's file of the same type in
llama.cpp, with the differences in percent.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf_logits import softmax

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts/demo"))
STORIES, SEED = 40, 1_000_003


def train_model(out, steps):
    import torch
    from corpus import BOS, CONTEXT, EOS, PAD, batches, perplexity, train, train_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(5)
    tokenizer = train_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        initializer_range=0.03, rms_norm_eps=1e-5))
    train(model, list(model.parameters()), batches(tokenizer, 8, 256, 5), steps, 3e-3, report=25)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    print("held-out perplexity {:.3f} over {} tokens".format(*perplexity(model, tokenizer, STORIES)))


def texts(folder):
    from corpus import EOS
    from grammar import story
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(folder), random.Random(SEED)
    return [tokenizer.encode(story(rng, "plain")) + [EOS] for _ in range(STORIES)]


def perplexity(logits_of, ids):
    loss = [-softmax(logits_of(text)[:-1])[np.arange(len(text) - 1), text[1:]] for text in ids]
    return float(np.exp(np.concatenate(loss).mean()))


def theirs(path):
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=512, n_batch=512, n_threads=2, logits_all=True, verbose=False, flash_attn=False, type_k=0, type_v=0)

    def logits(text):
        llama.reset()
        llama.eval(text)
        return np.array(llama.scores[: len(text)], dtype=np.float32)

    return logits


def ours(binary, path):
    def logits(text):
        with tempfile.NamedTemporaryFile() as out:
            subprocess.run([binary, path, out.name, ",".join(map(str, text))], check=True)
            return np.fromfile(out.name, dtype="<f4").reshape(len(text), -1)

    return logits


def compare(rlx, binary, folder, kinds):
    import llama_cpp

    ids = texts(folder)
    print(f"{sum(map(len, ids)) - len(ids)} tokens of {len(ids)} stories")
    full = folder / "F32.gguf"
    write = lambda kind, path: subprocess.run([rlx, "quantize", folder, "-o", path, "--type", kind], check=True, capture_output=True)
    write("F32", full)
    print(f"F32: llama.cpp {perplexity(theirs(full), ids):.4f}, rlx {perplexity(ours(binary, full), ids):.4f}", flush=True)
    for kind in kinds:
        own, other = folder / f"{kind}.gguf", folder / f"{kind}-llama.gguf"
        write(kind, own)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        if llama_cpp.llama_model_quantize(str(full).encode(), str(other).encode(), params):
            raise SystemExit(f"llama.cpp could not write {other}")
        here, there, twin = perplexity(theirs(own), ids), perplexity(ours(binary, own), ids), perplexity(theirs(other), ids)
        print(f"| {kind} | {here:.4f} | {there:.4f} | {there / here - 1:+.3%} | {twin:.4f} | {here / twin - 1:+.3%} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    works = parser.add_subparsers(dest="work", required=True)
    work = works.add_parser("train")
    work.add_argument("out", type=Path)
    work.add_argument("--steps", type=int, default=400)
    work = works.add_parser("compare")
    work.add_argument("rlx")
    work.add_argument("binary")
    work.add_argument("folder", type=Path)
    work.add_argument("--type", dest="kinds", nargs="*", default=["Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"])
    args = parser.parse_args()
    if args.work == "train":
        train_model(args.out, args.steps)
    else:
        compare(args.rlx, args.binary, args.folder, args.kinds)


if __name__ == "__main__":
    main()
