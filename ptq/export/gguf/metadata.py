"""A transformers config in llama.cpp's words: numbers of the architecture, rotary positions, sliding windows.

What llama.cpp does not compute as the model does is refused; a file must never stand for another model.
"""

import math

import numpy as np
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from calibration.errors import InputError
from ptq.families.gguf import BY_MODEL_TYPE, GgufArchitecture

Value = int | float | bool | str | list
WINDOW_PATTERN = "attention.sliding_window_pattern"


def architecture_of(config) -> GgufArchitecture:
    """llama.cpp's architecture for a transformers config.

    Raises:
        InputError: It has none for this model_type.
    """
    if config.model_type not in BY_MODEL_TYPE:
        known = ", ".join(sorted(BY_MODEL_TYPE))
        raise InputError(f"model_type {config.model_type!r} cannot be written as GGUF; those that can: {known}")
    return BY_MODEL_TYPE[config.model_type]


def to_metadata(config) -> dict[str, Value]:
    """Keys and values, "<architecture>." included, that tell llama.cpp what the config says.

    Raises:
        InputError: llama.cpp has no such model.
    """
    architecture = architecture_of(config)
    _check_agrees(architecture, config)
    values = {key.key: _value(architecture, key, config) for key in architecture.keys}
    values["vocab_size"] = config.vocab_size
    if architecture.window_period:
        values[WINDOW_PATTERN] = [kind == "sliding_attention" for kind in config.layer_types]
    if architecture.unwindowed and getattr(config, "sliding_window", None):  # up to there it is the whole context
        values["context_length"] = min(config.sliding_window, config.max_position_embeddings)
    if architecture.rope:
        values |= _rope_values(architecture, config)
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def rope_tensors(config) -> dict[str, np.ndarray]:
    """What scales each rotary frequency, float32 (rotary width / 2,), by the tensor's name; empty for most models."""
    if not architecture_of(config).rope:
        return {}
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        width = 2 * len(scaled)
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float32) / width)
        return {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{k}.weight": np.asarray(rope[f"{k}_factor"], np.float32) for k in ("long", "short")}
    return {}


def rope_parameters(config) -> dict:
    """The rotary parameters of the blocks with full attention."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def head_width(config) -> int:
    """Columns of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_scale_width(architecture: GgufArchitecture, blocks: int, hidden: int, heads: int, width: int) -> int:
    """Gemma's query_pre_attn_scalar as llama.cpp derives it."""
    return hidden // heads if blocks == architecture.wide_scale_blocks else width


def yarn_attention(factor: float) -> float:
    """What YaRN multiplies cosines and sines with unless told otherwise (arXiv 2309.00071, equation 22)."""
    return 1.0 + 0.1 * math.log(factor)


def _value(architecture, key, config) -> Value:
    value = getattr(config, key.name, None)
    if value is None and key.name in _DERIVED:
        value = _DERIVED[key.name](config)
    value = key.unset if value is None else value
    if value is None:
        raise _refusal(architecture, key.name, None, "a number there")
    return key.kind(value)


_DERIVED = {
    "head_dim": head_width,
    "n_inner": lambda config: 4 * config.n_embd,
    "num_key_value_heads": lambda config: config.num_attention_heads,
}


def _check_agrees(architecture, config):
    for name, value in architecture.fixed:
        if (found := getattr(config, name, value)) != value:
            raise _refusal(architecture, name, found, repr(value))
    activation = getattr(config, architecture.activation)
    if activation not in architecture.activations:
        raise _refusal(architecture, architecture.activation, activation, " or ".join(architecture.activations))
    plain = config.hidden_size // config.num_attention_heads
    if all(key.name != "head_dim" for key in architecture.keys) and head_width(config) != plain:
        raise _refusal(architecture, "head_dim", head_width(config), plain)
    if architecture.unturned_period:
        turned = [int((i + 1) % architecture.unturned_period != 0) for i in range(config.num_hidden_layers)]
        if config.no_rope_layers != turned:
            raise _refusal(architecture, "no_rope_layers", config.no_rope_layers, turned)
    if architecture.window_period:
        sizes = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, head_width(config)
        width = attention_scale_width(architecture, *sizes)
        if config.query_pre_attn_scalar != width:
            raise _refusal(architecture, "query_pre_attn_scalar", config.query_pre_attn_scalar, width)


def _refusal(architecture, name, found, rule):
    return InputError(f"config.json: {name} is {found!r}; llama.cpp's {architecture.name} computes with {rule}")


def _rope_values(architecture, config) -> dict[str, Value]:
    rope = rope_parameters(config)
    values = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_width(config) * rope.get("partial_rotary_factor", 1.0)),
    }
    if "sliding_attention" in config.rope_parameters:
        values["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    kind = rope["rope_type"]
    if kind not in _SCALINGS:
        raise _refusal(architecture, "rope_type", kind, " or ".join(_SCALINGS))
    return values | _SCALINGS[kind](architecture, config, rope)


def _unscaled(architecture, config, rope):
    return {}


def _linear(architecture, config, rope):
    return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}


def _yarn(architecture, config, rope):
    for name, value in _YARN_FIXED.items():
        if (found := rope.get(name)) not in (None, value):
            raise _refusal(architecture, f"rope_parameters.{name}", found, value)
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    factor = rope.get("factor") or config.max_position_embeddings / rope["original_max_position_embeddings"]
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(factor),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.attn_factor": float(attention / yarn_attention(factor)),
    }


def _longrope(architecture, config, rope):
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.attn_factor": float(attention),
    }


_YARN_FIXED = {"truncate": True, "beta_fast": 32, "beta_slow": 1}
_SCALINGS = {"default": _unscaled, "llama3": _unscaled, "linear": _linear, "yarn": _yarn, "longrope": _longrope}
