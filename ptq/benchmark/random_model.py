"""Random checkpoints with the shape of a real model, to measure memory and time without the model.

bf16, sharded, no tokenizer. A tensor is made in chunks while it is written, so memory does not depend on the model's
size. The same arguments give the same bytes.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from ptq.benchmark.shapes import SHAPES
from ptq.export.shards import Entry, tensor_bytes, write_checkpoint

CHUNK = 1 << 22  # values made at once
SHARD_BYTES = 1_000_000_000


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
