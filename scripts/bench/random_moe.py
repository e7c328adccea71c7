"""A random mixture of experts of more than 1 GB, for the table of expert budgets.

    python scripts/bench/random_moe.py FOLDER

Needs numpy. 8 layers of 16 experts in bf16, two of them for each token; the tokenizer is that of models/demo-moe. The file is the same on
every run.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

LAYERS, EXPERTS, WIDTH, INNER, HEADS = 8, 16, 1024, 1408, 16
folder = Path(sys.argv[1])
demo = Path(__file__).resolve().parents[2] / "models/demo-moe"
folder.mkdir(parents=True, exist_ok=True)
for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
    shutil.copy(demo / name, folder / name)
vocab = json.loads((demo / "config.json").read_text())["vocab_size"]
config = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": vocab, "hidden_size": WIDTH,
    "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 4, "head_dim": WIDTH // HEADS, "num_experts": EXPERTS, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 1024,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "decoder_sparse_step": 1, "mlp_only_layers": [],
}
(folder / "config.json").write_text(json.dumps(config, indent=1))

kv = WIDTH // 4
shapes = {"model.embed_tokens.weight": [vocab, WIDTH], "model.norm.weight": [WIDTH]}
for layer in range(LAYERS):
    at = f"model.layers.{layer}"
    shapes |= {f"{at}.input_layernorm.weight": [WIDTH], f"{at}.post_attention_layernorm.weight": [WIDTH]}
    shapes |= {f"{at}.self_attn.{n}_norm.weight": [WIDTH // HEADS] for n in "qk"}
    shapes |= {f"{at}.self_attn.q_proj.weight": [WIDTH, WIDTH], f"{at}.self_attn.o_proj.weight": [WIDTH, WIDTH]}
    shapes |= {f"{at}.self_attn.{n}_proj.weight": [kv, WIDTH] for n in "kv"}
    shapes[f"{at}.mlp.gate.weight"] = [EXPERTS, WIDTH]
    for expert in range(EXPERTS):
        to = f"{at}.mlp.experts.{expert}"
        shapes |= {f"{to}.gate_proj.weight": [INNER, WIDTH], f"{to}.up_proj.weight": [INNER, WIDTH]}
        shapes[f"{to}.down_proj.weight"] = [WIDTH, INNER]

header, end = {}, 0
for name, shape in shapes.items():
    begin, end = end, end + 2 * int(np.prod(shape))
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
random = np.random.default_rng(16)
with open(folder / "model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif "embed" in name:
            values *= 1.0
        else:
            values *= shape[-1] ** -0.5
        file.write((np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16).tobytes())
print(f"{folder}: {end / 1e9:.2f} GB")
