"""A GPTQ checkpoint folder: packed linears, other tensors as they were (or as the method left them), and companions.

The companions are the files beside the weights that make the folder loadable.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from calibration.errors import InputError
from ptq.export.gptq_tensors import packed_bits
from ptq.export.shards import Entry, write_checkpoint

MAX_SHARD_BYTES = 4_000_000_000
# GPTQModel opens an asymmetric v1 file only if it names a GPTQModel from 0.9.0 on, whose zero points follow this rule
# word by word; ours do too, since no stored zero point borrows from its neighbour (gptq_tensors.py).
QUANTIZERS = ["ptq:0.1.0", "gptqmodel:0.9.0"]
FILE_BITS = (2, 3, 4, 8)
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")
NOT_COPIED = (*WEIGHT_FILES, ".index.json", ".py", ".md")


def check_bits(bits: float):
    """Refuses a width that the format has no words for.

    Raises:
        InputError: Naming the widths it has.
    """
    if packed_bits(bits) not in FILE_BITS:
        raise InputError(f"bits {bits}: GPTQ files hold weights of 2, 3, 4 or 8 bits, and of 1 or 1.58 in 2-bit words")


def check_packable(name: str, outputs: int, inputs: int):
    """Refuses a linear that the format's 32-bit words cannot hold.

    Raises:
        InputError: Naming the linear and the rule.
    """
    for length, what in ((outputs, "outputs"), (inputs, "inputs")):
        if length % 32:
            raise InputError(f"{name} has {length} {what}, and GPTQ files pack 32 at a time")


def write_gptq(
    folder: Path, checkpoint, spec, packed: Iterable[tuple[str, str, tuple]], read: Callable[[str], torch.Tensor]
):
    """Writes the checkpoint into an empty folder, in bounded memory.

    Args:
        folder: Existing and empty.
        checkpoint: The source model: names(), dtype(), shape(), raw(), config, folder.
        spec: QuantSpec.
        packed: (name, dtype, shape) of every packed tensor, in the order of the linears; a tensor of the checkpoint's
            own name takes its place.
        read: Name of a packed tensor to its bytes.
    """
    plain, changed, by_linear = checkpoint.names(), {}, {}
    for name, dtype, shape in packed:
        entry = Entry(name, dtype, shape, lambda n=name: read(n))
        if name in plain:
            changed[name] = entry
        else:
            by_linear.setdefault(name.rpartition(".")[0], []).append(entry)
    entries = []
    for key in plain:
        linear, _, leaf = key.rpartition(".")
        if leaf == "weight" and linear in by_linear:
            entries += by_linear.pop(linear)
        elif key in changed:
            entries.append(changed[key])
        else:
            entries.append(Entry(key, checkpoint.dtype(key), checkpoint.shape(key), lambda k=key: checkpoint.raw(k)))
    assert not by_linear, f"not in the source checkpoint: {list(by_linear)[:3]}"
    write_checkpoint(folder, entries, MAX_SHARD_BYTES)
    _copy_companions(checkpoint.folder, folder)
    packed_config = quantization_config(spec)
    _write_json(folder / "config.json", {**checkpoint.config, "quantization_config": packed_config})
    _write_json(folder / "quantize_config.json", packed_config)


def quantization_config(spec) -> dict:
    """What loaders of GPTQ files read, in AutoGPTQ's and GPTQModel's words."""
    return {
        "quant_method": "gptq",
        "bits": packed_bits(spec.bits),
        "group_size": spec.group_size,
        "desc_act": spec.desc_act,
        "sym": spec.sym and spec.bits != 1,  # a one-bit grid sits in two-bit words around zero 1, not the middle 2
        "static_groups": spec.column_order == "activation" and not spec.desc_act,
        "true_sequential": True,
        "damp_percent": spec.damp_percent,
        "lm_head": False,
        "checkpoint_format": spec.checkpoint_format,
        "format": spec.checkpoint_format,
        "pack_dtype": "int32",
        "meta": {"quantizer": QUANTIZERS},
    }


def _copy_companions(source: Path, folder: Path):
    """Tokenizer, generation config and whatever else is no weight, index, code, card or hidden file."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(NOT_COPIED):
            shutil.copyfile(path, folder / path.name)


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")
