"""python -m ptq.export: an artefact that exists as a llama.cpp file, value for value."""

import argparse
from pathlib import Path

from ptq.console import run_command, size_text
from ptq.flags import Flags
from ptq.lazy import Lazy

convert = Lazy("ptq.convert")

EPILOG = """what goes over without rounding again:
  1 bit, groups a multiple of 128         Q1_0
  2 bits, symmetric, a multiple of 64     Q2_0
  3 or 4 bits, symmetric, of 32           Q4_0
  4 bits, asymmetric, of 32               Q4_1 (the offset is rounded to fp16)
  8 bits, of 32                           Q8_0
  full precision                          F16, BF16, F32
Anything else is refused: python -m ptq.quantize --format gguf --type TYPE solves again on that type's own grid.
"""


def parser() -> Flags:
    """The command line's flags."""
    p = Flags("python -m ptq.export", description=__doc__, epilog=EPILOG,
                                formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    p.add_argument("path", metavar="DIR", help="GPTQ folder, or full-precision folder")
    p.add_argument("--format", choices=["gguf"], default="gguf", help="what to write (default: gguf)")
    p.add_argument("--type", type=str.upper, metavar="TYPE", help="of the linears (default: the one that holds them)")
    p.add_argument("--embed-type", type=str.upper, metavar="TYPE",
                   help="of token embedding and head, such as Q6_K, Q8_0, F16 (default: F16)")  # fmt: skip
    p.add_argument("--pre-tokenizer", metavar="NAME", help="llama.cpp's name, where it is not recognised")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: DIR.gguf")
    return p


def main(argv=None):
    """Runs the command line."""
    args = parser().parse_args(argv)
    run_command(lambda: _export(args))


def _export(args):
    out = args.out or Path(f"{args.path.rstrip('/')}.gguf")
    types = {"ggml_type": args.type, "embed_type": args.embed_type, "pre_tokenizer": args.pre_tokenizer}
    counts = convert.convert(args.path, out, **types)
    told = ", ".join(f"{count} tensors {name}" for name, count in counts.most_common()) or "no tensor quantized"
    print(f"written: {out}, {size_text(out.stat().st_size)} ({told})")


if __name__ == "__main__":
    main()
