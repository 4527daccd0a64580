"""Activations of all calibration batches between two blocks, in memory up to a budget and on disk past it."""

import ctypes
import mmap
import weakref
from pathlib import Path

import torch


class ActivationStore:
    """A list of tensors (batch, T, D), one a batch, on the CPU or spilled to files.

    Args:
        folder: Where spilled batches go; made when the first one does. Without it nothing is spilled.
        budget: Bytes kept in memory; None for no limit.
    """

    def __init__(self, folder: Path | None = None, budget: int | None = None):
        self.folder, self.budget = folder, budget
        self._held: list[torch.Tensor | tuple] = []
        self._mapped: dict[int, weakref.ref] = {}  # batches that somebody may still be reading from disk
        self._bytes = 0

    def __len__(self):
        return len(self._held)

    def append(self, x: torch.Tensor):
        """Keeps or spills one more batch."""
        self._held.append(None)
        self[len(self) - 1] = x

    def __setitem__(self, i: int, x: torch.Tensor):
        x = x.detach().cpu()
        old = self._held[i]
        if isinstance(old, torch.Tensor):
            self._bytes -= old.nbytes
        if self.folder is None or self.budget is None or self._bytes + x.nbytes <= self.budget:
            self._held[i] = x
            self._bytes += x.nbytes
            return
        path = self.folder / f"batch-{i:05d}.bin"
        write(x, path)
        self._held[i] = (path, x.shape, x.dtype)

    def __getitem__(self, i: int) -> torch.Tensor:
        held = self._held[i]
        if isinstance(held, torch.Tensor):
            return held
        x = mapped(*held)
        self._mapped[i] = weakref.ref(x)
        return x

    def let_go(self, i: int):
        """Takes what was read of a spilled batch out of this process's memory; the next use reads it again.

        Without this a batch that a halted forward still holds counts in full.
        """
        mapping = self._mapped.get(i, lambda: None)()
        if mapping is not None:
            let_pages_go(mapping)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name if self.folder else "activations"

    def on(self, device) -> "ActivationsOn":
        """The same batches, each moved to a device when it is asked for."""
        return ActivationsOn(self, device)

    @property
    def spilled(self) -> int:
        """How many batches are on disk."""
        return sum(isinstance(held, tuple) for held in self._held)


def write(x: torch.Tensor, path: Path):
    """Writes a tensor's bytes; who has mapped the old file keeps its numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    x.contiguous().view(torch.uint8).numpy().tofile(aside)
    aside.replace(path)


def mapped(path: Path, shape, dtype, *, shared: bool = False) -> torch.Tensor:
    """A tensor whose numbers are read from a file when they are used; shared, what is done to it goes into the file."""
    count = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=shared, size=count, dtype=dtype).view(shape)


class RowsOnDisk:
    """A matrix in a file, of which rows are read when they are asked for.

    Args:
        matrix: (R, I) fp32; written, and freed.
        path: The file.
    """

    device = torch.device("cpu")

    def __init__(self, matrix: torch.Tensor, path: Path):
        self.shape, self._path = tuple(matrix.shape), path
        write(matrix, path)
        matrix.set_()

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """(R, I), in memory of their own."""
        wanted = torch.arange(len(self))[rows]
        found = torch.empty(len(wanted), self.shape[1])
        pieces = [found] if isinstance(rows, slice) else found.split(1)
        with self._path.open("rb", buffering=0) as file:
            for first, piece in zip(wanted.tolist(), pieces, strict=False):
                file.seek(first * 4 * self.shape[1])
                if file.readinto(piece.numpy()) != piece.nbytes:
                    raise OSError(f"{self._path}: became shorter while it was used")
        return found


class SquareOnDisk(RowsOnDisk):
    """A square one (I, I), whose diagonal is kept and may change."""

    def __init__(self, matrix: torch.Tensor, path: Path):
        self._diagonal = matrix.diagonal().clone()
        super().__init__(matrix, path)

    def diagonal(self) -> torch.Tensor:
        """(I,), the one that rows are read with: what is done to it shows in them."""
        return self._diagonal

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        found, wanted = super().__getitem__(rows), torch.arange(len(self))[rows]
        found[torch.arange(len(wanted)), wanted] = self._diagonal[wanted]
        return found


def let_pages_go(x: torch.Tensor):
    """Takes a mapped tensor out of this process's memory until it is used again.

    What was done to it is lost unless the mapping is shared.
    """
    try:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(x.nbytes), mmap.MADV_DONTNEED)
    except (AttributeError, OSError, TypeError):  # not Linux
        pass


class ActivationsOn:
    """A read-only view of a store from a device."""

    def __init__(self, store: ActivationStore, device):
        self.store, self.device = store, device

    def __len__(self):
        return len(self.store)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.store[i].to(self.device)

    def let_go(self, i: int):
        """As the store has it."""
        self.store.let_go(i)
