"""Safetensors files written as a stream: never more than one tensor in memory, bytes equal to the library's own.

A file is an 8-byte little-endian header length, a JSON header padded with spaces to 8 bytes, then the tensors ordered
by dtype (widest first, then the library's order) and name: what `safetensors.torch.save` writes, but from tensors that
are all in memory. Equal input gives equal bytes: nothing here depends on time, hashing or the order of a dict.
Not atomic: a failed write leaves a partial file, so write into a work folder and rename it.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import torch

from calibration.errors import InputError

# In the order in which the library lays tensors out.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}
PT_METADATA = MappingProxyType({"format": "pt"})
SINGLE_NAME = "model.safetensors"

Buffer = bytes | bytearray | memoryview


class Entry(NamedTuple):
    """One tensor to write; `read` is called once, when its turn comes, and gives all bytes or an iterable of chunks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Buffer | Iterable[Buffer]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        if self.dtype not in DTYPES:
            raise InputError(f"{self.name}: dtype {self.dtype} is not one of {tuple(DTYPES)}")
        size = DTYPES[self.dtype].itemsize
        for length in self.shape:
            size *= length
        return size


def tensor_bytes(t: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous and on the CPU."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_entry(name: str, t: torch.Tensor) -> Entry:
    """An entry for a tensor that is already in memory."""
    dtype = next(label for label, torch_dtype in DTYPES.items() if torch_dtype == t.dtype)
    return Entry(name, dtype, tuple(t.shape), lambda: tensor_bytes(t))


def plan_shards(sizes: Sequence[tuple[str, int]], max_shard_bytes: int) -> list[list[str]]:
    """Cut tensors, in the order given, into runs of at most `max_shard_bytes`; a larger tensor stands alone."""
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes {max_shard_bytes} must be at least 1")
    shards, used = [[]], 0
    for name, nbytes in sizes:
        if shards[-1] and used + nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    return shards


def write_shard(path: Path, entries: Iterable[Entry], *, metadata: Mapping[str, str] = PT_METADATA) -> None:
    """Write one safetensors file and wait until the disk has it.

    Raises:
        OSError: The disk is full or the path cannot be written.
        InputError: An entry gives more or fewer bytes than its dtype and shape say.
    """
    ordered = sorted((Entry(*entry) for entry in entries), key=lambda entry: (DTYPE_RANK[entry.dtype], entry.name))
    with open(path, "wb") as file:
        file.write(_header(ordered, metadata))
        for entry in ordered:
            _write_entry(file, entry)
        file.flush()
        os.fsync(file.fileno())


def write_checkpoint(
    folder: Path, entries: Iterable[Entry], max_shard_bytes: int, metadata: Mapping[str, str] = PT_METADATA
) -> None:
    """Write one file, or numbered shards and their index, into a folder that holds no other checkpoint.

    Args:
        folder: An existing folder.
        entries: All tensors, in the order in which they fill the shards.
        max_shard_bytes: Most tensor bytes of one file, unless a single tensor is larger.
        metadata: The `__metadata__` of every file's header.
    """
    by_name = {}
    for entry in entries:
        assert entry[0] not in by_name, f"two tensors named {entry[0]}"
        by_name[entry[0]] = Entry(*entry)
    plan = plan_shards([(name, entry.nbytes) for name, entry in by_name.items()], max_shard_bytes)
    weight_map = {}
    for i, names in enumerate(plan):
        file_name = SINGLE_NAME if len(plan) == 1 else f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors"
        write_shard(Path(folder) / file_name, [by_name[name] for name in names], metadata=metadata)
        weight_map |= dict.fromkeys(names, file_name)
    if len(plan) > 1:
        _write_index(Path(folder), weight_map, sum(entry.nbytes for entry in by_name.values()))


def sync_folder(folder: Path):
    """Makes renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(ordered: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    header = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for entry in ordered:
        assert entry.name not in header, f"two tensors named {entry.name}"
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_entry(file: BinaryIO, entry: Entry) -> None:
    # A function of its own: on return nothing refers to this tensor, so the next one is read into freed memory.
    data = entry.read()
    written = 0
    for chunk in (data,) if isinstance(data, Buffer) else data:
        file.write(chunk)
        written += memoryview(chunk).nbytes
    if written != entry.nbytes:
        raise InputError(f"{entry.name}: {written} bytes where {entry.dtype} {list(entry.shape)} needs {entry.nbytes}")


def _write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    with open(folder / f"{SINGLE_NAME}.index.json", "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
