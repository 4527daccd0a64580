"""llama.cpp's tensor types and mixes as a flag names them; `ptq.grids.blocks` has the grids behind the types."""

from collections.abc import Iterable

from calibration.errors import InputError

GRID_TYPES = (
    "Q1_0", "TQ1_0", "TQ2_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K", "Q3_K",
    "Q6_K", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
)  # fmt: skip
TYPE_OF_BITS = {1: "Q1_0", 1.58: "TQ1_0", 2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}


def check_type(flag: str, name: str | None, known: Iterable[str]):
    """Refuses a type that is none.

    Raises:
        InputError: Naming the flag and the types there are.
    """
    if name is not None and name not in known:
        raise InputError(f"--{flag} {name!r} is not one of {', '.join(known)}")
