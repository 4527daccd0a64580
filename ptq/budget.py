"""What a run may hold under --max-memory, worked out from shapes before it starts.

Resident memory of a walk on a CPU: the program, and the largest of these (fp32; I inputs, O outputs of a stage):

    outside     embedding or head; some rows' logits, and those of gradients more of them
    block       a block's weights whole and one batch inside it: perplexity, the pass of gradients, resuming
    gradients   the same with all that a batch leaves for its way back, and the block's H_O
    accumulate  weights of the stage and of the one before, or in bf16 half as much of that and half more of the
                stage; sums in fp64 of H (I x I / 2) and of G (I x I) or, where that is summed, W (G - H) (O x I)
    finalise    weights of the stage; H and G or W (G - H) in fp32, beside their sums
    solve       weights of the stage; H, the factor, unless outputs are few G - H, and a copy of one where columns are
                put in another order; targets, or W (G - H), and codes; some rows; H_O of the stage, and of the runs
                that are being solved in several forms
    tuning      the head; with it some rows' logits of both models in several forms, or a block's weights, their
                gradients and codes, all that a batch leaves for its way back, and of the largest linear what is trained
                with its gradients and the optimizer's numbers

and activations with what is left, in tuning also codes and what is trained of all blocks. Where that is too little,
the sums lie in files of which one tile at a time is mapped, H and W (G - H) are read from disk row by row, G - H waits
there while H is factored, and fewer rows are solved at once, unless they are solved together. None of it changes a bit
of the result. One thing can: whether the model fits whole, to write text of its own.
"""

from dataclasses import dataclass, replace

import torch

from calibration.attention import is_faster
from calibration.errors import InputError
from calibration.hessian import TILE, few_rows
from ptq.evaluation import stream
from ptq.quantizers.chunks import ROWS, chunk_size, coupled_cuts, threads_of
from ptq.quantizers.gptq import large
from ptq.streamed import StreamedModel
from ptq.tuning import end_to_end, fisher

FP32, FP64 = 4, 8
PROGRAM = 700 << 20  # all of it while a whole model writes text; not measured in a run, whose result it decides
LATER = 170 << 20  # what the program itself grows by: compiled loops, the page of the report, freed heap not given back
EARLY = 64 << 20  # the same until the walk begins; both measured at the shape of TinyLlama 1.1B


@dataclass(frozen=True)
class MemoryPlan:
    """What a walk may hold.

    Attributes:
        activations: Bytes of activations in memory.
        sums_on_disk: Whether H and its sums, those of G, and G - H for a while, are in files.
        limited: Whether resident memory is: what a forward frees then goes back to the system at once.
        whole: What a model may take that one step wants whole; None where that is not limited.
    """

    activations: int
    sums_on_disk: bool = False
    limited: bool = False
    whole: int | None = None


def plan_memory(limit: int, resident: int, model: StreamedModel, spec, tokens, windows) -> MemoryPlan:
    """How to stay under a limit.

    Args:
        limit: Bytes of resident memory.
        resident: Bytes that the program takes before the walk.
        model: What is quantized.
        spec: QuantSpec.
        tokens: (n_samples, T) calibration tokens; None for methods that need none.
        windows: (n, T) tokens that perplexity is measured on; None without.

    Raises:
        InputError: Not even the least fits, and the message says how much does; or what trains blocks, or a GPU.
    """
    if spec.trains or spec.reconstruct_epochs or model.device.type != "cpu":
        raise InputError(
            "max_memory is for --method gptq and rtn on a CPU: training of blocks is not planned for;"
            " --activation-memory bounds activations"
        )
    for on_disk in (False, True):
        needed = resident + _most(model, spec, tokens, windows, on_disk)
        if needed <= limit:
            return MemoryPlan(limit - needed, on_disk, limited=True, whole=max(0, limit - PROGRAM))
    cheaper, flags = replace(spec, fisher_tokens=0), "--fisher-tokens 0"
    if spec.tune_epochs:
        cheaper, flags = replace(spec, tune_epochs=0), "--effort fast"
    fewer = resident + _most(model, cheaper, tokens, windows, on_disk=True)
    less = f", with {flags} {fewer / 1e9:.2f} GB" if fewer < needed else ""
    raise InputError(
        f"max_memory {limit / 1e9:.2f} GB is too little for this model: it takes {needed / 1e9:.2f} GB{less}"
    )


