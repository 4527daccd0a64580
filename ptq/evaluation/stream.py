"""A streamed model over windows of tokens: every window through one block, then the next block; logits a few rows each.

Nothing of the size of the model or of all logits is ever in memory: one block, the hidden states of all windows (on
disk past a budget), and logits of LOGIT_ENTRIES.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from calibration.capture import run_block
from calibration.store import ActivationStore
from ptq.memory import release_freed
from ptq.streamed import StreamedModel

BATCH_TOKENS = 2048  # an MLP holds four times its width for each
LOGIT_ENTRIES = 1 << 22  # logits held at once, fp32; several copies of them are on the way


def batches_of(tokens: torch.Tensor) -> Sequence[torch.Tensor]:
    """Windows (n, seqlen) in batches of about BATCH_TOKENS."""
    return tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))


@torch.no_grad()
def final_states(
    model: StreamedModel, batches: Sequence[torch.Tensor], *, spill: Path | None, budget: int | None, label: str
) -> ActivationStore:
    """What leaves the last block, (rows, seqlen, D) for each batch.

    Args:
        model: The model, streamed.
        batches: From batches_of.
        spill: Folder for activations past `budget` bytes.
        budget: Bytes of activations kept in memory; None for no limit.
        label: Names the progress bar.
    """
    store, arguments, by_rows = ActivationStore(spill, budget), [], {}
    with model.outside(head=False):
        for batch in batches:
            hidden, of_batch = model.embed(batch)
            arguments.append(by_rows.setdefault(len(batch), of_batch))
            store.append(hidden)
    for i in tqdm(range(len(model.blocks)), desc=label, unit="block", disable=None, leave=False):
        with model.block(i) as block:
            for b, hidden in enumerate(store):
                store[b] = run_block(block, hidden.to(model.device), arguments[b][i])
        release_freed()  # or what is held grows from block to block
    return store


@torch.no_grad()
def scored_logits(
    model: StreamedModel, batches: Sequence[torch.Tensor], states: ActivationStore, skip: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits (N, vocabulary) in fp32 with the tokens (N,) that follow, a few rows each; inside outside(head=True).

    Args:
        model: The model.
        batches: As given to final_states.
        states: From final_states.
        skip: Leading positions of each window whose predictions are not scored.
    """
    step = max(1, LOGIT_ENTRIES // model.config.vocab_size)
    for batch, hidden in zip(batches, states, strict=True):
        rows, wanted = hidden[:, skip:-1].flatten(0, 1), batch[:, skip + 1 :].flatten()
        for some, ids in zip(rows.split(step), wanted.split(step), strict=True):
            logits = model.logits(some[None].to(model.device))[0].float()
            yield logits, ids.to(logits.device)
