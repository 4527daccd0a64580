"""Perplexity over windows of seqlen tokens, each on its own, by the protocols that have windows (protocols.py)."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from calibration.errors import InputError
from ptq.evaluation.stream import batches_of, final_states, scored_logits
from ptq.streamed import StreamedModel


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood in nats over `tokens` predicted tokens, and its standard error.

    The error is llama-perplexity's: that of the mean, as if tokens were independent, times the perplexity.
    """

    perplexity: float
    nll: float
    tokens: int
    seqlen: int
    stderr: float

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def prepare_windows(protocol: str, tokens: torch.Tensor, leading: list[int]) -> tuple[torch.Tensor, int]:
    """Windows (n, seqlen) as a protocol wants them, and how many leading positions of each it does not score.

    Args:
        protocol: Key of WINDOWS.
        tokens: int64 windows of the joined text.
        leading: What the tokenizer puts before a text: a bos token or nothing.

    Raises:
        InputError: The second half of a window predicts nothing.
    """
    if protocol == "gptq":
        return tokens, 0
    if tokens.shape[1] < 3:
        raise InputError(
            f"the second half of windows of {tokens.shape[1]} tokens predicts nothing: seqlen must be 3 or more"
        )
    if leading:
        tokens = tokens.clone()
        tokens[:, 0] = leading[0]
    return tokens, tokens.shape[1] // 2


@torch.no_grad()
def measure_perplexity(
    model: StreamedModel, tokens, *, skip: int = 0, spill: Path | None = None, budget: int | None = None, label=""
) -> Perplexity:
    """Perplexity of a model on windows of tokens (n, seqlen).

    Args:
        model: The model, streamed.
        tokens: int64 windows.
        skip: Leading positions of each window whose predictions are not scored.
        spill: Folder for activations past `budget` bytes.
        budget: Bytes of activations kept in memory; None for no limit.
        label: Names the progress bar.

    Raises:
        InputError: The result is not finite.
    """
    batches = batches_of(tokens)
    states = final_states(model, batches, spill=spill, budget=budget, label=f"perplexity {label}")
    nll = []
    with model.outside(head=True):
        for logits, wanted in scored_logits(model, batches, states, skip):
            nll.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double().cpu())
    return summarise(torch.cat(nll), tokens.shape[1], model)


def summarise(nll: torch.Tensor, seqlen: int, model: StreamedModel) -> Perplexity:
    """The figures of fp64 negative log-likelihoods (N,).

    Raises:
        InputError: They are not finite.
    """
    mean = float(nll.mean())
    if not math.isfinite(mean):
        raise InputError(f"{model.checkpoint.folder}: the model's outputs are not finite on this text")
    perplexity = math.exp(min(mean, 700.0))
    return Perplexity(perplexity, mean, len(nll), seqlen, perplexity * standard_error(nll))


def standard_error(values: torch.Tensor) -> float:
    """Of the mean of values (N,): the root of their mean squared deviation over N - 1."""
    return float(values.var(correction=0) / max(1, len(values) - 1)) ** 0.5