def _most(model, spec, tokens, windows, on_disk):
    """Bytes of the largest phase."""
    stages = [[tuple(model.weight(0, name).shape) for name in stage] for stage in model.family.stages]
    block = model.dtype.itemsize * sum(outputs * inputs for stage in stages for outputs, inputs in stage)
    phases = [FP32 * model.model.get_input_embeddings().weight.numel()]
    if windows is not None:
        phases[0] += 3 * FP32 * stream.LOGIT_ENTRIES
        phases.append(block + _forward(model, stages, max(stream.BATCH_TOKENS, windows.shape[1]), windows.shape[1]))
    if tokens is not None:
        batch = max(model.batch_tokens, tokens.shape[1]), tokens.shape[1]
        phases.append(block + _forward(model, stages, *batch))
        phases += _stages(model, stages, spec, batch, on_disk)
        phases += _tuning(model, stages, tokens.shape[1]) if spec.tune_epochs else ()
    most = LATER + max(phases)
    if tokens is not None and spec.weighs_outputs:
        most = max(most, EARLY + max(_gradients(model, stages, block, tokens.shape[1])))
    return most


def _stages(model, stages, spec, batch, on_disk):
    before, correction = 0, spec.correction > 0
    for stage in stages:
        O, I = sum(outputs for outputs, _ in stage), stage[0][1]
        weights, cross = model.dtype.itemsize * O * I, correction * I * (O if few_rows(O, I) else I)
        held = max(before + weights, before // 2 + weights * 3 // 2)
        yield held + _forward(model, stages, *batch) + _sums(I, cross, on_disk)
        yield weights + _sums(I, cross, on_disk) + on_disk * FP32 * (I * I + cross)
        yield weights + _solve(O, I, spec, on_disk)
        before = weights


def _forward(model, stages, tokens, length):
    """One batch between two halts: the widest linears' inputs and outputs in both streams, scores of its attention."""
    widest = max(max(shape) for stage in stages for shape in stage)
    return tokens * model.dtype.itemsize * (5 * widest + 3 * _scores(model, length))


def _gradients(model, stages, block, length):
    """The head with its draws, and a block's way back: what is kept was measured on ten families (LOG.md)."""
    config, tokens = model.config, max(fisher.batch_tokens(model), length)
    logits = min(fisher.HEAD_TOKENS * config.vocab_size, stream.LOGIT_ENTRIES)
    yield FP32 * (config.vocab_size * config.hidden_size + 4 * logits + 2 * tokens * config.hidden_size)
    runs = (run for stage in stages for run in _runs(sum(outputs for outputs, _ in stage), stage[0][1]))
    yield block + _kept(model, stages, tokens, length) + sum(_outputs(run) for run in runs)


def _outputs(run):
    """Sums of a run's H_O: about half of the square."""
    return FP64 // 2 * run * (run + min(run, fisher.TILE))


def _tuning(model, stages, length):
    """A step's two parts: the head with logits in several forms, and a block on its way back."""
    config, tokens = model.config, max(end_to_end.BATCH_TOKENS, length)
    head = FP32 * config.vocab_size * config.hidden_size
    yield head + FP32 * 8 * min(tokens * config.vocab_size, stream.LOGIT_ENTRIES)
    sizes = [outputs * inputs for stage in stages for outputs, inputs in stage]
    yield head + (2 * FP32 + 1) * sum(sizes) + 6 * FP32 * max(sizes) + _kept(model, stages, tokens, length)


def _kept(model, stages, tokens, length):
    """What a block keeps of a batch for its way back."""
    outputs = sum(outputs for stage in stages for outputs, _ in stage)
    return FP32 * tokens * (12 * model.config.hidden_size + 3 * outputs + 4 * _scores(model, length))


def _scores(model, length):
    """Scores of a token that are held where attention is not fused."""
    fused = is_faster(model.config) or model.config._attn_implementation == "sdpa"
    return 0 if fused else model.config.num_attention_heads * length


def _runs(O, I):
    """How many outputs are solved together, run by run."""
    return [cut.stop - cut.start for cut in coupled_cuts(O, I)]


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
    chunk, together = 12 * max(chunk_size(threads, small=on_disk), ROWS * I), 0
    if spec.weighs_outputs:
        runs = _runs(O, I)
        chunk, together = 8 * runs[0] * I + 5 * runs[0] ** 2, sum(run**2 for run in runs)
    return int(FP32 * (squares * I * I + rows * O * I + together + threads * chunk))
