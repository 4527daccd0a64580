"""End-to-end tuning: the codes and scales of all blocks, towards the full-precision model's predictions.

The loss is KL(full-precision || quantized) of the next token on calibration text. EfficientQAT (arXiv 2407.11062)
trains scales so, with codes frozen, on the text itself; here codes move as well, by straight-through gradients as in
BitDistiller (arXiv 2402.10631), from where the solver left them, and few turn. What is kept is the epoch with the
smallest divergence on rows that took no part.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from math import cos, hypot, isfinite, pi
from time import monotonic

import torch
from tqdm import tqdm

from calibration.errors import TrainingStopped
from calibration.products import bf16_products
from calibration.tokens import hold_back
from ptq.clock import Clock
from ptq.qtensor import digest
from ptq.streamed import StreamedModel
from ptq.tuning.state import TuningState, best_divergence
from ptq.tuning.student import StreamedStudent, Text
from ptq.workdir import WorkFolder

BATCH_TOKENS = 512  # of a step, or a row: many small steps turn the codes that gain, a few large ones hardly any
STEPS = 1024  # of an epoch, at most: each loads every block twice
WARM_UP = 5  # steps in which the learning rates rise
KEEP_AFTER = 600  # seconds of work that are worth writing down: 12 bytes a weight


class EndToEndTuning:
    """Tunes what a finished walk left in a work folder, and keeps it there.

    Args:
        model: The full-precision model, streamed.
        spec: QuantSpec: tune_epochs, tune_lr, tune_drift, seed.
        codec: Packs QuantizedTensors and back.
        work: Holds every block.
        clock: Gets the seconds.
        budget: Bytes of activations, of codes and of what is trained that stay in memory from one step to the next; the
            rest is spilled. None for no limit.
        bf16: Form products in bf16 (calibration/products.py).
        embed: Overwrites the loaded embedding (V, D) with the values that the artefact holds; None where those are
            the model's own.
    """

    def __init__(
        self, model: StreamedModel, spec, codec, work: WorkFolder, clock: Clock,
        *, budget: int | None = None, bf16: bool = False, embed: Callable[[torch.Tensor], None] | None = None,
    ):  # fmt: skip
        self.model, self.spec, self.codec, self.work, self.clock = model, spec, codec, work, clock
        self.budget, self.bf16, self.embed = budget, bf16, embed

    @torch.no_grad()
    def run(self, tokens):
        """Tunes and saves, unless an earlier run did or the spec asks for none.

        Args:
            tokens: (n_samples, seqlen) calibration tokens.

        Raises:
            TrainingStopped: A loss is not finite; the best epoch is saved.
        """
        if not self.spec.tune_epochs or self.work.has_tuned:
            return
        state = TuningState(self.work, len(self.model.blocks))
        if state.report() is None:
            state.drop()
            self.work.drop_tuned()
        with self.clock.phase("tune"), bf16_products(self.bf16):
            student = StreamedStudent(self.model, self.codec, self.work, self.budget, codes=self.spec.tune_drift > 0)
            if student.trained.empty:
                return
            text = student.open(tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])), self.embed)
            with self.model.outside(head=True):
                report = self._train(student, text, state)
            self.work.save_tuned(report)
            state.drop()
        if "stopped" in report:
            raise TrainingStopped(
                f"tuning: {report['stopped']}; the best epoch is kept and --resume goes on with it,"
                " or start again with a smaller learning rate"
            )

    def _train(self, student: StreamedStudent, text: Text, state: TuningState) -> dict:
        """Saves the best epoch's blocks; the report."""
        trained, held = hold_back(len(text.embedded))
        size = -(-len(trained) // STEPS)
        rates = self._rates(self.spec.tune_epochs * -(-len(trained) // size))
        bar = tqdm(rates, desc="tuning", unit="step", disable=None)
        generator = torch.Generator().manual_seed(self.spec.seed)
        report, kept, steps = state.report(), monotonic(), iter(bar)
        if report is None:
            report = {"kl_before": student.divergence(text, held), "kl_epochs": [], "codes_turned": 0.0}
        else:
            state.restore(student.trained, report)
        for epoch in range(self.spec.tune_epochs):
            order = [trained[b] for b in torch.randperm(len(trained), generator=generator).tolist()]
            batches = [order[k : k + size] for k in range(0, len(order), size)]
            if epoch < len(report["kl_epochs"]):  # an earlier run did
                deque(islice(steps, len(batches)), 0)
                continue
            reached = self._epoch(student, text, batches, held, steps)
            if isinstance(reached, str):
                report["stopped"] = f"the divergence is {reached.format(epoch + 1)}"
                break
            bar.set_postfix_str(f"divergence {reached:.4g} (before {report['kl_before']:.4g})")
            if reached < best_divergence(report):
                report["codes_turned"] = self._save_blocks(student)
            report["kl_epochs"].append(reached)
            if monotonic() - kept > KEEP_AFTER and epoch + 1 < self.spec.tune_epochs:
                state.keep(student.trained, report)
                kept = monotonic()
        bar.close()
        return report | {"kl_after": best_divergence(report)}

    def _rates(self, steps) -> list[dict[str, float]]:
        """The learning rates of scales and of positions in each step.

        Adam's steps are as long as its learning rate, so positions under pure noise end sqrt(sum of squared rates)
        away: that is what tune_drift says, whatever the number of steps.
        """
        shares = [min(1, (step + 1) / WARM_UP) * _cosine(step, steps) for step in range(steps)]
        of_codes = self.spec.tune_drift / hypot(*shares)
        return [{"factor": self.spec.tune_lr * share, "position": of_codes * share} for share in shares]

    def _epoch(self, student, text, batches, held, steps):
        """Divergence on the rows held back after one of `steps` for each list of batches; in words if not finite."""
        for step, some in enumerate(batches, 1):
            loss = student.backward(text, some, partial(student.trained.step, rates=next(steps)))
            if not isfinite(loss):
                return f"{loss} at epoch {{}}, step {step}"
        reached = student.divergence(text, held)
        return reached if isfinite(reached) else f"{reached} after epoch {{}}"

    def _save_blocks(self, student) -> float:
        """Keeps all blocks as they are now; the share of codes that are others than the walk's."""
        turned = total = 0
        for i in range(len(self.model.blocks)):
            packed, entries = {}, {}
            for name, linear in student.linears(i).items():
                full, tuned = self.model.stored_name(i, name), linear.finish()
                packed |= {f"{full}.{part}": tensor.cpu() for part, tensor in self.codec.pack(tuned).items()}
                entries[full] = {"sha256": digest(tuned.dequantize())}
                turned += int((tuned.codes != linear.start.codes).sum())
                total += tuned.codes.numel()
            self.work.save_tuned_block(i, packed, entries)
        return turned / total


def _cosine(step, steps):
    return (1 + cos(pi * step / steps)) / 2
