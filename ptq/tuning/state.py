"""The state of a tuning that goes on, in the work folder: what a run that was killed goes on from."""

from shutil import disk_usage

from ptq.tuning.trained import TrainedBlocks
from ptq.workdir import WorkFolder

RECORD = "tuning"  # that all blocks' parts are there, and the report so far


class TuningState:
    """Kept after an epoch, in place of the one before.

    Args:
        work: Where it lies, beside the blocks that the best epoch left.
        blocks: How many the model has.
    """

    def __init__(self, work: WorkFolder, blocks: int):
        self.work, self.blocks = work, range(blocks)

    def report(self) -> dict | None:
        """The report that was kept with it; None where there is no state, or part of it or of the best epoch lacks."""
        if not self.work.has_part(RECORD):
            return None
        report = self.work.part_report(RECORD)
        whole = all(self.work.has_part(_part(report, i)) for i in self.blocks)
        best = best_divergence(report) == report["kl_before"] or all(map(self.work.has_tuned_block, self.blocks))
        return report if whole and best else None

    def restore(self, trained: TrainedBlocks, report: dict):
        """Puts what is trained into the state that goes with a report."""
        for i in self.blocks:
            for name, tensor in trained.state(i).items():
                tensor.copy_(self.work.part_tensor(_part(report, i), name))

    def keep(self, trained: TrainedBlocks, report: dict):
        """Writes the state down, if the disk has room for it beside the one before."""
        size = sum(tensor.nbytes for i in self.blocks for tensor in trained.state(i).values())
        if disk_usage(self.work.folder).free < 2 * size:
            return
        for i in self.blocks:
            self.work.save_part(_part(report, i), trained.state(i), {})
        self.work.save_part(RECORD, {}, report)
        self.work.drop_parts(f"{RECORD}-*", but=[_part(report, i) for i in self.blocks])

    def drop(self):
        """Removes it."""
        self.work.drop_parts(f"{RECORD}*")


def best_divergence(report: dict) -> float:
    """The smallest so far."""
    return min([report["kl_before"], *report["kl_epochs"]])


def _part(report, i):
    return f"{RECORD}-{len(report['kl_epochs']):05d}-{i:05d}"
