"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v."""

from ptq.families.family import ModelFamily
from ptq.families.parts import GATED, NORM_TO_GATED, NORM_TO_QKV, ROTARY, UP_TO_DOWN, VALUES

QWEN2 = ModelFamily(
    name="qwen2",
    model_types=("qwen2",),
    blocks="model.layers",
    stages=GATED,
    folds=(NORM_TO_QKV, VALUES, ROTARY, NORM_TO_GATED, UP_TO_DOWN),
)
