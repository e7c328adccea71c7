"""Answers of llama.cpp for the tiny checkpoints written as GGUF, and a tiny nomic-bert file with its answers.

    python scripts/goldens/gguf_models.py RLX

RLX is the binary, which writes the files (`rlx quantize DIR -o FILE --type F32`). Needs llama-cpp-python, gguf and numpy. Writes
crates/rlx-conformance/data/gguf/: NAME.bin (logits of llama.cpp: f32, [tokens, vocab]), index.json (the tokens), and
nomic-bert.gguf with nomic-bert.json. Not among them, because llama.cpp refuses them: phi3 (its vocabulary has no byte tokens) and
qwen2-moe (a dense layer between layers of experts).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import Llama

DATA = Path(__file__).resolve().parents[2] / "crates/rlx-conformance/data"
OUT = DATA / "gguf"
NAMES = [
    "gemma2", "gemma3", "gpt2", "llama", "llama-bias-llama3", "llama-linear", "llama-yarn", "mistral-full", "mixtral", "qwen2", "qwen3",
    "qwen3-moe",
]
F32 = 0


def decoder(rlx, name, folder):
    path = Path(folder) / f"{name}.gguf"
    source = DATA / "models" / name
    subprocess.run([rlx, "quantize", source, "-o", path, "--type", "F32"], check=True, capture_output=True)
    llama = Llama(str(path), n_ctx=64, n_batch=64, n_threads=2, logits_all=True, verbose=False, flash_attn=False,
                  type_k=F32, type_v=F32)
    ids = [int(i) for i in np.random.default_rng(7).integers(3, 280, 12)]
    llama.eval(ids)
    np.array(llama.scores[: len(ids)], dtype="<f4").tofile(OUT / f"{name}.bin")
    return ids


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"\u2581{w}" for w in "the dog ran to a house and red big it".split()] + ["s", "ing"]


def nomic_bert():
    rng = np.random.default_rng(11)
    path = OUT / "nomic-bert.gguf"
    width, inner, layers, heads = 32, 48, 2, 4
    writer = gguf.GGUFWriter(path, "nomic-bert")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_rope_freq_base(1000.0)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 5 + [1] * (len(WORDS) - 5))
    writer.add_token_type_count(2)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_unk_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_mask_token_id(4)
    draw = lambda *shape: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
    norm = lambda name: (
        writer.add_tensor(f"{name}.weight", (1 + 0.2 * rng.standard_normal(width)).astype(np.float32)),
        writer.add_tensor(f"{name}.bias", (0.2 * rng.standard_normal(width)).astype(np.float32)),
    )
    writer.add_tensor("token_embd.weight", draw(len(WORDS), width) * 4)
    writer.add_tensor("token_types.weight", draw(2, width))
    norm("token_embd_norm")
    for layer in range(layers):
        at = f"blk.{layer}"
        writer.add_tensor(f"{at}.attn_qkv.weight", draw(3 * width, width) * 2)
        writer.add_tensor(f"{at}.attn_output.weight", draw(width, width))
        norm(f"{at}.attn_output_norm")
        writer.add_tensor(f"{at}.ffn_up.weight", draw(inner, width))
        writer.add_tensor(f"{at}.ffn_gate.weight", draw(inner, width))
        writer.add_tensor(f"{at}.ffn_down.weight", draw(width, inner))
        norm(f"{at}.layer_output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    llama = Llama(str(path), embedding=True, n_ctx=64, n_batch=64, n_threads=2, verbose=False, flash_attn=False)
    texts = ["the dog ran to a house", "a big red dog", "it", "dogs running and houses"]
    answers = []
    for text in texts:
        vector = np.array(llama.embed(text, normalize=True), dtype=np.float64)
        answers.append({"text": text, "ids": llama.tokenize(text.encode(), add_bos=True, special=True), "embedding": [float(v) for v in vector.ravel()]})
    (OUT / "nomic-bert.json").write_text(json.dumps(answers, indent=1))


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        index = {name: decoder(sys.argv[1], name, folder) for name in NAMES}
    (OUT / "index.json").write_text(json.dumps(index, indent=1))
    nomic_bert()


if __name__ == "__main__":
    main()
