"""llama.cpp files: which type a matrix gets, writing, reading back, sizes, and who loads them."""

import re
from collections import defaultdict
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch

from calibration.errors import InputError
from ptq.export.gguf.codecs import pack, unpack
from ptq.export.gguf.layout import FLOAT_TYPES, EncodedTensor
from ptq.export.gguf.types import BY_NAME
from ptq.export.gguf.writer import check_writable, write_gguf
from ptq.export.runtimes import Runtime
from ptq.formats.gptq import changed_tensors
from ptq.ggml import TYPE_OF_BITS, check_type
from ptq.gguf.weights import GgufCheckpoint
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.grids.grid import BlockGrid
from ptq.mixture.assignment import fitting
from ptq.mixture.mixture import PLAN, Mixture
from ptq.mixture.recipes import MIXES
from ptq.qtensor import BlockTensor, digest
from ptq.quantizers.rtn import round_fitted
from ptq.reload import load_tokenizer

TYPES = (*BLOCK_GRIDS, *MIXES)
EMBEDDINGS, HEADS = ("embed_tokens", "embed_in", "wte"), ("lm_head", "embed_out")
OUTER_TYPES = (*BLOCK_GRIDS, *FLOAT_TYPES)
CHUNK = 1 << 22  # weights of an embedding encoded at once


class GgufCodec:
    """Grids and bytes of linears.

    Args:
        types: llama.cpp's type of each, by name; may be filled later.
    """

    def __init__(self, types: dict[str, str]):
        self.types = types

    def grid(self, linear: str, inputs: int) -> BlockGrid:
        """The values of its type."""
        return BLOCK_GRIDS[self.types[linear]]

    def pack(self, tensor: BlockTensor) -> dict[str, torch.Tensor]:
        """Row bytes (O, bytes) under the type's name."""
        return {tensor.grid.name: torch.from_numpy(pack(tensor))}

    def unpack(self, parts) -> BlockTensor:
        """Back from them."""
        ((name, rows),) = parts.items()
        return unpack(rows.numpy(), name)


