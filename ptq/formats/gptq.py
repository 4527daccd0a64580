"""GPTQ folders: checks before the walk, writing, reading back, sizes, and who loads them."""

from collections import defaultdict
from math import log2

from calibration.errors import InputError
from ptq.checkpoint import open_checkpoint
from ptq.export.gptq import check_bits, check_packable, write_gptq
from ptq.export.gptq_tensors import GptqCodec
from ptq.export.runtimes import Runtime, runtimes
from ptq.export.shards import tensor_bytes
from ptq.grids.affine import level_count
from ptq.qtensor import digest
from ptq.reload import GptqCheckpoint

PARTS = {".qweight": "codes", ".scales": "scales", ".qzeros": "zero points", ".g_idx": "column groups"}
MATRICES, VECTORS = "kept matrices", "norms and biases"


class GptqFormat:
    """A GPTQ folder.

    Args:
        spec: QuantSpec.

    Raises:
        InputError: The format has no words for the spec's bits.
    """

    def __init__(self, spec):
        check_bits(spec.bits)
        self.spec = spec
        self.codec = GptqCodec(spec.bits, spec.group_size, spec.checkpoint_format)

    def name(self, model: str) -> str:
        """<model>-w<bits>g<group>-<method>, without the g part for one group per row."""
        group = "" if self.spec.group_size == -1 else f"g{self.spec.group_size}"
        return f"{model}-w{self.spec.bits}{group}-{self.spec.method}"

    def check(self, streamed, linears):
        """Refuses what the file cannot hold.

        Args:
            streamed: The model.
            linears: (O, I) by name.

        Raises:
            InputError: Naming the linear and the rule.
        """
        for name, shape in linears.items():
            check_packable(name, *shape)
        shortest, group = min(inputs for _, inputs in linears.values()), self.spec.group_size
        if group > shortest:
            raise InputError(f"group {group} is longer than the {shortest} inputs of a linear; use --group -1")

    def notes(self, streamed, linears) -> list[str]:
        """What the user should know about the file: nothing."""
        return []

    def prepare(self, streamed, work, tokens, *, budget: int | None):
        """Nothing is settled before the walk: embeddings stay as they are."""

    def adopt(self, prepared):
        """Nothing of it."""

    def write(self, folder, streamed, work):
        """Writes the folder from the finished blocks."""
        home = {name: i for i in range(len(streamed.blocks)) for name, _, _ in work.layout(i)}
        packed = [part for i in range(len(streamed.blocks)) for part in work.layout(i)]
        read = lambda name: tensor_bytes(work.read(home[name], name))  # noqa: E731
        write_gptq(folder, streamed.checkpoint, self.spec, packed, read)

    def open(self, folder) -> GptqCheckpoint:
        """The written folder as plain weights."""
        return GptqCheckpoint(open_checkpoint(folder))

    def verify(self, packed: GptqCheckpoint, streamed, work, per_linear: dict):
        """Compares the written folder with what the walk used and, byte for byte, other tensors with their origin.

        Raises:
            OSError: They differ: the disk or the memory failed.
        """
        source = streamed.checkpoint
        for linear, entry in per_linear.items():
            if digest(packed.quantized(linear).dequantize()) != entry["sha256"]:
                raise OSError(f"{packed.folder}: {linear} reads back different from what was written")
        changed = changed_tensors(streamed, work)
        for name in source.names():
            if name.removesuffix(".weight") in per_linear:
                continue
            expected = [bytes(tensor_bytes(changed[name]()))] if name in changed else source.raw(name)
            for ours, theirs in zip(packed.packed.raw(name), expected, strict=True):
                if ours != theirs:
                    raise OSError(f"{packed.folder}: {name} reads back different from what was written")

    def sizes(self, packed: GptqCheckpoint, linears) -> dict:
        """Bytes of all tensors, of the quantized linears, of those with codes as short as may be, and of the files."""
        stored = packed.packed
        codes, rest = (
            sum(stored.nbytes(f"{linear}.{part}") for linear in linears for part in parts)
            for parts in (("qweight",), ("qzeros", "scales"))
        )
        weights = sum(outputs * inputs for outputs, inputs in linears.values())
        return {
            "tensors": sum(stored.nbytes(name) for name in stored.names()),
            "linears": codes + rest,
            "shortest": weights * log2(level_count(self.spec.bits)) / 8 + rest,
            "files": sum(path.stat().st_size for path in stored.shards),
        }

    def bytes_by_part(self, packed: GptqCheckpoint) -> dict[str, int]:
        """Where the bytes are; no tensor is read."""
        stored, parts = packed.packed, defaultdict(int)
        for name in stored.names():
            left_alone = MATRICES if len(stored.shape(name)) > 1 else VECTORS
            parts[PARTS.get(name[name.rfind(".") :], left_alone)] += stored.nbytes(name)
        return dict(parts)

    def mixture_report(self, work) -> None:
        """All linears are alike."""

    def runtimes(self, linears, model_type: str) -> list[Runtime]:
        """Which programs load the folder."""
        return runtimes(self.spec, linears.values(), model_type)


def changed_tensors(streamed, work) -> dict:
    """Readers of the checkpoint's own tensors that the method changed, by name."""
    plain, blocks = set(streamed.checkpoint.names()), range(len(streamed.blocks))
    names = ((i, name) for i in blocks for name, _, _ in work.layout(i) if name in plain)
    return {name: lambda i=i, n=name: work.read(i, n) for i, name in names}
