"""Token embedding and output head on block grids.

A head is a linear: it is solved like one, on what the final norm delivers on calibration text. A table that is both
embedding and head is solved for its work as head, with a ridge, because its rows are read as they are too: RIDGE times
the mean of H's diagonal. An embedding alone is read row by row, where all columns count the same: it is rounded to
nearest on fitted blocks.

Legend: V tokens, D columns.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from calibration.hessian import Hessian
from ptq.evaluation.stream import LOGIT_ENTRIES, final_states
from ptq.export.gguf.codecs import pack, unpack
from ptq.quantizers.gptq import gptq
from ptq.quantizers.rtn import round_fitted

CHUNK = 1 << 25  # weights solved at once
RIDGE = 0.15


@torch.no_grad()
def head_hessian(model, batches: Sequence[torch.Tensor], *, spill=None, budget=None) -> torch.Tensor:
    """H (D, D) of what the full-precision model's output head reads.

    Args:
        model: StreamedModel.
        batches: Of token rows.
        spill: Folder for activations past `budget` bytes.
        budget: Bytes of activations kept in memory; None for no limit.
    """
    states = final_states(model, batches, spill=spill, budget=budget, label="output head")
    step, hessian = max(1, LOGIT_ENTRIES // model.config.vocab_size), None
    with model.outside(head=True):
        for hidden in states:
            for some in hidden.flatten(0, 1).split(step):
                read = model.head_inputs(some[None].to(model.device))
                hessian = hessian or Hessian(read.shape[-1], device=read.device)
                hessian.add(read)
    return hessian.finalise()[0]


def with_ridge(H: torch.Tensor) -> torch.Tensor:
    """What a table that is both embedding and head is solved on, (D, D), from what the head reads."""
    return H + RIDGE * H.diagonal().mean() * torch.eye(len(H), device=H.device)


def encode_table(W: torch.Tensor, grid, H: torch.Tensor | None, spec) -> np.ndarray:
    """Row bytes (V, bytes) of a table (V, D), some rows at a time.

    Args:
        W: The table.
        grid: A BlockGrid.
        H: (D, D); None to round to nearest on fitted blocks.
        spec: QuantSpec.
    """
    parts, spec = [], replace(spec, correction=0.0)
    for rows in W.split(max(1, CHUNK // W.shape[1])):
        solved = round_fitted(rows.float(), grid) if H is None else gptq(rows, H.clone(), spec, grid=grid).quantized
        parts.append(pack(solved))
    return np.concatenate(parts)


def decode_table(rows: np.ndarray, ggml_type: str, target: torch.Tensor):
    """Writes the values of row bytes into a table (V, D), some rows at a time."""
    step = max(1, CHUNK // target.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        target[part] = unpack(rows[part], ggml_type).dequantize().to(target)
