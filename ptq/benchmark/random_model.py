"""Random checkpoints with the shape of a real model, to measure memory and time without the model.

bf16, sharded, no tokenizer. A tensor is made in chunks while it is written, so memory does not depend on the model's
size. The same arguments give the same bytes.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from ptq.export.shards import Entry, tensor_bytes, write_checkpoint

CHUNK = 1 << 22  # values made at once
SHARD_BYTES = 1_000_000_000

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
_ROPE_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
SHAPES = {
    "tinyllama-1.1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048},
    "llama-2-7b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama-3.2-3b": _LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}
    | {"tie_word_embeddings": True}
    | {"rope_parameters": _ROPE_3 | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    "starcoderbase-3b": {"model_type": "gpt_bigcode", "multi_query": True, "activation_function": "gelu_pytorch_tanh"}
    | {"n_embd": 2816, "n_inner": 11264, "n_layer": 36, "n_head": 22, "n_positions": 8192, "vocab_size": 49152},
}


def write_random_model(shape: str, folder: Path, *, blocks: int | None = None, seed: int = 0) -> Path:
    """Writes a checkpoint into a new folder.

    Args:
        shape: A key of SHAPES.
        folder: Where to write; must not exist.
        blocks: Decoder blocks; None for as many as the real model has.
        seed: Seed of the weights.
    """
    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values, bos_token_id=0, eos_token_id=0)
    if blocks:
        config.num_hidden_layers = blocks
    config.dtype = torch.bfloat16
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    entries = [
        Entry(name, "BF16", tuple(tensor.shape), lambda name=name, shape=tensor.shape: _values(name, shape, generator))
        for name, tensor in model.named_parameters()  # a tied head is not named twice
    ]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    write_checkpoint(folder, entries, SHARD_BYTES)
    return folder


def _values(name: str, shape: torch.Size, generator: torch.Generator) -> Iterator[memoryview]:
    """The bytes of a tensor: norms and biases near where they start, matrices that keep the size of what they read."""
    count = shape.numel()
    middle = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    spread = 0.1 if len(shape) == 1 else shape[1] ** -0.5
    for start in range(0, count, CHUNK):
        noise = torch.randn(min(CHUNK, count - start), generator=generator)
        yield tensor_bytes((middle + spread * noise).bfloat16())
