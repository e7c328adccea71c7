"""Checkpoints of published LLM shapes with seeded random weights, as Hugging Face folders: speed depends on the shape only.

    python make_models.py models                      # all shapes, f32 and bf16
    python make_models.py models --shapes SmolLM2-135M --dtypes bf16

Weights are normal with deviation 0.02, rounded to bf16 and written in either dtype, so that both folders hold the same
numbers. The tokenizer is a byte-level BPE with as many tokens and merges as the published one, made of random merges: it
takes as long to load and cuts text into real pieces.
"""

import argparse
import json
import random
import struct
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHAPES = {
    "SmolLM2-135M": dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "Qwen2.5-0.5B": dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        use_sliding_window=False,
        sliding_window=32768,
        max_window_layers=24,
        bos_token_id=151643,
        eos_token_id=151643,
    ),
    "Qwen2.5-1.5B": dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        use_sliding_window=False,
        sliding_window=32768,
        max_window_layers=28,
        bos_token_id=151643,
        eos_token_id=151643,
    ),
}
SPECIAL_FIRST = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<reserved_{i}>" for i in range(14))]
SPECIAL_LAST = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_WORDS = 151643


def tensors(config):
    """Names and dims in the file's order."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    dim = hidden // config["num_attention_heads"]
    kv = dim * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            yield f"{prefix}self_attn.{name}.weight", (rows, hidden)
            if config["model_type"] == "qwen2":
                yield f"{prefix}self_attn.{name}.bias", (rows,)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inter, hidden)
        yield prefix + "mlp.up_proj.weight", (inter, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inter)
    yield "model.norm.weight", (hidden,)


def to_bf16(values):
    """Bits of the nearest bf16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def draw(rng, name, dims):
    values = rng.standard_normal(dims, dtype=np.float32) * np.float32(0.02)
    return to_bf16(values + np.float32(1.0) if "norm" in name else values)


def write_weights(config, seed, paths):
    """Streams the tensors into a safetensors file for each (dtype, path)."""
    names = list(tensors(config))
    files = []
    for dtype, path in paths:
        width, header, at = 4 if dtype == "f32" else 2, {"__metadata__": {"format": "pt"}}, 0
        for name, dims in names:
            size = width * int(np.prod(dims))
            header[name] = {"dtype": "F32" if dtype == "f32" else "BF16", "shape": list(dims), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        file.write(struct.pack("<Q", len(text)) + text)
        files.append((dtype, file))
    rng = np.random.default_rng(seed)
    for name, dims in names:
        bits = draw(rng, name, dims)
        for dtype, file in files:
            file.write((bits if dtype == "bf16" else bits.astype(np.uint32) << 16).tobytes())
    for _, file in files:
        file.close()


def merges_of(count, seed):
    """`count` merges whose results are new: the pieces are letters' bytes, earlier merges and now and then any byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng = random.Random(seed)
    letters = [c for c in "etaoinshrdlucmfwypvbgk"] * 6 + ["\u0120"] * 12
    known, merges, vocab = set(alphabet), [], list(alphabet)
    while len(merges) < count:
        left = rng.choice(vocab) if rng.random() < 0.8 and merges else rng.choice(letters)
        right = rng.choice(vocab[256 : 256 + 4096]) if rng.random() < 0.3 and len(merges) > 64 else rng.choice(letters)
        if rng.random() < 0.05:
            right = rng.choice(alphabet)
        joined = left + right
        if len(joined) > 14 or joined in known or "\u0120" in joined[1:]:
            continue
        known.add(joined)
        vocab.append(joined)
        merges.append((left, right))
    return vocab, merges


def tokenizer(config, seed):
    qwen = config["model_type"] == "qwen2"
    special = SPECIAL_LAST if qwen else SPECIAL_FIRST
    words = QWEN_WORDS if qwen else config["vocab_size"] - len(special)
    vocab, merges = merges_of(words - 256, seed)
    first = 0 if qwen else len(special)
    ids = {token: first + index for index, token in enumerate(vocab)}
    if not qwen:
        ids = {**{token: index for index, token in enumerate(special)}, **ids}
    made = Tokenizer(models.BPE(vocab=ids, merges=merges))
    if qwen:
        made.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(pattern=Regex(SPLIT), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    else:
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that gets SHAPE-DTYPE folders")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", default=["f32", "bf16"], choices=["f32", "bf16"])
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    for shape in args.shapes:
        config = {**SHAPES[shape], "hidden_act": "silu", "tie_word_embeddings": True, "initializer_range": 0.02}
        text = tokenizer(config, args.seed)
        paths = []
        for dtype in args.dtypes:
            folder = args.out / f"{shape}-{dtype}"
            folder.mkdir(parents=True, exist_ok=True)
            named = {**config, "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}[dtype], "rope_scaling": None}
            (folder / "config.json").write_text(json.dumps(named, indent=1) + "\n")
            tokens = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
            (folder / "generation_config.json").write_text(json.dumps(tokens) + "\n")
            text.save(str(folder / "tokenizer.json"))
            names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|endoftext|>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(names) + "\n")
            paths.append((dtype, folder / "model.safetensors"))
        write_weights(config, args.seed, paths)
        for _, path in paths:
            print(f"{path.parent}: {path.stat().st_size / 1e6:.0f} MB, {text.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
