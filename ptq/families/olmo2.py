"""OLMo 2 and 3, and EXAONE 4: Llama's linears with norms behind attention and MLP, none before, and norms on q and k.

In OLMo 3 and EXAONE 4 some blocks have a sliding window.
"""

from ptq.families.family import ModelFamily
from ptq.families.parts import GATED, UP_TO_DOWN, VALUES

OLMO2 = ModelFamily(
    name="olmo2",
    model_types=("olmo2", "olmo3", "exaone4"),
    blocks="model.layers",
    stages=GATED,
    folds=(VALUES, UP_TO_DOWN),
)
