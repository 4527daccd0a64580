"""How outputs of a linear weigh against each other: H_O = E[g g^T], g the gradient of the loss in its outputs.

The loss is that of predicting tokens drawn from the full-precision model itself, so H_O is the Fisher information of
its predictions, not of the text's (YAQA, arXiv 2505.22988; K-FAC, arXiv 1503.05671). One pass forward through the
blocks and one in reverse, a block in memory at a time, as tuning does it. Outputs are taken in runs (coupled_cuts): of
each run H_O is a square, between runs it is not asked for.

With several ranks each takes its own batches through, with the draws that one process would give them. Products of a
batch are fp32, sums over batches fp64, for the reason that calibration/hessian.py gives.

Legend: O outputs of a run, T tokens.
"""

from contextlib import contextmanager
from functools import partial

import torch
from tqdm import tqdm

from calibration.capture import run_block
from calibration.errors import InputError
from calibration.hessian import mirror, tiles
from calibration.products import bf16_products, rounded_linears
from calibration.ranks import ALONE, Ranks
from calibration.store import ActivationStore
from ptq.clock import Clock
from ptq.evaluation.stream import LOGIT_ENTRIES
from ptq.memory import release_freed
from ptq.quantizers.chunks import coupled_cuts
from ptq.streamed import StreamedModel
from ptq.workdir import Scratch, WorkFolder

HEAD_TOKENS = 256  # predicted at once at most: the heap keeps logits of a small vocabulary from one to the next
MOST_DRAWS = 4  # of a token; two were as good (LOG.md)
TILE = 128  # rows of H_O summed at once, from the diagonal on: runs are a few hundred rows, and half of one is enough
OUTLIERS = 0.99  # tokens of larger gradients count as this quantile


