"""Post-training quantization of large language models: one solver, every grid."""

from ptq.lazy import Lazy
from ptq.spec import QuantSpec

__all__ = ["Artefact", "QuantSpec", "quantize_model"]

_pipeline = Lazy("ptq.pipeline", freeze=False)


def __getattr__(name: str):
    if name in __all__:
        return getattr(_pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
