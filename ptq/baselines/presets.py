"""Grids that measure what published tables print, with the same bits, groups, texts and protocol where they say so."""

from dataclasses import dataclass

from ptq.baselines.grid import Grid, Model, Settings
from ptq.evaluation.published import models

TINYLLAMA = Model("TinyLlama/TinyLlama_v1.1", "TinyLlama 1.1B", models.TINYLLAMA)
LLAMA_3_2_3B = Model("meta-llama/Llama-3.2-3B", "Llama-3.2-3B", models.LLAMA_3_2_3B)
LLAMA_2_7B = Model("meta-llama/Llama-2-7b-hf", "Llama-2-7B", models.LLAMA_2_7B)
LLAMA_1_7B = Model("huggyllama/llama-7b", "LLaMA-1-7B", models.LLAMA_1_7B)
OPEN_LLAMA_3B = Model("openlm-research/open_llama_3b", "OpenLLaMA 3B", models.OPEN_LLAMA_3B)
STARCODER_3B = Model("bigcode/starcoderbase-3b", "StarCoderBase-3B", models.STARCODER_3B)
# The document names its model nowhere; every row of it is meant, and none compares.
UNNAMED = Model(TINYLLAMA.source, "a model that the document does not name", "teacher|quant_1")
KNOWN = (TINYLLAMA, LLAMA_3_2_3B, LLAMA_2_7B, LLAMA_1_7B, OPEN_LLAMA_3B, STARCODER_3B)


@dataclass(frozen=True)
class Preset:
    """Grids, the published sources that stand beside them, what is shared by all cells, and the tasks of `--tasks`."""

    grids: tuple[Grid, ...]
    sources: tuple[str, ...]
    settings: Settings
    tasks: str


PRESETS = {
    "bitdistiller": Preset(
        grids=(
            Grid((TINYLLAMA, LLAMA_3_2_3B, LLAMA_2_7B), bits=(3, 2, 1)),
            Grid((TINYLLAMA,), bits=(1,), groups=(128, 64, 32)),
        ),
        sources=("bitdistiller", "bitdistiller_short"),
        settings=Settings(),
        tasks="qat",
    ),
    "onebit": Preset(
        grids=(Grid((UNNAMED,), bits=(2, 1.58, 1), groups=(-1, 128)),),
        sources=("onebit",),
        settings=Settings(protocol="lm-eval"),
        tasks="onebit",
    ),
    "starcoder": Preset(
        grids=(
            Grid((STARCODER_3B,), bits=(4,)),
            Grid((STARCODER_3B,), formats=("gguf",), types=("Q4_K",)),
        ),
        sources=("starcoder",),
        settings=Settings(texts=("code",), calibration="code"),
        tasks="starcoder",
    ),
    "greenbit": Preset(
        grids=(
            Grid((TINYLLAMA, OPEN_LLAMA_3B, LLAMA_1_7B, LLAMA_2_7B), bits=(2,), groups=(32, 16, 8)),
            Grid((LLAMA_1_7B, LLAMA_2_7B), bits=(4, 3, 2)),
            Grid((LLAMA_2_7B,), bits=(2,), groups=(64,)),
            Grid((OPEN_LLAMA_3B,), bits=(4,)),
            Grid((OPEN_LLAMA_3B, LLAMA_2_7B), bits=(4,), groups=(32,)),
        ),
        sources=("greenbit",),
        settings=Settings(texts=("wikitext2", "c4")),
        tasks="greenbit",
    ),
}
