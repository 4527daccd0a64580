"""The plots of a page."""

import math
from collections.abc import Sequence

from ptq.console import size_text
from ptq.document import Markup
from ptq.report.svg import ACCENT, INK, QUIET, RULE, SECOND, inline, new_figure, styled

PALEST, STRONGEST = 0.06, 0.8
FEW_BLOCKS = 12  # so many have their numbers in the map
LOG_FROM = 30  # bars whose lengths differ more stand on a logarithmic axis


@styled
def heat_map(errors: Sequence[Sequence[float | None]], kinds: Sequence[str], name: str) -> Markup:
    """Errors of each kind of linear (rows) in each block (columns), the deeper the colour the larger, logarithmic.

    Args:
        errors: Kinds x blocks; None where a block has none.
        kinds: Names of the rows.
        name: Of the figure.
    """
    blocks, few = len(errors[0]), len(errors[0]) <= FEW_BLOCKS
    figure = new_figure(2.2 + blocks * (0.62 if few else 0.2), 0.7 + 0.3 * len(kinds))
    axes = figure.subplots()
    logs = [math.log(error) for row in errors for error in row if error] or [0.0]
    low, width = min(logs), max(logs) - min(logs) or 1.0
    for y, row in enumerate(errors):
        known = [(x, error) for x, error in enumerate(row) if error is not None]
        depths = [(math.log(error) - low) / width if error else 0.0 for _, error in known]
        colors = [(ACCENT, PALEST + (STRONGEST - PALEST) * depth) for depth in depths]
        axes.barh([y] * len(known), 0.94, 0.92, [x - 0.47 for x, _ in known], color=colors, linewidth=0)
        for x, error in known if few else ():
            axes.text(x, y, f"{error:.2g}", ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(-0.5, blocks - 0.5), ylim=(len(kinds) - 0.5, -0.5), xlabel="block")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.locator_params(axis="x", integer=True, nbins=min(blocks, 16))
    _bare(axes)
    return inline(figure, name, "error of each linear in each block", "broad")


@styled
def bars(
    labels: Sequence[str], values: Sequence[float], texts: Sequence[str], own: Sequence[bool], name: str, what: str
):
    """Lying bars, each with its label before and its text after it.

    Args:
        labels: Before the bars.
        values: Lengths, positive.
        texts: After the bars.
        own: Which are this run's; the others are outlines.
        name: Of the figure.
        what: What is shown, for who cannot see it.
    """
    figure = new_figure(5.2, 0.35 + 0.3 * len(labels))
    axes = figure.subplots()
    logarithmic = is_logarithmic(values) and not all(own)
    if logarithmic:
        axes.set_xscale("log")
    start = min(values) / 2 if logarithmic else 0.0
    for y, (value, text, ours) in enumerate(zip(values, texts, own, strict=True)):
        color = {"facecolor": ACCENT, "alpha": 0.75} if ours else {"facecolor": "none", "edgecolor": SECOND}
        axes.barh(y, value - start, left=start, height=0.62, **color)
        axes.annotate(text, (value, y), xytext=(4, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(start, _with_room(max(values), max(map(len, texts)), start if logarithmic else None))
    axes.set_xticks([])
    axes.minorticks_off()
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    return inline(figure, name, what)


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether lengths differ so much that the short ones would vanish."""
    return min(values) > 0 and max(values) > LOG_FROM * min(values)


def _with_room(longest, letters, start):
    """Where an axis ends so that texts after its longest bar have room; `start` is that of a logarithmic one."""
    share = min(0.7, 0.05 + 0.018 * letters)  # of the axis
    return longest / (1 - share) if start is None else start * (longest / start) ** (1 / (1 - share))


def parts_of_the_file(parts: dict[str, int], parameters: int, name: str) -> Markup:
    """Bytes of each part, and what they are per weight of the model."""
    ordered = sorted(parts, key=lambda part: -parts[part])
    texts = [f"{size_text(parts[part])}, {8 * parts[part] / parameters:.3f} bits per weight" for part in ordered]
    return bars(
        ordered, [parts[p] for p in ordered], texts, [True] * len(ordered), name, "bytes of each part of the file"
    )


@styled
def histogram(low: float, high: float, before: Sequence[int], after: Sequence[int], name: str) -> Markup:
    """Weights before, as a grey area, and after, as a line, on a logarithmic count."""
    figure = new_figure(3.6, 2.1)
    axes = figure.subplots()
    edges = [low + (high - low) * i / len(before) for i in range(len(before) + 1)]
    axes.stairs([max(n, 0.5) for n in before], edges, baseline=0.5, fill=True, color=QUIET, alpha=0.35, lw=0)
    axes.stairs([max(n, 0.5) for n in after], edges, baseline=0.5, color=ACCENT, lw=1.1)
    axes.set_yscale("log")
    axes.set(ylim=(0.5, None), xlabel="weight")
    axes.grid(axis="y", color=RULE, lw=0.5)
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")  # powers of ten would be typeset, as long as all else
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(length=2, labelsize=8)
    return inline(figure, name, "weights before and after")


def _bare(axes):
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
