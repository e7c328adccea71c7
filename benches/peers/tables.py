"""The tables that compare.py knows: which works, which workers, with which files of the folder that the make_ scripts filled."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
CANDLE = HERE / "candle" / "target" / "release" / "rlx-candle-peer"
ISA_VARIABLE = "RLX_ISA"
SHAPES = {"smollm": "SmolLM2-135M", "qwen": "Qwen2.5-0.5B"}
QUANTISED_SHAPES = {**SHAPES, "qwen1.5b": "Qwen2.5-1.5B"}
QUANTS = ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K"]
LLM_WORKS = ["prefill:512", "decode:128x16"]


@dataclass
class Plan:
    works: list
    workers: list
    precision: str
    folder: Path | None
    weight_bytes: dict = field(default_factory=dict)
    cache_width: dict = field(default_factory=dict)


def python(peer, args, precision, *more):
    return f"{sys.executable} {HERE}/peer_{peer}.py --threads {args.threads} --precision {precision} " + " ".join(map(str, more))


def rlx(args, model, precision=None):
    env = f"env {ISA_VARIABLE}={args.isa} " if args.isa else ""
    tail = f" --precision {precision}" if precision and precision != "f32" else ""
    return f"{env}{args.rlx} bench {model} --worker --threads {args.threads}{tail}"


def candle(args, model, precision):
    return f"env RAYON_NUM_THREADS={args.threads} {CANDLE} {model} {precision} {args.threads}"


def minilm(args, precision):
    from worker import package_folder

    folder = package_folder()
    onnx = f"--model {args.models / 'minilm.onnx'}"
    workers = [
        ("rlx", rlx(args, folder, precision)),
        ("openvino", python("openvino", args, precision, onnx)),
        ("torch.compile", python("torch", args, precision, "--option compile")),
        ("torch", python("torch", args, precision)),
        ("sentence-transformers", python("st", args, precision)),
    ]
    if precision == "f32":
        workers.insert(2, ("onnxruntime", python("ort", args, precision, onnx)))
        if CANDLE.exists():
            workers.append(("candle", candle(args, folder, precision)))
    return Plan(["embed:1x16", "embed:1x128", "embed:32x128"], workers, precision, folder)


def texts(args):
    plan = minilm(args, "f32")
    kept = [worker for worker in plan.workers if worker[0] in ("rlx", "onnxruntime", "openvino", "sentence-transformers")]
    return Plan([f"texts:{args.models / 'texts.txt'}"], kept, "f32", plan.folder)


def llm(args, shape, precision, works=LLM_WORKS):
    folder = args.models / f"{shape}-{precision}"
    gguf = f"--model {args.models}/gguf/{shape}-{precision}.gguf"
    workers = [
        ("rlx", rlx(args, folder, precision)),
        ("llama.cpp", python("llama", args, precision, gguf)),
        ("llama.cpp-flash", python("llama", args, precision, gguf, "--option flash")),
        ("openvino", python("openvino", args, precision, f"--model {args.models}/openvino/{shape}-{precision}/model.xml")),
        ("transformers", python("torch", args, precision, f"--model {folder}")),
    ]
    if CANDLE.exists():
        workers.append(("candle", candle(args, folder, precision)))
    return Plan(list(works), workers, precision, folder)


def long(args, shape, precision):
    """Against llama.cpp only: OpenVINO would read the 4,096 tokens again for every repetition."""
    plan = llm(args, shape, precision, ["decode:4096x8"])
    plan.workers = [worker for worker in plan.workers if worker[0].split("-")[0] in ("rlx", "llama.cpp")]
    return plan


def quantised(args, shape):
    """RLX, where it opens GGUF, beside llama.cpp on the same file; the floor is the file read once."""
    workers, sizes = [], {}
    for kind in QUANTS:
        file = args.models / "gguf" / f"{shape}-{kind}.gguf"
        for label, command in (("rlx", rlx(args, file)), ("llama.cpp", python("llama", args, "f32", f"--model {file}"))):
            workers.append((f"{label} {kind}", command))
            sizes[f"{label} {kind}"] = file.stat().st_size if file.exists() else None
    return Plan(list(LLM_WORKS), workers, "bf16", args.models / f"{shape}-f32", sizes)


def quantised_long(args, shape, kind):
    """One file after 4,096 tokens, with caches of f16 and of 8-bit integers in both; llama.cpp has the latter with flash attention only."""
    file = args.models / "gguf" / f"{shape}-{kind}.gguf"
    peer = python("llama", args, "bf16", f"--model {file}")
    workers = [
        ("rlx", f"{rlx(args, file)} --cache-type f16"),
        ("rlx q8_0", f"{rlx(args, file)} --cache-type q8_0"),
        ("llama.cpp", peer),
        ("llama.cpp-flash", f"{peer} --option flash"),
        ("llama.cpp-flash q8_0", f"{peer} --option flash --option q8-cache"),
    ]
    sizes = {label: file.stat().st_size for label, _ in workers if file.exists()}
    widths = {label: 34 / 32 for label, _ in workers if label.endswith("q8_0")}
    return Plan(["decode:4096x8"], workers, "bf16", args.models / f"{shape}-f32", sizes, widths)


TABLES = {
    "minilm-f32": lambda args: minilm(args, "f32"),
    "minilm-bf16": lambda args: minilm(args, "bf16"),
    "texts": texts,
    **{f"{key}-{p}": lambda args, s=s, p=p: llm(args, s, p) for key, s in SHAPES.items() for p in ("f32", "bf16")},
    **{f"{key}-{p}-long": lambda args, s=s, p=p: long(args, s, p) for key, s in SHAPES.items() for p in ("f32", "bf16")},
    **{f"{key}-{q}-long": lambda args, s=s, q=q: quantised_long(args, s, q) for key, s in QUANTISED_SHAPES.items() for q in QUANTS},
    **{f"{key}-quantised": lambda args, s=s: quantised(args, s) for key, s in QUANTISED_SHAPES.items()},
}


def plan(args):
    if args.table:
        if not args.models:
            raise SystemExit("--models is needed for a table")
        args.models = args.models.resolve()
        made = TABLES[args.table](args)
    else:
        made = Plan([], [], "f32", args.model)
    made.workers = [*made.workers, *(tuple(text.split("=", 1)) for text in args.worker)]
    if args.only:
        made.workers = [worker for worker in made.workers if worker[0] in args.only]
    made.works = args.works or made.works
    made.precision = args.precision or made.precision
    if not made.works or not made.workers:
        raise SystemExit("nothing to compare: name a table, or give --worker and --works")
    return made


def lengths(path):
    """Tokens of each line, special ones included, as MiniLM's tokenizer cuts it."""
    from tokenizers import Tokenizer
    from worker import package_folder

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer.from_file(str(package_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(path.read_text().splitlines())]
