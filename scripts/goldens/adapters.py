"""Random low-rank adapters of the tiny checkpoints, with the answers peft gives for them.

    python scripts/goldens/adapters.py

Needs scripts/requirements.txt. Writes crates/rlx-conformance/data/adapters/<name>/: adapter_config.json and adapter_model.safetensors as
peft saves them, golden.json (model, prompts) and golden.safetensors (logits_<i>: f32, [tokens, vocab]; plain_<i>: those of
the model without adapter).
"""

import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import peft
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

DATA = Path(__file__).resolve().parents[2] / "crates/rlx-conformance/data"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = ATTENTION + ["gate_proj", "up_proj", "down_proj"]
# Adapter, checkpoint, targets, and what else its config says.
ADAPTERS = [
    ("llama-a", "llama", ALL, {"r": 4, "lora_alpha": 8}),
    ("llama-b", "llama", ["q_proj", "v_proj"], {"r": 6, "lora_alpha": 3}),
    ("llama-head", "llama-linear", ALL + ["lm_head"], {"r": 2, "lora_alpha": 4}),
    ("mistral", "mistral", ALL, {"r": 3, "lora_alpha": 5, "use_rslora": True}),
    ("mixtral", "mixtral", ATTENTION, {"r": 4, "lora_alpha": 8}),
    ("qwen2", "qwen2", ALL, {"r": 4, "lora_alpha": 8}),
    ("qwen2-moe", "qwen2-moe", ATTENTION, {"r": 4, "lora_alpha": 8}),
    ("qwen3", "qwen3", ALL, {"r": 4, "lora_alpha": 8}),
    ("qwen3-moe", "qwen3-moe", ATTENTION, {"r": 4, "lora_alpha": 8}),
    ("gemma2", "gemma2", ALL, {"r": 4, "lora_alpha": 8}),
    ("gemma3", "gemma3", ALL, {"r": 4, "lora_alpha": 8}),
    ("phi3", "phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], {"r": 4, "lora_alpha": 8}),
    ("gpt2", "gpt2", ["c_attn", "c_proj", "c_fc"], {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True}),
]


@torch.no_grad()
def write(name, checkpoint, targets, config, seed):
    source = DATA / "models" / checkpoint
    golden = json.loads((source / "golden.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = golden["prompts"][1:]
    logits = lambda model, prompt: model(input_ids=torch.tensor([prompt])).logits[0].clone()
    tensors = {f"plain_{i}": logits(model, prompt) for i, prompt in enumerate(prompts)}
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in sorted(adapted.named_parameters()):
        if "lora_" in key:
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    for i, prompt in enumerate(prompts):
        tensors[f"logits_{i}"] = logits(adapted, prompt)
        change = (tensors[f"logits_{i}"] - tensors[f"plain_{i}"]).abs().max().item()
        assert change > 0.05, f"{name}: the adapter changes nothing ({change})"
    folder = DATA / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    # peft would save the base of an adapted head beside its factors.
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    saved = json.loads((folder / "adapter_config.json").read_text())
    saved |= {"base_model_name_or_path": checkpoint, "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "golden.safetensors")
    facts = {"model": checkpoint, "peft": peft.__version__, "prompts": prompts, "seed": seed}
    (folder / "golden.json").write_text(json.dumps(facts) + "\n")
    print(f"{name}: {sum(p.numel() for k, p in adapted.named_parameters() if 'lora_' in k)} parameters")


for seed, (name, checkpoint, targets, config) in enumerate(ADAPTERS):
    write(name, checkpoint, targets, config, seed)
