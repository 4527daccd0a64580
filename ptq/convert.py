"""Artefacts that exist as llama.cpp files: values are moved, never rounded a second time."""

import argparse
import json
import shlex
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from calibration.errors import InputError
from ptq.export.gguf.bridges import bridge
from ptq.export.gguf.codecs import pack
from ptq.export.gguf.layout import FLOAT_TYPES, EncodedTensor
from ptq.export.gguf.types import BY_NAME
from ptq.export.gguf.writer import check_writable, write_gguf
from ptq.formats.gguf import OUTER_TYPES, outer_tensors
from ptq.ggml import TYPE_OF_BITS, check_type
from ptq.gguf.weights import GgufCheckpoint
from ptq.qtensor import QuantizedTensor
from ptq.reload import GptqCheckpoint, open_tokenizer, open_weights

REPORT = "ptq_report.json"  # says by what command a folder was made
QUANTIZE = ["python", "-m", "ptq.quantize"]
GRID_FLAGS = "--bits", "--group", "--format", "--method", "--effort", "--epochs", "--out"
GRID_SWITCHES = "--sym", "--asym", "--act-order", "--aug-loss", "--no-aug-loss", "--let", "--no-let"


def convert(
    path, out: Path, *, ggml_type: str | None = None, embed_type: str | None = None, pre_tokenizer: str | None = None
) -> Counter:
    """Writes a GGUF file from a folder.

    Args:
        path: GPTQ folder, whose linears keep their values; or full-precision folder.
        out: The file, which must not exist.
        ggml_type: llama.cpp's type of the linears; None for the one that holds a GPTQ folder's values, or F16.
        embed_type: Of token embedding and head; None for F16, or what full precision is written as.
        pre_tokenizer: llama.cpp's name of the tokenizer's first step; None to recognise it.

    Returns:
        How many tensors have which type.

    Raises:
        InputError: The type does not hold the values, or llama.cpp has no such model or tokenizer.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; choose another --out or delete it")
    weights = open_weights(path)
    if isinstance(weights, GgufCheckpoint):
        raise InputError(f"{path}: is a GGUF file already")
    check_type("embed-type", embed_type, OUTER_TYPES)
    is_packed = isinstance(weights, GptqCheckpoint)
    if not is_packed and ggml_type not in (None, *FLOAT_TYPES):
        raise InputError(
            f"--type {ggml_type}: {path} is not quantized; python -m ptq.quantize --model {shlex.quote(str(path))}"
            f" --format gguf --type {ggml_type} solves on that grid; here a full-precision folder becomes"
            f" {', '.join(FLOAT_TYPES)}"
        )
    floats = embed_type if embed_type in FLOAT_TYPES else "F16" if is_packed else ggml_type or "F16"
    config, tokenizer = weights.model_config(), open_tokenizer(weights)
    check_writable(weights, config=config, tokenizer=tokenizer, float_type=floats, pre_tokenizer=pre_tokenizer)
    tensors = _bridged(weights, ggml_type) if is_packed else {}
    tensors |= outer_tensors(weights, embed_type or floats, embed_type or floats)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(
        out, weights, tensors, config=config, tokenizer=tokenizer, float_type=floats, pre_tokenizer=pre_tokenizer
    )
    numbers = {of_type.number: name for name, of_type in BY_NAME.items()}
    return Counter(numbers[tensor.number] for tensor in tensors.values())


def _bridged(weights: GptqCheckpoint, name) -> dict[str, EncodedTensor]:
    """Every linear, unpacked once to see its type and once to be written: one is in memory."""
    tensors = {}
    for linear in weights.linears:
        kind = _bridge(weights, linear, name).grid.name
        tensors[f"{linear}.weight"] = EncodedTensor(BY_NAME[kind].number, partial(_bytes, weights, linear, kind))
    return tensors


def _bytes(weights, linear, kind):
    return pack(_bridge(weights, linear, kind))


def _bridge(weights, linear, name):
    quantized = _as_one_bit(weights.quantized(linear))
    try:
        return bridge(quantized, name, tensor=linear)
    except InputError as error:
        again = TYPE_OF_BITS.get(quantized.bits, "Q4_K")
        advice = f"; to solve again on the nearest grid: {_solve_again(weights.folder, again)}"
        raise InputError(f"{error}{advice}") from None


def _solve_again(folder, ggml_type) -> str:
    """The command that made a folder, as its report has it, with a llama.cpp type for the uniform grid."""
    try:
        words = shlex.split(json.loads((Path(folder) / REPORT).read_bytes())["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        words = []
    kept = ["--model", "ORIGINAL"]  # made by another program, or by a call from Python
    if words[:3] == QUANTIZE:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for flag in GRID_FLAGS:
            parser.add_argument(flag)
        for switch in GRID_SWITCHES:
            parser.add_argument(switch, action="store_true")
        _, kept = parser.parse_known_args(words[3:])
    out = f"{Path(folder).resolve().name}-{ggml_type.lower()}"
    return shlex.join([*QUANTIZE, *kept, "--format", "gguf", "--type", ggml_type, "--out", out])


def _as_one_bit(quantized: QuantizedTensor) -> QuantizedTensor:
    """What the file holds in 2-bit words because there are no 1-bit ones, as the two values it has."""
    two_values = quantized.bits == 2 and bool((quantized.zero == 1).all()) and bool((quantized.codes % 2 == 0).all())
    scale = 2 * quantized.scale
    if not two_values or not bool((scale == scale.half().float()).all()):
        return quantized
    zero = torch.full_like(quantized.zero, 0.5)
    return QuantizedTensor(quantized.codes // 2, scale, zero, quantized.g_idx, 1, quantized.group_size)
