"""A complete llama.cpp file, written through the gguf package: metadata, tokenizer, then tensor after tensor.

Encoded matrices come as bytes and are written as they are, only whole rows moved; all else is the source checkpoint's,
as F32 where llama.cpp wants that and in `float_type` elsewhere. Never more than one tensor is in memory.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import gguf
import numpy as np

from calibration.errors import InputError
from ptq.export.gguf.layout import EncodedTensor, FileTensor, Layout
from ptq.export.gguf.metadata import Value, architecture_of, to_metadata
from ptq.export.gguf.types import file_type
from ptq.export.gguf.vocabulary import add_vocabulary
from ptq.export.shards import sync_folder

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
PHI3_NAMES = ("phi-3", "phi3")
PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def write_gguf(
    path: Path,
    checkpoint,
    encoded: Mapping[str, EncodedTensor],
    *,
    config,
    tokenizer,
    float_type: str = "F16",
    pre_tokenizer: str | None = None,
    extra: Mapping[str, Value] | None = None,
):
    """Writes a file aside, waits until the disk has it, and gives it its name.

    Args:
        path: The file-to-be.
        checkpoint: The source model: names(), shape(), read(), config, folder.
        encoded: By Hugging Face tensor name; may hold lm_head.weight where the embedding is the head.
        config: The transformers config of the model.
        tokenizer: The transformers tokenizer of the model.
        float_type: "F32", "F16" or "BF16", for matrices that are not encoded.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, where recognising it fails.
        extra: More metadata by full key, such as what the quantization was calibrated with.

    Raises:
        InputError: llama.cpp has no such model or tokenizer, or a weight does not fit its type.
        OSError: The disk is full or the path cannot be written.
    """
    tensors = list(Layout(checkpoint, config, float_type).tensors(encoded))
    writer = _described(checkpoint, tensors, config, tokenizer, pre_tokenizer)
    _add_values(writer, extra or {})
    aside = path.with_name(path.name + ".partial")
    try:
        _write(writer, aside, tensors)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        writer.close()
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def check_writable(checkpoint, *, config, tokenizer, float_type: str = "F16", pre_tokenizer: str | None = None):
    """Refuses, before any work is done, what write_gguf would refuse; arguments as there."""
    tensors = list(Layout(checkpoint, config, float_type).tensors({}))
    _described(checkpoint, tensors, config, tokenizer, pre_tokenizer).close()


def header_bytes(
    checkpoint,
    encoded: Mapping[str, EncodedTensor],
    *,
    config,
    tokenizer,
    float_type: str = "F16",
    pre_tokenizer: str | None = None,
    extra: Mapping[str, Value] | None = None,
) -> int:
    """Bytes before the first tensor of the file that write_gguf would write; arguments as there, nothing is encoded.

    Each tensor after it takes padded(its bytes).
    """
    tensors = list(Layout(checkpoint, config, float_type).tensors(encoded))
    writer = _described(checkpoint, tensors, config, tokenizer, pre_tokenizer)
    _add_values(writer, extra or {})
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "header"
        _write_header(writer, path, tensors)
        writer.close()
        return padded(path.stat().st_size)


def padded(count: int) -> int:
    """Bytes up to the next tensor's place."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def _described(checkpoint, tensors, config, tokenizer, pre_tokenizer) -> gguf.GGUFWriter:
    """A writer that holds all metadata."""
    if tokenizer is None:
        raise InputError(f"{checkpoint.folder}: has no usable tokenizer, and a GGUF file carries its own")
    writer = gguf.GGUFWriter(None, architecture_of(config).name)
    _add_general(writer, Path(checkpoint.folder), tensors)
    _add_values(writer, to_metadata(config))
    add_vocabulary(writer, tokenizer, config, pre_tokenizer=pre_tokenizer)
    _check_name(writer)
    return writer


def _write(writer: gguf.GGUFWriter, path: Path, tensors: Sequence[FileTensor]):
    _write_header(writer, path, tensors)
    for tensor in tensors:
        writer.write_tensor_data(_content(tensor))


def _write_header(writer: gguf.GGUFWriter, path: Path, tensors: Sequence[FileTensor]):
    """All that comes before the first tensor's bytes."""
    for tensor in tensors:
        # Any dtype but uint8 makes the package take shape and type as given, so types it does not know pass too.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.int8), tensor.nbytes, tensor.ggml_type.number)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _content(tensor: FileTensor) -> np.ndarray:
    content = tensor.read()
    if content.nbytes != tensor.nbytes:
        wanted = f"{tensor.ggml_type.name} {list(tensor.shape)} needs {tensor.nbytes}"
        raise InputError(f"{tensor.name}: {content.nbytes} bytes where {wanted}")
    return content


def _add_general(writer: gguf.GGUFWriter, folder: Path, tensors: Sequence[FileTensor]):
    """What the model is called, how large it is, and what most of it is stored as."""
    weights = Counter()
    for tensor in tensors:
        weights[tensor.ggml_type.name] += prod(tensor.shape)
    writer.add_type(gguf.GGUFType.MODEL)
    try:
        metadata = gguf.Metadata.load(None, folder, None, weights.total())
        metadata.name = metadata.name or folder.name
        metadata.size_label = metadata.size_label or gguf.size_label(weights.total(), weights.total(), 0, 0)
        metadata.set_gguf_meta_model(writer)
    except Exception as error:  # the package takes the card's fields for what they should be
        cause = " ".join(str(error).split())
        raise InputError(f"{folder / 'README.md'}: the head of the model card cannot be read ({cause})") from error
    (mostly, _), *_ = weights.most_common()
    if file_type(mostly) is not None:
        writer.add_file_type(file_type(mostly))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _check_name(writer: gguf.GGUFWriter):
    """llama.cpp looks for Phi-3's special tokens by the model's name, and fails to load a file without them."""
    name, tokens = (writer.kv_data[0][key].value for key in (gguf.Keys.General.NAME, gguf.Keys.Tokenizer.LIST))
    if any(word in name.lower() for word in PHI3_NAMES) and not PHI3_TOKENS <= set(tokens):
        wanted = ", ".join(sorted(PHI3_TOKENS))
        raise InputError(f"llama.cpp wants the tokens {wanted} in a model named {name!r}; rename its folder")


def _add_values(writer: gguf.GGUFWriter, values: Mapping[str, Value]):
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in values.items():
        adders[type(value)](key, value)
