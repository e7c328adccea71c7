"""Writes ONNX files of transformers with random weights, exported from torch, for compare_onnx.py.

    python make_transformers.py --out models/onnx --batch 1 8

BERT of the sizes of MiniLM-L6 and of bert-base over 128 tokens; a Whisper encoder of the size of `tiny`, as
transformers writes them, each exported with attention written out (`eager`) and by scaled_dot_product_attention (`sdpa`).
"""

import argparse
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import BertConfig, BertModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder


class Hidden(torch.nn.Module):
    """The last hidden state alone."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *inputs):
        return self.net(*inputs).last_hidden_state


def bert(width, layers, heads, attention):
    config = BertConfig(vocab_size=8192, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width)
    config._attn_implementation = attention
    return Hidden(BertModel(config, add_pooling_layer=False))


def whisper(attention):
    config = WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)
    config._attn_implementation = attention
    return Hidden(WhisperEncoder(config))


NETS = {
    "bert_mini": lambda attention: bert(384, 6, 12, attention),
    "bert_base": lambda attention: bert(768, 12, 12, attention),
    "whisper_tiny": whisper,
}


def inputs(name, batch):
    if name.startswith("whisper"):
        return ["input_features"], (torch.randn(batch, 80, 3000),)
    ids = torch.randint(0, 1000, (batch, 128))
    return ["input_ids", "attention_mask"], (ids, torch.ones_like(ids))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", nargs="+", default=list(NETS))
    parser.add_argument("--attention", default="eager", choices=["eager", "sdpa"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        torch.manual_seed(7)
        net = NETS[name](args.attention).eval()
        for batch in args.batch:
            names, given = inputs(name, batch)
            suffix = "" if args.attention == "eager" else f"_{args.attention}"
            path = args.out / f"{name}{suffix}_b{batch}.onnx"
            torch.onnx.export(net, given, str(path), input_names=names, output_names=["y"], opset_version=17, dynamo=False)
            print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