class FisherPass:
    """Measures every block's H_O and keeps it in the work folder.

    Args:
        model: The full-precision model, streamed.
        spec: QuantSpec: fisher_tokens, seed.
        work: Where the matrices go; on other ranks than the first, where activations are spilled and no more.
        clock: Gets the seconds.
        budget: Bytes of activations kept in memory; the rest is spilled. None for no limit.
        bf16: Form products in bf16 (calibration/products.py).
        ranks: This process's place among those that share the work.
    """

    def __init__(
        self, model: StreamedModel, spec, work: WorkFolder | Scratch, clock: Clock,
        *, budget: int | None, bf16: bool, ranks: Ranks = ALONE,
    ):  # fmt: skip
        self.model, self.spec, self.work, self.clock = model, spec, work, clock
        self.budget, self.bf16, self.ranks = budget, bf16, ranks

    @torch.no_grad()
    def run(self, tokens):
        """Measures what the walk will ask for, unless an earlier run did or the spec asks for nothing.

        Args:
            tokens: (n_samples, seqlen) calibration tokens; the first fisher_tokens of them are used, up to MOST_DRAWS
                times with other draws where there are fewer.

        Raises:
            InputError: A gradient is not finite.
        """
        if not self.spec.weighs_outputs or self.ranks.from_first(self._measured):
            return
        asked, T = self.spec.fisher_tokens, tokens.shape[1]
        batches = tokens[: max(1, asked // T)].split(max(1, batch_tokens(self.model) // T))
        with self.clock.phase("fisher"), bf16_products(self.bf16):
            self._measure(batches, draws=min(max(1, asked // tokens.numel()), MOST_DRAWS))

    def _measured(self):
        """Whether an earlier run has left all that the walk will ask for."""
        wanted = [i for i in range(len(self.model.blocks)) if not self.work.has_block(i)]
        return all(self.work.has_fisher(i) for i in wanted)

    def _measure(self, batches, draws):
        share, own = self.budget and self.budget // (2 + draws), self.ranks.share(len(batches))
        entering, states, arguments = self._forward(batches[own], share)
        with self.model.outside(head=True), rounded_linears([self.model.model.get_output_embeddings()]):
            gradients = [self._store(f"gradients-{draw}", share) for draw in range(draws)]
            self._draw(batches, own, states, gradients)
        del states
        for i in self._bar(reversed(range(len(self.model.blocks))), "gradients"):
            found = self._backward(i, entering, arguments, gradients)
            if self.ranks.first:
                self.work.save_fisher(i, *found)

    def _draw(self, batches, own, states, gradients):
        """Gradients to the last block's outputs, a store for each draw; other ranks' random numbers are let pass."""
        generator = torch.Generator().manual_seed(self.spec.seed)
        for store in gradients:
            for b, batch in enumerate(batches):
                if own.start <= b < own.stop:
                    store.append(self._head(states[b - own.start], generator))
                    release_freed()
                else:
                    for some in self._predictions(batch.numel()):
                        sign_words(some.stop - some.start, self.model.config.vocab_size, generator)

    def _bar(self, blocks, label):
        hidden = None if self.ranks.first else True
        return tqdm(blocks, label, len(self.model.blocks), unit="block", disable=hidden, leave=False)

    def _forward(self, batches, share):
        """What enters each block, block by block, what leaves the last one, and the blocks' other arguments."""
        entering, states = self._store("entering", share), self._store("states", share)
        arguments, by_rows = [], {}
        with self.model.outside(head=False):
            for batch in batches:
                hidden, of_batch = self.model.embed(batch)
                arguments.append(by_rows.setdefault(len(batch), of_batch))
                states.append(hidden)
        for i in self._bar(range(len(self.model.blocks)), "predictions"):
            with self._block(i) as block:
                for b, hidden in enumerate(states):
                    entering.append(hidden)
                    states[b] = out = run_block(block, hidden.to(self.model.device), arguments[b][i])
                    if not bool(torch.isfinite(out).all()):
                        self._refuse(f"the activations that leave {self.model.block_name(i)}")
        return entering, states, arguments

    def _head(self, hidden, generator):
        """A draw of the gradient to hidden (rows, T, D) of what each prediction loses.

        The gradient in the logits has the covariance of that of -log p over tokens drawn from p, diag(p) - p p^T, and
        is drawn as sqrt(p) z - p (sqrt(p) . z), z random signs: drawn tokens would have heavier tails.
        """
        shape = hidden.shape
        hidden = hidden.to(self.model.device).flatten(0, 1)[None]
        gradient, parts = torch.zeros_like(hidden), list(self._predictions(hidden.shape[1]))
        kept = [torch.empty(parts[0].stop, self.model.config.vocab_size, device=hidden.device) for _ in range(2)]
        for some in parts:  # in numbers that are kept: new pages are slow to get
            with torch.enable_grad():
                leaf = hidden[:, some].detach().requires_grad_()
                logits = self.model.logits(leaf)[0].float()
            p, drawn = (of_step[: len(logits)] for of_step in kept)
            torch.sqrt(torch.softmax(logits, -1, out=p), out=drawn)
            flip_signs(drawn, generator)
            drawn.sub_(p.mul_(drawn.sum(-1, keepdim=True)))
            gradient[:, some] = torch.autograd.grad(logits, leaf, drawn)[0]
        return gradient.view(shape)

    def _predictions(self, count):
        """`count` predictions in parts whose logits are held at once."""
        step = min(HEAD_TOKENS, max(1, LOGIT_ENTRIES // self.model.config.vocab_size))
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def _backward(self, i, entering, arguments, gradients):
        """Takes every draw's gradients back through block i; H_O by stage and run, the stages' weights of tokens."""
        stages, count = self.model.family.stages, len(arguments)
        sums, squares = [self._zeros(i, stage) for stage in stages], [{} for _ in stages]
        with self._block(i) as block:
            for b in range(count):
                with torch.enable_grad(), self._watched(i, partial(self._add, i, b, sums, squares)):
                    hidden = entering[i * count + b].to(self.model.device).requires_grad_()
                    out = run_block(block, hidden, arguments[b][i])
                for store in gradients:
                    given, again = store[b].to(self.model.device), store is not gradients[-1]
                    store[b] = torch.autograd.grad(out, hidden, given, retain_graph=again)[0]
                del out
                release_freed()
        runs = [[self._summed(of_stage.pop(0)) for _ in list(of_stage)] for of_stage in sums]
        if not all(bool(torch.isfinite(HO.diagonal()).all()) for of_stage in runs for HO in of_stage):
            where = "at this block or after; --fisher-tokens 0 does without gradients"
            self._refuse(f"the gradients in {self.model.block_name(i)}", where)
        none = torch.zeros(0, device=self.model.device)  # of a rank without batches
        own = [torch.cat([none, *of_tokens.values()]) for of_tokens in squares]
        return runs, [token_weights(self.ranks.gather(of_tokens).cpu()) for of_tokens in own]

    def _zeros(self, i, stage):
        """Sums of the H_O of a stage's runs, by tiles that begin at the diagonal."""
        weights = [self.model.weight(i, name) for name in stage]
        runs = coupled_cuts(sum(map(len, weights)), weights[0].shape[1])
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.model.device)
        sizes = [run.stop - run.start for run in runs]
        return [[zeros(tile.stop - tile.start, size - tile.start) for tile in tiles(size, TILE)] for size in sizes]

    def _summed(self, parts):
        """H_O of a run, of all ranks' tokens, on the CPU."""
        size = parts[0].shape[1]
        HO = torch.empty(size, size)
        for tile, part in zip(tiles(size, TILE), parts, strict=True):
            HO[tile, tile.start :] = self.ranks.all_reduce(part)
        return mirror(HO)

    @staticmethod
    def _refuse(what, where="at this block or before"):
        raise InputError(
            f"{what} are not finite on the calibration text: --dtype float32 has the widest range; if they stay so,"
            f" the model is damaged {where}"
        )

    def _add(self, i, b, sums, squares, stage, gradients):
        """Adds a draw's g g^T of every run of a stage's outputs, and g . g of the tokens of batch b."""
        g = torch.cat([gradients.pop(name).flatten(0, -2).float() for name in self.model.family.stages[stage]], 1)
        of_tokens = squares[stage]
        of_tokens[b] = of_tokens.get(b, 0) + torch.linalg.vector_norm(g, dim=1).square()
        sizes = [parts[0].shape[1] for parts in sums[stage]]
        for parts, own in zip(sums[stage], g.split(sizes, 1), strict=True):
            for tile, part in zip(tiles(own.shape[1], TILE), parts, strict=True):
                part.add_(own[:, tile].T @ own[:, tile.start :])

    @contextmanager
    def _block(self, i):
        """Block i for estimates."""
        linears = [self.model.linear(i, name) for name in self.model.family.linears]
        with self.model.block(i) as block, rounded_linears(linears):
            yield block

    def _watched(self, i, take):
        return _Watched([[(name, self.model.linear(i, name)) for name in s] for s in self.model.family.stages], take)

    def _store(self, name, share):
        return ActivationStore(self.work.folder / "activations" / name, share)


def batch_tokens(model: StreamedModel) -> int:
    """How many tokens go back at once, or a row: half of a forward's, since a block keeps what it makes of them."""
    return model.batch_tokens // 2


def flip_signs(numbers: torch.Tensor, generator: torch.Generator):
    """Turns the sign of each of (T, V) fp32 numbers with a probability of one half, in place."""
    words = sign_words(*numbers.shape, generator).to(numbers.device)
    for bit, some in enumerate(numbers.view(torch.int32).split(words.shape[1], 1)):
        some.bitwise_xor_((words[:, : some.shape[1]] << bit).bitwise_and_(-(2**31)))


def sign_words(T: int, V: int, generator: torch.Generator) -> torch.Tensor:
    """A random bit for each of (T, V) numbers, in words of 32."""
    return torch.empty(T, -(-V // 32), dtype=torch.int32).random_(-(2**31), 2**31, generator=generator)


def token_weights(squares):
    """How often each token counts in H, (T,), 1 on average: the root of its gradient's square, without outliers."""
    if not bool(squares.any()):
        return torch.ones_like(squares)
    weights = squares.clamp(max=squares.quantile(OUTLIERS)).sqrt()
    return weights / weights.mean()


class _Watched:
    """Context of a forward pass whose way back gives the gradients of linears' outputs, stage by stage.

    Args:
        stages: (name, linear) of each linear, by stage.
        take: Called with the number of a stage and its gradients by name, once on each way back, when all are there;
            it may take them out.
    """

    def __init__(self, stages, take):
        self.stages, self.take = stages, take

    def __enter__(self):
        self.hooks = [
            linear.register_forward_hook(partial(self._await, waiting, name, stage, len(linears)))
            for stage, linears in enumerate(self.stages)
            for waiting in [{}]
            for name, linear in linears
        ]

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _await(self, waiting, name, stage, count, module, arguments, out):
        out.register_hook(partial(self._arrive, waiting, name, stage, count))

    def _arrive(self, waiting, name, stage, count, gradient):
        waiting[name] = gradient
        if len(waiting) == count:
            with torch.no_grad():
                self.take(stage, waiting)
            waiting.clear()
