"""What the walker must know of a decoder family, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    """Channels that may be rescaled between the module that makes them and the linears that read them.

    Attributes:
        source: A norm, or a linear, of which the last outputs are meant if the readers do not read all.
        readers: Linears that read those channels and nothing else does; the first decides where scales start.
        ties: Which channels share a scale: "channel", none; "kv_head", the source makes key-value heads and the
            readers read query heads; "query_key", source and reader are the query and the key linear, whose products
            are taken channel by channel; "rotary", the same with channels i and i + half of a head rotated together.
    """

    source: str
    readers: tuple[str, ...]
    ties: str = "channel"


@dataclass(frozen=True)
class ModelFamily:
    """One decoder architecture.

    Attributes:
        name: The family's name in messages and reports.
        model_types: The `model_type` values of config.json that belong to it.
        blocks: Dotted path of the list of decoder blocks inside the `AutoModelForCausalLM` model.
        stages: Names of linears inside a block, grouped by the tensor they read, in the order in which the
            block's forward runs them. Linears of one stage share one Hessian.
        renamed: (prefix in the model, prefix in the checkpoint) of parameters that files call otherwise.
        transposed: The linears store their weight as (inputs, outputs).
        folds: Pairs of neighbours between which channels may be rescaled without changing the block's output.
        norm_offset: What norms add to the weight that they store.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    stages: tuple[tuple[str, ...], ...]
    renamed: tuple[tuple[str, str], ...] = ()
    transposed: bool = False
    folds: tuple[Fold, ...] = ()
    norm_offset: float = 0.0

    @property
    def linears(self) -> tuple[str, ...]:
        """All quantized linears of a block, in the order they run."""
        return tuple(name for stage in self.stages for name in stage)
