"""How far a model's predictions are from those of the full-precision model: sharper than two perplexities apart.

Both models are streamed block by block over the same windows; at the end both heads are in memory, and logits of a few
rows. Kullback-Leibler divergence is sum_v p(v) (log p(v) - log q(v)) in nats, p the reference's, q the model's.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from calibration.errors import InputError
from ptq.evaluation.perplexity import Perplexity, standard_error, summarise
from ptq.evaluation.stream import batches_of, final_states, scored_logits
from ptq.streamed import StreamedModel


@dataclass(frozen=True)
class Divergence:
    """Of `tokens` predictions: mean, standard error, 99th percentile and maximum of the divergence in nats.

    Attributes:
        kl: Mean.
        kl_stderr: Standard error of the mean.
        kl_99: 99 of 100 predictions diverge by less.
        kl_max: The largest.
        same_top: Share of predictions whose likeliest token is the reference's.
        tokens: Predictions compared.
        model: The model's perplexity on them.
        reference: The reference's.
    """

    kl: float
    kl_stderr: float
    kl_99: float
    kl_max: float
    same_top: float
    tokens: int
    model: Perplexity
    reference: Perplexity

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_divergence(
    model: StreamedModel,
    reference: StreamedModel,
    tokens: torch.Tensor,
    *,
    skip: int = 0,
    spill: Path | None = None,
    budget: int | None = None,
) -> Divergence:
    """Compares two models on windows of tokens (n, seqlen).

    Args:
        model: The one that is judged.
        reference: The one it should be like.
        tokens: int64 windows.
        skip: Leading positions of each window whose predictions are not scored.
        spill: Folder for activations past `budget` bytes.
        budget: Bytes of activations kept in memory, half of them for each model; None for no limit.

    Raises:
        InputError: The vocabularies differ, or a result is not finite.
    """
    sizes = [each.config.vocab_size for each in (model, reference)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{model.checkpoint.folder} has {sizes[0]} tokens and {reference.checkpoint.folder} {sizes[1]}:"
            " models of one vocabulary can be compared"
        )
    batches, half = batches_of(tokens), None if budget is None else budget // 2
    streams = []
    for each, name in ((reference, "reference"), (model, "model")):
        folder = None if spill is None else spill / name
        states = final_states(each, batches, spill=folder, budget=half, label=name)
        streams.append(scored_logits(each, batches, states, skip))
    with reference.outside(head=True), model.outside(head=True):
        rows = [torch.cat(column) for column in zip(*map(_compare, *streams), strict=True)]
    kl, same, nll, nll_reference = rows
    return Divergence(
        float(kl.mean()),
        standard_error(kl),
        float(kl.sort().values[int(0.99 * (len(kl) - 1))]),
        float(kl.max()),
        float(same.double().mean()),
        len(kl),
        summarise(nll, tokens.shape[1], model),
        summarise(nll_reference, tokens.shape[1], reference),
    )


def _compare(of_reference, of_model):
    """Of a few predictions: divergence, whether the likeliest token is the same, both log-likelihoods negated."""
    (expected, wanted), (found, _) = of_reference, of_model
    # Divergences of a good 8-bit model are 1e-6 nats, the difference of log-probabilities near 10: fp64.
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (expected, found.to(expected.device)))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    nll, nll_reference = (-each.gather(-1, wanted[:, None])[:, 0] for each in (log_q, log_p))
    return kl.cpu(), (log_p.argmax(-1) == log_q.argmax(-1)).cpu(), nll.cpu(), nll_reference.cpu()
