"""A GGUF file's metadata and where its tensors lie, read with distrust.

Layout, little-endian: magic "GGUF", version, number of tensors, number of keys; the keys with typed values; for each
tensor name, dimensions, type and offset; padding to the alignment; the data. Nothing is believed before it is compared
with the file's size: a count only as far as so many of its items could still fit, an offset only where llama.cpp would
put it. The package's own reader maps the file and trusts its counts.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from calibration.errors import InputError
from ptq.export.gguf.types import TYPES, GgmlType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 28  # the largest vocabularies take a tenth of it
MAX_DIMENSIONS = 4
ALIGNMENT = "general.alignment"
# Value types by number: struct's letter, for all but the last two.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SMALLEST_KEY = 8 + 1 + 4 + 1  # length, one letter, type, one byte
SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # length, one letter, dimensions, one of them, type, offset


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: shape with inputs last, as in torch; `start` counts from the beginning of the file."""

    ggml_type: GgmlType
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return prod(self.shape[:-1]) * self.ggml_type.row_bytes(self.shape[-1])


class GgufFile:
    """An opened and checked file.

    Args:
        path: The file.

    Attributes:
        metadata: Values by key; arrays are lists or numpy arrays.
        tensors: Every tensor by name, in file order.

    Raises:
        InputError: It is no whole GGUF file of a known version, or one of several parts of a model.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as handle:
            header = _Header(handle, size, self.path)
            tensor_count, key_count = _preamble(header)
            self.metadata = _metadata(header, key_count)
            self.tensors = _tensors(header, tensor_count, _alignment(header, self.metadata))
        parts = self.metadata.get("split.count", 1)
        if not isinstance(parts, int) or parts > 1:
            raise InputError(f"{path}: is one part of several; join them with llama-gguf-split --merge")

    def rows(self, name: str, part: slice = slice(None)) -> np.ndarray:
        """Encoded bytes of a matrix's rows, uint8 (O, row bytes); a vector is one row.

        Args:
            name: A key of `tensors`.
            part: Which rows, with step 1.
        """
        tensor = self.tensors[name]
        first, last, _ = part.indices(prod(tensor.shape[:-1]))
        width = tensor.ggml_type.row_bytes(tensor.shape[-1])
        content = np.empty((max(last - first, 0), width), np.uint8)
        with self.path.open("rb") as handle:
            handle.seek(tensor.start + first * width)
            if handle.readinto(content) != content.nbytes:
                raise InputError(f"{self.path}: became shorter while {name!r} was read")
        return content


class _Header:
    """Reads forward through the file's head; running out of it is the user's InputError."""

    def __init__(self, handle, size, path):
        self._handle, self.size, self._path, self.position = handle, min(size, MAX_HEADER_BYTES), path, 0
        self.file_size = size

    def refuse(self, why: str) -> InputError:
        return InputError(f"{self._path}: not a whole GGUF file: {why} at byte {self.position}")

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise self.refuse(f"{count} bytes wanted of {self.size - self.position} left")
        content = self._handle.read(count)
        if len(content) != count:
            raise self.refuse("it became shorter")
        self.position += count
        return content

    def scalar(self, letter: str):
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def count(self, smallest: int) -> int:
        """How many items of at least `smallest` bytes follow."""
        number = self.scalar("Q")
        if number > (self.size - self.position) // smallest:
            raise self.refuse(f"a count of {number}, more than the file could hold,")
        return number

    def text(self) -> str:
        content = self.take(self.count(1))
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise self.refuse(f"text {content[:16]!r} that is not UTF-8") from None


def _preamble(header) -> tuple[int, int]:
    if header.take(4) != MAGIC:
        raise header.refuse("another magic number")
    version = header.scalar("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
        raise header.refuse("big-endian numbers" if swapped else f"version {version}, which is not read here,")
    return header.count(SMALLEST_TENSOR), header.count(SMALLEST_KEY)


def _metadata(header, count) -> dict:
    metadata = {}
    for _ in range(count):
        key = header.text()
        if key in metadata:
            raise header.refuse(f"{key!r} for the second time")
        metadata[key] = _value(header, header.scalar("I"))
    return metadata


def _value(header, kind):
    if kind == STRING:
        return header.text()
    if kind == ARRAY:
        return _array(header, header.scalar("I"))
    if kind not in SCALARS:
        raise header.refuse(f"a value of type {kind}")
    return header.scalar(SCALARS[kind])


def _array(header, kind) -> list[str] | np.ndarray:
    if kind == STRING:
        return [header.text() for _ in range(header.count(8))]
    if kind not in SCALARS:
        raise header.refuse(f"an array of type {kind}")
    dtype = np.dtype(f"<{SCALARS[kind]}")
    return np.frombuffer(header.take(header.count(dtype.itemsize) * dtype.itemsize), dtype)


def _alignment(header, metadata) -> int:
    alignment = metadata.get(ALIGNMENT, 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > header.file_size:
        raise header.refuse(f"an alignment of {alignment!r}")
    return alignment


def _tensors(header, count, alignment) -> dict[str, StoredTensor]:
    entries = [_entry(header) for _ in range(count)]
    data, expected = _padded(header.position, alignment), 0
    tensors = {}
    for name, ggml_type, shape, offset in entries:
        tensor = StoredTensor(ggml_type, shape, data + offset)
        if name in tensors:
            raise header.refuse(f"tensor {name!r} for the second time")
        if offset != expected or tensor.start + tensor.nbytes > header.file_size:
            raise header.refuse(f"tensor {name!r} outside its place in the {header.file_size} bytes")
        expected = _padded(offset + tensor.nbytes, alignment)
        tensors[name] = tensor
    return tensors


def _entry(header):
    name, dimensions = header.text(), header.scalar("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise header.refuse(f"tensor {name!r} with {dimensions} dimensions")
    shape = struct.unpack(f"<{dimensions}Q", header.take(8 * dimensions))[::-1]
    number, offset = header.scalar("I"), header.scalar("Q")
    if number not in TYPES:
        raise header.refuse(f"tensor {name!r} of unknown type {number}")
    if not all(shape) or shape[-1] % TYPES[number].block:
        raise header.refuse(f"tensor {name!r} of {TYPES[number].name} with shape {list(shape)}")
    return name, TYPES[number], shape, offset


def _padded(position, alignment) -> int:
    return position + -position % alignment
