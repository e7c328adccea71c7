"""Train the built-in demo model, or its mixture-of-experts sibling, on the grammar's stories.

    python scripts/demo/train.py dense models/demo --steps 3000
    python scripts/demo/train.py moe models/demo-moe --start models/demo --steps 500 --rate 2e-3

The mixture starts from the dense model (--start): same tokenizer, embeddings, attention and norms; each expert begins as
a third of the dense feed-forward neurons.
"""

import argparse
from pathlib import Path

from corpus import BOS, CONTEXT, EOS, PAD, batches, perplexity, train, train_tokenizer

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    set_seed,
)

SHARED = dict(
    vocab_size=1024,
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=PAD,
    initializer_range=0.04,
    rms_norm_eps=1e-5,
)


def build(kind):
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**SHARED, intermediate_size=384, num_hidden_layers=4))
    config = MixtralConfig(
        **SHARED,
        intermediate_size=128,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    config.output_router_logits = True
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config)


def start_from(model, folder, seed):
    """Copy what the dense model shares; expert e takes every neuron of a seeded third of the dense layer."""
    dense = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shared = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    missing = model.load_state_dict(shared, strict=False)
    assert not missing.unexpected_keys and all(".mlp." in name for name in missing.missing_keys), missing
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, source in zip(model.model.layers, dense.model.layers):
            experts, mlp = layer.mlp.experts, source.mlp
            width = model.config.intermediate_size
            for index in range(model.config.num_local_experts):
                rows = torch.randperm(dense.config.intermediate_size, generator=generator)[:width]
                experts.gate_up_proj[index].copy_(torch.cat([mlp.gate_proj.weight[rows], mlp.up_proj.weight[rows]]))
                experts.down_proj[index].copy_(2.0 * mlp.down_proj.weight[:, rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("dense", "moe"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--start", type=Path, help="dense model folder to start the mixture from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.start) if args.start else train_tokenizer()
    model = build(args.kind)
    if args.start:
        start_from(model, args.start, args.seed)
    print(f"{model.num_parameters()} parameters")
    train(model, list(model.parameters()), batches(tokenizer, args.rows, args.length, args.seed), args.steps, args.rate)
    if args.kind == "moe":
        model.config.output_router_logits = False
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out, save_jinja_files=False)
    (args.out / "model.safetensors").chmod(0o644)
    value, count = perplexity(model.float(), tokenizer)
    print(f"held-out perplexity {value:.3f} over {count} tokens")


if __name__ == "__main__":
    main()
