"""ERNIE 4.5 (dense) and Helium: Llama's block, but queries and keys are rotated in pairs of neighbours."""

from ptq.families.family import ModelFamily
from ptq.families.parts import GATED, NORM_TO_GATED, NORM_TO_QKV, UP_TO_DOWN, VALUES

ERNIE = ModelFamily(
    name="ernie",
    model_types=("ernie4_5", "helium"),
    blocks="model.layers",
    stages=GATED,
    folds=(NORM_TO_QKV, VALUES, NORM_TO_GATED, UP_TO_DOWN),
)
