"""What each type of each tensor costs: KL divergence from the full-precision model's predictions, one tensor at a time.

For a linear and a type, the solver's error tr(D H D^T) is found on a sample of its rows. KL is measured once, with the
linear in the type whose size is nearest to the target, on rows of text that took no part in H; for the other types it
goes by their errors,

    KL(type) = KL(probe) * error(type) / error(probe),

because the divergence of a small error is quadratic in it. Of embedding and head every type is measured. KL of several
tensors is the sum of each one's: errors of different tensors are nearly uncorrelated.

Everything is streamed: a block is loaded once, solved in all types, and the hidden states of all probes so far (one
tensor replaced in each) pass through it. So the cost is one forward of the probe text through half of the model for
each linear, and the memory that of a block; hidden states are spilled past a budget.

Legend: O outputs, T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from calibration.capture import run_block
from calibration.hessian import Hessian
from calibration.store import ActivationStore
from ptq.evaluation.stream import LOGIT_ENTRIES, batches_of
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.mixture.assignment import bits_of
from ptq.mixture.outer import decode_table, encode_table
from ptq.quantizers.gptq import gptq
from ptq.streamed import StreamedModel

SOLVED_TOKENS, PROBED_TOKENS = 16384, 2048
SAMPLED_ROWS = 64
REFINE_ROUNDS = 1  # errors of all types shrink alike with more


def split_rows(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, T) to solve on, and others to measure KL on; the same where there is but one."""
    count, length = tokens.shape
    probed = max(1, min(count // 4, PROBED_TOKENS // length))
    solved = tokens[: max(1, min(count - probed, SOLVED_TOKENS // length))]
    return solved, tokens[-probed:]


class Survey:
    """Measures a model.

    Args:
        model: The full-precision model, streamed.
        spec: QuantSpec.
        types: The types that each tensor may get, by the linear's name or the table's, narrowest first.
        tables: What embedding and head are solved on by name, or None.
        bits: Bits a weight that are aimed at; decides the types that KL of linears is measured with.
        spill: Folder for hidden states past `budget` bytes.
        budget: Bytes of hidden states kept in memory; None for no limit.
    """

    def __init__(
        self,
        model: StreamedModel,
        spec,
        types: Mapping[str, Sequence[str]],
        tables: Mapping[str, torch.Tensor | None],
        bits: float,
        *,
        spill: Path | None = None,
        budget: int | None = None,
    ):
        self.model, self.types, self.tables, self.bits = model, types, tables, bits
        self.spec, self.fast = spec, replace(spec, refine_rounds=min(REFINE_ROUNDS, spec.refine_rounds))
        share = budget and budget // 4
        *self._stores, self._encoded = (
            ActivationStore(spill and spill / name, share) for name in ("solved", "probed", "changed", "tables")
        )
        self._tables: dict[tuple[str, str], int] = {}  # where in the last one a table of a type lies
        self._probes: list[tuple[str, str]] = []  # (tensor, type), in the order of what is stored of them
        self._errors: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def run(self, tokens: torch.Tensor) -> dict[str, dict[str, float]]:
        """KL in nats a token of every type of every tensor, from calibration rows (n, T)."""
        solved, probed = split_rows(tokens)
        self._embed(batches_of(solved), batches_of(probed))
        bar = tqdm(range(len(self.model.blocks)), desc="measuring types", unit="block", disable=None)
        for i in bar:
            with self.model.block(i):
                self._block(i)
        measured = self._divergences()
        return {name: self._costs(name, measured) for name in self.types}

    def _costs(self, name, measured):
        found = {kind: kl for (tensor, kind), kl in measured.items() if tensor == name}
        if name in self.tables:
            return {kind: found[kind] for kind in self.types[name]}
        ((probe, kl),) = found.items()
        errors = self._errors[name]
        return {kind: kl * errors[kind] / max(errors[probe], 1e-30) for kind in self.types[name]}

    def _embed(self, solved, probed):
        """Fills the stores; of the embedding, one set of probes for each type."""
        self._arguments, by_rows = [], {}
        with self.model.outside(head=False):
            for store, batches in zip(self._stores, (solved, probed), strict=False):
                arguments = []
                for batch in batches:
                    hidden, of_batch = self.model.embed(batch)
                    arguments.append(by_rows.setdefault(len(batch), of_batch))
                    store.append(hidden)
                self._arguments.append(arguments)
            embedding = self.model.embedding_key
            for name, H in self.tables.items():
                W = self.model.checkpoint.read([name])[name].to(self.model.device)
                for kind in self.types[name]:
                    self._tables[name, kind] = len(self._encoded)
                    self._encoded.append(torch.from_numpy(encode_table(W, BLOCK_GRIDS[kind], H, self.fast)))
                    if name == embedding:
                        self._decode((name, kind), self.model.embedding_weight)
                        self._probe(name, kind, lambda b: self.model.embed(probed[b])[0])

    def _decode(self, case, target):
        decode_table(self._encoded[self._tables[case]].numpy(), case[1], target)

    def _probe(self, name, kind, hidden_of):
        """Stores the hidden states of one more probe."""
        self._probes.append((name, kind))
        for b in range(len(self._stores[1])):
            self._stores[2].append(hidden_of(b))

    def _block(self, i):
        """Solves block i's linears in all types, takes probes through it, and adds one for each linear."""
        solved, probed, changed = self._stores
        block, device = self.model.blocks[i], self.model.device
        arguments = [of_batch[i] for of_batch in self._arguments[1]]
        hessians = self._hessians(i, solved)
        for k in range(len(changed)):
            changed[k] = run_block(block, changed[k].to(device), arguments[k % len(arguments)])
        for stage, hessian in zip(self.model.family.stages, hessians, strict=True):
            for name, kind, values in self._solve(i, stage, hessian.finalise()[0]):
                weight = self.model.weight(i, name)
                original = weight.clone()
                weight.copy_(values)
                probe = lambda b: run_block(block, probed[b].to(device), arguments[b])  # noqa: E731
                self._probe(self.model.stored_name(i, name), kind, probe)
                weight.copy_(original)
        for b, hidden in enumerate(probed):
            probed[b] = run_block(block, hidden.to(device), arguments[b])

    def _hessians(self, i, store):
        """H of each stage; the store's hidden states are taken through the block."""
        hessians = []
        with ExitStack() as hooks:
            for stage in self.model.family.stages:
                linear = self.model.linear(i, stage[0])
                hessian = Hessian(self.model.weight(i, stage[0]).shape[1], device=self.model.device)
                handle = linear.register_forward_pre_hook(lambda _, args, h=hessian: h.add(args[0]))
                hooks.callback(handle.remove)
                hessians.append(hessian)
            for b, hidden in enumerate(store):
                store[b] = run_block(self.model.blocks[i], hidden.to(self.model.device), self._arguments[0][b][i])
        return hessians

    def _solve(self, i, stage, H):
        """Errors of a stage's linears in each type, and (linear, type, values) of each one's probe."""
        names = {name: self.model.stored_name(i, name) for name in stage}
        weights = {name: self.model.weight(i, name) for name in stage}
        kinds = self.types[names[stage[0]]]
        probe = min(kinds, key=lambda kind: (abs(bits_of(kind) - self.bits), bits_of(kind)))
        sampled = {name: _sample(len(W)) for name, W in weights.items()}
        for kind in kinds:
            rows = None if kind == probe else sampled
            parts = [W if rows is None else W[rows[name]] for name, W in weights.items()]
            solution = gptq(parts, H.clone(), replace(self.fast, correction=0.0), grid=BLOCK_GRIDS[kind])
            start = 0
            for name, part in zip(stage, parts, strict=True):
                own = slice(start, start := start + len(part))
                loss = solution.loss[own] if rows is not None else solution.loss[own][sampled[name]]
                self._errors.setdefault(names[name], {})[kind] = float(loss.sum())
                if kind == probe:
                    yield name, kind, solution.quantized.rows(own).dequantize()

    def _divergences(self) -> dict[tuple[str, str], float]:
        """Mean KL of each probe, the full-precision model's predictions against its own."""
        _, probed, changed = self._stores
        step = max(1, 4 * LOGIT_ENTRIES // self.model.config.vocab_size)  # with each, every head is decoded again
        totals, count = {}, 0
        with self.model.outside(head=True):
            original = self.model.head_weight.clone()
            head, batches = self.model.head_key or self.model.embedding_key, len(probed)
            for b in range(batches):
                for rows in torch.arange(probed[b].shape[:2].numel()).split(step):
                    log_p = self._log_probabilities(probed[b], rows)
                    p = log_p.exp()
                    count += len(rows)
                    cases = {(n, k): changed[j * batches + b] for j, (n, k) in enumerate(self._probes)}
                    cases |= {case: probed[b] for case in self._tables if case not in cases}
                    for case, hidden in cases.items():
                        if case[0] == head:
                            self._decode(case, self.model.head_weight)
                        log_q = self._log_probabilities(hidden, rows)
                        totals[case] = totals.get(case, 0.0) + float((p * (log_p - log_q)).sum(dtype=torch.float64))
                        if case[0] == head:
                            self.model.head_weight.copy_(original)
        return {case: max(total / count, 0.0) for case, total in totals.items()}

    def _log_probabilities(self, hidden, rows):
        """fp32, whose errors of 1e-6 nats have either sign: over all rows less than what an 8-bit tensor costs."""
        some = hidden.flatten(0, 1)[rows][None].to(self.model.device)
        return self.model.logits(some)[0].float().log_softmax(-1)


def _sample(rows):
    """Evenly spaced rows."""
    return torch.arange(rows) if rows <= SAMPLED_ROWS else torch.linspace(0, rows - 1, SAMPLED_ROWS).long()
