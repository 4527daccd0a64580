"""What is trained in every block, with its optimizer's state: in memory up to a budget, in mapped files past it.

Of a linear that is a factor for each scale and, where codes move, a position behind each code
(ptq/quantizers/reconstruct/parameters.py). It stays on the CPU; a block's part is copied to the device with the block.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ptq.qtensor import QuantizedTensor
from ptq.quantizers.reconstruct.parameters import TrainedCodes, TrainedScales, limit_positions

BETAS = (0.9, 0.95)
EPSILON = 1e-12  # gradients of one weight of billions are small


class TrainedBlocks:
    """The trained numbers of all blocks; blocks are added in order.

    Args:
        folder: Where what does not fit in memory is mapped.
        budget: Bytes kept in memory; None for no limit.
        codes: Train codes beside scales.
    """

    def __init__(self, folder: Path, budget: int | None, *, codes: bool):
        self._kind = TrainedCodes if codes else TrainedScales
        self._room = MappedRoom(folder, budget)
        self._leaves: list[list[torch.Tensor]] = []  # of each linear in turn
        self._bits: list[list[float]] = []
        self._optimizers: list[torch.optim.Adam] = []

    def add(self, starts: Mapping[str, QuantizedTensor], weights: Mapping[str, torch.Tensor]):
        """One more block, where the walk left it.

        Args:
            starts: Its linears by name.
            weights: (O, I) original weight of each, which says where in its cell each position starts.
        """
        leaves = []
        for name, start in starts.items():
            linear = (
                TrainedCodes.near(start, weights[name].cpu()) if self._kind is TrainedCodes else TrainedScales(start)
            )
            leaves += [self._room.zeros(leaf.shape).copy_(leaf) for leaf in linear.leaves()]
        self._leaves.append(leaves)
        self._bits.append([start.bits for start in starts.values()])
        self._optimizers.append(self._optimizer(leaves))

    def linears(self, i: int, starts: Mapping[str, QuantizedTensor]) -> dict[str, TrainedScales]:
        """The linears of block i as they are now, on the device of `starts`, by name."""
        found, each = {}, self._each
        for n, (name, start) in enumerate(starts.items()):
            leaves = self._leaves[i][n * each : (n + 1) * each]
            copies = (leaf.detach().to(start.codes.device).requires_grad_() for leaf in leaves)
            found[name] = self._kind(start, *copies)
        return found

    def step(self, i: int, gradients: Sequence[torch.Tensor], rates: tuple[float, float]):
        """One step of Adam in block i.

        Args:
            i: The block.
            gradients: Of the leaves of its linears in turn.
            rates: Learning rates of factors, relative to the scale, and of positions, in codes.
        """
        optimizer, leaves = self._optimizers[i], self._leaves[i]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient.cpu()
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        if self._each == 2:
            for position, bits in zip(leaves[1::2], self._bits[i], strict=True):
                limit_positions(position, bits)

    @property
    def _each(self):
        """Leaves of a linear."""
        return 2 if self._kind is TrainedCodes else 1

    def _optimizer(self, leaves):
        groups = [{"params": leaves[k :: self._each]} for k in range(self._each)]
        optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
        for leaf in leaves:
            averages = {name: self._room.zeros(leaf.shape) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[leaf] = {"step": torch.zeros(())} | averages
        return optimizer


class MappedRoom:
    """Gives out fp32 tensors: in memory up to a budget, past it as mapped files, which the system writes out at will.

    Args:
        folder: Where files go; made when the first one does.
        budget: Bytes in memory; None for no limit.
    """

    def __init__(self, folder: Path, budget: int | None):
        self.folder, self.budget = folder, budget
        self._bytes = self._files = 0

    def zeros(self, shape: torch.Size) -> torch.Tensor:
        """A tensor of zeros."""
        size = 4 * shape.numel()
        if self.budget is None or self._bytes + size <= self.budget:
            self._bytes += size
            return torch.zeros(shape)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._files:06d}.bin"
        self._files += 1
        path.unlink(missing_ok=True)
        return torch.from_file(str(path), shared=True, size=shape.numel()).view(shape)
