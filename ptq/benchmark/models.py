"""The model that is run: the first blocks of a real folder, or of a shape with random weights."""

import re
from pathlib import Path

from ptq.benchmark.random_model import write_random_model
from ptq.benchmark.shapes import SHAPES
from ptq.checkpoint import Checkpoint, open_checkpoint
from ptq.export.shards import Entry, write_checkpoint
from ptq.families import family_of

SHARD_BYTES = 1_000_000_000


def blocks_of(checkpoint: Checkpoint) -> int:
    """How many decoder blocks a model has."""
    return checkpoint.model_config().num_hidden_layers


def shape_blocks(shape: str) -> int:
    """How many decoder blocks the real model of a shape has."""
    values = SHAPES[shape]
    return values.get("num_hidden_layers", values.get("n_layer"))


def write_shape(shape: str, folder: Path, blocks: int) -> Checkpoint:
    """A random model of a shape with so many blocks, in a new folder."""
    return open_checkpoint(write_random_model(shape, folder, blocks=blocks))


def write_first_blocks(source: Checkpoint, folder: Path, blocks: int) -> Checkpoint:
    """A real model cut off after its first blocks, in a new folder; its tensors keep their bytes."""
    inside = re.compile(rf"\b{family_of(source.config).blocks.rpartition('.')[2]}\.(\d+)\.")
    kept = [name for name in source.names() if not (found := inside.search(name)) or int(found[1]) < blocks]
    config = source.model_config()
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    write_checkpoint(
        folder,
        [Entry(name, source.dtype(name), source.shape(name), lambda name=name: source.raw(name)) for name in kept],
        SHARD_BYTES,
    )
    return open_checkpoint(folder)
