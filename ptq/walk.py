"""The walk: blocks one by one, each stage solved on the inputs that the already quantized stages deliver.

Two streams of activations go through a block (streams.py): the quantized one and, when the solver corrects for errors
that arrive from earlier layers, the full-precision one.

With several ranks each carries its own calibration batches and solves its own outputs; H and G are summed over all, the
solutions gathered, so every rank's block is the same one. Rank 0 alone holds the work folder.

Methods that train whole blocks (blockwise.py) take the place of the stages; saving, resuming and streams are the same.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from tqdm import tqdm

from calibration.capture import run_block
from calibration.errors import InputError, TrainingStopped
from calibration.products import bf16_products, rounding_once
from calibration.ranks import ALONE, Ranks
from calibration.store import ActivationStore
from ptq.blockwise import BlockReconstruction, BlockTraining
from ptq.clock import Clock
from ptq.grids.affine import HALF_MAX
from ptq.memory import large_blocks_kept, release_freed
from ptq.qtensor import digest
from ptq.quantizers.chunks import ROWS
from ptq.stages import StageSolver
from ptq.streamed import StreamedModel
from ptq.streams import BlockForwards, open_streams, rows_of_batch
from ptq.workdir import Scratch, WorkFolder


def most_ranks(model: StreamedModel, tokens) -> int:
    """How many ranks find work: a batch of tokens (n_samples, seqlen) each, and ROWS outputs of every stage."""
    outputs = [sum(len(model.weight(0, name)) for name in stage) for stage in model.family.stages]
    batches = [] if tokens is None else [-(-len(tokens) // rows_of_batch(model, tokens))]
    return min(batches + [-(-count // ROWS) for count in outputs])


class Walk:
    """Quantizes a streamed model into a work folder.

    Args:
        model: The model, streamed.
        spec: QuantSpec.
        codec: Packs QuantizedTensors into the artefact's tensors and back.
        work: Where finished blocks are kept; on other ranks than the first, where activations are spilled and no more.
        clock: Gets the seconds by phase.
        budget: Bytes of activations kept in memory; the rest is spilled. None for no limit. Half goes to what lies
            between blocks, half to forwards halted inside one; either half is shared by the two streams.
        sums_on_disk: Keep sums of H and G, and G - H for a while, in files.
        limited: Give back at once what a forward frees, although the next one takes it again.
        ranks: This process's place among those that share the work; methods that train want one alone.
        bf16: Form products of the forward passes and of Hessians in bf16 (calibration/products.py).
        embed: Overwrites the loaded embedding (V, D) with the values that the artefact holds; None where those are
            the model's own.
    """

    def __init__(
        self, model: StreamedModel, spec, codec, work: WorkFolder | Scratch, clock: Clock,
        *, budget: int | None = None, sums_on_disk: bool = False, limited: bool = False, ranks: Ranks = ALONE,
        bf16: bool = False, embed: Callable[[torch.Tensor], None] | None = None,
    ):  # fmt: skip
        self.model, self.spec, self.codec, self.embed = model, spec, codec, embed
        self.work, self.clock, self.budget, self.ranks, self.bf16 = work, clock, budget, ranks, bf16
        self.keep = nullcontext if limited else large_blocks_kept
        sums = work.folder / "activations" / "sums" if sums_on_disk else None
        self.stages = StageSolver(model, spec, codec, clock, sums=sums, ranks=ranks, bf16=bf16)

    @torch.no_grad()
    def run(self, tokens):
        """Quantizes and saves every block that the work folder does not hold yet.

        Args:
            tokens: (n_samples, seqlen) calibration tokens; None for methods that need none.

        Raises:
            InputError: Weights or activations are not finite, or a Hessian cannot be factored.
            TrainingStopped: The loss of a block is not finite; the block is saved at its best state.
        """
        blocks = range(len(self.model.blocks))
        todo = self.ranks.from_first(lambda: [i for i in blocks if not self.work.has_block(i)])
        if not todo:
            return
        with self.clock.phase("embed"):
            streams = None if tokens is None else self._open_streams(tokens)
        bar = tqdm(blocks, desc="quantizing", unit="block", disable=None if self.ranks.first else True)
        for i in bar:
            if i not in todo and (streams is None or i > todo[-1]):
                continue
            with ExitStack() as loaded:
                with self.clock.phase("load"):
                    loaded.enter_context(self.model.block(i, linears=i not in todo or not self._by_stages(streams)))
                linears = [self.model.linear(i, name) for name in self.model.family.linears]
                drop_copies = loaded.enter_context(rounding_once(linears))
                if i not in todo:
                    with self._products("forward"):
                        self._replay_block(i, streams)
                    continue
                tensors, report = self._solve_block(i, streams, drop_copies)
                if self.ranks.first:
                    with self.clock.phase("write"):
                        self.work.save_block(i, tensors, report)
            self._stop_if_diverged(i, report)
            bar.set_postfix_str(f"error {max(entry['error'] for entry in report.values()):.3g}")

    def _open_streams(self, tokens):
        release_freed()  # what gradients left, before the embedding comes
        batches = tokens.split(self.spec.train_rows if self.spec.trains else rows_of_batch(self.model, tokens))
        share, spill = self.ranks.share(len(batches)), self.work.folder / "activations"
        own, self._first_token = batches[share], sum(batch.numel() for batch in batches[: share.start])
        two = bool(self.spec.trains or self.spec.reconstruct_epochs or self.spec.correction > 0)
        return open_streams(self.model, own, spill, self.budget, two=two, embed=self.embed)

    def _replay_block(self, i, streams):
        """Carries both streams through a block that an earlier run finished."""
        block, arguments, device = self.model.blocks[i], streams.at(i), self.model.device
        packed = self.ranks.from_first(lambda: self.work.load_block(i))
        if self.bf16:
            self.model.round_linears(i, self.model.family.linears)
        for store in reversed(list(streams)):  # the full-precision one first, while the weights are the original
            if store is streams.quantized:
                for name, parameter in block.named_parameters():
                    key = self.model.stored_key(i, name)
                    if key in packed:
                        parameter.copy_(packed.pop(key))
                for name in self.model.family.linears:
                    prefix = self.model.stored_name(i, name) + "."
                    parts = {key.removeprefix(prefix): part for key, part in packed.items() if key.startswith(prefix)}
                    self.model.weight(i, name).copy_(self.codec.unpack(parts).dequantize())
            for b, hidden in enumerate(store):
                store[b] = run_block(block, hidden.to(device), arguments[b])

    def _solve_block(self, i, streams, drop_copies):
        """Every stage of a block: packed tensors by full name, and report entries by the linear's name.

        `drop_copies` drops those of weights that forwards have made (rounding_once).
        """
        tensors, report = {}, {}
        stages = self.model.family.stages
        if not self._by_stages(streams):
            self._check_range(i, self.model.family.linears)
        if streams is None:
            for stage in stages:
                self._keep(i, stage, self.stages.round(i, stage), tensors, report)
            return tensors, report
        if self.spec.trains:
            return self._train_block(i, streams)
        weights = {name: self.model.weight(i, name).clone() for name in self._reconstructed}
        linears = {}
        with BlockForwards(self.model, i, streams, self._products, bf16=self.bf16, keep=self.keep) as forwards:
            for s, stage in enumerate(stages):
                if not weights:
                    self._load_stage(i, stage)
                release_freed()
                counts = self._counts(i, s)
                hessian = self.stages.hessian(i, stage, cross=streams.full is not None, counts=counts)
                forwards.sum_inputs(hessian)
                drop_copies()  # the original weights of this stage have been multiplied
                if s and not weights:
                    self.model.drop_linears(i, stages[s - 1])  # both streams have left them behind
                H, G = self._finalise(i, stage, hessian)
                release_freed()
                solved = self.stages.solve(i, stage, H, G, 1000 * i + s, self._weighed_outputs(i, s))
                self._keep(i, stage, solved, tensors, report)
                if weights:
                    linears |= dict(zip(stage, solved, strict=True))
                elif self.bf16:
                    self.model.round_linears(i, stage)  # from here on they are only multiplied
                del solved
            if not weights:
                forwards.finish()
                self.model.drop_linears(i, stages[-1])
        if weights:
            self._reconstruct(i, streams, weights, linears, tensors, report)
        return tensors, report

    def _by_stages(self, streams):
        """Whether a stage's weights need be in memory no longer than from its inputs' sums to the next stage's."""
        return streams is not None and not self.spec.trains and not self.spec.reconstruct_epochs

    def _load_stage(self, i, stage):
        with self.clock.phase("load"):
            self.model.load_linears(i, stage)
        self._check_range(i, stage)

    @property
    def _reconstructed(self):
        """Linears whose solution is trained on."""
        return self.model.family.linears if self.spec.reconstruct_epochs else ()

    def _reconstruct(self, i, streams, weights, solved, tensors, report):
        """Trains a solved block on, keeps the better of the two, and takes the quantized stream through it."""
        names = list(solved)
        start, entries = ({name: pair[part] for name, pair in solved.items()} for part in (0, 1))
        training = BlockReconstruction(self.model, i, streams, self.spec)
        with self.clock.phase("forward"):
            before = training.error()
        with self.clock.phase("reconstruct"):
            trained, stopped = training.train(start, weights)
        self._keep(i, names, [(trained[name], entries[name]) for name in names], tensors, report)
        with self.clock.phase("forward"):
            after = reached = training.error()
            if not after < before:
                self._keep(i, names, solved.values(), tensors, report)
                reached = before
            training.advance()
        gained = {"block_error_solved": before, "block_error": reached} | ({"stopped": stopped} if stopped else {})
        for entry in report.values():
            entry |= gained

    def _train_block(self, i, streams):
        """The same for methods that train a block as a whole."""
        spill, share = self.work.folder / "activations" / "targets", self.budget and self.budget // 4
        training = BlockTraining(self.model, i, streams, self.spec, ActivationStore(spill, share))
        with self.clock.phase("forward"):
            training.transform()
        with self._products("forward"):
            training.prepare()
        with self.clock.phase("solve"):
            trained = training.train(bf16=self.bf16)
        tensors, report = {}, {}
        for name, values in trained.changed.items():
            self.model.blocks[i].get_parameter(name).copy_(values)
            tensors[self.model.stored_key(i, name)] = values.cpu()
        entry = {"stopped": trained.stopped} if trained.stopped else {}
        solved = [(trained.quantized[name], entry) for name in self.model.family.linears]
        self._keep(i, self.model.family.linears, solved, tensors, report)
        with self._products("forward"):
            reached = training.advance()
        return tensors, {name: reached | entry for name, entry in report.items()}

    def _stop_if_diverged(self, i, report):
        """Ends the run after a block whose training broke off: whoever resumes accepts its best state."""
        stopped = next((entry["stopped"] for entry in report.values() if "stopped" in entry), None)
        if stopped:
            raise TrainingStopped(
                f"{self.model.block_name(i)}: {stopped}; its best state is kept and --resume goes on from there,"
                " or start again with a smaller learning rate"
            )

    def _check_range(self, i, linears):
        """Refuses weights that no fp16 scale reaches."""
        for name in linears:
            largest = float(self.model.weight(i, name).abs().max())
            if largest > HALF_MAX:
                raise InputError(
                    f"{self.model.stored_name(i, name)} holds a weight of {largest:.3g}; scales are stored in fp16,"
                    f" which ends at {HALF_MAX:.0f}: the checkpoint is damaged"
                )

    @contextmanager
    def _products(self, phase):
        """A phase that the clock books, with bf16 products if the walk has them."""
        with self.clock.phase(phase), bf16_products(self.bf16):
            yield

    def _counts(self, i, s):
        """How much each of this rank's tokens counts in a stage's Hessian; None where all count the same."""
        if self.spec.weighs_outputs:
            return self.ranks.from_first(lambda: self.work.token_weights(i, s))[self._first_token :]

    def _weighed_outputs(self, i, s):
        """H_O of a stage's runs of outputs; None where each output is by itself."""
        if self.spec.weighs_outputs:
            return self.ranks.from_first(lambda: self.work.fisher(i, s))

    def _finalise(self, i, stage, hessian):
        """H, and G, W (G - H) or None."""
        with self.clock.phase("hessian"):
            H, G = hessian.finalise(self.ranks)
        if not bool(torch.isfinite(H.diagonal()).all()):
            raise InputError(
                f"the inputs of {self.model.stored_name(i, stage[0])} are not finite on the calibration text: --dtype"
                " float32 has the widest range; if they stay so, the model is damaged before this block"
            )
        return H, G

    def _keep(self, i, stage, solved, tensors, report):
        """Writes a solved stage into the live block, and files its packed tensors and its report."""
        for name, (qt, entry) in zip(stage, solved, strict=True):
            linear, values = self.model.stored_name(i, name), qt.dequantize()
            self.model.weight(i, name).copy_(values)
            report[linear] = {**entry, "shape": list(values.shape), "sha256": digest(values)}
            with self.clock.phase("pack"):
                for part, tensor in self.codec.pack(qt).items():
                    tensors[f"{linear}.{part}"] = tensor.cpu()
