"""A GGUF file seen as the full-precision checkpoint it stands for: one tensor is decoded at a time, when it is read."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.errors import InputError
from ptq.export.gguf.layout import HEAD
from ptq.export.gguf.tensors import TensorNames, is_norm, row_order
from ptq.export.gguf.types import dequantize
from ptq.families import family_of
from ptq.gguf.config import read_architecture, read_config
from ptq.gguf.file import GgufFile

CHUNK_WEIGHTS = 1 << 24  # decoded at once: numpy's intermediate arrays are several times as large


class GgufCheckpoint:
    """Same interface as a full-precision Checkpoint, weights dequantized on read.

    Args:
        path: The file.

    Attributes:
        config: What config.json would say.
        folder: The file's path; named in messages.

    Raises:
        InputError: The file is damaged, or its model is none that is read here.
    """

    def __init__(self, path: str | Path):
        self.file, self.folder = GgufFile(path), Path(path)
        self._architecture = read_architecture(self.file)
        self.config = read_config(self.file)
        self._transposed = family_of(self.config).transposed
        names = TensorNames(self._architecture, self.file.metadata[f"{self._architecture.name}.block_count"])
        self._stored = {name: names[name] for name in self._parameters()}
        self._stored = {name: stored for name, stored in self._stored.items() if stored in self.file.tensors}

    def model_config(self, *, trust_remote_code: bool = False):
        """The transformers config; it needs no code but transformers' own."""
        return AutoConfig.for_model(**self.config)

    def names(self) -> list[str]:
        """Tensor names as in the full-precision checkpoint."""
        return list(self._stored)

    def stored_name(self, name: str) -> str:
        """What the file calls a tensor."""
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the full-precision checkpoint."""
        shape = self.file.tensors[self._stored[name]].shape
        return shape[::-1] if self._flips(name) else shape

    def dtype(self, name: str) -> str:
        """Safetensors' word for the dtype in which a tensor is read."""
        return "F32"

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name, as fp32."""
        return {name: self._read(name) for name in names}

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's numbers in order, flat, in one piece."""
        yield self._read(name).flatten()

    def _read(self, name) -> torch.Tensor:
        stored = self._stored[name]
        values = self._decoded(stored)
        order = self._order(stored, values.shape[0])
        if order is not None:
            restored = torch.empty_like(values)
            restored[torch.from_numpy(order)] = values
            values = restored
        if self._architecture.norm_offset and is_norm(stored):
            values -= self._architecture.norm_offset
        return values.T.contiguous() if self._flips(name) else values

    def _decoded(self, stored) -> torch.Tensor:
        tensor = self.file.tensors[stored]
        values = np.empty((int(np.prod(tensor.shape[:-1])), tensor.shape[-1]), np.float32)
        step = max(1, CHUNK_WEIGHTS // tensor.shape[-1])
        for first in range(0, len(values), step):
            part = slice(first, first + step)
            values[part] = dequantize(self.file.rows(stored, part), tensor.ggml_type.number)
        return torch.from_numpy(values).view(tensor.shape)

    def _order(self, stored, rows) -> np.ndarray | None:
        heads = self.config.get("num_attention_heads") or self.config["n_head"]
        return row_order(self._architecture, stored, heads, self.config.get("num_key_value_heads") or heads, rows)

    def _flips(self, name) -> bool:
        stored = self._stored[name]
        return self._transposed and stored.startswith("blk.") and len(self.file.tensors[stored].shape) == 2

    def _parameters(self) -> list[str]:
        """Names in Hugging Face's model, without a head that is the embedding."""
        try:
            with init_empty_weights():
                model = AutoModelForCausalLM.from_config(self.model_config())
        except Exception as error:  # a wrong value surfaces as whatever it breaks inside transformers
            kind, cause = self.config["model_type"], " ".join(str(error).split())
            raise InputError(f"{self.folder}: its metadata make no {kind} model ({cause})") from error
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        return [name for name in names if name != HEAD or not self.config["tie_word_embeddings"]]
