"""The transformers config that a GGUF file's metadata stands for.

Numbers are compared with the tensors before a model is built from them: no length may exceed the longest tensor, and
every block must be there. So what is built is never larger than the file.
"""

import math

import numpy as np

from calibration.errors import InputError
from ptq.export.gguf.metadata import WINDOW_PATTERN, attention_scale_width, yarn_attention
from ptq.families.gguf import BY_NAME, GgufArchitecture
from ptq.gguf.file import GgufFile

MAX_CONTEXT = 1 << 31
ORIGINAL = "original_max_position_embeddings"


def read_architecture(file: GgufFile) -> GgufArchitecture:
    """The architecture a file names.

    Raises:
        InputError: It is none that is read here.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in BY_NAME:
        raise InputError(f"{file.path}: architecture {name!r} is not read here, only {', '.join(BY_NAME)}")
    return BY_NAME[name]


def read_config(file: GgufFile) -> dict:
    """config.json as a dict, "model_type" included.

    Raises:
        InputError: A key is missing, of another type than it should be, or at odds with the tensors.
    """
    return _Reader(file).config()


class _Reader:
    def __init__(self, file: GgufFile):
        self._file, self._architecture = file, read_architecture(file)
        self._longest = max((max(tensor.shape) for tensor in file.tensors.values()), default=0)

    def config(self) -> dict:
        """What transformers' config is made from; InputError where metadata and tensors disagree."""
        architecture, tensors = self._architecture, self._file.tensors
        values = {key.name: self._read(key) for key in architecture.keys}
        blocks = self._number("block_count")
        missing = [i for i in range(min(blocks, len(tensors) + 1)) if f"blk.{i}.ffn_down.weight" not in tensors]
        if missing:
            raise self._refuse(f"block_count is {blocks}, but block {missing[0]} is not there")
        values["vocab_size"] = self._shape("token_embd.weight")[0]
        values["tie_word_embeddings"] = "output.weight" not in tensors
        values |= {name: f"blk.0.{tensor}" in tensors for name, tensor in architecture.biases}
        values |= {name: value for name, value in architecture.fixed if value is not None}
        self._check_heads(values)
        if architecture.rope:
            values |= self._rope(values)
        else:
            self._check_positions()
        if architecture.window_period:
            values |= self._windows(blocks, values)
        specials = {name: self._special(name) for name in ("bos", "eos", "pad")}
        return {"model_type": architecture.model_type} | values | {f"{n}_token_id": i for n, i in specials.items()}

    def _refuse(self, why) -> InputError:
        return InputError(f"{self._file.path}: {why}")

    def _value(self, key, default=None):
        return self._file.metadata.get(f"{self._architecture.name}.{key}", default)

    def _read(self, key):
        name = f"{self._architecture.name}.{key.key}"
        value = self._file.metadata.get(name, self._default(key))
        if key.kind is bool and type(value) is bool:
            return value
        if type(value) in (int, float) and value == key.unset:
            return None
        limit = self._longest if key.shapes and key.kind is int else MAX_CONTEXT
        return self._checked(name, value, key.kind, limit)

    def _default(self, key):
        """What llama.cpp takes where a key is absent."""
        if key.key == "attention.head_count_kv":
            return self._value("attention.head_count")
        if key.key in ("attention.key_length", "attention.value_length"):
            return self._number("embedding_length") // self._number("attention.head_count")
        return key.default

    def _checked(self, name, value, kind, limit):
        if type(value) not in (kind, int) or not math.isfinite(value) or not 0 < value <= limit:
            raise self._refuse(f"{name} is {value!r}; a number above 0 and at most {limit} is wanted")
        return kind(value)

    def _number(self, key, kind=int, default=None, limit=None):
        name = f"{self._architecture.name}.{key}"
        return self._checked(name, self._value(key, default), kind, self._longest if limit is None else limit)

    def _shape(self, name):
        if name not in self._file.tensors:
            raise self._refuse(f"it has no tensor {name}")
        return self._file.tensors[name].shape

    def _special(self, name) -> int | None:
        key = {"pad": "padding"}.get(name, name)
        value = self._file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if type(value) is int and 0 <= value < self._shape("token_embd.weight")[0] else None

    def _check_heads(self, values):
        embedding, heads = self._number("embedding_length"), self._number("attention.head_count")
        kv_heads = self._number("attention.head_count_kv", default=heads)
        if heads % kv_heads or ("head_dim" not in values and embedding % heads):
            raise self._refuse(f"{heads} heads do not go with {kv_heads} key-value heads and a width of {embedding}")

    def _check_positions(self):
        rows, context = self._shape("position_embd.weight")[0], self._number("context_length")
        if rows != context:
            raise self._refuse(f"context_length is {context}, but position_embd.weight has {rows} rows")

    def _windows(self, blocks, values) -> dict:
        architecture = self._architecture
        pattern = self._value(WINDOW_PATTERN, architecture.window_period)
        if type(pattern) is int and 0 < pattern:
            slides = [(i + 1) % pattern != 0 for i in range(blocks)]
        elif isinstance(pattern, np.ndarray) and len(pattern) == blocks:
            slides = pattern.astype(bool).tolist()
        else:
            raise self._refuse(f"{WINDOW_PATTERN} must be a period, or say it of each of {blocks} blocks")
        sizes = values["hidden_size"], values["num_attention_heads"], values["head_dim"]
        return {
            "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
            "query_pre_attn_scalar": attention_scale_width(architecture, blocks, *sizes),
        }

    def _rope(self, values) -> dict:
        width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        turned = self._number("rope.dimension_count", default=width)
        if turned % 2 or turned > width:
            raise self._refuse(f"rope.dimension_count is {turned}; an even number up to a head's {width} is wanted")
        theta = self._number("rope.freq_base", float, 10000.0, limit=math.inf)
        rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": _fraction(turned, width)}
        rope |= self._scaling(turned, values["max_position_embeddings"])
        if self._architecture.name == "phi3" and ORIGINAL in rope:  # where its config class looks
            return {"rope_parameters": rope, ORIGINAL: rope[ORIGINAL]}
        if self._architecture.name == "gemma3":
            local = self._number("rope.freq_base_swa", float, 10000.0, limit=math.inf)
            rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
        return {"rope_parameters": rope}

    def _scaling(self, turned, context) -> dict:
        kind = self._value("rope.scaling.type", "none" if self._value("rope.scaling.factor") is None else "linear")
        if not isinstance(kind, str):
            raise self._refuse("rope.scaling.type is no text")
        factor = self._number("rope.scaling.factor", float, 1.0, limit=math.inf)
        if kind != "yarn" and "rope_freqs.weight" in self._file.tensors:
            factors = [factor * each for each in self._factors("rope_freqs.weight", turned)]
            return self._factored(factors, factors, 1.0, context)
        if kind != "yarn" and "rope_factors_long.weight" in self._file.tensors:  # Phi-3's files may lack the type
            attention = self._number("rope.scaling.attn_factor", float, 1.0, limit=math.inf)
            pair = [self._factors(f"rope_factors_{length}.weight", turned) for length in ("long", "short")]
            return self._factored(*pair, attention, self._original_context(context))
        if kind in ("none", "longrope"):
            return {}
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
        if kind == "yarn":
            attention = self._number("rope.scaling.attn_factor", float, 1.0, limit=math.inf) * yarn_attention(factor)
            scaling = {"rope_type": "yarn", "factor": factor, "attention_factor": attention}
            return scaling | {ORIGINAL: self._original_context(context)}
        raise self._refuse(f"rope.scaling.type {kind!r} is not read here")

    def _factored(self, long, short, attention, original) -> dict:
        """A factor for each frequency; transformers has them under this name for every model."""
        scaling = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        return scaling | {"attention_factor": attention, ORIGINAL: original, "factor": 1.0}

    def _original_context(self, context) -> int:
        return self._number("rope.scaling.original_context_length", default=context, limit=MAX_CONTEXT)

    def _factors(self, name, turned) -> list[float]:
        shape, number = self._shape(name), self._file.tensors[name].ggml_type.name
        factors = self._file.rows(name).view(np.float32).reshape(-1).tolist() if number == "F32" else []
        if shape != (turned // 2,) or not all(math.isfinite(factor) and factor > 0 for factor in factors or [0]):
            raise self._refuse(f"{name} must hold {turned // 2} positive numbers in F32")
        return factors


def _fraction(part: int, whole: int) -> float:
    """The quotient, such that int(whole * fraction), which is what transformers computes, gives part back."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 1.0)
