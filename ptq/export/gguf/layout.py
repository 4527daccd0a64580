"""The tensors of a GGUF file before they are written: name, type, shape, and what gives their bytes."""

from collections.abc import Callable, Iterator, Mapping
from math import isfinite, prod
from typing import NamedTuple

import numpy as np
import torch

from calibration.errors import InputError
from ptq.export.gguf.metadata import architecture_of, rope_tensors
from ptq.export.gguf.tensors import NOT_STORED, TensorNames, is_norm, row_order, stays_float32
from ptq.export.gguf.types import BY_NAME, TYPES, GgmlType
from ptq.export.shards import tensor_bytes
from ptq.families import family_of

FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEAD = "lm_head.weight"
HEADS = (HEAD, "embed_out.weight")


class EncodedTensor(NamedTuple):
    """A matrix (O, I) in a ggml type: `read` gives its rows' bytes, one after another, rows in the checkpoint's order.

    For Conv1D weights, which checkpoints store as (I, O), the matrix is that of the linear.
    """

    number: int
    read: Callable[[], bytes | memoryview | np.ndarray]


class FileTensor(NamedTuple):
    """One tensor of the file: shape with inputs last; `read` is called once and gives all its bytes."""

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return prod(self.shape[:-1]) * self.ggml_type.row_bytes(self.shape[-1])


class Layout:
    """Lays out the tensors of a model.

    Args:
        checkpoint: The source model: names(), shape(), read(), config.
        config: The transformers config of the model.
        float_type: A key of FLOAT_TYPES, for matrices that are not encoded.

    Raises:
        InputError: llama.cpp has no such model, or the float type is none.
    """

    def __init__(self, checkpoint, config, float_type: str):
        if float_type not in FLOAT_TYPES:
            raise InputError(f"float type {float_type!r} is not one of {', '.join(FLOAT_TYPES)}")
        self._checkpoint, self._config, self._float_type = checkpoint, config, float_type
        self._architecture = architecture_of(config)
        self._names = TensorNames(self._architecture, config.num_hidden_layers)
        self._transposed = family_of(checkpoint.config).transposed

    def tensors(self, encoded: Mapping[str, EncodedTensor]) -> Iterator[FileTensor]:
        """Every tensor of the file, in the checkpoint's order.

        Args:
            encoded: By Hugging Face tensor name; may hold lm_head.weight where the embedding is the head.

        Raises:
            InputError: A tensor that llama.cpp has no name for, or rows that do not fill whole blocks.
        """
        for name, values in rope_tensors(self._config).items():
            yield FileTensor(name, BY_NAME["F32"], values.shape, lambda v=values: v)
        names = self._stored(encoded)
        assert encoded.keys() <= set(names), f"not in the source checkpoint: {sorted(encoded.keys() - set(names))[:3]}"
        for name in names:
            yield self._encoded(name, encoded[name]) if name in encoded else self._floats(name)

    def _stored(self, encoded) -> list[str]:
        names = [name for name in self._checkpoint.names() if not name.endswith(NOT_STORED)]
        if not self._config.tie_word_embeddings:
            return names
        if HEAD in encoded and not self._architecture.separate_head:
            raise InputError(f"{HEAD}: llama.cpp's {self._architecture.name} computes with the embedding as its head")
        return [name for name in names if name not in HEADS] + [HEAD] * (HEAD in encoded)

    def _shape(self, name) -> tuple[int, ...]:
        """With outputs first, as in the file."""
        if name == HEAD and self._config.tie_word_embeddings:
            return self._config.vocab_size, self._config.hidden_size
        shape = self._checkpoint.shape(name)
        return shape[::-1] if self._flips(name, shape) else shape

    def _flips(self, name, shape) -> bool:
        return self._transposed and len(shape) == 2 and self._names[name].startswith("blk.")

    def _order(self, name, rows) -> np.ndarray | None:
        heads = self._config.num_attention_heads
        kv_heads = getattr(self._config, "num_key_value_heads", None) or heads
        return row_order(self._architecture, self._names[name], heads, kv_heads, rows)

    def _encoded(self, name, tensor) -> FileTensor:
        ggml_type, shape = TYPES[tensor.number], self._shape(name)
        if shape[-1] % ggml_type.block:
            raise InputError(f"{name} has {shape[-1]} inputs; {ggml_type.name} wants a multiple of {ggml_type.block}")

        def read():
            content = np.frombuffer(tensor.read(), np.uint8)
            order = self._order(name, shape[0])
            return content if order is None else content.reshape(shape[0], -1)[order]

        return FileTensor(self._names[name], ggml_type, shape, read)

    def _floats(self, name) -> FileTensor:
        target, shape = self._names[name], self._shape(name)
        ggml_type = BY_NAME["F32" if stays_float32(target, len(shape)) else self._float_type]

        def read():
            values = self._checkpoint.read([name])[name]
            values = values.T if self._flips(name, values.shape) else values
            order = self._order(name, shape[0])
            values = values if order is None else values[torch.from_numpy(order)]
            if self._architecture.norm_offset and is_norm(target):
                values = values.float() + self._architecture.norm_offset
            stored = values.to(FLOAT_TYPES[ggml_type.name])
            if ggml_type.name == "F16" and not all(map(isfinite, stored.aminmax())):
                raise InputError(f"{name} holds values that F16 cannot; use BF16 or F32")
            return np.frombuffer(tensor_bytes(stored), np.uint8)

        return FileTensor(target, ggml_type, shape, read)