class GgufFormat:
    """A folder with one .gguf file and the report.

    Args:
        spec: QuantSpec.

    Raises:
        InputError: A type that is none, or bits that no type has.
    """

    def __init__(self, spec):
        if spec.ggml_type is None and not spec.has_target and spec.bits not in TYPE_OF_BITS:
            raise InputError(f"bits {spec.bits}: no llama.cpp type is the usual one for them; choose with --type")
        ggml_type = spec.ggml_type if spec.has_target else spec.ggml_type or TYPE_OF_BITS[spec.bits]
        check_type("type", ggml_type, TYPES)
        outer = {"embed-type": spec.embed_type, "head-type": spec.head_type}
        for flag, name in outer.items():
            check_type(flag, name, OUTER_TYPES)
        floats = {name for name in outer.values() if name in FLOAT_TYPES}
        if len(floats) > 1:
            raise InputError(
                f"--embed-type and --head-type are {' and '.join(sorted(floats))}: a file has one float type"
            )
        if spec.trains:
            raise InputError(f"method {spec.method!r} trains uniform groups: --format gguf takes gptq or rtn")
        if spec.reconstruct_epochs:
            raise InputError("reconstruct_epochs trains uniform groups, which format gguf does not have")
        self.float_type = min(floats, default="F16")
        self.spec, self.codec = replace(spec, ggml_type=ggml_type), GgufCodec({})

    def name(self, model: str) -> str:
        """<model>-<type>-<method>."""
        return f"{model}-{self.spec.label.lower()}-{self.spec.method}"

    def check(self, streamed, linears):
        """Refuses rows that no type holds, models that llama.cpp does not know, and sizes out of reach."""
        self.mixture = Mixture(streamed, self.spec, linears)
        tokenizer = load_tokenizer(streamed.checkpoint.folder)
        described = {"tokenizer": tokenizer, "pre_tokenizer": self.spec.pre_tokenizer, "config": streamed.config}
        check_writable(streamed.checkpoint, **described)
        if self.spec.has_target:
            self.mixture.check_target(float_type=self.float_type, extra=self._provenance(), **described)

    def prepare(self, streamed, work, tokens, *, budget: int | None):
        """Settles the types and solves embedding and head, unless the work folder has both.

        Args:
            streamed: The model.
            work: WorkFolder.
            tokens: (n, T) calibration rows; None for methods that need none.
            budget: Bytes of activations kept in memory.

        Returns:
            The type of each matrix, and what overwrites a loaded embedding with the file's values; None where they
            are the model's own.
        """
        return self.mixture.settle(work, tokens, budget=budget), self.mixture.embed(work)

    def adopt(self, prepared):
        """Takes the types over and gives the rest back; `prepared` may come from another process."""
        types, embed = prepared
        self.codec.types |= types
        return embed

    def notes(self, streamed, linears) -> list[str]:
        """Which tensors get a narrower type than was asked for, because their rows do not fill its blocks."""
        found = defaultdict(dict)
        for name, wanted, used, inputs in self.mixture.narrower:
            found[used, wanted, inputs][re.sub(r"\.\d+\.", ".*.", name)] = None
        return [
            f"{used} instead of {wanted}, whose blocks of {BY_NAME[wanted].block} do not divide rows of {inputs}: "
            + ", ".join(names)
            for (used, wanted, inputs), names in found.items()
        ]

    def write(self, folder, streamed, work):
        """Writes the file from the finished blocks."""
        source, blocks = streamed.checkpoint, range(len(streamed.blocks))
        changed = changed_tensors(streamed, work)
        assert not changed, "methods that change other tensors are refused before the walk"
        encoded = {}
        for i in blocks:
            for stored, _, _ in work.layout(i):
                linear, _, ggml_type = stored.rpartition(".")
                read = partial(_kept, work, i, stored)
                encoded[f"{linear}.weight"] = EncodedTensor(BY_NAME[ggml_type].number, read)
        encoded |= self.mixture.tables(work)
        name = source.folder.resolve().name
        write_gguf(
            folder / f"{name}-{self.spec.label}.gguf", source, encoded, config=streamed.config,
            tokenizer=load_tokenizer(source.folder), float_type=self.float_type,
            pre_tokenizer=self.spec.pre_tokenizer, extra=self._provenance(),
        )  # fmt: skip

    def _provenance(self) -> dict:
        return {"quantize.ptq.method": self.spec.method, "quantize.ptq.type": self.spec.label}

    def open(self, folder) -> GgufCheckpoint:
        """The written file as plain weights."""
        return GgufCheckpoint(self._file(folder))

    def _file(self, folder) -> Path:
        (path,) = Path(folder).glob("*.gguf")
        return path

    def verify(self, packed: GgufCheckpoint, streamed, work, per_linear: dict):
        """Compares what the file decodes to with what the walk used.

        Raises:
            OSError: They differ: the disk or the memory failed.
        """
        for linear, entry in per_linear.items():
            values = packed.read([f"{linear}.weight"])[f"{linear}.weight"]
            if digest(values.T if streamed.family.transposed else values) != entry["sha256"]:
                raise OSError(f"{packed.folder}: {linear} reads back different from what was written")
        for name, table in self.mixture.tables(work).items():
            if not np.array_equal(packed.file.rows(packed.stored_name(name)), table.read()):
                raise OSError(f"{packed.folder}: {name} reads back different from what was written")

    def sizes(self, packed: GgufCheckpoint, linears) -> dict:
        """Bytes of all tensors, of the quantized linears, and of the file."""
        of = {name: _nbytes(tensor) for name, tensor in packed.file.tensors.items()}
        return {
            "tensors": sum(of.values()),
            "linears": sum(of[packed.stored_name(f"{linear}.weight")] for linear in linears),
            "files": packed.folder.stat().st_size,
        }

    def bytes_by_part(self, packed: GgufCheckpoint) -> dict[str, int]:
        """Where the bytes are, by type."""
        parts = defaultdict(int)
        for tensor in packed.file.tensors.values():
            parts[tensor.ggml_type.name] += _nbytes(tensor)
        return dict(parts)

    def mixture_report(self, work) -> dict | None:
        """What types were chosen under a target, and by which measurements; None without a target."""
        return work.part_report(PLAN) if self.spec.has_target else None

    def runtimes(self, linears, model_type: str) -> list[Runtime]:
        """Which programs load the file."""
        return [Runtime("llama.cpp", True, "")]


def _nbytes(tensor):
    return prod(tensor.shape[:-1]) * tensor.ggml_type.row_bytes(tensor.shape[-1])


def _kept(work, i, stored):
    return work.read(i, stored).numpy()


def outer_tensors(source, embed_type: str, head_type: str) -> dict[str, EncodedTensor]:
    """Embedding and head, rounded to nearest on fitted blocks; nothing for types of floats."""
    encoded = {}
    for name in source.names():
        shape = source.shape(name)
        wanted = head_type if any(part in name for part in HEADS) else embed_type
        if len(shape) != 2 or wanted in FLOAT_TYPES or not any(part in name for part in (*HEADS, *EMBEDDINGS)):
            continue
        grid = BLOCK_GRIDS[fitting(wanted, shape[1])]
        encoded[name] = EncodedTensor(BY_NAME[grid.name].number, partial(_rounded, source, name, grid))
    return encoded


def _rounded(source, name, grid):
    """Row bytes of a matrix of the checkpoint, some rows at a time."""
    W = source.read([name])[name]
    rows = max(1, CHUNK // W.shape[1])
    return np.concatenate([pack(round_fitted(part.float(), grid)) for part in W.split(rows)])
