"""Memory of halted forwards, moved to disk and back without the forwards' knowledge.

A forward that is suspended half way keeps its activations alive in its frames. They are found by watching which tensors
its operators make, and parked by emptying their storages: the tensors stay, their bytes wait in a file.
"""

import ctypes
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watcher(TorchDispatchMode):
    """While it is on, remembers every tensor that an operator makes, as long as something else keeps it."""

    def __init__(self):
        super().__init__()
        self._made: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._made.extend(weakref.ref(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out

    def storages(self, spared: set[int]) -> list[torch.UntypedStorage]:
        """Storages of the tensors that are still alive, without those whose address is in `spared`."""
        alive = [t for t in (ref() for ref in self._made) if t is not None]
        self._made = [weakref.ref(t) for t in alive]
        found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in alive if t.device.type == "cpu"}
        # What cannot be resized is mapped from a file already.
        return [s for address, s in found.items() if address not in spared and s.nbytes() and s.resizable()]


class ParkedStorages:
    """Storages whose bytes are in a file until `restore`."""

    def __init__(self, storages: list[torch.UntypedStorage], file: Path):
        self.storages, self.file = storages, file
        self.sizes = [storage.nbytes() for storage in storages]
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as out:
            for storage in storages:
                out.write(_bytes(storage))
        for storage in storages:
            storage.resize_(0)

    def restore(self):
        """Reads the bytes back into the same storages."""
        with open(self.file, "rb") as source:
            for storage, size in zip(self.storages, self.sizes, strict=True):
                storage.resize_(size)
                if source.readinto(_bytes(storage)) != size:
                    raise OSError(f"{self.file}: became shorter while it was parked")


def addresses(tensors) -> set[int]:
    """Where the storages of tensors (in any nesting of tuples, lists and dicts) lie."""
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    """The storage's memory; by its address, because a storage that numpy has seen can never be resized again."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
