"""The decoder folders: one entry each, with what it covers."""

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tiny_tokenizers import gemma, gpt2, llama3, qwen, sentence_pieces


def published(keep_layer_types=False, **extra):
    """The keys of checkpoints on the hub before transformers 5: rope_theta, rope_scaling, torch_dtype."""

    def rewrite(value):
        rope = value.pop("rope_parameters", None)
        value["torch_dtype"] = value.pop("dtype", "float32")
        value.pop("_sliding_window_pattern", None)
        value["transformers_version"] = "4.44.0"
        if not keep_layer_types:
            value.pop("layer_types", None)
        if rope and "rope_theta" in rope:
            value["rope_theta"] = rope.pop("rope_theta")
            partial = rope.pop("partial_rotary_factor", None)
            if partial is not None:
                value["partial_rotary_factor"] = partial
            kind = rope.pop("rope_type", "default")
            value["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
        value.update(extra)
        return {key: item for key, item in sorted(value.items()) if item is not DROP}

    return rewrite


DROP = object()


def old_type_key(rewrite):
    """rope_scaling names its kind `type`, as checkpoints of 2023 do."""

    def inner(value):
        value = rewrite(value)
        value["rope_scaling"]["type"] = value["rope_scaling"].pop("rope_type")
        return value

    return inner


def without_prefix(tensors, config):
    """GPT-2 as published: no `transformer.` in front, and the causal masks stored as buffers."""
    out = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    n = config.n_positions
    for layer in range(config.n_layer):
        out[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(n, n)).view(1, 1, n, n)
    return out


LLAMA = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
SMALL = LLAMA | dict(hidden_size=32, intermediate_size=56, num_attention_heads=2, num_key_value_heads=1)
QWEN = LLAMA | dict(rms_norm_eps=1e-6)
TIED = dict(embed=0.2, gain=1.6)


def rope(kind, theta=10000.0, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


CASES = [
    dict(
        name="llama",
        covers="grouped queries, tied head, published config keys, split-pattern tokenizer, two end tokens",
        **{"class": LlamaConfig},
        fields=LLAMA | dict(tie_word_embeddings=True),
        tokenizer=llama3,
        more_ends=[2],
        config=published(head_dim=DROP),
        **TIED,
    ),
    dict(
        name="llama-bias-llama3",
        covers="untied head, attention_bias, mlp_bias, llama3 rope scaling, transformers 5 config keys",
        **{"class": LlamaConfig},
        fields=LLAMA
        | dict(attention_bias=True, mlp_bias=True, head_dim=16)
        | rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        tokenizer=llama3,
    ),
    dict(
        name="llama-linear",
        covers="linear rope scaling, named `type` as in 2023; sentence-piece tokenizer with byte fallback",
        **{"class": LlamaConfig},
        fields=SMALL | rope("linear", factor=2.5),
        tokenizer=sentence_pieces,
        config=old_type_key(published(head_dim=DROP)),
    ),
    dict(
        name="llama-yarn",
        covers="yarn rope scaling with its default attention factor",
        **{"class": LlamaConfig},
        fields=SMALL | rope("yarn", factor=4.0, original_max_position_embeddings=32),
        tokenizer=gpt2,
        config=published(),
    ),
    dict(
        name="llama-yarn-explicit",
        covers="yarn with beta_fast, beta_slow and attention_factor given; every head has its own keys",
        **{"class": LlamaConfig},
        fields=SMALL
        | dict(num_key_value_heads=2)
        | rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=16,
            beta_fast=8.0,
            beta_slow=0.5,
            attention_factor=1.3,
        ),
        tokenizer=gpt2,
    ),
    dict(
        name="llama-dynamic",
        covers="dynamic rope scaling: the last prompt is longer than max_position_embeddings, and each step changes the base",
        **{"class": LlamaConfig},
        fields=SMALL | dict(max_position_embeddings=60) | rope("dynamic", factor=4.0),
        tokenizer=gpt2,
        config=published(head_dim=DROP),
        lengths=(1, 5, 13, 70),
        history=True,
    ),
    dict(
        name="llama-bf16",
        covers="bf16 weights, answers in f32 from the widened weights",
        **{"class": LlamaConfig},
        fields=LLAMA,
        tokenizer=llama3,
        dtype=torch.bfloat16,
        config=published(),
    ),
    dict(
        name="llama-f16",
        covers="f16 weights, answers in f32 from the widened weights, transformers 5 config keys",
        **{"class": LlamaConfig},
        fields=LLAMA,
        tokenizer=llama3,
        dtype=torch.float16,
    ),
    dict(
        name="llama-sharded",
        covers="three files and model.safetensors.index.json",
        **{"class": LlamaConfig},
        fields=LLAMA,
        tokenizer=gpt2,
        shard="90KB",
        config=published(),
    ),
    dict(
        name="mistral",
        covers="sliding window of 8 in every layer, head_dim * heads differs from hidden_size",
        **{"class": MistralConfig},
        fields=LLAMA | dict(sliding_window=8, head_dim=16),
        tokenizer=sentence_pieces,
        config=published(),
    ),
    dict(
        name="mistral-full",
        covers="sliding_window null, transformers 5 config keys",
        **{"class": MistralConfig},
        fields=SMALL | dict(sliding_window=None, head_dim=16),
        tokenizer=sentence_pieces,
    ),
    dict(
        name="qwen2",
        covers="query, key and value biases, sliding_window present but switched off, vocab larger than the tokenizer",
        **{"class": Qwen2Config},
        fields=QWEN | dict(tie_word_embeddings=True, use_sliding_window=False, sliding_window=8, max_window_layers=1),
        tokenizer=qwen,
        padding=8,
        config=published(sliding_window=8),
        **TIED,
    ),
    dict(
        name="qwen2-window",
        covers="sliding window from layer max_window_layers on, no layer_types in the config",
        **{"class": Qwen2Config},
        fields=SMALL | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        tokenizer=qwen,
        config=published(),
    ),
    dict(
        name="qwen3",
        covers="norms on queries and keys, head_dim 16 with hidden_size 48 and 4 heads, tied head",
        **{"class": Qwen3Config},
        fields=QWEN | dict(head_dim=16, tie_word_embeddings=True),
        tokenizer=qwen,
        config=published(),
        **TIED,
    ),
    dict(
        name="qwen3-bias-window",
        covers="attention_bias, layer_types with a sliding layer, transformers 5 config keys",
        **{"class": Qwen3Config},
        fields=SMALL
        | dict(head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        tokenizer=qwen,
    ),
    dict(
        name="gemma2",
        covers="soft caps on scores and logits, query_pre_attn_scalar, alternating window, four norms, scaled embedding",
        **{"class": Gemma2Config},
        fields=LLAMA
        | dict(
            num_hidden_layers=3,
            intermediate_size=64,
            head_dim=16,
            tie_word_embeddings=True,
            query_pre_attn_scalar=24,
            sliding_window=8,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=1.0,
            rms_norm_eps=1e-6,
        ),
        tokenizer=gemma,
        config=published(),
        jinja=True,
        embed=0.04,
        gain=1.3,
    ),
    dict(
        name="gemma3",
        covers="two rope thetas by layer type, norms on queries and keys, transformers 5 config keys",
        **{"class": Gemma3TextConfig},
        fields=LLAMA
        | dict(
            num_hidden_layers=3,
            intermediate_size=64,
            head_dim=16,
            tie_word_embeddings=True,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rms_norm_eps=1e-6,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        tokenizer=gemma,
        embed=0.04,
    ),
    dict(
        name="gemma3-published",
        covers="sliding_window_pattern and rope_local_base_freq instead of layer_types and rope_parameters",
        **{"class": Gemma3TextConfig},
        fields=SMALL
        | dict(
            num_hidden_layers=4,
            head_dim=16,
            tie_word_embeddings=True,
            query_pre_attn_scalar=20,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rms_norm_eps=1e-6,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        tokenizer=gemma,
        config=published(sliding_window_pattern=2, rope_theta=1000000.0, rope_local_base_freq=10000.0, rope_scaling=None),
        embed=0.04,
    ),
    dict(
        name="gpt2",
        covers="stored as [in, out], learnt positions, layer norms, no tensor prefix, stored causal masks",
        **{"class": GPT2Config},
        fields=dict(n_embd=48, n_layer=2, n_head=4, n_positions=80, layer_norm_epsilon=1e-5),
        tokenizer=gpt2,
        config=published(),
        rename=without_prefix,
        embed=0.3,
    ),
    dict(
        name="gpt2-prefixed",
        covers="`transformer.` prefix, n_inner given, head_dim 13 and odd sizes",
        **{"class": GPT2Config},
        fields=dict(n_embd=39, n_layer=2, n_head=3, n_positions=80, n_inner=70),
        tokenizer=gpt2,
        embed=0.3,
    ),
    dict(
        name="mixtral",
        covers="4 experts, top 2, weights renormalised, published expert names",
        **{"class": MixtralConfig},
        fields=SMALL | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        tokenizer=sentence_pieces,
        config=published(head_dim=DROP),
    ),
    dict(
        name="mixtral-window",
        covers="sliding window of 8, 3 of 5 experts, transformers 5 config keys",
        **{"class": MixtralConfig},
        fields=SMALL | dict(intermediate_size=40, num_local_experts=5, num_experts_per_tok=3, sliding_window=8),
        tokenizer=sentence_pieces,
    ),
    dict(
        name="qwen2-moe",
        covers="shared expert with its gate, routing not renormalised, decoder_sparse_step 2",
        **{"class": Qwen2MoeConfig},
        fields=SMALL
        | dict(
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            decoder_sparse_step=2,
        ),
        tokenizer=qwen,
        config=published(sliding_window=64),
    ),
    dict(
        name="qwen2-moe-mixed",
        covers="mlp_only_layers, routing renormalised, tied head",
        **{"class": Qwen2MoeConfig},
        fields=SMALL
        | dict(
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=[0],
            tie_word_embeddings=True,
        ),
        tokenizer=qwen,
        **TIED,
    ),
    dict(
        name="qwen3-moe",
        covers="norms on queries and keys, 8 experts, top 3, renormalised",
        **{"class": Qwen3MoeConfig},
        fields=SMALL
        | dict(head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True),
        tokenizer=qwen,
        config=published(),
    ),
    dict(
        name="phi3",
        covers="fused qkv_proj and gate_up_proj, sliding window of 8",
        **{"class": Phi3Config},
        fields=LLAMA | dict(sliding_window=8),
        tokenizer=sentence_pieces,
        config=published(),
    ),
    dict(
        name="phi3-longrope",
        covers="longrope with short and long factors, partial_rotary_factor 0.75; only the last prompt is past the switch",
        **{"class": Phi3Config},
        fields=LLAMA
        | dict(hidden_size=64, intermediate_size=56, sliding_window=None, original_max_position_embeddings=64)
        | rope(
            "longrope",
            short_factor=[1.0, 1.02, 1.05, 1.1, 1.2, 1.3],
            long_factor=[1.1, 1.5, 2.0, 2.6, 3.1, 3.9],
            partial_rotary_factor=0.75,
            original_max_position_embeddings=64,
        ),
        tokenizer=llama3,
        config=old_type_key(published(original_max_position_embeddings=64)),
        lengths=(1, 5, 13, 70),
    ),
]
