"""Gemma: Llama's linears and norms of 1 + weight; since Gemma 2 a norm on both sides of each half.

Gemma 3 is its text model. Since Gemma 2 blocks alternate between a sliding window and full attention, so masks (and in
Gemma 3 rotary tables) differ by block.
"""

from ptq.families.family import Fold, ModelFamily
from ptq.families.parts import GATED, NORM_TO_GATED, NORM_TO_QKV, UP_TO_DOWN, VALUES

GEMMA = ModelFamily(
    name="gemma",
    model_types=("gemma",),
    blocks="model.layers",
    stages=GATED,
    folds=(NORM_TO_QKV, VALUES, NORM_TO_GATED, UP_TO_DOWN),
    norm_offset=1.0,
)
GEMMA2 = ModelFamily(
    name="gemma2",
    model_types=("gemma2", "gemma3_text"),
    blocks="model.layers",
    stages=GATED,
    folds=(NORM_TO_QKV, VALUES, Fold("pre_feedforward_layernorm", ("mlp.up_proj", "mlp.gate_proj")), UP_TO_DOWN),
    norm_offset=1.0,
)
