"""One timed run: ptq.quantize in a process of its own on random token rows, each phase of its report beside its floor.

What is timed is the command as a user starts it, imports included. The text does not matter to the time, so token ids
are drawn evenly and nothing is measured on held-out text.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from calibration.errors import InputError
from ptq.benchmark.operations import Work, disk_bytes, memory_bytes, operations
from ptq.benchmark.rates import Rates, forget
from ptq.checkpoint import Checkpoint
from ptq.grids.affine import FINE_STEPS, AffineGrid
from ptq.outcome import REPORT
from ptq.spec import QuantSpec
from ptq.streamed import StreamedModel

ONCE = ("start", "calibration", "embed")  # the other phases repeat with every block
BY_SIZE = ("write", "verify")  # blocks, and what lies outside them
START = "start"  # imports, opening the model, ending the process
WALK = ("forward", "hessian", "factor", "target", "baseline", "scales", "columns", "refine", "solve")


@dataclass(frozen=True)
class Phase:
    """Seconds of one phase in the blocks that were run.

    Attributes:
        name: As in ptq_report.json.
        seconds: What passed.
        processor: What the process computed meanwhile, all threads together.
        spent: The one of the two that is compared with the floor: for arithmetic on one thread the processor's.
        floor: What the phase takes at least; None where nothing is counted.
        whole: What the whole model would take: `spent`, extrapolated.
    """

    name: str
    seconds: float
    processor: float
    spent: float
    floor: float | None
    whole: float

    @property
    def ratio(self) -> float | None:
        """How many times the floor."""
        return self.spent / self.floor if self.floor else None


@dataclass(frozen=True)
class Run:
    """A timed run: phases, the largest first, and peak resident bytes."""

    phases: list[Phase]
    peak_bytes: int

    def sum(self, names) -> Phase:
        """Several phases as one."""
        parts = [phase for phase in self.phases if phase.name in names]
        floors = [phase.floor for phase in parts if phase.floor]
        total = {key: sum(getattr(p, key) for p in parts) for key in ("seconds", "processor", "spent", "whole")}
        return Phase(name="+".join(names), floor=sum(floors) or None, **total)


def time_run(checkpoint: Checkpoint, spec: QuantSpec, folder: Path, rates: Rates, **shape) -> Run:
    """Runs ptq.quantize on a model.

    Args:
        checkpoint: The model.
        spec: Bits and group size.
        folder: For tokens and the artefact.
        rates: Of this machine.
        **shape: samples and seqlen of the text; blocks of the whole model, for extrapolation.
    """
    streamed = StreamedModel(checkpoint)
    tokens = folder / "tokens.npy"
    drawn = np.random.default_rng(0).integers(0, streamed.config.vocab_size, (shape["samples"], shape["seqlen"]))
    np.save(tokens, drawn)
    for shard in checkpoint.shards:
        with shard.open("rb") as file:
            forget(file.fileno())
    report, passed, used = _quantize(checkpoint, spec, folder / "artefact", tokens)
    seconds, processor = report["seconds"], report["processor_seconds"]
    seconds |= {START: passed - seconds.pop("total")}
    processor |= {START: used - processor.pop("total")}
    work = work_of(streamed, spec, shape["samples"], shape["seqlen"])
    floors, growth = _floors(streamed, work, rates), _growth(streamed, work, shape["blocks"])
    phases = []
    for name in seconds:
        spent = (processor if _is_arithmetic(name) else seconds)[name]
        phases.append(Phase(name, seconds[name], processor[name], spent, floors.get(name), spent * growth(name)))
    return Run(sorted(phases, key=lambda phase: -phase.spent), report["peak_memory_bytes"]["resident"])


def work_of(streamed: StreamedModel, spec: QuantSpec, samples: int, seqlen: int) -> Work:
    """What the spec asks of a block of a model."""
    config, weight = streamed.config, streamed.weight
    heads = config.num_attention_heads
    grid = AffineGrid(spec.bits, spec.sym)
    return Work(
        stages=[
            (sum(weight(0, name).shape[0] for name in stage), weight(0, stage[0]).shape[1])
            for stage in streamed.family.stages
        ],
        tokens=samples * seqlen,
        seqlen=seqlen,
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        bits=spec.bits,
        trials=1 + sum(1 for _ in grid.candidates(torch.ones(1, 1))) + FINE_STEPS,
        rounds=spec.refine_rounds,
        corrected=spec.correction > 0,
    )


def _quantize(checkpoint, spec, out, tokens):
    """(its report, seconds, processor seconds) of the command."""
    flags = {"--model": checkpoint.folder, "--bits": spec.bits, "--group": spec.group_size, "--heldout": "none"}
    flags |= {"--calibration": tokens, "--out": out, "--device": "cpu", "--fisher-tokens": spec.fisher_tokens}
    arguments = [str(part) for pair in flags.items() for part in pair]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "ptq.quantize", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip
    after = os.times()
    if done.returncode:
        raise InputError(done.stderr.strip().rpartition("\n")[2].removeprefix("error: "))
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return json.loads((out / REPORT).read_text()), after.elapsed - before.elapsed, used


def _is_arithmetic(name):
    return torch.get_num_threads() == 1 and name not in ("load", "write", START)


def _block_bytes(streamed):
    """(bytes of one block, bytes of the rest) in the source."""
    source, prefix = streamed.checkpoint, streamed.stored_key(0, streamed.family.linears[0] + ".weight")
    inside = prefix.partition(streamed.family.linears[0])[0]
    block = sum(source.nbytes(name) for name in source.names() if name.startswith(inside))
    return block, sum(map(source.nbytes, source.names())) - len(streamed.blocks) * block


def _floors(streamed, work, rates):
    """Seconds that the phases take at least, in the blocks that are run."""
    blocks, disk = len(streamed.blocks), disk_bytes(work, *_block_bytes(streamed))
    rate_of = dict.fromkeys(("forward", "hessian", "baseline", "columns", "refine"), rates.walk)
    counts = operations(work).items()
    floors = {name: blocks * count / rate_of.get(name, rates.products) for name, count in counts}
    floors |= {name: blocks * count / rates.memory for name, count in memory_bytes(work).items()}
    moved = {name: blocks * disk["block"][name] + disk["once"].get(name, 0) for name in disk["block"]}
    return floors | {"load": moved["load"] / rates.disk_read, "write": moved["write"] / rates.disk_write}


def _growth(streamed, work, whole):
    """By what factor a phase grows from the blocks that are run to the whole model."""
    blocks, disk = len(streamed.blocks), disk_bytes(work, *_block_bytes(streamed))
    once, of_block = disk["once"]["write"], disk["block"]["write"]
    by_size = (once + whole * of_block) / (once + blocks * of_block)
    return lambda name: 1.0 if name in ONCE else by_size if name in BY_SIZE else whole / blocks
