"""Qwen3 (dense): Llama's block with a norm on every head's q and k, and heads wider than hidden / heads."""

from ptq.families.family import ModelFamily
from ptq.families.parts import GATED, NORM_TO_GATED, NORM_TO_QKV, UP_TO_DOWN, VALUES

QWEN3 = ModelFamily(
    name="qwen3",
    model_types=("qwen3",),
    blocks="model.layers",
    stages=GATED,
    folds=(NORM_TO_QKV, VALUES, NORM_TO_GATED, UP_TO_DOWN),
)
