"""Perplexity by the community's protocol: joined text, windows of seqlen that do not overlap, each on its own.

Every token of a window but the first is predicted from those before it in the window. The model is streamed block by
block, so its size does not matter. The harnesses of GPTQ, OmniQuant and EfficientQAT count the same tokens.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from calibration.capture import run_block
from calibration.errors import InputError
from calibration.store import ActivationStore
from ptq.streamed import StreamedModel

BATCH_TOKENS = 2048  # an MLP holds four times its width for each
LOGIT_ENTRIES = 1 << 24  # logits held at once, fp32


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood in nats over `tokens` predicted tokens."""

    perplexity: float
    nll: float
    tokens: int
    seqlen: int

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_perplexity(model: StreamedModel, tokens, *, spill: Path | None = None, budget: int | None = None, label=""):
    """Perplexity of a model on windows of tokens (n, seqlen).

    Args:
        model: The model, streamed.
        tokens: int64 windows.
        spill: Folder for activations past `budget` bytes.
        budget: Bytes of activations kept in memory; None for no limit.
        label: Names the progress bar.

    Raises:
        InputError: The result is not finite.
    """
    batches = tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))
    store, arguments, by_rows = ActivationStore(spill, budget), [], {}
    with model.outside(head=False):
        for batch in batches:
            hidden, of_batch = model.embed(batch)
            arguments.append(by_rows.setdefault(len(batch), of_batch))
            store.append(hidden)
    for i in tqdm(range(len(model.blocks)), desc=f"perplexity {label}", unit="block", disable=None, leave=False):
        with model.block(i) as block:
            for b, hidden in enumerate(store):
                store[b] = run_block(block, hidden.to(model.device), arguments[b][i])
    nll = torch.zeros((), dtype=torch.float64)
    with model.outside(head=True):
        for batch, hidden in zip(batches, store, strict=True):
            nll += _nll(model, hidden[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    count = tokens.numel() - len(tokens)
    mean = float(nll) / count
    if not math.isfinite(mean):
        raise InputError(f"{model.checkpoint.folder}: the model's outputs are not finite on this text")
    return Perplexity(math.exp(min(mean, 700.0)), mean, count, tokens.shape[1])


def _nll(model, hidden, wanted):
    """Summed over tokens: hidden (N, D) from the last block, wanted (N,) the tokens that follow."""
    total, step = torch.zeros((), dtype=torch.float64), max(1, LOGIT_ENTRIES // model.config.vocab_size)
    for states, ids in zip(hidden.split(step), wanted.split(step), strict=True):
        logits = model.logits(states[None].to(model.device))[0].float()
        total += torch.nn.functional.cross_entropy(logits, ids.to(logits.device), reduction="none").double().sum().cpu()
    return total
