"""Tiny random encoders as sentence-transformers folders, with the answers sentence-transformers gives.

    python scripts/goldens/encoders.py [--only NAME ...]

Each folder gets golden.json (texts and token ids) and golden.safetensors: hidden_<i> (f32, [tokens, hidden], the last
hidden state of text i alone) and embeddings (f32, [texts, dimension], pooled, and normalised where modules.json says so).
"""

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import sentence_transformers
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

import tiny_tokenizers
from make import ROOT, compact, write_json

MAX_TOKENS = 48
TEXTS = [
    *tiny_tokenizers.TEXTS,
    "Rex",
    "\n\t \r\n",
    "control \u0000 \u0007 \u200b \ufeff characters",
    "fn main() { println!(\"{}\", 1 + 1); }",
    "Pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "the kind baker gave Mia a basket of warm bread and " * 12,
]


def scatter(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            if "LayerNorm.weight" in name or "layer_norm.weight" in name:
                tensor.copy_(1.0 + 0.2 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.2 * noise)
            elif "embeddings" in name:
                tensor.copy_(0.7 * noise)
            else:
                tensor.copy_(1.3 / tensor.shape[-1] ** 0.5 * noise)


def old_names(tensors):
    """As bert-base-uncased is published: `bert.` in front, gamma and beta for the norms, a head that embedding ignores."""
    out = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        out["bert." + name] = tensor
    out["cls.predictions.bias"] = torch.zeros(8)
    return out


def prefixed(prefix):
    return lambda tensors: {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


BERT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=72,
    max_position_embeddings=64,
)
CASES = [
    dict(
        name="bert-mean",
        covers="mean pooling, normalised, no tensor prefix, layout of sentence-transformers 2",
        model=(BertModel, BertConfig(**BERT, vocab_size=320, layer_norm_eps=1e-12)),
        tokenizer=tiny_tokenizers.word_piece,
        pooling="mean",
        normalize=True,
    ),
    dict(
        name="bert-cls",
        covers="first-token pooling, not normalised, `bert.` prefix, gamma and beta, tanh gelu, an unused head",
        model=(BertModel, BertConfig(**BERT | dict(hidden_size=40), vocab_size=320, hidden_act="gelu_new")),
        tokenizer=tiny_tokenizers.word_piece,
        pooling="cls",
        normalize=False,
        rename=old_names,
    ),
    dict(
        name="bert-max-st6",
        covers="max pooling, normalised, layout of sentence-transformers 6",
        model=(BertModel, BertConfig(**BERT, vocab_size=320)),
        tokenizer=tiny_tokenizers.word_piece,
        pooling="max",
        normalize=True,
        resave=True,
    ),
    dict(
        name="roberta",
        covers="positions start at pad_token_id + 1, byte-level BPE, one token type, `roberta.` prefix, mean, normalised",
        model=(
            RobertaModel,
            RobertaConfig(**BERT | dict(max_position_embeddings=66), vocab_size=320, type_vocab_size=1, pad_token_id=1),
        ),
        tokenizer=tiny_tokenizers.roberta,
        pooling="mean",
        normalize=True,
        rename=prefixed("roberta"),
    ),
    dict(
        name="distilbert",
        covers="q_lin/k_lin names, no token types, mean pooling, not normalised, `distilbert.` prefix",
        model=(
            DistilBertModel,
            DistilBertConfig(vocab_size=320, dim=32, n_layers=2, n_heads=4, hidden_dim=72, max_position_embeddings=64),
        ),
        tokenizer=tiny_tokenizers.word_piece,
        pooling="mean",
        normalize=False,
        rename=prefixed("distilbert"),
    ),
]


def write_modules(case, folder, dimension):
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * case["normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir()
    flags = dict(cls_token="cls", mean_tokens="mean", max_tokens="max", mean_sqrt_len_tokens="mean_sqrt_len_tokens")
    pooling = {"word_embedding_dimension": dimension}
    pooling |= {f"pooling_mode_{flag}": kind == case["pooling"] for flag, kind in flags.items()}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})


def write_folder(case, folder):
    kind, config = case["model"]
    model = kind(config).eval()
    scatter(model, 17)
    model.save_pretrained(folder)
    tokenizer = case["tokenizer"]()
    assert len(tokenizer) <= config.vocab_size, len(tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings - (2 if config.model_type == "roberta" else 0)
    tokenizer.save_pretrained(folder)
    write_modules(case, folder, config.hidden_size)
    if case.get("resave"):
        sentence = SentenceTransformer(str(folder), device="cpu")
        shutil.rmtree(folder)
        sentence.save(str(folder), create_model_card=False)
        return
    path = folder / "config.json"
    value = json.loads(path.read_text())
    value["torch_dtype"] = value.pop("dtype")
    write_json(path, value | {"transformers_version": "4.44.0"})
    if rename := case.get("rename"):
        weights = folder / "model.safetensors"
        save_file(rename(load_file(weights)), weights, metadata={"format": "pt"})


def answers(folder):
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    ids, hidden, embeddings = [], [], []
    for text in TEXTS:
        tokens = model.preprocess([text])["input_ids"][0] if hasattr(model, "preprocess") else model.tokenize([text])["input_ids"][0]
        ids.append(tokens.tolist())
        hidden.append(model.encode([text], output_value="token_embeddings", show_progress_bar=False)[0].float())
        embeddings.append(torch.tensor(model.encode([text], show_progress_bar=False)[0]))
    return ids, hidden, torch.stack(embeddings)


def make(case):
    folder = ROOT / case["name"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_folder(case, folder)
    ids, hidden, embeddings = answers(folder)
    kind, config = case["model"]
    fresh = kind(config).eval()
    scatter(fresh, 17)
    with torch.no_grad():
        direct = [fresh(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ids]
    worst = max((a - b).abs().max().item() for a, b in zip(direct, hidden))
    assert worst < 2e-5, (case["name"], worst)
    golden = {
        "covers": case["covers"],
        "transformers": transformers.__version__,
        "sentence_transformers": sentence_transformers.__version__,
        "pooling": case["pooling"],
        "normalized": case["normalize"],
        "texts": [{"text": text, "ids": row} for text, row in zip(TEXTS, ids)],
    }
    (folder / "golden.json").write_text(compact(golden), encoding="utf-8")
    tensors = {f"hidden_{i}": value.contiguous() for i, value in enumerate(hidden)} | {"embeddings": embeddings}
    save_file(tensors, folder / "golden.safetensors")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    longest = max(map(len, ids))
    print(f"{case['name']:16} reload against built {worst:.1e}, longest {longest} tokens, {size // 1024} KiB", flush=True)


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
