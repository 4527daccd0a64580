"""Reading an artefact back as plain weights, so that what is measured is the file."""

from collections.abc import Iterable
from pathlib import Path

import torch

from calibration.errors import InputError
from ptq.checkpoint import Checkpoint, open_checkpoint
from ptq.export.gptq_tensors import CHECKPOINT_FORMATS, from_gptq
from ptq.families import family_of
from ptq.qtensor import QuantizedTensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqCheckpoint:
    """A GPTQ folder seen as the full-precision checkpoint it stands for: same interface, weights dequantized on read.

    Args:
        packed: The opened folder.

    Raises:
        InputError: The quantization is not a GPTQ one that this program reads.
    """

    def __init__(self, packed: Checkpoint):
        self.packed, self.folder = packed, packed.folder
        self.config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
        settings = packed.quantization_config
        self._transposed = family_of(self.config).transposed
        if settings.get("quant_method") != "gptq":
            raise InputError(f"{self.folder}: quant_method {settings.get('quant_method')!r} is not read here, only 'gptq'")
        self.bits, self.group_size = settings.get("bits"), settings.get("group_size")
        self.checkpoint_format = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if self.bits not in (2, 3, 4, 8) or not isinstance(self.group_size, int):
            raise InputError(f"{self.folder}: bits {self.bits!r}, group_size {self.group_size!r} are no GPTQ layout")
        if self.checkpoint_format not in CHECKPOINT_FORMATS:
            raise InputError(f"{self.folder}: checkpoint_format {self.checkpoint_format!r} is not read here")
        self.linears = [name.removesuffix(".qweight") for name in packed.names() if name.endswith(".qweight")]

    def names(self) -> list[str]:
        """Tensor names as in the full-precision checkpoint."""
        packed = {f"{linear}.{part}" for linear in self.linears for part in PARTS}
        kept = [name for name in self.packed.names() if name not in packed]
        return kept + [f"{linear}.weight" for linear in self.linears]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name; the packed ones as fp32."""
        return {name: self._read(name) for name in names}

    def quantized(self, linear: str) -> QuantizedTensor:
        """A packed linear."""
        stored = set(self.packed.names())
        parts = self.packed.read([f"{linear}.{part}" for part in PARTS if f"{linear}.{part}" in stored])
        parts = {name.removeprefix(f"{linear}."): tensor for name, tensor in parts.items()}
        missing = set(PARTS[:3]) - set(parts)
        if missing:
            raise InputError(f"{self.folder}: {linear} lacks {', '.join(sorted(missing))}")
        if "g_idx" not in parts:
            inputs = parts["qweight"].shape[0] * 32 // self.bits
            parts["g_idx"] = (torch.arange(inputs) // (inputs if self.group_size == -1 else self.group_size)).int()
        try:
            return from_gptq(parts, self.bits, self.group_size, self.checkpoint_format)
        except InputError as error:
            raise InputError(f"{self.folder}: {linear}: {error}") from None

    def _read(self, name):
        linear = name.removesuffix(".weight")
        if name in self.packed.names() or linear not in self.linears:
            return self.packed.read([name])[name]
        values = self.quantized(linear).dequantize()
        return values.T.contiguous() if self._transposed else values


def open_weights(path: str | Path, *, trust_remote_code: bool = False) -> Checkpoint | GptqCheckpoint:
    """Opens a model folder, quantized or not, as plain weights.

    Raises:
        InputError: As open_checkpoint, or the quantization is of a kind that is not read.
    """
    checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
    return GptqCheckpoint(checkpoint) if checkpoint.quantization_config else checkpoint
