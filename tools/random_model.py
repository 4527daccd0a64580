"""Writes a random Hugging Face checkpoint with the shape of a real model, to measure memory and time without the model.

    python tools/random_model.py tinyllama-1.1b /tmp/tinyllama --blocks 4

It has no tokenizer: give `ptq.quantize` token rows in a .npy file.
"""

import argparse
from pathlib import Path

from ptq.benchmark.random_model import write_random_model
from ptq.benchmark.shapes import SHAPES


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("shape", choices=SHAPES)
    p.add_argument("folder", type=Path)
    p.add_argument("--blocks", type=int, help="decoder blocks (default: the real model's)")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    print(write_random_model(args.shape, args.folder, blocks=args.blocks, seed=args.seed))


if __name__ == "__main__":
    main()
