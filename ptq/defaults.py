"""What a run uses where it is not told: device, dtype, memory, length of windows."""

import os

import torch

from calibration.errors import InputError
from calibration.processor import has_bf16_units

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """A device by name; "auto" takes the first GPU if there is one.

    Raises:
        InputError: The name is none, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(name: str, device: torch.device, config: dict) -> torch.dtype:
    """The dtype to compute in.

    Raises:
        InputError: The name is none.
    """
    if name == "auto":
        stored = config.get("dtype") or config.get("torch_dtype")
        return DTYPES.get(stored, torch.float32) if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def choose_products(name: str, device: torch.device) -> bool:
    """Whether a walk multiplies in bf16 what it computes in fp32: where neither is asked for and there are units."""
    return name == "auto" and device.type == "cpu" and has_bf16_units()


def default_budget() -> int:
    """Bytes of activations to keep in memory unless told otherwise: two fifths of what the machine has."""
    return int(0.4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def whole_model_room(device: torch.device) -> int:
    """Bytes that a model may take which one step wants whole: that much of memory, or four fifths of a GPU's."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.get_device_properties(device).total_memory)
    return default_budget()


def context_length(config) -> int | None:
    """Positions the model was made for, if its config says so."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def window_length(config, seqlen: int | None) -> int:
    """The seqlen asked for, or the model's context up to 2048.

    Raises:
        InputError: It is longer than the context.
    """
    context = context_length(config)
    if seqlen is None:
        return min(2048, context or 2048)
    if context is not None and seqlen > context:
        raise InputError(f"seqlen {seqlen} is longer than the model's context of {context} positions")
    return seqlen
