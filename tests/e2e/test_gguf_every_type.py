"""Every type in every family: llama.cpp loads it and computes with the values that the bytes stand for."""

from functools import cache
from itertools import cycle

import numpy as np
import pytest
import torch
from llama_client import open_llama
from test_gguf_families import TOKENS, logits, original, write
from tiny_models import make_tiny

from ptq.checkpoint import open_checkpoint
from ptq.export.gguf.codecs import pack
from ptq.export.gguf.layout import EncodedTensor
from ptq.export.gguf.types import BY_NAME, dequantize
from ptq.families import family_of
from ptq.families.gguf import BY_MODEL_TYPE
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.quantizers.rtn import round_fitted

INPUTS = 256  # so that every type's blocks fill the rows
WIDE = {"hidden_size": INPUTS, "intermediate_size": INPUTS, "head_dim": 64}
GPT = {"n_embd": INPUTS, "n_inner": INPUTS}
DEVIATION = 0.04  # of the weights: activations neither grow nor fade from block to block
TOLERANCE = 3e-2  # llama.cpp rounds activations to 8 bits, a block of 32 or of 256 at a time, before it multiplies


def make_wide(model_type, folder, blocks):
    """A model of which every linear reads 256 inputs."""
    sizes = GPT if model_type in ("gpt2", "gpt_bigcode") else WIDE
    sizes = sizes | ({"query_pre_attn_scalar": 64} if model_type.startswith("gemma") else {})
    return make_tiny(model_type, folder, blocks=blocks, **sizes)


@cache
def fitted_rows(name) -> np.ndarray:
    """Bytes of normal weights, rounded to nearest on fitted blocks."""
    W = DEVIATION * torch.randn(128, INPUTS, generator=torch.Generator().manual_seed(0))
    return pack(round_fitted(W, BLOCK_GRIDS[name]))


def matrix(name, outputs, seed):
    """Fitted rows in random order; their bytes and the values that they stand for."""
    rows = fitted_rows(name)[np.random.default_rng(seed).integers(0, 128, outputs)]
    return rows, torch.from_numpy(dequantize(rows, BY_NAME[name].number).copy())


def encode(source, names):
    """Each matrix in the next of the types; and their values by the model's names."""
    encoded, values, names = {}, {}, cycle(names)
    checkpoint = open_checkpoint(source)
    transposed = family_of(checkpoint.config).transposed
    for seed, tensor in enumerate(checkpoint.names()):
        shape = checkpoint.shape(tensor)
        if len(shape) != 2 or "wpe" in tensor:
            continue
        flips = transposed and "wte" not in tensor
        kind = next(names)
        rows, decoded = matrix(kind, shape[1] if flips else shape[0], seed)
        encoded[tensor] = EncodedTensor(BY_NAME[kind].number, rows.tobytes)
        values[tensor.replace("embed_out", "lm_head")] = decoded.T if flips else decoded
    return encoded, values


def deviation(path, source, names) -> float:
    """Of llama.cpp's logits from exact ones, relative; the file is written to `path`."""
    encoded, values = encode(source, names)
    write(path, source, encoded)
    reference = original(source)
    unknown = reference.load_state_dict(values, strict=False).unexpected_keys
    assert not unknown
    llama, expected = open_llama(path, n_ctx=128), logits(reference).numpy()
    difference = llama.logits(TOKENS[0].tolist()) - expected
    llama.close()
    assert llama.warnings == ""
    relative = float(np.linalg.norm(difference) / np.linalg.norm(expected))
    print(f"{source.name}: relative difference {relative:.5f}")
    return relative


@pytest.mark.parametrize("model_type", BY_MODEL_TYPE)
def test_a_file_of_all_types(tmp_path, model_type):
    """Linear by linear another type, in blocks enough for all of them."""
    source = make_wide(model_type, tmp_path / "source", blocks=4)
    assert deviation(tmp_path / "model.gguf", source, BLOCK_GRIDS) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCK_GRIDS)
@pytest.mark.parametrize("model_type", BY_MODEL_TYPE)
def test_files_of_one_type(tmp_path, model_type, name):
    source = make_wide(model_type, tmp_path / "source", blocks=2)
    assert deviation(tmp_path / "model.gguf", source, [name]) < TOLERANCE
