"""python -m ptq.quantize: a model folder in, a verified and measured GPTQ folder out."""

import argparse
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

from calibration.corpora import CORPORA
from calibration.errors import InputError
from ptq.console import run_command, size_text, table
from ptq.flags import Flags
from ptq.ggml import GRID_TYPES
from ptq.lazy import Lazy
from ptq.mixture.recipes import MIXES
from ptq.spec import CHECKPOINT_FORMATS, EFFORTS, METHODS, QuantSpec, omniquant_recipe, width

pipeline = Lazy("ptq.pipeline")
processes = Lazy("calibration.ranks")

EXAMPLES = """examples:
  python -m ptq.quantize --bits 2 --group 128
      the embedded demo model; needs no network
  python -m ptq.quantize --model meta-llama/Llama-3.2-3B --bits 4 --out llama-w4
      4 bits, loads in vLLM and transformers
  python -m ptq.quantize --model ./my-model --effort best
      2 bits, as good as time buys
  python -m ptq.quantize --model ./my-model --bits 3 --group 64 --asym --calibration my-text.txt
      your own model and text; asymmetric grids help most at 2 and 3 bits

An interrupted run leaves OUT.ptq-work; the same command with --resume goes on and gives the identical files.
"""


def parser() -> Flags:
    """The command line's flags."""
    p = Flags(
        "python -m ptq.quantize", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--model", metavar="DIR|HUB_ID", help="Hugging Face model folder or hub id (default: embedded demo)")
    p.add_argument("--out", metavar="DIR", type=Path, help="output folder (default: quantized/<model>-w2g128-gptq)")
    _add_grid(p.add_argument_group("grid: what values a weight may have"), QuantSpec())
    _add_method(p.add_argument_group("method: how a weight's value is chosen"), QuantSpec())
    _add_text(p.add_argument_group("calibration text"))
    _add_run(p.add_argument_group("run"))
    return p


def _add_grid(grid, defaults):
    grid.add_argument("--bits", type=width, metavar="N", default=defaults.bits,
                      help="bits of a weight, 1, 1.58 (-s, 0, s), 2, 3, 4 or 8 (default: 2)")  # fmt: skip
    grid.add_argument(
        "--group",
        type=int,
        default=defaults.group_size,
        help="weights that share a scale; -1: a whole row. Smaller is better and larger:\n"
        "2 bits take 2.14 bits per weight at 128, 2.28 at 64, 2.56 at 32 (default: 128)",
    )
    sym = grid.add_mutually_exclusive_group()
    sym.add_argument("--sym", action="store_true", default=None,
                     help="zero in the middle of the grid; what fast kernels want\n"
                     "(default, except for omniquant)")  # fmt: skip
    sym.add_argument("--asym", dest="sym", action="store_false", default=None, help="a zero point per group")
    grid.add_argument("--format", choices=CHECKPOINT_FORMATS, default=defaults.checkpoint_format,
                      help="gptq: what every GPTQ loader reads (default)\n"
                      "gptq_v2: stores zero points as they are\n"
                      "gguf: one file for llama.cpp; --type chooses the grid")  # fmt: skip
    grid.add_argument("--type", type=str.upper, metavar="TYPE",
                      help="gguf: " + " ".join(GRID_TYPES)
                      + "\nfor all linears, or one of llama.cpp's mixes: " + " ".join(MIXES)
                      + "\n(default: by --bits: Q1_0, TQ1_0, Q2_K ... Q6_K, Q8_0)")  # fmt: skip
    grid.add_argument("--target-bpw", type=float, metavar="N",
                      help="gguf: bits a weight, embeddings included; each\n"
                      "tensor gets the type that measuring says")  # fmt: skip
    grid.add_argument("--target-size", type=_bytes, metavar="SIZE",
                      help="gguf: the same for the whole file: 1.1GB, 900MB, 1GiB, or bytes")  # fmt: skip
    grid.add_argument("--embed-type", type=str.upper, metavar="TYPE",
                      help="gguf: type of the token embedding, also F16, BF16, F32 (default: Q6_K)")  # fmt: skip
    grid.add_argument("--pre-tokenizer", metavar="NAME", help="gguf: llama.cpp's name, where it is not recognised")
    grid.add_argument(
        "--head-type", type=str.upper, metavar="TYPE", help="gguf: type of a separate head (default: Q6_K)"
    )


def _add_method(how, defaults):
    how.add_argument("--method", choices=METHODS, default=defaults.method,
                     help="gptq: by the Hessian of calibration text (default)\n"
                     "rtn: round to nearest, no text\n"
                     "omniquant: clipping trained block by block, hours where gptq takes minutes")  # fmt: skip
    how.add_argument("--effort", choices=EFFORTS, default="fast",
                     help="gptq: draft solves in one pass over the text; fast also weighs outputs and\n"
                     "makes up for earlier errors (default); balanced also lets the model write text\n"
                     "to calibrate on, and tunes codes and scales; best does more of each")  # fmt: skip
    how.add_argument("--fisher-tokens", type=int, metavar="N",
                     help="gptq: tokens of text whose gradients weigh a linear's outputs against each\n"
                     f"other; 0: plain GPTQ (default: {defaults.fisher_tokens}; draft 0, above fast more)")  # fmt: skip
    order = how.add_mutually_exclusive_group()
    order.add_argument("--act-order", action="store_true",
                       help="form groups along the activation order (desc_act):\n"
                       "a shuffled g_idx, slow in some runtimes")  # fmt: skip
    order.add_argument("--no-act-order", action="store_true",
                       help="visit columns as they come. Default: activation order, groups left in place")  # fmt: skip
    how.add_argument("--epochs", type=int, help="omniquant: passes over the text per block (default: 20, 40 at 2 bits)")
    how.add_argument("--aug-loss", action=argparse.BooleanOptionalAction,
                     help="omniquant: aim also at the original block's\noutput on quantized inputs"
                     " (default: at 2 bits)")  # fmt: skip
    how.add_argument("--let", action=argparse.BooleanOptionalAction, default=defaults.let,
                     help="omniquant: also train scales of channels, folded\n"
                     "into neighbouring weights (default: off)")  # fmt: skip


def _add_text(text):
    text.add_argument("--calibration", metavar="NAME|FILE",
                      help="corpus (" + ", ".join(CORPORA) + ")\nor .txt, .jsonl, .parquet, or .npy token rows"
                      " (default: stdlib for the demo, else c4)")  # fmt: skip
    text.add_argument("--samples", type=int, default=128, help="rows of text (default: 128)")
    text.add_argument("--seqlen", type=int, help="tokens in a row (default: 2048, or the model's context if shorter)")
    text.add_argument("--seed", type=int, default=0, help="draws the rows (default: 0)")
    text.add_argument("--heldout", metavar="NAME|FILE|none", help="text for the perplexity before and after")


def _add_run(run):
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    run.add_argument(
        "--dtype", default="auto",
        help="auto, float32, bfloat16 or float16: what blocks compute in; auto is float32 on a CPU, with products in"
        " bf16 where it has units for them",
    )  # fmt: skip
    run.add_argument("--activation-memory", metavar="GB", type=float,
                     help="activations kept in memory, the rest on disk (default: 40 %% of the machine's)")  # fmt: skip
    run.add_argument("--max-memory", metavar="SIZE", type=_bytes,
                     help="plan for this much resident memory, as 4GB or 800MB;\n"
                     "on a CPU, with gptq or rtn")  # fmt: skip
    run.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    run.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model folder brings")


def main(argv=None):
    """Runs the command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    ranks = processes.join_ranks()
    start = ["python"] if ranks.size == 1 else ["torchrun", "--nproc-per-node", str(ranks.size)]
    command = shlex.join([*start, "-m", "ptq.quantize", *(flag for flag in argv if flag != "--resume")])
    again = "; the same command with --resume goes on"
    run_command(lambda: _quantize(args, command, ranks), interrupted=again, ranks=ranks)


def _quantize(args, command, ranks):
    if args.effort != "fast" and args.method != "gptq":
        raise InputError(f"--effort {args.effort} is for --method gptq, not {args.method}")
    chosen = {"sym": args.sym, "epochs": args.epochs, "aug_loss": args.aug_loss, "fisher_tokens": args.fisher_tokens}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    recipe = EFFORTS[args.effort] | (omniquant_recipe(args.bits) if args.method == "omniquant" else {})
    spec = QuantSpec(
        bits=args.bits,
        group_size=args.group,
        method=args.method,
        let=args.let,
        **(recipe | chosen),
        column_order="natural" if args.no_act_order else "activation",
        desc_act=args.act_order,
        checkpoint_format=args.format,
        ggml_type=args.type,
        target_bpw=args.target_bpw,
        target_bytes=args.target_size,
        embed_type=args.embed_type,
        head_type=args.head_type,
        pre_tokenizer=args.pre_tokenizer,
        seed=args.seed,
    )
    artefact = pipeline.quantize_model(
        args.model,
        spec,
        out=args.out,
        calibration=args.calibration,
        samples=args.samples,
        seqlen=args.seqlen,
        heldout=args.heldout,
        device=args.device,
        dtype=args.dtype,
        activation_budget=None if args.activation_memory is None else int(args.activation_memory * 1e9),
        max_memory=args.max_memory,
        resume=args.resume,
        trust_remote_code=args.trust_remote_code,
        command=command,
        ranks=ranks,
    )
    if artefact:
        print(summary(artefact))


def _bytes(text: str) -> int:
    """A size as a user writes it: a number, and B, kB, MB, GB or their binary kin."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) *(?:([kmgt]?)(i?)b)?", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1.1GB, 900MB, 1GiB or 1100000000")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def summary(artefact) -> str:
    """The closing table of an Artefact."""
    report = artefact.report
    bits, size, perplexity = report["bits_per_weight"], report["file_bytes"], report["perplexity"]
    rows = [("", "before", "after")]
    if perplexity:
        before, after = perplexity["before"]["perplexity"], perplexity["after"]["perplexity"]
        rows.append((f"perplexity ({perplexity['text']})", f"{before:.4g}", f"{after:.4g}"))
    rows += [
        ("bits per weight, everything", f"{bits['before']:.2f}", f"{bits['after']:.2f}"),
        ("bits per weight, quantized linears", "", f"{bits['linears']:.2f}"),
        *_shortest(bits),
        ("file size", size_text(size["before"]), size_text(size["after"])),
        ("seconds", "", f"{report['seconds']['total']:.1f}"),
    ]
    rows += [(f"peak memory, {kind}", "", size_text(n)) for kind, n in report["peak_memory_bytes"].items()]
    lines = [table(rows), "", *report.get("notes", [])]
    if report.get("mixture"):
        lines += [_budgets(report["mixture"]), ""]
    for verdict in report["runtimes"]:
        lines.append(f"{verdict['name']}: " + ("loads it" if verdict["loads"] else f"does not: {verdict['why']}"))
    return "\n".join([*lines, "", f"written: {artefact.folder}"])


def _shortest(bits):
    """What two or three values need, where the file's 2-bit words take more."""
    shortest = bits.get("shortest", bits["linears"])
    if shortest < bits["linears"]:
        yield "the same, were codes as short as may be", "", f"{shortest:.2f}"


def _budgets(mixture):
    """What other sizes would give, and what this one took."""
    rows = [("best types within", "bits per weight", "predicted KL")]
    for row in mixture["table"]:
        chosen = " *" if row["budget"] == mixture["budget"] else ""
        rows.append((size_text(row["budget"]), f"{row['bits']:.3f}", f"{row['kl']:.4g}{chosen}"))
    counts = Counter(mixture["types"].values())
    return table(rows) + "\n\ntypes: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


if __name__ == "__main__":
    main()
