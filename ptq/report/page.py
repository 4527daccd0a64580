"""report.html: what a run did, drawn from ptq_report.json alone."""

from collections import defaultdict
from dataclasses import dataclass

from ptq.console import size_text
from ptq.document import Markup, document, element, table
from ptq.evaluation.published.doubts import find_doubts
from ptq.evaluation.published.models import rows_like
from ptq.evaluation.published.rows import published_rows
from ptq.report.plots import bars, heat_map, histogram, is_logarithmic, parts_of_the_file
from ptq.report.steps import in_its_block, place, steps

PERPLEXITIES = {"PPL": "text not stated", "Wikitext2": "wikitext2", "C4": "c4"}
WORST = 10
BITS = "Per weight: over all weights of the model. Kept matrices: embeddings, head, what else was not quantized."


@dataclass(frozen=True)
class Generations:
    """What two models say after a prompt."""

    prompt: str
    before: str
    after: str


def page(report: dict, generations: Generations | None = None) -> str:
    """The page.

    Args:
        report: As in ptq_report.json; parts that older runs did not keep are left out.
        generations: Text of the full-precision and of the quantized model; None for what the run kept of it.
    """
    spec = report["identity"]["spec"]
    title = f"{report['model']}, {spec['bits']} bits"
    parts = [element("h1", title), element("p", _in_words(report), class_="quiet")]
    if "command" in report:
        parts.append(element("pre", report["command"]))
    parts += [
        _facts(report),
        *_perplexity(report),
        *_errors(report["linears"], report["identity"]["calibration"]),
        *steps(report),
        *_bits(report),
    ]
    parts += [*_histograms(report), *_generations(generations or _kept(report)), *_time(report), *_runtimes(report)]
    return document(title, *parts)


def _in_words(report):
    spec, calibration = report["identity"]["spec"], report["identity"]["calibration"]
    group = "one scale a row" if spec["group_size"] == -1 else f"groups of {spec['group_size']}"
    text = "no calibration text"
    if calibration:
        text = (
            f"calibrated on {calibration['samples']} rows of {calibration['seqlen']} tokens of {calibration['source']}"
        )
    return f"{spec['method']}, {'' if spec['sym'] else 'a'}symmetric, {group}; {text}; seed {spec['seed']}"


def _facts(report):
    bits, size, perplexity = report["bits_per_weight"], report["file_bytes"], report["perplexity"]
    facts = []
    if perplexity:
        before, after = (perplexity[when]["perplexity"] for when in ("before", "after"))
        facts.append((f"perplexity, {perplexity['text']}", f"{before:.4g} → {after:.4g}"))
    facts += [
        ("bits per weight, linears", f"{bits['linears']:.2f}{_shortest(bits)}"),
        ("bits per weight, everything", f"{bits['before']:.2f} → {bits['after']:.2f}"),
        ("file", f"{size_text(size['before'])} → {size_text(size['after'])}"),
        ("seconds" + (", since resumed" if report["resumed"] else ""), f"{report['seconds']['total']:.0f}"),
        *((f"peak memory, {kind}", size_text(n)) for kind, n in report["peak_memory_bytes"].items()),
    ]
    return element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in facts),
                   class_="facts")  # fmt: skip


def _shortest(bits):
    """What two or three values need, where the file's 2-bit words take more."""
    shortest = bits.get("shortest", bits["linears"])
    return f" ({shortest:.2f} with codes as short as may be)" if shortest < bits["linears"] else ""


def _perplexity(report):
    measured, bars_of = report["perplexity"], []
    if not measured:
        return
    for when in ("before", "after"):
        found = measured[when]
        bars_of.append(
            (f"{when}, {measured['text']}", found["perplexity"], f"{found['perplexity']:.2f} ± {found['stderr']:.2f}")
        )
    own, published = len(bars_of), _published(report)
    bars_of += [(label, row.number, row.value + (" (doubtful)" if doubts else "")) for label, row, doubts in published]
    labels, values, texts = zip(*bars_of, strict=True)
    figure = bars(labels, values, texts, [i < own for i in range(len(values))], "perplexity", "perplexities")
    caption = f"Protocol gptq, {measured['after']['tokens']} tokens in windows of {measured['after']['seqlen']}."
    if published:
        caption += " Outlined: published figures of this model at these bits, as printed; texts and windows differ, so"
        caption += " they show an order of magnitude and do not compare."
    if published and is_logarithmic(values):
        caption += " Lengths are logarithmic."
    notes = [f"{label}: {text}" for label, _, doubts in published for text in doubts]
    yield from (element("h2", "Perplexity"), _figure(figure, caption))
    if notes:
        yield element("ul", *(element("li", text) for text in notes), class_="notes")


