"""Post-training quantization of large language models: one solver, every grid."""

import gc

_collecting = gc.isenabled()
gc.disable()  # modules stay: searching them for garbage while they load takes half a second
try:
    from ptq.pipeline import Artefact, quantize_model
    from ptq.spec import QuantSpec
finally:
    if _collecting:
        gc.freeze()
        gc.unfreeze()  # puts them with the oldest objects, unsearched
        gc.enable()

__all__ = ["Artefact", "QuantSpec", "quantize_model"]
