"""What a run may hold under --max-memory, worked out from shapes before it starts.

Resident memory of a walk on a CPU: the program, and the largest of these (fp32; I inputs, O outputs of a stage):

    outside     embedding or head; some rows' logits
    accumulate  weights of the stage and of the one before; sums in fp64 of H (I x I / 2) and of G (I x I) or, where
                that is summed, W (G - H) (O x I)
    finalise    weights of the stage; H and G or W (G - H) in fp32, beside their sums
    solve       weights of the stage; H, the factor, unless outputs are few G - H, and a copy of one where columns are
                put in another order; targets, or W (G - H), and codes; some rows

and activations with what is left. Where that is too little, the sums lie in files of which one tile at a time is
mapped, H and W (G - H) are read from disk row by row, G - H waits there while H is factored, and fewer rows are solved
at once. None of it changes a bit of the result.
"""

from dataclasses import dataclass

import torch

from calibration.errors import InputError
from calibration.hessian import TILE, few_rows
from ptq.evaluation.stream import LOGIT_ENTRIES
from ptq.quantizers.chunks import ROWS, chunk_size, threads_of
from ptq.quantizers.gptq import large
from ptq.streamed import StreamedModel
from ptq.streams import BATCH_TOKENS

FP32, FP64 = 4, 8
LATER = 215 << 20  # what the program itself grows by: compiled loops, the page of the report, freed heap not given back


@dataclass(frozen=True)
class MemoryPlan:
    """What a walk may hold.

    Attributes:
        activations: Bytes of activations in memory.
        sums_on_disk: Whether H and its sums, those of G, and G - H for a while, are in files.
    """

    activations: int
    sums_on_disk: bool


def plan_memory(limit: int, resident: int, model: StreamedModel, spec, drawn, *, measures: bool) -> MemoryPlan:
    """How to stay under a limit.

    Args:
        limit: Bytes of resident memory.
        resident: Bytes that the program takes before the walk.
        model: What is quantized.
        spec: QuantSpec.
        drawn: Calibration text; None for methods that need none.
        measures: Whether perplexity is measured.

    Raises:
        InputError: Not even the least fits, and the message says how much does; or what trains is not planned here.
    """
    if spec.trains or spec.refined or spec.weighs_outputs or model.device.type != "cpu":
        raise InputError(
            "max_memory is for --method gptq --fisher-tokens 0 and rtn at --effort fast on a CPU: gradients are not"
            " planned for; --activation-memory bounds activations"
        )
    stages = [[tuple(model.weight(0, name).shape) for name in stage] for stage in model.family.stages]
    for on_disk in (False, True):
        phases = [_outside(model, measures), *_phases(model, stages if drawn else [], spec, on_disk)]
        needed = resident + LATER + max(phases)
        if needed <= limit:
            return MemoryPlan(limit - needed, on_disk)
    raise InputError(f"max_memory {limit / 1e9:.2f} GB is too little for this model: it takes {needed / 1e9:.2f} GB")


def _phases(model, stages, spec, on_disk):
    before, correction = 0, spec.correction > 0
    for stage in stages:
        O, I = sum(outputs for outputs, _ in stage), stage[0][1]
        weights, cross = model.dtype.itemsize * O * I, correction * I * (O if few_rows(O, I) else I)
        yield before + weights + _forward(model, stages) + _sums(I, cross, on_disk)
        yield weights + _sums(I, cross, on_disk) + on_disk * FP32 * (I * I + cross)
        yield weights + _solve(O, I, spec, on_disk)
        before = weights


def _outside(model, measures):
    embedding = model.model.get_input_embeddings().weight
    return FP32 * embedding.numel() + measures * 3 * FP32 * LOGIT_ENTRIES


def _forward(model, stages):
    """One batch between two halts: the widest linears' inputs and outputs in both streams."""
    return 5 * BATCH_TOKENS * model.dtype.itemsize * max(max(shape) for stage in stages for shape in stage)


def _sums(I, cross, on_disk):
    tile = min(TILE, I) * I
    held = FP64 * tile if on_disk else FP64 * (I * I // 2 + tile // 2 + cross)
    return held + FP32 * tile  # and one product


def _solve(O, I, spec, on_disk):
    few, correction = few_rows(O, I), spec.correction > 0
    squares = (1 if on_disk and large(I) else 2) + (correction and not few) + spec.desc_act
    targets = correction * (I > O) * (not (few and on_disk and large(I)))
    rows = targets + 0.5  # codes of a byte, in parts and as a whole
    threads = threads_of(torch.device("cpu"))
    chunk = max(chunk_size(threads, small=on_disk), ROWS * I)
    return int(FP32 * (squares * I * I + rows * O * I)) + 12 * FP32 * threads * chunk
