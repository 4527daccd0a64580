"""Llama, and what has its block: separate q, k, v and a gated MLP behind a norm each."""

from ptq.families.family import ModelFamily
from ptq.families.parts import GATED, NORM_TO_GATED, NORM_TO_QKV, ROTARY, UP_TO_DOWN, VALUES

LLAMA = ModelFamily(
    name="llama",
    model_types=("llama", "mistral", "granite", "smollm3", "seed_oss", "cwm"),
    blocks="model.layers",
    stages=GATED,
    folds=(NORM_TO_QKV, VALUES, ROTARY, NORM_TO_GATED, UP_TO_DOWN),
)
