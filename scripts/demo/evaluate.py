"""Held-out perplexity, name persistence over 20 prompts and sample texts of a demo model.

    python scripts/demo/evaluate.py models/demo
    python scripts/demo/evaluate.py models/demo --adapter models/demo-lora --style sailor
    python scripts/demo/evaluate.py models/demo-moe

Prints, and writes to README.md in the model's (or adapter's) folder. A name persists when the greedy continuation of the
prompt, up to the end token, contains it; a stranger is a name of the grammar's lists that the prompt does not contain.
"""

import argparse
import re
from pathlib import Path

from corpus import EOS, perplexity
from grammar import BOYS, GIRLS, PETS

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    ("Once upon a time, Mia and her dog Rex", "Mia", "Rex"),
    ("Once upon a time, Tom and his cat Pepper lived in", "Tom", "Pepper"),
    ("Once upon a time, there was a brave girl named Zelda. She had a fox named Ember.", "Zelda", "Ember"),
    ("One windy morning, Kofi and his parrot Kiwi walked to the harbor.", "Kofi", "Kiwi"),
    ("It was a cold evening, and Nora was playing near the mill with her brother Ben.", "Nora", "Ben"),
    ("Long ago, in Silver Lake, there lived a shy boy named Felix and his duck Waffle.", "Felix", "Waffle"),
    ("Priya and her pony Thunder loved the meadow.", "Priya", "Thunder"),
    ("In Stony Bay lived a boy named Hugo. He was very curious, and he went everywhere with his goat Clover.", "Hugo", "Clover"),
    ("Once there was a gentle girl called Freya, who lived near a forest with her sister Anna.", "Freya", "Anna"),
    ("Omar was a patient boy who lived in Apple Town. His best friend was a donkey named Turnip.", "Omar", "Turnip"),
    ("One day, Yuki was at the beach with her kitten Mittens.", "Yuki", "Mittens"),
    ("Once upon a time, Lucas and his dog Bolt", "Lucas", "Bolt"),
    ("Once upon a time, Brelka and her rabbit Zoon went to the castle.", "Brelka", "Zoon"),
    ("One sunny day, Max and his cousin Ruby hurried to the lake.", "Max", "Ruby"),
    ("Once upon a time, Elena and her friend Carlos lived near Pine Valley. They walked into the woods", "Elena", "Carlos"),
    ("Ivan and his hamster Noodle loved the library. Every afternoon they went there.", "Ivan", "Noodle"),
    ("Once upon a time, Sara and her puppy Cookie went to the market. Sara had a red lantern", "Sara", "Cookie"),
    ("Long ago, in Old Harbor, there lived a clever girl named Tessa and her parrot Plum.", "Tessa", "Plum"),
    ("Once upon a time, Dmitri and his neighbor Wanda went to the river. Dmitri went fishing", "Dmitri", "Wanda"),
    ("One foggy evening, Chioma and her cat Shadow went to the lighthouse.", "Chioma", "Shadow"),
]
SAMPLES = ["Once upon a time, Mia and her dog Rex", "One day, Yuki was at the beach", "It was a snowy day, and Bruno"]


@torch.no_grad()
def continuation(model, tokenizer, prompt, temperature=0.0):
    ids = torch.tensor([tokenizer.encode(prompt)])
    options = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
    out = model.generate(ids, max_new_tokens=320, eos_token_id=EOS, pad_token_id=2, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), out[0, -1].item() == EOS


def persistence(model, tokenizer):
    """Counts over PROMPTS: hero kept, companion kept, both, both and no stranger, ended by itself."""
    known = set(GIRLS) | set(BOYS) | set(PETS)
    totals = dict(hero=0, companion=0, both=0, no_stranger=0, ended=0)
    for prompt, hero, companion in PROMPTS:
        text, ended = continuation(model, tokenizer, prompt)
        words = set(re.findall(r"[A-Za-z]+", text))
        inside = set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text)) & known
        kept = hero in words, companion in words
        totals["hero"] += kept[0]
        totals["companion"] += kept[1]
        totals["both"] += all(kept)
        totals["no_stranger"] += all(kept) and not inside - {hero, companion} - set(prompt.split())
        totals["ended"] += ended
    return totals


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--style", choices=("plain", "sailor"), default="plain")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    parameters = model.num_parameters()
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter).eval()
        parameters = model.num_parameters() - parameters
    folder = args.adapter or args.model
    value, count = perplexity(model, tokenizer, style=args.style)
    totals = persistence(model, tokenizer)
    n = len(PROMPTS)
    command = f"python scripts/demo/evaluate.py {args.model}"
    command += f" --adapter {args.adapter} --style {args.style}" if args.adapter else ""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    lines = [
        f"# {folder.name}",
        "",
        f"{parameters:,} parameters, {size / 1e6:.2f} MB. Trained on stories from `scripts/demo/grammar.py` by",
        f"`{TRAINED[folder.name]}`; figures below by `{command}`.",
        "",
        f"- held-out perplexity per token: {value:.3f} ({count:,} tokens of {args.style} stories from an unused seed)",
        f"- names over {n} prompts, greedy: hero kept {totals['hero']}, companion kept {totals['companion']}, both "
        f"{totals['both']}, both and no other name {totals['no_stranger']}, ended by itself {totals['ended']}",
        "",
        "Greedy, then one sample at temperature 0.8:",
        "",
    ]
    torch.manual_seed(1)
    for prompt in SAMPLES:
        for temperature in (0.0, 0.8):
            text, _ = continuation(model, tokenizer, prompt, temperature)
            lines += [f"> **{prompt}**{text}", ""]
    report = "\n".join(lines).rstrip() + "\n"
    (folder / "README.md").write_text(report, encoding="utf-8")
    print(report)


TRAINED = {
    "demo": "scripts/demo/train.py dense models/demo --steps 3000",
    "demo-moe": "scripts/demo/train.py moe models/demo-moe --start models/demo --steps 500 --rate 2e-3",
    "demo-lora": "scripts/demo/train_lora.py models/demo models/demo-lora --steps 300",
}


if __name__ == "__main__":
    main()
