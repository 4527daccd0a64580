"""What is trained in every block, with its optimizer's state: in memory up to a budget, in mapped files past it.

Of a linear that is a factor for each scale and, where codes move, a position behind each code; of llama.cpp's types
the positions alone (ptq/quantizers/reconstruct). It stays on the CPU; a block's part is copied to the device with the
block.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from calibration.store import let_pages_go, mapped, write
from ptq.qtensor import BlockTensor, QuantizedTensor
from ptq.quantizers.reconstruct.block_types import TrainedBlockCodes, Untrained
from ptq.quantizers.reconstruct.parameters import TrainedCodes, TrainedScales, limit_positions

EDGE = 0.25  # how far from the middle of its cell a position starts at most, the cell's edge being at 0.5
BETAS = (0.9, 0.95)
EPSILON = 1e-12  # gradients of one weight of billions are small

Linear = TrainedScales | TrainedBlockCodes | Untrained


class TrainedBlocks:
    """The trained numbers of all blocks; blocks are added in order.

    Args:
        folder: Where what does not fit in memory is mapped.
        budget: Bytes kept in memory; None for no limit.
        codes: Train codes beside scales.
    """

    def __init__(self, folder: Path, budget: int | None, *, codes: bool):
        self.codes, self._room = codes, MappedRoom(folder, budget)
        self._leaves: list[dict[str, dict[str, torch.Tensor]]] = []  # of each linear by name
        self._tops: list[dict[str, int]] = []  # their largest codes
        self._optimizers: list[torch.optim.Adam | None] = []

    def add(self, starts: Mapping[str, QuantizedTensor | BlockTensor], weights: Mapping[str, torch.Tensor]):
        """One more block, where the walk left it.

        Args:
            starts: Its linears by name.
            weights: (O, I) original weight of each, which says where in its cell each position starts.
        """
        leaves, tops = {}, {}
        for name, start in starts.items():
            linear = self._kind(start).near(start, weights[name].cpu(), EDGE)
            leaves[name] = {n: self._room.zeros(leaf.shape).copy_(leaf) for n, leaf in linear.leaves().items()}
            tops[name] = linear.top
        self._leaves.append(leaves)
        self._tops.append(tops)
        self._optimizers.append(self._optimizer(leaves.values()))

    @property
    def empty(self) -> bool:
        """Whether nothing is trained: of codebooks nothing can be, of llama.cpp's types no scales."""
        return not any(self._optimizers)

    def linears(self, i: int, starts: Mapping[str, QuantizedTensor | BlockTensor]) -> dict[str, Linear]:
        """The linears of block i as they are now, on the device of `starts`, by name."""
        found = {}
        for name, start in starts.items():
            leaves = self._leaves[i][name].items()
            copies = {n: leaf.detach().to(start.codes.device).requires_grad_() for n, leaf in leaves}
            found[name] = self._kind(start)(start, **copies)
        return found

    def step(self, i: int, name: str, gradients: Sequence[torch.Tensor], rates: Mapping[str, float]):
        """One step of Adam in a linear.

        Args:
            i: Its block.
            name: Its name.
            gradients: Of its leaves.
            rates: Learning rate of each "factor", relative to its scale, and of each "position", in codes.
        """
        optimizer, leaves = self._optimizers[i], self._leaves[i][name]
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            leaf.grad = gradient.cpu()
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        optimizer.step()  # of those alone that have gradients
        optimizer.zero_grad()
        if "position" in leaves:
            limit_positions(leaves["position"], self._tops[i][name])
        self.let_go(i, name)

    def let_go(self, i: int, name: str):
        """Takes what is trained in a linear of block i, if it is mapped, out of memory until it is used again."""
        for leaf in self._leaves[i][name].values():
            for tensor in (leaf, *self._optimizers[i].state[leaf].values()):
                self._room.let_go(tensor)

    def state(self, i: int) -> dict[str, torch.Tensor]:
        """What is trained in block i and its optimizer's numbers, by name; what is done to them counts."""
        found = {}
        for name, leaves in self._leaves[i].items():
            for n, leaf in leaves.items():
                found[f"{name}.{n}"] = leaf.detach()
                found |= {f"{name}.{n}.{part}": x for part, x in self._optimizers[i].state[leaf].items()}
        return found

    def _kind(self, start):
        if isinstance(start, QuantizedTensor):
            return TrainedCodes if self.codes else TrainedScales
        return TrainedBlockCodes if self.codes and start.grid.vector == 1 else Untrained

    def _optimizer(self, linears):
        names = ("factor", "position")
        groups = [{"name": n, "params": [leaves[n] for leaves in linears if n in leaves]} for n in names]
        groups = [group for group in groups if group["params"]]
        if not groups:
            return None
        optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
        for group in groups:
            for leaf in group["params"]:
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
        self._bytes, self._mapped = 0, set()

    def zeros(self, shape: torch.Size) -> torch.Tensor:
        """A tensor of zeros."""
        size = 4 * shape.numel()
        if self.budget is None or self._bytes + size <= self.budget:
            self._bytes += size
            return torch.zeros(shape)
        path = self.folder / f"{len(self._mapped):06d}.bin"
        write(torch.zeros(shape), path)  # a file with holes would end the process on a full disk, here an error does
        tensor = mapped(path, shape, torch.float32, shared=True)
        self._mapped.add(tensor.data_ptr())
        return tensor

    def let_go(self, tensor: torch.Tensor):
        """Takes one of them, if it is mapped, out of memory until it is used again."""
        if tensor.data_ptr() in self._mapped:
            let_pages_go(tensor.detach())
