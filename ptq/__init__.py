"""Post-training quantization of large language models: one solver, every grid."""

from ptq.pipeline import Artefact, quantize_model
from ptq.spec import QuantSpec

__all__ = ["Artefact", "QuantSpec", "quantize_model"]
