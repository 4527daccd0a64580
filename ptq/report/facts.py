"""What a page shows and only the weights can tell: kept in ptq_report.json, so that pages need no weights."""

import torch

SHOWN_LINEARS = 3
BINS = 61


def weight_histograms(source, packed, per_linear: dict) -> dict[str, dict]:
    """Counts of weights before and after, in BINS bins from low to high, for the linears with the largest errors.

    Args:
        source: The full-precision checkpoint; read() is asked.
        packed: The artefact as plain weights.
        per_linear: Report entries by linear.
    """
    worst = sorted(per_linear, key=lambda linear: -per_linear[linear]["error"])[:SHOWN_LINEARS]
    return {linear: _histogram(*(_weights(file, linear) for file in (source, packed))) for linear in worst}


def _weights(file, linear):
    name = f"{linear}.weight"
    return file.read([name])[name].float().flatten()


def _histogram(before, after):
    low, high = (float(extreme(before.aminmax(), after.aminmax())) for extreme in (_lowest, _highest))
    counts = {key: torch.histc(weights, BINS, low, high).int().tolist() for key, weights in
              (("before", before), ("after", after))}  # fmt: skip
    return {"low": low, "high": high, **counts}


def _lowest(*ranges):
    return min(found.min for found in ranges)


def _highest(*ranges):
    return max(found.max for found in ranges)
