"""Small tokenizers in the three published flavours that decoders use, and two for encoders."""

import json
import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from grammar import story

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "<start_of_turn>{{ role }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXTS = [
    "",
    " ",
    "Mia and her dog Rex went to the forest.",
    "  two  spaces, a\ttab and\na newline\n\n",
    "Numbers: 7, 42, 2026 and 1234567.",
    "Grüße, naïve café, été",
    "你好，世界",
    "مرحبا بالعالم",
    "🙂👩‍👩‍👧‍👦 flags 🇨🇭",
    "don't I'LL we've",
    "<s> is not special in plain text? </s>",
    "e\u0301 and é",
]


def corpus(count=400, seed=3):
    rng = random.Random(seed)
    return [story(rng) for _ in range(count)]


def wrap(tokenizer, **special):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def byte_level(size, special, pattern=None):
    tokenizer = Tokenizer(models.BPE())
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def gpt2(size=288):
    """GPT-2's: byte-level, nothing added, one special token."""
    return wrap(byte_level(size, ["<|endoftext|>"]), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def llama3(size=288):
    """Llama 3's: split by pattern, then bytes; the template adds the begin token."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = byte_level(size, special, LLAMA3_SPLIT)
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return wrap(tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def qwen(size=288):
    """Qwen's: NFC, split by pattern, bytes, no begin token, ChatML."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(size, special, LLAMA3_SPLIT.replace("{1,3}", ""))
    tokenizer.normalizer = normalizers.NFC()
    wrapped = wrap(tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = CHATML
    return wrapped


def sentence_pieces(extra=(), prefix=True, merges=60):
    """Llama 2's and Mistral's (prefix) or Gemma's (no prefix): spaces become U+2581, unknown characters fall back to bytes."""
    special = ["<unk>", "<s>", "</s>", *extra]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    alphabet = sorted(set("".join(corpus())) | {"\u2581"} - {" "})
    size = len(special) + len(bytes_) + len(alphabet) + merges
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special + bytes_, show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    data = json.loads(trained.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    data["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(data))
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma():
    """Gemma's: as sentence pieces, with turn tokens and a chat template."""
    wrapped = sentence_pieces(("<start_of_turn>", "<end_of_turn>"), prefix=False)
    wrapped.chat_template = TURNS
    return wrapped


def word_piece(size=320):
    """BERT's, uncased."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        corpus() + ["0123456789 你好世界"] * 40,
        trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return wrap(tokenizer, **names)


def roberta(size=320):
    """RoBERTa's: byte-level with <s> at 0 and <pad> at 1."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = byte_level(size, [*special, AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    names = dict(bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", unk_token="<unk>")
    return wrap(tokenizer, **names, pad_token="<pad>", mask_token="<mask>")
