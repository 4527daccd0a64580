"""Whole blocks trained on stored activations: what training is fed, and what it reached.

OmniQuant: the full-precision stream passes through the block first: its outputs are the targets, and the next block's
inputs. With aug_loss the block also runs on the quantized stream's inputs, and the mean of the two outputs is the
target. Reconstruction finds that stream past the block already, and goes on from solved linears.
"""

from contextlib import contextmanager
from functools import partial
from math import isfinite

import torch
from torch.nn import functional as F
from tqdm import tqdm

from calibration.capture import run_block
from calibration.errors import InputError
from calibration.store import ActivationStore
from calibration.tokens import hold_back
from ptq.export.shards import DTYPES
from ptq.memory import IN_TRAINING, large_blocks_kept
from ptq.quantizers.omniquant.block import TrainedBlock, omniquant
from ptq.quantizers.omniquant.transform import Heads, Transformation
from ptq.quantizers.reconstruct.block import reconstruct
from ptq.quantizers.rtn import rtn


class BlockTraining:
    """One block between the two streams of activations; call its methods once, in order.

    Args:
        model: StreamedModel with block i loaded.
        i: The block.
        streams: Activations that enter the block.
        spec: QuantSpec.
        targets: An empty store, for targets that neither stream holds.
    """

    def __init__(self, model, i: int, streams, spec, targets: ActivationStore):
        self.model, self.i, self.spec, self.streams = model, i, spec, streams
        self.block, self.arguments, self.linears = model.blocks[i], streams.at(i), model.family.linears
        self.inputs, self.full = streams.quantized.on(model.device), streams.full.on(model.device)
        self.targets, self.transformation = targets if spec.aug_loss else streams.full, None

    def transform(self):
        """Lays out the transformation, if there is one, and proves its folds, which takes products of fp32.

        Raises:
            InputError: A fold changes the block's outputs.
        """
        if self.spec.let:
            self.transformation = self._transformation()

    def prepare(self):
        """Takes the full-precision stream through the block, and measures plain rounding.

        Raises:
            InputError: The block's outputs are not finite.
        """
        ranges = {}
        with self._watched(ranges):
            for b, arguments in enumerate(self.arguments):
                self.streams.full[b] = run_block(self.block, self.full[b], arguments)
        self.energy = sum(float(x.float().square().mean()) for x in self.streams.full)
        if not isfinite(self.energy):
            raise InputError(
                f"the outputs of {self.model.block_name(self.i)} are not finite on the calibration text: --dtype"
                " float32 has the widest range; if they stay so, the model is damaged at this block or before"
            )
        if self.transformation is not None:
            self.transformation.start(ranges)
        for b, arguments in enumerate(self.arguments if self.spec.aug_loss else ()):
            self.targets.append((run_block(self.block, self.inputs[b], arguments) + self.full[b]) / 2)
        self.error_rtn = self._error(self._rounded(), keep=False)

    def train(self, *, bf16: bool) -> TrainedBlock:
        """Trains, the block's products in bf16 if wanted; its live weights stay as they are."""
        epochs = tqdm(range(self.spec.epochs), desc=f"block {self.i}", unit="epoch", leave=False, disable=None)
        with large_blocks_kept(IN_TRAINING):
            return omniquant(
                self.block,
                {name: self.model.weight(self.i, name) for name in self.linears},
                self.inputs,
                self.targets.on(self.model.device),
                self.arguments,
                self.spec,
                transformation=self.transformation,
                transposed=self.model.family.transposed,
                bf16=bf16,
                epochs=epochs,
            )

    def advance(self) -> dict[str, float]:
        """Takes the quantized stream through the block, whose live weights are the quantized ones by now.

        Returns:
            Squared errors of its outputs, and of those of plain rounding on the same inputs, as shares of the squared
            full-precision outputs.
        """
        return {"error": self._error({}, keep=True), "error_rtn": self.error_rtn}

    def _error(self, weights, keep):
        total = 0.0
        for b, arguments in enumerate(self.arguments):
            out = run_block(self.block, self.inputs[b], arguments, weights)
            total += float(F.mse_loss(out.float(), self.full[b].float()))
            if keep:
                self.streams.quantized[b] = out
        return total / max(self.energy, torch.finfo(torch.float32).tiny)

    def _rounded(self):
        """The linears' parameters after plain rounding."""
        rounded = {}
        for name in self.linears:
            W = self.model.weight(self.i, name)
            values = rtn(W.float(), self.spec).dequantize().to(W.dtype)
            rounded[f"{name}.weight"] = values.T if self.model.family.transposed else values
        return rounded

    def _transformation(self):
        model, family, heads = self.model, self.model.family, self.model.config.num_attention_heads
        built = Transformation(
            self.block,
            family.folds,
            Heads(heads, getattr(model.config, "num_key_value_heads", None) or heads),
            transposed=family.transposed,
            norm_offset=family.norm_offset,
            shift=self.spec.let_shift,
            stored=lambda name: DTYPES[model.checkpoint.dtype(model.stored_key(self.i, name))],
        )
        built.prove(self.full[0], self.arguments[0], model.block_name(self.i))
        return built

    @contextmanager
    def _watched(self, ranges):
        """While it is open, notes the smallest and largest value of each channel that a fold's first reader reads."""
        hooks = []
        for fold in self.model.family.folds if self.transformation is not None else ():
            linear = self.model.linear(self.i, fold.readers[0])
            hooks.append(linear.register_forward_pre_hook(partial(_note_range, ranges, fold.readers[0])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class BlockReconstruction:
    """One solved block, its live weights the quantized ones, between the quantized stream and the block's outputs.

    Args:
        model: StreamedModel with block i loaded.
        i: The block.
        streams: What enters the block in the quantized stream, and what leaves it in the full-precision one.
        spec: QuantSpec.
    """

    def __init__(self, model, i: int, streams, spec):
        self.model, self.i, self.spec, self.streams = model, i, spec, streams
        self.block, self.arguments = model.blocks[i], streams.at(i)
        self.trained, self.held = hold_back(len(self.arguments))

    def error(self) -> float:
        """Squared error of the block's outputs, as a share of the full-precision ones' squares, on rows held back."""
        error = energy = 0.0
        for b in self.held:
            wanted = self.streams.full[b].float()
            error += float(F.mse_loss(self._run(b).float().cpu(), wanted))
            energy += float(wanted.square().mean())
        return error / max(energy, torch.finfo(torch.float32).tiny)

    def advance(self):
        """Takes the quantized stream through the block."""
        for b in range(len(self.arguments)):
            self.streams.quantized[b] = self._run(b)

    def _run(self, b):
        return run_block(self.block, self.streams.quantized.on(self.model.device)[b], self.arguments[b])

    def train(self, solved, weights):
        """(linears by name, why training stopped or None) from solved linears and original weights by name."""
        epochs, device = range(self.spec.reconstruct_epochs), self.model.device
        return reconstruct(
            self.block,
            solved,
            weights,
            self.streams.quantized.on(device),
            self.streams.full.on(device),
            self.arguments,
            self.spec,
            batches=self.trained,
            generator=torch.Generator().manual_seed(self.spec.seed + 1000 * self.i),
            transposed=self.model.family.transposed,
            epochs=tqdm(epochs, desc=f"block {self.i}", unit="epoch", leave=False, disable=None),
        )


def _note_range(ranges, name, _, args):
    low, high = args[0].float().flatten(0, -2).aminmax(dim=0)
    if name in ranges:
        low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
    ranges[name] = low, high
