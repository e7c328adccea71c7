"""Tiny random checkpoints of every family, with the answers transformers gives for them.

    python scripts/goldens/make.py [--only NAME ...]

Writes crates/rlx-conformance/data/models/<name>/. Decoders get golden.json (prompts, greedy tokens, margins,
tokenizer cases) and golden.safetensors (logits_<i>: f32, [tokens, vocab]). Everything is seeded; the seed of each
folder is the first whose greedy tokens keep an arg-max margin of MARGIN of the logit range at every step.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_tokenizers
from decoders import CASES

ROOT = Path(__file__).resolve().parents[2] / "crates/rlx-conformance/data/models"
TOLERANCE = 1e-4
MARGIN = 10 * TOLERANCE
STEPS = 40
LENGTHS = (1, 5, 13, 24)


def scatter(model, seed, embed, gain):
    """Random weights whose logits are spread out; norm weights and biases away from their neutral values."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda tensor, mean, std: tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))
    around_zero = model.config.model_type.startswith("gemma")
    transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            leaf = name.split(".")[-2]
            if tensor.ndim == 1 and name.endswith("bias"):
                draw(tensor, 0.0, 0.2)
            elif tensor.ndim == 1:
                draw(tensor, 0.0 if around_zero else 1.0, 0.2)
            elif leaf in ("embed_tokens", "wte", "wpe"):
                draw(tensor, 0.0, embed)
            elif leaf == "lm_head":
                draw(tensor, 0.0, 2.0 / tensor.shape[-1] ** 0.5)
            else:
                fan_in = tensor.shape[0] if id(tensor) in transposed else tensor.shape[-1]
                draw(tensor, 0.0, gain / fan_in**0.5)


def reset_rope(model):
    """Dynamic scaling remembers the longest input so far; a short input puts it back."""
    model(input_ids=torch.tensor([[3]]))


@torch.no_grad()
def greedy(model, prompt):
    """40 greedy tokens as `generate` gives them, and the smallest arg-max margin as a share of the logit range."""
    reset_rope(model)
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(out.logits).float()
    top = logits.topk(2, dim=-1).values
    margin = ((top[:, 0] - top[:, 1]) / (logits.amax(-1) - logits.amin(-1))).min().item()
    return out.sequences[0, len(prompt) :].tolist(), margin, logits


@torch.no_grad()
def logits_of(model, prompt):
    reset_rope(model)
    return model(input_ids=torch.tensor([prompt])).logits[0].float()


def prompts_for(case, vocab):
    generator = torch.Generator().manual_seed(97)
    return [torch.randint(8, vocab, (n,), generator=generator).tolist() for n in case.get("lengths", LENGTHS)]


def search(case, config, prompts):
    """The first seed with margins, variety and no end token; the weights are rounded to the stored dtype first."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for seed in range(1, 2000):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        scatter(model, seed, case.get("embed", 0.5), case.get("gain", 1.3))
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.copy_(tensor.to(case.get("dtype", torch.float32)))
        tokens, margins = [], []
        for prompt in prompts:
            found, margin, stepwise = greedy(model, prompt)
            if margin < MARGIN or len(set(found)) < 8 or set(found) & set(ends):
                break
            tokens.append(found)
            margins.append(margin)
        else:
            return seed, model, tokens, min(margins)
    raise SystemExit(f"{case['name']}: no seed keeps the margin")


def cross_check(model, prompt, tokens):
    """Greedy steps with a cache and one pass over the whole text must be the same model."""
    whole = logits_of(model, prompt + tokens[:-1])[len(prompt) - 1 :]
    stepwise = greedy(model, prompt)[2]
    return ((whole - stepwise).abs().max() / (whole.max() - whole.min())).item()


def save_weights(case, model, folder):
    """Weights under their published names, in the stored dtype, in one file or several."""
    model.to(case.get("dtype", torch.float32)).save_pretrained(folder, max_shard_size=case.get("shard", "1GB"))
    if rename := case.get("rename"):
        path = folder / "model.safetensors"
        renamed = rename(load_file(path), model.config)
        save_file(renamed, path, metadata={"format": "pt"})
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
    model.float()


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_configs(case, config, folder):
    style = case.get("config")
    path = folder / "config.json"
    value = json.loads(path.read_text())
    write_json(path, style(value) if style else value)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    generation |= case.get("generation", {})
    write_json(folder / "generation_config.json", generation | {"transformers_version": transformers.__version__})


def tokenizer_cases(tokenizer):
    cases = [{"text": text, "ids": tokenizer.encode(text)} for text in tiny_tokenizers.TEXTS]
    for case in cases:
        case["decoded"] = tokenizer.decode(case["ids"], skip_special_tokens=True)
    if not tokenizer.chat_template:
        return {"texts": cases}
    messages = [
        {"role": "user", "content": " Where is Rex? "},
        {"role": "assistant", "content": "In the forest."},
        {"role": "user", "content": "Why?"},
    ]
    chat = {"messages": messages, "rendered": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)}
    return {"texts": cases, "chat": chat}


def make(case):
    folder = ROOT / case["name"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = case["tokenizer"]()
    vocab = len(tokenizer) + case.get("padding", 0)
    ends = [tokenizer.eos_token_id, *case.get("more_ends", [])]
    config = case["class"](
        vocab_size=vocab,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        **case["fields"],
    )
    prompts = prompts_for(case, vocab)
    seed, model, tokens, margin = search(case, config, prompts)
    logits = [logits_of(model, prompt) for prompt in prompts]
    drift = 0.0 if case.get("history") else max(cross_check(model, p, t) for p, t in zip(prompts, tokens))
    save_weights(case, model, folder)
    write_configs(case, config, folder)
    tokenizer.save_pretrained(folder, save_jinja_files=case.get("jinja", False))
    golden = {
        "covers": case["covers"],
        "transformers": transformers.__version__,
        "seed": seed,
        "relative_tolerance": TOLERANCE,
        "min_relative_margin": margin,
        "cached_against_whole": drift,
        "prompts": prompts,
        "greedy": tokens,
    } | tokenizer_cases(tokenizer)
    (folder / "golden.json").write_text(compact(golden), encoding="utf-8")
    save_file({f"logits_{i}": value.contiguous() for i, value in enumerate(logits)}, folder / "golden.safetensors")
    (folder / "golden.safetensors").chmod(0o644)
    worst = reload(folder, prompts, logits, tokens)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{case['name']:24} seed {seed:4} margin {margin:.2e} drift {drift:.1e} reload {worst:.1e} {size // 1024} KiB", flush=True)
    assert drift < TOLERANCE / 20 and worst < TOLERANCE / 20, case["name"]


def compact(value):
    """One line per key; one line per element of a list of lists or objects."""
    lines = []
    for key, item in value.items():
        text = json.dumps(item, ensure_ascii=False)
        if isinstance(item, list) and item and isinstance(item[0], (list, dict)):
            text = "[\n" + ",\n".join("  " + json.dumps(part, ensure_ascii=False) for part in item) + "\n ]"
        lines.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def reload(folder, prompts, logits, tokens):
    """The committed files, opened by AutoModel: the largest logit difference as a share of the range; tokens equal."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    worst = 0.0
    for prompt, expected, found in zip(prompts, logits, tokens):
        again = logits_of(model, prompt)
        worst = max(worst, ((again - expected).abs().max() / (expected.max() - expected.min())).item())
        assert greedy(model, prompt)[0] == found, folder
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of the folders to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for case in CASES:
        if not args.only or case["name"] in args.only:
            make(case)


if __name__ == "__main__":
    main()
