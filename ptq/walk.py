"""The walk: blocks one by one, each stage solved on the inputs that the already quantized stages deliver.

Two streams of activations go through a block, halted before each stage: the quantized one, and, when the solver
corrects for errors that arrive from earlier layers, the full-precision one. The block has one set of weights: the
full-precision stream runs ahead through a stage with the original weights, then the stage's quantized weights are
written and the quantized stream follows. Each linear multiplies each token once in each stream.

Legend: O outputs, I inputs.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from calibration.capture import SuspendedForwards, run_block
from calibration.errors import InputError
from calibration.hessian import Hessian
from calibration.store import ActivationStore
from ptq.clock import Clock
from ptq.quantizers.gptq import gptq
from ptq.quantizers.rtn import rtn
from ptq.streamed import StreamedModel
from ptq.workdir import WorkFolder

BATCH_TOKENS = 4096  # part of what decides the result to the last bit: sums run over batches


@dataclass
class Streams:
    """Activations entering the current block, and every block's other arguments for each batch."""

    quantized: ActivationStore
    full: ActivationStore | None
    arguments: list[list[tuple]] = field(default_factory=list)

    def at(self, block: int) -> list[tuple]:
        """Arguments of one block, batch by batch."""
        return [of_batch[block] for of_batch in self.arguments]


