"""What the walker must know of a decoder family, as data."""

from dataclasses import dataclass


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
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    stages: tuple[tuple[str, ...], ...]
    renamed: tuple[tuple[str, str], ...] = ()
    transposed: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """All quantized linears of a block, in the order they run."""
        return tuple(name for stage in self.stages for name in stage)
