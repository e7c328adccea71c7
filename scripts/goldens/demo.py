"""Greedy text of the demo models by transformers, in f32.

    python scripts/goldens/demo.py

Writes crates/rlx-conformance/data/demo_text.json: for each of demo, demo-lora (the adapter on demo) and demo-moe a few
prompts with their ids, the greedy ids and their text. Stories offer equal choices (a colour, a plot), so each text stops
at the end token or before the first step whose arg-max margin is under 10 tolerances of the logit range (`complete` says
which); prompts that stop before 24 tokens are left out.
"""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from make import MARGIN, ROOT, TOLERANCE

MODELS = Path(__file__).resolve().parents[2] / "models"
PROMPTS = [
    "Once upon a time, Mia and her dog Rex",
    "Once upon a time, Tom and his cat Pepper lived in",
    "One windy morning, Kofi and his parrot Kiwi walked to the harbor.",
    "Priya and her pony Thunder loved the meadow.",
    "It was a cold evening, and Nora was playing near the mill with her brother Ben.",
    "In Stony Bay lived a boy named Hugo.",
]


def load(name):
    folder = MODELS / ("demo" if name == "demo-lora" else name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if name == "demo-lora":
        model = PeftModel.from_pretrained(model, MODELS / name)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def tell(model, tokenizer, prompt):
    ids = tokenizer.encode(prompt)
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=300, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    logits = torch.cat(out.logits).float()
    top = logits.topk(2, dim=-1).values
    margins = ((top[:, 0] - top[:, 1]) / (logits.amax(-1) - logits.amin(-1))).tolist()
    close = [step for step, margin in enumerate(margins) if margin < MARGIN]
    end = close[0] if close else len(margins)
    greedy = out.sequences[0, len(ids) : len(ids) + end].tolist()
    text = tokenizer.decode(greedy, skip_special_tokens=True)
    return {"prompt": prompt, "ids": ids, "greedy": greedy, "text": text, "complete": not close}


def main():
    torch.set_num_threads(1)
    result = {"transformers": transformers.__version__, "relative_tolerance": TOLERANCE}
    for name in ("demo", "demo-lora", "demo-moe"):
        model, tokenizer = load(name)
        told = [tell(model, tokenizer, prompt) for prompt in PROMPTS]
        result[name] = [case for case in told if len(case["greedy"]) >= 24]
        print(name, [len(case["greedy"]) for case in result[name]], "tokens")
        assert len(result[name]) >= 2
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in result.items()]
    (ROOT.parent / "demo_text.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
