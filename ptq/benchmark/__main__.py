"""python -m ptq.benchmark: where the time of a quantization goes, each phase beside what this machine must spend."""

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from calibration.errors import InputError
from ptq.benchmark.shapes import SHAPES
from ptq.console import run_command, size_text, table
from ptq.flags import Flags
from ptq.lazy import Lazy
from ptq.spec import QuantSpec

torch = Lazy("torch")
checkpoints = Lazy("ptq.checkpoint")
models = Lazy("ptq.benchmark.models")
machine = Lazy("ptq.benchmark.rates")
timing = Lazy("ptq.benchmark.run")

EPILOG = """The floor of a phase is its operations over the rate of products, or its bytes over the rate of memory
or disk, all measured first with the same number of threads; docs/speed.md has the counts. With one thread arithmetic
is compared in processor seconds, which other work on the machine does not lengthen. Blocks that are not run are
extrapolated from those that are.
"""


def parser() -> Flags:
    """The command line's flags."""
    defaults = QuantSpec()
    p = Flags("python -m ptq.benchmark", description=__doc__, epilog=EPILOG,
                                formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    model = p.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b", help="random weights of a real shape")
    model.add_argument("--model", metavar="DIR", help="a real model folder")
    p.add_argument("--blocks", type=int, default=1, help="decoder blocks to run (default: 1)")
    p.add_argument("--bits", type=int, default=defaults.bits, help="bits of a weight (default: 2)")
    p.add_argument("--group", type=int, default=defaults.group_size, help="weights that share a scale (default: 128)")
    p.add_argument("--samples", type=int, default=64, help="rows of tokens (default: 64)")
    p.add_argument("--seqlen", type=int, default=512, help="tokens in a row (default: 512)")
    p.add_argument("--threads", type=int, help="threads (default: torch's choice)")
    p.add_argument("--folder", type=Path, metavar="DIR", help="where models and artefacts are written for a while")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv=None):
    """Runs the command line."""
    args = parser().parse_args(argv)
    run_command(lambda: _benchmark(args))


def _benchmark(args):
    for name in ("blocks", "samples", "seqlen", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    if args.folder is not None and not args.folder.is_dir():
        raise InputError(f"{args.folder}: --folder must be an existing folder")
    spec = QuantSpec(bits=args.bits, group_size=args.group, fisher_tokens=0)  # plain GPTQ, whose floors are known
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="ptq-", dir=args.folder) as scratch:
        folder = Path(scratch)
        checkpoint, whole = _model(args, folder / "model")
        rates = machine.measure_rates(folder)
        text = {"samples": args.samples, "seqlen": args.seqlen}
        run = timing.time_run(checkpoint, spec, folder, rates, blocks=whole, **text)
    subject = {"model": args.model or args.shape, "blocks": {"run": args.blocks, "whole": whole}, **text}
    facts = {**subject, "bits": args.bits, "group": args.group, "threads": torch.get_num_threads()}
    if args.json:
        phases = {phase.name: asdict(phase) | {"ratio": phase.ratio} for phase in (*run.phases, run.sum(timing.WALK))}
        print(json.dumps({**facts, "rates": asdict(rates), "phases": phases, "peak_bytes": run.peak_bytes}))
    else:
        print(_text(facts, rates, run))


def _model(args, folder):
    """(what is run, blocks of the whole model)."""
    if args.model is None:
        whole = models.shape_blocks(args.shape)
    else:
        source = checkpoints.open_checkpoint(args.model)
        whole = models.blocks_of(source)
    if args.blocks > whole:
        raise InputError(f"--blocks {args.blocks}: {args.model or args.shape} has {whole}")
    if args.model is None:
        return models.write_shape(args.shape, folder, args.blocks), whole
    return models.write_first_blocks(source, folder, args.blocks), whole


def _text(facts, rates, run) -> str:
    blocks, whole = facts["blocks"]["run"], facts["blocks"]["whole"]
    everything = run.sum([phase.name for phase in run.phases])
    rows = [("", "seconds", "processor", "floor", "ratio", f"all {whole} blocks")]
    rows += [_row(phase.name, phase) for phase in run.phases]
    rows += [_row("forward + hessian + solve", run.sum(timing.WALK)), _row("all", replace(everything, floor=None))]
    lines = [
        f"{facts['model']}: {blocks} of {whole} blocks, {facts['bits']} bits, groups of {facts['group']},"
        f" {facts['samples']} x {facts['seqlen']} tokens, threads: {facts['threads']}",
        f"this machine: {rates.products / 1e9:.1f} billion operations a second in fp32 products,"
        f" {rates.walk / 1e9:.1f} in those of two matrices on the way;"
        f" memory {size_text(rates.memory)}/s;"
        f" disk {size_text(rates.disk_read)}/s read, {size_text(rates.disk_write)}/s written",
        "",
        table(rows),
        "",
        f"peak memory, resident: {size_text(run.peak_bytes)}",
    ]
    return "\n".join(lines)


def _row(name, phase):
    floor = ("", "") if phase.floor is None else (f"{phase.floor:.2f}", f"{phase.ratio:.2f}")
    return name, f"{phase.seconds:.2f}", f"{phase.processor:.2f}", *floor, f"{phase.whole:.0f}"


if __name__ == "__main__":
    main()
