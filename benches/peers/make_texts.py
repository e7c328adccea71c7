"""Sentences of 3 to 256 tokens, most of them short, for the table `texts`: python make_texts.py models/texts.txt"""

import argparse
import random
from pathlib import Path

from tokenizers import Tokenizer
from worker import package_folder

LEAST, MOST = 3, 256


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    vocab = Tokenizer.from_file(str(package_folder() / "tokenizer.json")).get_vocab()
    words = sorted(word for word in vocab if word.isascii() and word.isalpha() and word.islower() and len(word) > 2)
    lines = []
    for _ in range(args.count):
        length = LEAST + int((MOST - LEAST + 1) * rng.random() ** 3)
        lines.append(" ".join(rng.choice(words) for _ in range(length - 2)))
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
