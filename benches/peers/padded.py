"""Sentence vectors by a model of fixed rectangles: texts sorted by length, batches of 32 padded to their longest."""

import numpy as np
from tokenizers import Tokenizer

BATCH, MOST = 32, 256


class Padded:
    def __init__(self, folder, forward):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(MOST)
        self.tokenizer.no_padding()
        self.forward = forward

    def run(self, lines):
        encodings = self.tokenizer.encode_batch(lines)
        order = sorted(range(len(lines)), key=lambda index: -len(encodings[index].ids))
        vectors = None
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            longest = len(encodings[chosen[0]].ids)
            ids = np.zeros((len(chosen), longest), dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, index in enumerate(chosen):
                tokens = encodings[index].ids
                ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            hidden = self.forward({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
            weights = mask.astype(np.float32)
            pooled = np.einsum("bsd,bs->bd", hidden, weights) / weights.sum(1, keepdims=True)
            pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
            vectors = np.empty((len(lines), pooled.shape[1]), dtype=np.float32) if vectors is None else vectors
            vectors[chosen] = pooled
        return vectors
