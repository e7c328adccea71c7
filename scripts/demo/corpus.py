"""Text, tokenizer and batches shared by the demo scripts."""

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from grammar import story

BOS, EOS, PAD = 0, 1, 2
CONTEXT = 512
HELD_OUT_SEED = 1_000_003
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"


def train_tokenizer(vocab_size=1024, stories=6000, seed=11):
    """A byte-level BPE over the grammar's own text; it adds <s> in front."""
    rng = random.Random(seed)
    texts = [story(rng, "pirate" if i % 10 == 0 else "plain") for i in range(stories)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def batches(tokenizer, rows, length, seed, style="plain"):
    """Endless [rows, length] id arrays; each row starts at a story's beginning and packs whole stories until full."""
    rng = random.Random(seed)
    while True:
        ids = np.full((rows, length), PAD, dtype=np.int64)
        for row in ids:
            at = 0
            while at < length:
                tokens = tokenizer.encode(story(rng, style)) + [EOS]
                tokens = tokens[: length - at]
                row[at : at + len(tokens)] = tokens
                at += len(tokens)
        yield torch.from_numpy(ids)


def train(model, parameters, stream, steps, rate, warmup=60, report=100):
    """AdamW with a cosine schedule; next-token loss. Prints the smoothed loss."""
    import math
    import time

    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))),
    )
    model.train()
    smooth, started = None, time.time()
    for step in range(steps):
        ids = next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(input_ids=ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
        if getattr(output, "router_logits", None) is not None:
            loss = loss + 0.02 * balance(output.router_logits)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        smooth = loss.item() if smooth is None else 0.97 * smooth + 0.03 * loss.item()
        if step % report == report - 1 or step == 9:
            print(f"step {step + 1}/{steps} loss {smooth:.4f} {time.time() - started:.0f} s", flush=True)
    model.eval()


def balance(router_logits):
    """Sum over layers of experts * sum(share of tokens * mean probability), for top-2 routing (Switch Transformer, eq. 4)."""
    total = 0.0
    for logits in router_logits:
        probabilities = torch.softmax(logits.float(), dim=-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(2, dim=-1).indices, 1.0)
        total = total + logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum()
    return total / len(router_logits)


@torch.no_grad()
def perplexity(model, tokenizer, stories=200, style="plain"):
    """Per-token perplexity over held-out stories, each alone, its end token included."""
    rng = random.Random(HELD_OUT_SEED)
    loss, count = 0.0, 0
    for _ in range(stories):
        ids = torch.tensor([tokenizer.encode(story(rng, style)) + [EOS]])
        logits = model(input_ids=ids[:, :-1]).logits[0].float()
        loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return float(np.exp(loss / count)), count
