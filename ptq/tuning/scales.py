"""End-to-end tuning: the scales of all blocks, codes frozen, towards the full-precision model's predictions.

The loss is KL(full-precision || quantized) of the next token on calibration text (EfficientQAT, arXiv 2407.11062, tunes
the same numbers on the text itself). What is kept is the epoch with the smallest divergence on
rows that took no part.
"""

from math import cos, isfinite, pi

import torch
from tqdm import tqdm

from calibration.errors import TrainingStopped
from calibration.products import bf16_products
from calibration.tokens import hold_back
from ptq.clock import Clock
from ptq.evaluation.stream import batches_of
from ptq.qtensor import digest
from ptq.streamed import StreamedModel
from ptq.tuning.student import StreamedStudent, Text
from ptq.workdir import WorkFolder

STEPS = 16  # of an epoch, at most: each loads every block twice
WARM_UP = 5  # steps in which the learning rate rises
PATIENCE = 2  # epochs without gain after which tuning ends


class ScaleTuning:
    """Tunes what a finished walk left in a work folder, and keeps it there.

    Args:
        model: The full-precision model, streamed.
        spec: QuantSpec: tune_epochs, tune_lr, seed.
        codec: Packs QuantizedTensors and back.
        work: Holds every block.
        clock: Gets the seconds.
        budget: Bytes of activations kept in memory; the rest is spilled. None for no limit. As many bytes of codes stay
            in memory between steps.
        bf16: Form products in bf16 (calibration/products.py).
    """

    def __init__(
        self, model: StreamedModel, spec, codec, work: WorkFolder, clock: Clock,
        *, budget: int | None = None, bf16: bool = False,
    ):  # fmt: skip
        self.model, self.spec, self.codec, self.work, self.clock = model, spec, codec, work, clock
        self.budget, self.bf16 = budget, bf16

    @torch.no_grad()
    def run(self, tokens):
        """Tunes and saves, unless an earlier run did or the spec asks for none.

        Args:
            tokens: (n_samples, seqlen) calibration tokens.

        Raises:
            TrainingStopped: A loss is not finite; the best scales are saved.
        """
        if not self.spec.tune_epochs or self.work.has_tuned:
            return
        with self.clock.phase("tune"), bf16_products(self.bf16):
            student = StreamedStudent(self.model, self.codec, self.work, self.budget)
            text = student.open(batches_of(tokens))
            with self.model.outside(head=True):
                report = self._train(student, text)
            self._save(student, report)
        if "stopped" in report:
            raise TrainingStopped(
                f"tuning: {report['stopped']}; the best scales are kept and --resume goes on with them,"
                " or start again with a smaller learning rate"
            )

    def _train(self, student: StreamedStudent, text: Text) -> dict:
        """Leaves the factors at their best; the report."""
        trained, held = hold_back(len(text.embedded))
        size = -(-len(trained) // STEPS)
        leaves = [factor for factors in student.factors for factor in factors.values()]
        optimizer = torch.optim.Adam(leaves, lr=self.spec.tune_lr, fused=True)
        total, generator = (
            self.spec.tune_epochs * -(-len(trained) // size),
            torch.Generator().manual_seed(self.spec.seed),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / WARM_UP) * _cosine(s, total))
        best = student.divergence(text, held)
        report, kept, waited = {"kl_before": best, "kl_epochs": []}, _copies(leaves), 0
        bar = tqdm(range(self.spec.tune_epochs), desc="tuning", unit="epoch", disable=None)
        for epoch in bar:
            order = [trained[b] for b in torch.randperm(len(trained), generator=generator).tolist()]
            for start in range(0, len(order), size):
                loss = student.backward(text, order[start : start + size])
                if not isfinite(loss):
                    report["stopped"] = f"the divergence is {loss} at epoch {epoch + 1}, step {start // size + 1}"
                    break
                optimizer.step()
                schedule.step()
            reached = student.divergence(text, held)
            if "stopped" in report or not isfinite(reached):
                report.setdefault("stopped", f"the divergence is {reached} after epoch {epoch + 1}")
                break
            report["kl_epochs"].append(reached)
            bar.set_postfix_str(f"divergence {reached:.4g} (before {report['kl_before']:.4g})")
            waited += 1
            if reached < best:
                best, kept, waited = reached, _copies(leaves), 0
            if waited == PATIENCE:
                break
        for leaf, values in zip(leaves, kept, strict=True):
            leaf.copy_(values)
        return report | {"kl_after": best}

    def _save(self, student, report):
        scales, entries = {}, {}
        for i in range(len(self.model.blocks)):
            for name, linear in student.linears(i).items():
                full, tuned = self.model.stored_name(i, name), linear.finish()
                scales[f"{full}.scales"] = self.codec.pack(tuned)["scales"].cpu()
                entries[full] = {"sha256": digest(tuned.dequantize())}
        self.work.save_tuned(scales, report | {"linears": entries})


def _cosine(step, steps):
    return (1 + cos(pi * step / steps)) / 2


@torch.no_grad()
def _copies(tensors):
    return [tensor.clone() for tensor in tensors]