def _published(report):
    """(label, row, doubts) of published perplexities of the same model at the same bits."""
    rows = rows_like(report["model"], published_rows())
    bits = str(report["identity"]["spec"]["bits"])
    doubts = defaultdict(list)
    for doubt in find_doubts(published_rows()):
        for row in doubt.rows:
            doubts[row].append(doubt.text)
    found = {}
    for row in rows:
        if row.bits == bits and row.number is not None and row.task in PERPLEXITIES:
            group = f" g{row.group}" if row.group else ""
            teacher = f", teacher {row.teacher}" if row.teacher else ""
            label = f"{row.method}{group}{teacher}, {PERPLEXITIES[row.task]}"
            found.setdefault((label, row.value), (label, row, doubts[row]))
    return list(found.values())


def _errors(linears, calibration):
    kinds, blocks = _by_kind_and_block(linears)
    figure = heat_map([[blocks[block].get(kind) for block in blocks] for kind in kinds], kinds, "errors")
    errors = [entry["error"] for entry in linears.values()]
    of = "output on the calibration text" if calibration else "weights"
    caption = (
        f"The share of each linear's squared {of} that is lost, from {min(errors):.2g} (palest) to {max(errors):.2g};"
        " the scale is logarithmic. Writing zeros would lose 1."
    )
    worst = sorted(linears, key=lambda linear: -linears[linear]["error"])[:WORST]
    rows = [("", [in_its_block(linear), f"{linears[linear]['error']:.3g}"]) for linear in worst]
    yield from (element("h2", "Error"), _figure(figure, caption), element("p", "The largest:", class_="quiet"))
    yield table(["linear", "error"], rows)


def _by_kind_and_block(linears):
    """Names of linears inside a block, and errors by block and name."""
    blocks = defaultdict(dict)
    for linear, entry in linears.items():
        block, kind = place(linear)
        blocks[block][kind] = entry["error"]
    return list(dict.fromkeys(kind for of_block in blocks.values() for kind in of_block)), dict(sorted(blocks.items()))


def _bits(report):
    if "bytes" in report:
        figure = parts_of_the_file(report["bytes"], report["parameters"], "parts")
        yield from (
            element("h2", "Where the bits went"),
            _figure(figure, BITS),
        )


def _histograms(report):
    found = report.get("histograms", {})
    if not found:
        return
    yield element("h2", "Weights before and after")
    figures = (
        _figure(histogram(h["low"], h["high"], h["before"], h["after"], f"weights{n}"), in_its_block(linear))
        for n, (linear, h) in enumerate(found.items())
    )
    yield element(
        "p", "The linears with the largest errors. Grey: before. Line: after. Counts are logarithmic.", class_="quiet"
    )
    yield element("div", *figures, class_="tiles")


def _kept(report) -> Generations | None:
    kept = report.get("generations")
    return None if kept is None else Generations(**kept)


def _generations(generations):
    if generations is None:
        return
    texts = (("before", generations.before), ("after", generations.after))
    columns = (element("div", element("p", name, class_="quiet"), element("pre", text)) for name, text in texts)
    yield element("h2", "What it says")
    yield element("p", "The likeliest token each time, after this:", class_="quiet")
    yield element("pre", generations.prompt)
    yield element("div", *columns, class_="columns")


def _time(report):
    seconds = {phase: spent for phase, spent in report["seconds"].items() if phase != "total"}
    rows = [("", [phase, f"{spent:.1f}"]) for phase, spent in sorted(seconds.items(), key=lambda item: -item[1])]
    yield from (element("h2", "Where the time went"), table(["phase", "seconds"], rows))


def _runtimes(report):
    rows = [("", [v["name"], "loads it" if v["loads"] else f"does not: {v['why']}"]) for v in report["runtimes"]]
    yield from (element("h2", "Who loads it"), table(["runtime", ""], rows, text_columns=2))


def _figure(svg: Markup, caption: str) -> Markup:
    return element("figure", element("div", svg, class_="plot"), element("figcaption", caption))
