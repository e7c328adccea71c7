"""Train the sailors'-speech adapter on top of the demo model.

    python scripts/demo/train_lora.py models/demo models/demo-lora --steps 300
"""

import argparse
import json
import shutil
from pathlib import Path

from corpus import batches, perplexity, train

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(21)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    train(model, trained, batches(tokenizer, args.rows, args.length, 22, "sailor"), args.steps, args.rate, warmup=20)
    value, count = perplexity(model, tokenizer, style="sailor")
    with model.disable_adapter():
        plain, _ = perplexity(model, tokenizer, style="sailor")
    print(f"held-out sailor perplexity {value:.3f} with the adapter, {plain:.3f} without, over {count} tokens")
    readme = args.out / "README.md"
    kept = readme.read_text() if readme.exists() else None
    shutil.rmtree(args.out, ignore_errors=True)
    model.save_pretrained(args.out)
    path = args.out / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": "models/demo"}
    settings["target_modules"] = TARGETS
    path.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    (args.out / "adapter_model.safetensors").chmod(0o644)
    readme.unlink(missing_ok=True)
    if kept:
        readme.write_text(kept)


if __name__ == "__main__":
    main()
