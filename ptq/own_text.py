"""Calibration rows that the full-precision model writes itself.

What is fitted to few calibration tokens fits them better than other text. The model is a source of more, in the
distribution that counts: what it would say (LLM-QAT, arXiv 2305.17888, trains on such text alone). Each row begins as a
calibration row does and goes on with tokens drawn from the model's predictions, all of the vocabulary, temperature 1.

For this alone the model is in memory whole, beside the keys and values of the rows being written: a token at a time
through blocks that come and go would read all weights once for each.

Legend: T tokens of a row, V vocabulary.
"""

import sys

import torch
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

from calibration.attention import is_faster
from calibration.products import bf16_products
from calibration.ranks import ALONE, Ranks
from ptq.clock import Clock
from ptq.memory import release_freed
from ptq.streamed import StreamedModel
from ptq.workdir import Scratch, WorkFolder

OPENING = 8  # tokens of a calibration row that a row of its own begins with
AT_ONCE = 64  # rows written side by side
PART = "own-text"


class OwnText:
    """Writes rows once and keeps them in the work folder.

    Args:
        model: The full-precision model, streamed.
        spec: QuantSpec: own_tokens, seed.
        clock: Gets the seconds.
        room: Bytes that weights, keys and values may take.
        bf16: Form products in bf16 (calibration/products.py).
        ranks: This process's place among several; the first writes for all, since last bits of a forward depend on how
            many rows go through it, and a token on them.
    """

    def __init__(self, model: StreamedModel, spec, clock: Clock, *, room: int, bf16: bool, ranks: Ranks = ALONE):
        self.model, self.spec, self.clock, self.room, self.bf16, self.ranks = model, spec, clock, room, bf16, ranks

    def rows(self, tokens) -> int:
        """How many will be written beside calibration rows (n_samples, T)."""
        return 0 if self.obstacle(tokens) else self._asked(tokens)

    def obstacle(self, tokens) -> str | None:
        """Why none can be written beside them; None if they can, or none is asked for."""
        asked = self._asked(tokens)
        needed = self._bytes_of_weights + min(AT_ONCE, asked) * tokens.shape[1] * self._bytes_a_token
        if not asked or needed <= self.room:
            return None
        return (
            f"calibrated without text of the model's own: whole in memory it takes {needed / 1e9:.1f} GB"
            f" of {self.room / 1e9:.1f} GB that it may; more --samples make up for that"
        )

    @torch.no_grad()
    def added_to(self, tokens, work: WorkFolder | Scratch):
        """Calibration rows (n_samples, T) and after them as many of the model's own as the spec asks for."""
        obstacle = self.obstacle(tokens)
        if obstacle and self.ranks.first:
            print(f"note: {obstacle}", file=sys.stderr)
        if obstacle or not self.spec.own_tokens:
            return tokens
        return torch.cat([tokens, self.ranks.from_first(lambda: self._kept(tokens, work)).to(tokens.dtype)])

    def _kept(self, tokens, work):
        """Rows of an earlier run, or new ones."""
        if not work.has_part(PART):
            with self.clock.phase("own text"):
                work.save_part(PART, {"tokens": self._write(tokens)}, {})
        return work.part_tensor(PART, "tokens")

    def _write(self, tokens):
        count, T = self._asked(tokens), tokens.shape[1]
        openings = tokens[torch.arange(count) % len(tokens), :OPENING]
        chances = torch.rand(count, T, generator=torch.Generator().manual_seed(self.spec.seed), dtype=torch.double)
        rows = []
        with (
            self.model.whole_for_a_while() as model,
            tqdm(total=count * max(0, T - OPENING), desc="own text", unit="token", disable=None, leave=False) as bar,
        ):
            for opening, of_rows in zip(openings.split(AT_ONCE), chances.split(AT_ONCE), strict=True):
                rows.append(continued(model, opening.to(self.model.device), of_rows, bf16=self.bf16, bar=bar).cpu())
        release_freed()
        return torch.cat(rows)

    def _asked(self, tokens):
        return -(-self.spec.own_tokens // tokens.shape[1])

    @property
    def _bytes_of_weights(self):
        return self.model.dtype.itemsize * self.model.weight_count

    @property
    def _bytes_a_token(self):
        """Of keys and values, were there as many heads of them as of queries."""
        return 2 * self.model.dtype.itemsize * len(self.model.blocks) * self.model.config.hidden_size


def continued(model, opening, chances, *, bf16=False, bar=None):
    """Rows (n, T) that begin with `opening` (n, k) and go on with tokens drawn from the model's predictions.

    Args:
        model: A Hugging Face causal language model with its weights.
        opening: First tokens.
        chances: (n, T) between 0 and 1: at each position the token is the first whose cumulative probability is
            larger. So rows do not depend on those beside them.
        bf16: Form products in bf16, and keep in bf16 what attention multiplies.
        bar: A progress bar of tokens.
    """
    T, kept = chances.shape[1], torch.bfloat16 if bf16 and is_faster(model.config) else None
    given = text = opening[:, :T]
    cache = Cache(layers=[_RoomyLayer(T, kept) for _ in range(model.config.num_hidden_layers)])
    while text.shape[1] < T:
        with bf16_products(bf16):
            logits = model(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1]
        below = logits.double().softmax(-1).cumsum(-1)
        chance = chances[:, text.shape[1], None].to(below.device).contiguous()
        given = torch.searchsorted(below, chance, right=True).clamp_(max=below.shape[1] - 1)
        text = torch.cat([text, given], 1)
        if bar is not None:
            bar.update(len(text))
    return text


class _RoomyLayer(DynamicLayer):
    """Keys and values of a block with room for all tokens from the start; growing would copy them at each.

    Args:
        tokens: How many there will be.
        kept: dtype of the room; None for that of what comes.
    """

    def __init__(self, tokens, kept):
        super().__init__()
        self.tokens, self.kept = tokens, kept

    def lazy_initialization(self, key_states, value_states):
        """Makes the room."""
        super().lazy_initialization(key_states, value_states)
        self.filled = 0
        shapes = ((*x.shape[:-2], self.tokens, x.shape[-1]) for x in (key_states, value_states))
        self.room = [key_states.new_empty(shape, dtype=self.kept) for shape in shapes]

    def update(self, key_states, value_states, *args, **kwargs):
        """Adds tokens; all keys and values until now, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[..., self.filled : end, :] = states
        self.filled = end
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values
