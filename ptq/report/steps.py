"""What each step gained: linears and blocks, from plain rounding to the last epoch, and the model end to end."""

from collections import defaultdict
from collections.abc import Iterator

from ptq.document import Markup, element, table

LINEAR_STEPS = {
    "error_rtn": "plain rounding",
    "error_gptq": "GPTQ",
    "error": "refined",
    "error_coupled_gptq": "outputs weighed, GPTQ",
    "error_coupled": "outputs weighed, refined",
}
BLOCK_STEPS = {"block_error_solved": "block, solved", "block_error": "block, reconstructed"}
LEGEND = (
    "Of each block: the mean over its linears of the share of squared output that is lost, step by step; then the same"
    " share of the block's own output, before and after its codes and scales were trained."
)


def steps(report: dict) -> Iterator[Markup]:
    """Tables of blocks, of linears and of epochs; those that the run has figures for.

    Args:
        report: As in ptq_report.json.
    """
    linears = report["linears"]
    of_linears = _present(LINEAR_STEPS, linears)
    if len(of_linears) > 1:
        of_blocks = _present(BLOCK_STEPS, linears)
        yield element("h2", "What each step gained")
        yield element("p", LEGEND if of_blocks else LEGEND.partition(";")[0] + ".", class_="quiet")
        yield table(["block", *of_linears.values(), *of_blocks.values()], _block_rows(linears, of_linears, of_blocks))
        rows = [("", [in_its_block(name), *_figures(entry, of_linears)]) for name, entry in linears.items()]
        listed = table(["linear", *of_linears.values()], rows)
        yield element("details", element("summary", "Every linear"), listed)
    yield from _tuning(report.get("tuning"))


def _tuning(tuning):
    if not tuning:
        return
    epochs = [("before", tuning["kl_before"])]
    epochs += [(f"epoch {i}", reached) for i, reached in enumerate(tuning["kl_epochs"], 1)]
    rows = [("", [name, f"{reached:.5f}"]) for name, reached in epochs]
    text = (
        f"Codes and scales were tuned end to end: divergence from the full-precision model on rows held back"
        f" {tuning['kl_before']:.4g} → {tuning['kl_after']:.4g} nats, {tuning['codes_turned']:.2%} of the codes turned."
        f" The best epoch was kept."
    )
    yield from (element("h2", "Tuning"), element("p", text, class_="quiet"), table(["", "divergence"], rows))


def _present(names, linears):
    """Those that every linear has."""
    return {key: head for key, head in names.items() if all(key in entry for entry in linears.values())}


def _block_rows(linears, of_linears, of_blocks):
    blocks = defaultdict(list)
    for linear, entry in linears.items():
        blocks[place(linear)[0]].append(entry)
    for block, entries in sorted(blocks.items()):
        means = {key: sum(entry[key] for entry in entries) / len(entries) for key in of_linears}
        yield "", [str(block), *_figures(means, of_linears), *_figures(entries[0], of_blocks)]


def _figures(entry, names):
    return [f"{entry[key]:.3g}" for key in names]


def place(linear: str) -> tuple[int, str]:
    """model.layers.3.mlp.up_proj is mlp.up_proj of block 3."""
    parts = linear.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return int(parts[at]), ".".join(parts[at + 1 :])


def in_its_block(linear: str) -> str:
    """The same in words."""
    block, kind = place(linear)
    return f"block {block}, {kind}"
