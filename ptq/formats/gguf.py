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
from ptq.gguf.weights import GgufCheckpoint
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.qtensor import BlockTensor, digest
from ptq.quantizers.rtn import round_fitted
from ptq.reload import load_tokenizer

TYPE_OF_BITS = {1: "Q1_0", 1.58: "TQ1_0", 2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
NARROWER = {  # for rows that do not fill a type's blocks, the nearest types that have shorter ones
    "Q1_0": "Q2_0", "Q2_K": "Q2_0", "TQ1_0": "Q2_0", "TQ2_0": "Q2_0", "Q2_0": "IQ4_NL", "Q3_K": "IQ4_NL",
    "IQ4_XS": "IQ4_NL", "IQ2_XXS": "Q2_0", "IQ2_XS": "Q2_0", "IQ2_S": "Q2_0", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
OUTER_TYPE = "Q6_K"  # of embedding and head, where the user does not say: hardly worse than F16
EMBEDDINGS, HEADS = ("embed_tokens", "embed_in", "wte"), ("lm_head", "embed_out")
OUTER_TYPES = (*BLOCK_GRIDS, *FLOAT_TYPES)
CHUNK = 1 << 22  # weights of an embedding encoded at once


def check_type(flag: str, name: str | None, known):
    """Refuses a type that is none.

    Raises:
        InputError: Naming the flag and the types there are.
    """
    if name is not None and name not in known:
        raise InputError(f"--{flag} {name!r} is not one of {', '.join(known)}")


class GgufCodec:
    """Grids and bytes of one type, and of the narrower ones where rows do not fill its blocks."""

    def __init__(self, ggml_type: str):
        self.ggml_type = ggml_type

    def type_for(self, inputs: int) -> str:
        """The type that rows of so many weights get.

        Raises:
            InputError: No block divides them.
        """
        name = self.ggml_type
        while inputs % BY_NAME[name].block:
            if name not in NARROWER:
                raise InputError(
                    f"rows of {inputs} weights do not fill the blocks of {self.ggml_type} or a narrower type"
                )
            name = NARROWER[name]
        return name

    def grid(self, inputs: int):
        """The values of that type."""
        return BLOCK_GRIDS[self.type_for(inputs)]

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
        if spec.ggml_type is None and spec.bits not in TYPE_OF_BITS:
            raise InputError(f"bits {spec.bits}: no llama.cpp type is the usual one for them; choose with --type")
        self.ggml_type = spec.ggml_type or TYPE_OF_BITS[spec.bits]
        check_type("type", self.ggml_type, BLOCK_GRIDS)
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
        if spec.refined:
            raise InputError("effort above fast trains uniform groups: --format gguf takes --effort fast")
        self.spec, self.codec = replace(spec, ggml_type=self.ggml_type), GgufCodec(self.ggml_type)

    def name(self, model: str) -> str:
        """<model>-<type>-<method>."""
        return f"{model}-{self.ggml_type.lower()}-{self.spec.method}"

    def check(self, streamed, linears):
        """Refuses rows that no type holds, and models that llama.cpp does not know."""
        for name, (_, inputs) in linears.items():
            try:
                self.codec.type_for(inputs)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        tokenizer = load_tokenizer(streamed.checkpoint.folder)
        check_writable(
            streamed.checkpoint, config=streamed.config, tokenizer=tokenizer, pre_tokenizer=self.spec.pre_tokenizer
        )

    def notes(self, streamed, linears) -> list[str]:
        """Which tensors get a narrower type than was asked for, because their rows do not fill its blocks."""
        asked = [(name, self.ggml_type, inputs) for name, (_, inputs) in linears.items()]
        found = defaultdict(dict)
        for name, wanted, inputs in asked + outer_types(streamed.checkpoint, *self._outer()):
            if (used := GgufCodec(wanted).type_for(inputs)) != wanted:
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
        encoded |= outer_tensors(source, *self._outer())
        name = source.folder.resolve().name
        write_gguf(
            folder / f"{name}-{self.ggml_type}.gguf", source, encoded, config=streamed.config,
            tokenizer=load_tokenizer(source.folder), float_type=self._floats(), pre_tokenizer=self.spec.pre_tokenizer,
            extra=self._provenance(),
        )  # fmt: skip

    def _outer(self) -> tuple[str, str]:
        return self.spec.embed_type or OUTER_TYPE, self.spec.head_type or OUTER_TYPE

    def _floats(self) -> str:
        given = [t for t in (self.spec.embed_type, self.spec.head_type) if t in FLOAT_TYPES]
        return given[0] if given else "F16"

    def _provenance(self) -> dict:
        return {"quantize.ptq.method": self.spec.method, "quantize.ptq.type": self.ggml_type}

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

    def runtimes(self, linears, model_type: str) -> list[Runtime]:
        """Which programs load the file."""
        return [Runtime("llama.cpp", True, "")]


def _nbytes(tensor):
    return prod(tensor.shape[:-1]) * tensor.ggml_type.row_bytes(tensor.shape[-1])


def _kept(work, i, stored):
    return work.read(i, stored).numpy()


def outer_types(source, embed_type: str, head_type: str) -> list[tuple[str, str, int]]:
    """(name, type, inputs) of embedding and head, without those that stay floats."""
    found = []
    for name in source.names():
        shape = source.shape(name)
        wanted = head_type if any(part in name for part in HEADS) else embed_type
        if len(shape) == 2 and wanted not in FLOAT_TYPES and any(part in name for part in (*HEADS, *EMBEDDINGS)):
            found.append((name, wanted, shape[1]))
    return found


def outer_tensors(source, embed_type: str, head_type: str) -> dict[str, EncodedTensor]:
    """Embedding and head, rounded to nearest on fitted blocks; nothing for types of floats."""
    encoded = {}
    for name, wanted, inputs in outer_types(source, embed_type, head_type):
        grid = GgufCodec(wanted).grid(inputs)
        encoded[name] = EncodedTensor(BY_NAME[grid.name].number, partial(_rounded, source, name, grid))
    return encoded


def _rounded(source, name, grid):
    """Row bytes of a matrix of the checkpoint, some rows at a time."""
    W = source.read([name])[name]
    rows = max(1, CHUNK // W.shape[1])
    return np.concatenate([pack(round_fitted(part.float(), grid)) for part in W.split(rows)])
