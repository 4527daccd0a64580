"""The menu of decoder families: one data file each, looked up by config.json's `model_type`."""

from calibration.errors import InputError
from ptq.families.ernie import ERNIE
from ptq.families.family import ModelFamily
from ptq.families.gemma import GEMMA, GEMMA2
from ptq.families.glm import GLM
from ptq.families.gpt2 import GPT2
from ptq.families.gpt_bigcode import GPT_BIGCODE
from ptq.families.gpt_neox import GPT_NEOX
from ptq.families.llama import LLAMA
from ptq.families.nemotron import APERTUS, ARCEE, NEMOTRON
from ptq.families.olmo2 import OLMO2
from ptq.families.opt import OPT
from ptq.families.phi3 import PHI3
from ptq.families.qwen2 import QWEN2
from ptq.families.qwen3 import QWEN3
from ptq.families.starcoder2 import STARCODER2

_MENU = (
    LLAMA, GPT_BIGCODE, STARCODER2, GPT2, QWEN2, QWEN3, OPT, GPT_NEOX, PHI3, GEMMA, GEMMA2, OLMO2, GLM, ERNIE,
    NEMOTRON, ARCEE, APERTUS,
)  # fmt: skip

FAMILIES: dict[str, ModelFamily] = {model_type: family for family in _MENU for model_type in family.model_types}


def family_of(config: dict) -> ModelFamily:
    """The family of a parsed config.json.

    Raises:
        InputError: The config has no `model_type`, or one that no family lists.
    """
    model_type = config.get("model_type")
    known = ", ".join(sorted(FAMILIES))
    if model_type is None:
        raise InputError(f"config.json has no model_type; known: {known}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"model_type {model_type!r} is not a known family; known: {known}")
    return FAMILIES[model_type]