def weight_matrix(linear: nn.Module) -> torch.Tensor:
    """A view (O, I) of a linear's weight; GPT-2's Conv1D stores it the other way round."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


@torch.no_grad()
def walk_blocks(model: StreamedModel, spec, tokens, work: WorkFolder, clock: Clock, *, budget=None):
    """Quantizes every block that the work folder does not hold yet and saves it there.

    Args:
        model: The model, streamed.
        spec: QuantSpec.
        tokens: (n_samples, seqlen) calibration tokens; None for methods that need none.
        work: Where finished blocks are kept.
        clock: Gets the seconds by phase.
        budget: Bytes of activations kept in memory, per stream; the rest is spilled. None for no limit.
    """
    streams = None
    if spec.method != "rtn":
        with clock.phase("embed"):
            streams = _open_streams(model, spec, tokens, work, budget)
    bar = tqdm(range(len(model.blocks)), desc="quantizing", unit="block", disable=None)
    for i in bar:
        if work.has_block(i) and (streams is None or all(map(work.has_block, range(i, len(model.blocks))))):
            continue  # nothing after this block needs its outputs
        with ExitStack() as loaded:
            with clock.phase("load"):
                block = loaded.enter_context(model.block(i))
            if work.has_block(i):
                with clock.phase("forward"):
                    _replay_block(model, i, block, streams, work.load_block(i))
                continue
            tensors, report = _solve_block(model, i, block, streams, spec, clock)
            with clock.phase("write"):
                work.save_block(i, tensors, report)
        bar.set_postfix_str(f"error {max(entry['error'] for entry in report.values()):.3g}")


def _open_streams(model, spec, tokens, work, budget):
    spill = work.folder / "activations"
    quantized = ActivationStore(spill / "quantized", budget)
    full = ActivationStore(spill / "full", budget) if spec.correction > 0 else None
    streams, by_rows = Streams(quantized, full), {}
    with model.outside(head=False):
        for batch in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
            hidden, arguments = model.embed(batch)
            streams.arguments.append(by_rows.setdefault(len(batch), arguments))
            quantized.append(hidden)
            if full is not None:
                full.append(hidden)
    return streams


def _replay_block(model, i, block, streams, tensors):
    """Carries both streams through a block that an earlier run finished."""
    arguments = streams.at(i)
    if streams.full is not None:
        for b, hidden in enumerate(streams.full):
            streams.full[b] = run_block(block, hidden.to(model.device), arguments[b])
    for name in model.family.linears:
        linear = model.linear(i, name)
        weight_matrix(linear).copy_(tensors[f"{model.block_name(i)}.{name}"].dequantize())
    for b, hidden in enumerate(streams.quantized):
        streams.quantized[b] = run_block(block, hidden.to(model.device), arguments[b])


def _solve_block(model, i, block, streams, spec, clock):
    """Every stage of a block: (QuantizedTensor by full name, report by full name). Moves the streams past it."""
    stages = [{name: model.linear(i, name) for name in stage} for stage in model.family.stages]
    prefix = model.block_name(i) + "."
    tensors, report = {}, {}
    if streams is None:
        for stage in stages:
            _keep(prefix, stage, *_round_stage(stage, spec, clock), tensors, report)
        return tensors, report
    arguments, modules = streams.at(i), [list(stage.values()) for stage in stages]
    with ExitStack() as open_forwards:
        quantized, full = (
            store and open_forwards.enter_context(
                SuspendedForwards(block, [h.to(model.device) for h in store], arguments, modules)
            )
            for store in (streams.quantized, streams.full)
        )  # fmt: skip
        full_reads = _advance(full, arguments, clock)
        for s, stage in enumerate(stages):
            H, G = _accumulate(quantized, full_reads, arguments, prefix + next(iter(stage)), clock)
            solved = _solve_stage(prefix, stage, H, G, spec, 1000 * i + s, clock)
            full_reads = _advance(full, arguments, clock)
            _keep(prefix, stage, *solved, tensors, report)
        for b, hidden in enumerate(_advance(quantized, arguments, clock)):
            streams.quantized[b] = hidden
        for b, hidden in enumerate(full_reads):
            if streams.full is not None:
                streams.full[b] = hidden
    return tensors, report


def _advance(forwards, arguments, clock):
    """Runs every batch up to its next halt; Nones if there is no such stream."""
    with clock.phase("forward"):
        return [forwards and forwards.advance(b) for b in range(len(arguments))]


def _accumulate(quantized, full_reads, arguments, name, clock):
    """Runs the quantized stream up to a stage and sums what the stage will read: H and G."""
    hessian = None
    for b in range(len(arguments)):
        with clock.phase("forward"):
            x = quantized.advance(b)
        with clock.phase("hessian"):
            if hessian is None:
                hessian = Hessian(x.shape[-1], cross=full_reads[b] is not None, device=x.device)
            hessian.add(x, full_reads[b])
    H, G = hessian.finalise()
    if not bool(torch.isfinite(H.diagonal()).all()):
        raise InputError(
            f"the inputs of {name} are not finite on the calibration text: --dtype float32 has the widest range;"
            " if they stay so, the model is damaged before this block"
        )
    return H, G


def _solve_stage(prefix, stage, H, G, spec, salt, clock):
    """QuantizedTensors and report entries of a stage's linears, in the stage's order."""
    with clock.phase("solve"):
        W = torch.cat([weight_matrix(linear).float() for linear in stage.values()])
        try:
            solution = gptq(W, H, spec, G=G, seed=spec.seed + salt)
        except InputError as error:
            raise InputError(f"{prefix}{next(iter(stage))}: {error}") from None
        tensors, entries, start = [], [], 0
        for linear in stage.values():
            rows = slice(start, start := start + weight_matrix(linear).shape[0])
            tensors.append(solution.quantized.rows(rows))
            energy = float(solution.energy[rows].sum()) or 1.0
            entries.append({
                "error": float(solution.loss[rows].sum()) / energy,
                "error_gptq": float(solution.loss_gptq[rows].sum()) / energy,
                "error_rtn": float(solution.loss_rtn[rows].sum()) / energy,
                "dead_inputs": solution.dead,
                "damp_percent": solution.damp_percent,
            })  # fmt: skip
    return tensors, entries


def _round_stage(stage, spec, clock):
    """The same without data: plain rounding, and its error relative to the weights themselves."""
    tensors, entries = [], []
    with clock.phase("solve"):
        for linear in stage.values():
            W = weight_matrix(linear).float()
            tensors.append(rtn(W, spec))
            error = float((tensors[-1].dequantize() - W).square().sum() / W.square().sum().clamp(min=1e-30))
            entries.append({"error": error, "error_rtn": error})
    return tensors, entries


def _keep(prefix, stage, tensors, entries, all_tensors, report):
    """Writes a solved stage into the live block and files it under its linears' full names."""
    for (name, linear), qt, entry in zip(stage.items(), tensors, entries, strict=True):
        weight_matrix(linear).copy_(qt.dequantize())
        all_tensors[prefix + name] = qt
        report[prefix + name] = {**entry, "shape": list(qt.codes.shape)}
