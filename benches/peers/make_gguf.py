"""GGUF files of the folders that make_models.py wrote, for llama.cpp: the same weights and the same tokenizer.

    python make_gguf.py models models/gguf                          # f32 and bf16
    python make_gguf.py models models/gguf --types Q8_0 Q4_0 Q4_K_M Q6_K   # with llama.cpp's quantiser, from the f32 file

Quantised files keep the tied embedding in the type that llama.cpp chooses for it.
"""

import argparse
import json
from pathlib import Path

import numpy as np

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
PLAIN = ("f32", "bf16")


def mapped(path):
    """Tensors of an F32 safetensors file as arrays over the mapped file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        assert entry["dtype"] == "F32", f"{path}: {name} is {entry['dtype']}"
        first, last = entry["data_offsets"]
        yield name, data[first:last].view(np.float32).reshape(entry["shape"])


def renamed(name):
    stem, kind = name.rsplit(".", 1)
    if stem == "model.embed_tokens":
        return f"token_embd.{kind}"
    if stem == "model.norm":
        return f"output_norm.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def interleaved(values, heads):
    """Rows of each head in the order of llama's rotary pairs: (i, i + half) side by side."""
    rows, inner = values.shape
    return values.reshape(heads, 2, rows // heads // 2, inner).swapaxes(1, 2).reshape(rows, inner)


def add_tokenizer(writer, folder, config):
    import gguf

    text = json.loads((folder / "tokenizer.json").read_text())
    tokens = [f"[PAD{index}]" for index in range(config["vocab_size"])]
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in text["model"]["vocab"].items():
        tokens[index], kinds[index] = token, gguf.TokenType.NORMAL
    for entry in text["added_tokens"]:
        tokens[entry["id"]], kinds[entry["id"]] = entry["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if config["model_type"] == "qwen2" else "smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in text["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def write(folder, path, kind):
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, config["model_type"])
    writer.add_name(path.stem)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "f32" else gguf.LlamaFileType.MOSTLY_BF16)
    add_tokenizer(writer, folder, config)
    for name, values in mapped(folder / "model.safetensors"):
        if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, heads if "q_proj" in name else kv_heads)
        if kind == "f32" or values.ndim == 1:
            writer.add_tensor(renamed(name), np.ascontiguousarray(values))
        else:
            bits = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(renamed(name), bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source, path, kind, threads):
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = threads
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params)
    if status:
        raise SystemExit(f"{path}: the quantiser ended with {status}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="folder of SHAPE-f32 folders")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="*", default=["SmolLM2-135M", "Qwen2.5-0.5B"])
    parser.add_argument("--types", nargs="*", default=list(PLAIN))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for shape in args.shapes:
        for kind in args.types:
            path = args.out / f"{shape}-{kind}.gguf"
            if kind in PLAIN:
                write(args.models / f"{shape}-f32", path, kind)
            else:
                quantise(args.out / f"{shape}-f32.gguf", path, kind, args.threads)
            print(f"{path}: {path.stat().st_size / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
