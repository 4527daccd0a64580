"""Reading an artefact back as plain weights, so that what is measured is the file."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calibration.errors import InputError
from ptq.checkpoint import Checkpoint, open_checkpoint
from ptq.export.gptq import FILE_BITS
from ptq.export.gptq_tensors import CHECKPOINT_FORMATS, from_gptq
from ptq.families import family_of
from ptq.gguf.tokenizer import read_tokenizer
from ptq.gguf.weights import GgufCheckpoint
from ptq.qtensor import QuantizedTensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqCheckpoint:
    """A GPTQ folder seen as the full-precision checkpoint it stands for: same interface, weights dequantized on read.

    Args:
        packed: The opened folder.

    Raises:
        InputError: The quantization is not a GPTQ one that this program reads, or a linear's tensors do not fit.
    """

    def __init__(self, packed: Checkpoint):
        self.packed, self.folder = packed, packed.folder
        self.config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
        settings = packed.quantization_config
        self._transposed = family_of(self.config).transposed
        method = settings.get("quant_method")
        if method != "gptq":
            raise InputError(f"{self.folder}: quant_method {method!r} is not read here, only 'gptq'")
        self.bits, self.group_size = settings.get("bits"), settings.get("group_size")
        self.checkpoint_format = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        group_fits = type(self.group_size) is int and (self.group_size == -1 or self.group_size > 0)
        if self.bits not in FILE_BITS or not group_fits:
            raise InputError(f"{self.folder}: bits {self.bits!r}, group_size {self.group_size!r} are no GPTQ layout")
        if self.checkpoint_format not in CHECKPOINT_FORMATS:
            raise InputError(f"{self.folder}: checkpoint_format {self.checkpoint_format!r} is not read here")
        stored = packed.names()
        self.linears = {name.removesuffix(".qweight"): None for name in stored if name.endswith(".qweight")}
        self.linears = {linear: self._layout(linear, set(stored)) for linear in self.linears}
        parts = {f"{linear}.{part}" for linear in self.linears for part in PARTS}
        self._kept = dict.fromkeys(name for name in stored if name not in parts)

    def model_config(self, *, trust_remote_code: bool = False):
        """The transformers config of the folder."""
        return self.packed.model_config(trust_remote_code=trust_remote_code)

    def names(self) -> list[str]:
        """Tensor names as in the full-precision checkpoint."""
        return [*self._kept, *(f"{linear}.weight" for linear in self.linears)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the full-precision checkpoint."""
        if name in self._kept:
            return self.packed.shape(name)
        shape = self.linears[name.removesuffix(".weight")]
        return shape[::-1] if self._transposed else shape

    def dtype(self, name: str) -> str:
        """Safetensors' word for the dtype in which a tensor is read."""
        return self.packed.dtype(name) if name in self._kept else "F32"

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name; the packed ones as fp32."""
        return {name: self._read(name) for name in names}

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's numbers in order, flat; a packed one in one piece."""
        return self.packed.pieces(name) if name in self._kept else iter([self._read(name).flatten()])

    def quantized(self, linear: str) -> QuantizedTensor:
        """A packed linear."""
        inputs = self.linears[linear][1]
        stored = [f"{linear}.{part}" for part in PARTS if part != "g_idx" or f"{linear}.g_idx" in self.packed.tensors]
        parts = {name.rpartition(".")[2]: tensor for name, tensor in self.packed.read(stored).items()}
        parts.setdefault("g_idx", torch.arange(inputs, dtype=torch.int32) // self._columns_per_group(inputs))
        if not bool(torch.isfinite(parts["scales"]).all()):
            raise InputError(f"{self.folder}: {linear}.scales holds NaN or infinity: the file is damaged")
        try:
            return from_gptq(parts, self.bits, self.group_size, self.checkpoint_format)
        except InputError as error:
            raise InputError(f"{self.folder}: {linear}: {error}") from None

    def _columns_per_group(self, inputs):
        return inputs if self.group_size == -1 else self.group_size

    def _layout(self, linear, stored) -> tuple[int, int]:
        """(O, I) of a linear, from the shapes of its tensors, which must agree."""
        missing = [part for part in PARTS[:3] if f"{linear}.{part}" not in stored]
        if missing:
            raise InputError(f"{self.folder}: {linear} lacks {', '.join(missing)}")
        words, outputs = (*self.packed.shape(f"{linear}.qweight"), 0, 0)[:2]
        inputs = words * 32 // self.bits
        groups = -(-inputs // self._columns_per_group(max(inputs, 1)))
        expected = {
            "qweight": ("I32", (inputs * self.bits // 32, outputs)),
            "qzeros": ("I32", (groups, outputs * self.bits // 32)),
            "scales": (self.packed.dtype(f"{linear}.scales"), (groups, outputs)),
            "g_idx": ("I32", (inputs,)),
        }
        for part, rule in expected.items():
            name = f"{linear}.{part}"
            found = (self.packed.dtype(name), self.packed.shape(name)) if name in stored else rule
            if found != rule:
                raise InputError(
                    f"{self.folder}: {name} is {found[0]} {list(found[1])}; bits {self.bits} and group_size"
                    f" {self.group_size} ask for {rule[0]} {list(rule[1])}"
                )
        return outputs, inputs

    def _read(self, name):
        if name in self._kept:
            return self.packed.read([name])[name]
        values = self.quantized(name.removesuffix(".weight")).dequantize()
        return values.T.contiguous() if self._transposed else values


Weights = Checkpoint | GptqCheckpoint | GgufCheckpoint


def open_weights(path: str | Path, *, trust_remote_code: bool = False) -> Weights:
    """Opens a model folder, quantized or not, or a GGUF file, as plain weights.

    Raises:
        InputError: As open_checkpoint, the quantization is of a kind that is not read, or the file is damaged.
    """
    if Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir():
        return GgufCheckpoint(path)
    checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
    return checkpoint if checkpoint.quantization_config is None else GptqCheckpoint(checkpoint)


def open_tokenizer(weights: Weights, *, trust_remote_code: bool = False):
    """The tokenizer of an artefact, or None if it has none that loads."""
    if isinstance(weights, GgufCheckpoint):
        return read_tokenizer(weights.file)
    return load_tokenizer(Path(weights.folder), trust_remote_code)


def load_tokenizer(folder: Path, trust_remote_code: bool = False):
    """The folder's tokenizer, or None if it has none that loads.

    A tokenizer.json is taken as it stands. Some classes of transformers 5 make its steps anew by the name in
    tokenizer_config.json: StarCoder's loses the cut at digits, Llama 2's the space before a text that begins with one.
    """
    as_it_stands = (folder / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if as_it_stands else AutoTokenizer
    try:
        return loader.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception:  # transformers raises whatever its many tokenizers do; who needs one says so
        return None
