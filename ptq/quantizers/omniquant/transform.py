"""Learnable equivalent transformation (LET): scales and shifts of channels, folded into the neighbouring weights.

Where linears read a tensor that a norm or another linear makes, each channel may be divided by s > 0 and moved by d at
its source, and multiplied back by its readers (OmniQuant, arXiv 2308.13137, equation 3); the block computes the same:

    source:  w / s,  (b - d) / s          readers:  W diag(s),  b + W d

Between queries and keys the two sides are rows: q / s and k * s. Whether a fold is exact depends on what lies between,
so a family lists its folds, and `prove` runs every one of them through the real block before it is used.

A norm's weight is stored in the checkpoint's own dtype. `fold(stored=True)` rounds it first and takes the s that this
rounded weight stands for, so what readers are multiplied by is what the file's norm divides by.

Legend: I channels between source and readers, O outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from calibration.capture import run_block
from calibration.errors import InputError

MIGRATION = 0.5  # scales start at |x|^a / |w|^(1-a), a = 0.5, as in SmoothQuant (arXiv 2211.10438, equation 4)
SMALLEST = 1e-2
TOLERANCE = {torch.float32: 1e-4}  # relative to what the block adds; three orders above fp32's own rounding
HALF_TOLERANCE = 5e-2
ROWS = ("rotary", "query_key")


@dataclass(frozen=True)
class Heads:
    """Attention heads: queries, and the keys and values that they share."""

    query: int
    key_value: int

    def spread(self, per_kv_channel: torch.Tensor) -> torch.Tensor:
        """A value of each key-value channel, to the channels of the query heads that read it."""
        by_head = per_kv_channel.view(self.key_value, 1, -1)
        return by_head.expand(-1, self.query // self.key_value, -1).reshape(-1)


class _Pair:
    """Scale and shift of one fold, and what they do to its weights."""

    def __init__(self, fold, heads: Heads, parameters: Mapping[str, torch.Tensor], *, shift: bool):
        self.fold, self.heads = fold, heads
        O, I = parameters[f"{fold.readers[0]}.weight"].shape
        self.channels = {"rotary": O // 2, "query_key": O, "kv_head": I // heads.query * heads.key_value}.get(
            fold.ties, I
        )
        device = parameters[f"{fold.source}.weight"].device
        self.scale = torch.ones(self.channels, device=device, requires_grad=True)
        has_biases = all(f"{name}.bias" in parameters for name in (fold.source, *fold.readers))
        self.shift = None
        if shift and has_biases and fold.ties not in ROWS:
            self.shift = torch.zeros(self.channels, device=device, requires_grad=True)

    def start(self, low, high, W):
        """Sets the start from the smallest and largest value of each channel (I,) and the first reader's weight."""
        if self.fold.ties in ROWS:
            return
        with torch.no_grad():
            x = self._gather(torch.maximum(high, -low)).clamp(min=1e-5)
            w = self._gather(W.abs().amax(0)).clamp(min=1e-5)
            self.scale.copy_((x**MIGRATION / w ** (1 - MIGRATION)).clamp(min=1e-5))
            if self.shift is not None:
                self.shift.copy_((self._gather(high) - self._gather(-low)) / 2)

    def _gather(self, values):
        """The largest over the channels that share a scale."""
        if self.fold.ties != "kv_head":
            return values
        return values.view(self.heads.key_value, -1, self.channels // self.heads.key_value).amax(1).reshape(-1)

    def sides(self, values):
        """What `values` of the learned channels are at the source and at the readers."""
        if self.fold.ties == "rotary":  # a rotation mixes channel i of a head with i + half: both get one scale
            by_head = values.view(self.heads.key_value, -1)
            values = torch.cat((by_head, by_head), 1).reshape(-1)
        spread = self.heads.spread(values) if self.fold.ties != "channel" else values
        return (spread, values) if self.fold.ties in ROWS else (values, spread)

    def apply(self, parameters, offset, stored):
        """Folds into `parameters`, a dict from names to tensors, linears as (O, I)."""
        source, readers = self.fold.source, self.fold.readers
        down, up = self.sides(self.scale)
        weight = parameters[f"{source}.weight"]
        if weight.dim() == 1 and stored is not None:
            dtype = stored(f"{source}.weight")
            parameters[f"{source}.weight"], down = _stored_norm(weight + offset, down, offset, dtype)
            up = down
        elif weight.dim() == 1:
            parameters[f"{source}.weight"] = (weight + offset) / down - offset
        else:
            down = _last_rows(down, len(weight), 1.0)
            parameters[f"{source}.weight"] = weight / down[:, None]
        self._apply_biases(parameters, down)
        for name in readers:
            W = parameters[f"{name}.weight"]
            parameters[f"{name}.weight"] = W * (up[:, None] if self.fold.ties in ROWS else up)
            if self.fold.ties in ROWS and f"{name}.bias" in parameters:
                parameters[f"{name}.bias"] = parameters[f"{name}.bias"] * up

    def _apply_biases(self, parameters, down):
        """The source's bias, and what a shift adds to the readers', whose weights are still the old ones."""
        source, bias = self.fold.source, parameters.get(f"{self.fold.source}.bias")
        if self.shift is not None:
            at_source, at_readers = self.sides(self.shift)
            bias = bias - _last_rows(at_source, len(bias), 0.0)
            for name in self.fold.readers:
                moved = parameters[f"{name}.weight"] @ at_readers
                parameters[f"{name}.bias"] = parameters[f"{name}.bias"] + moved
        if bias is not None:
            parameters[f"{source}.bias"] = bias / down


class Transformation:
    """The learnable transformation of one block.

    Args:
        block: The decoder block with its weights.
        folds: What the family lists: source, readers, ties.
        heads: The block's attention heads.
        transposed: Linears hold (I, O) weights.
        norm_offset: What the block's norms add to their stored weight.
        shift: Learn shifts too, where source and readers have biases.
        stored: dtype in which the checkpoint holds a parameter of the block, by the parameter's name.
    """

    def __init__(
        self, block: nn.Module, folds, heads: Heads, *, transposed=False, norm_offset=0.0, shift=False,
        stored: Callable[[str], torch.dtype] = lambda name: torch.float32,
    ):  # fmt: skip
        self.block, self.transposed, self.norm_offset, self.stored = block, transposed, norm_offset, stored
        names = dict.fromkeys(name for fold in folds for name in (fold.source, *fold.readers))
        self.plain = {}
        for name in names:
            module = block.get_submodule(name)
            weight = module.weight.T if transposed and module.weight.dim() == 2 else module.weight
            self.plain[f"{name}.weight"] = weight.detach().float()
            if getattr(module, "bias", None) is not None:
                self.plain[f"{name}.bias"] = module.bias.detach().float()
        self.pairs = [_Pair(fold, heads, self.plain, shift=shift) for fold in folds]

    def parameters(self) -> list[torch.Tensor]:
        """Everything that is learned."""
        return [p for pair in self.pairs for p in (pair.scale, pair.shift) if p is not None]

    @torch.no_grad()
    def limit(self):
        """Keeps scales away from zero."""
        for pair in self.pairs:
            pair.scale.clamp_(min=SMALLEST)

    def start(self, ranges: Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
        """Starts from (smallest, largest) value (I,) of what each fold's first reader reads, by the reader's name."""
        for pair in self.pairs:
            first = pair.fold.readers[0]
            pair.start(*ranges[first], self.plain[f"{first}.weight"])

    def fold(self, *, stored=False) -> dict[str, torch.Tensor]:
        """Changed parameters by name, linears as (O, I), fp32; with `stored`, vectors in the file's dtype."""
        parameters = dict(self.plain)
        for pair in self.pairs:
            pair.apply(parameters, self.norm_offset, self.stored if stored else None)
        changed = {name: p for name, p in parameters.items() if p is not self.plain[name]}
        if stored:
            changed |= {name: p.to(self.stored(name)) for name, p in changed.items() if p.dim() == 1}
        return changed

    @torch.no_grad()
    def prove(self, hidden: torch.Tensor, arguments: tuple, where: str):
        """Runs every fold, with scales in [1/2, 2] and shifts, through the unquantized block.

        Args:
            hidden: A batch (batch, T, D) of the block's inputs.
            arguments: The block's other arguments for it.
            where: The block's name.

        Raises:
            InputError: A fold changes the block's output; names it.
        """
        expected = run_block(self.block, hidden, arguments).float()
        energy = (expected - hidden.float()).norm().clamp(min=torch.finfo(torch.float32).tiny)
        generator = torch.Generator().manual_seed(0)
        for pair in self.pairs:
            error = (self._tried(pair, generator, hidden, arguments) - expected).norm() / energy
            if not float(error) <= TOLERANCE.get(hidden.dtype, HALF_TOLERANCE):
                readers = ", ".join(pair.fold.readers)
                raise InputError(
                    f"{where}: folding a scale between {pair.fold.source} and {readers} changes the block's output by"
                    f" {float(error):.2g} of what it adds: this model is not what its family describes; use --no-let"
                )

    def _tried(self, pair, generator, hidden, arguments):
        """The block's output with random values in one fold."""
        kept = [p.detach().clone() for p in (pair.scale, pair.shift) if p is not None]
        device = pair.scale.device
        pair.scale.copy_(2 ** (2 * torch.rand(pair.channels, generator=generator) - 1).to(device))
        if pair.shift is not None:
            pair.shift.copy_(torch.randn(pair.channels, generator=generator).to(device))
        parameters = dict(self.plain)
        pair.apply(parameters, self.norm_offset, None)
        for p, old in zip((pair.scale, pair.shift), kept, strict=False):
            p.copy_(old)
        weights = {
            name: (p.T if self.transposed and p.dim() == 2 else p).to(hidden.dtype)
            for name, p in parameters.items()
            if p is not self.plain[name]
        }
        return run_block(self.block, hidden, arguments, weights).float()


def _stored_norm(weight, scale, offset, dtype):
    """(stored weight, the scale that it stands for); a weight that would be rounded away keeps its size."""
    stored = (weight / scale - offset).to(dtype).float()
    lost = stored + offset == 0
    stored = torch.where(lost, weight - offset, stored)
    return stored, torch.where(lost, torch.ones_like(scale), weight / (stored + offset))


def _last_rows(values, rows, neutral):
    """The values of the last rows of a fused linear, such as v of a fused q, k, v; `neutral` for those before."""
    if len(values) == rows:
        return values
    return torch.cat((values.new_full((rows - len(values),), neutral), values))
