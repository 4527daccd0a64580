"""README.md of an artefact: what it is, how it was made, what was measured, how to load it."""

from dataclasses import fields

from ptq.console import size_text
from ptq.spec import QuantSpec

HEAD = """---
tags:
- {method}
- {tag}
- ptq
---

# {model}, {label}

{model}, quantized after training to {label} by {method}: {linears:.2f} bits per weight in the linears, {after:.2f}
over the whole model.

## Made by

{fence}
{command}
{fence}
"""
MEASURED = """
## Measured

| | before | after |
|---|---|---|
"""
LOADING = """
## Load it

{fence}
{lines}
{fence}
"""


def card(report: dict, folder: str) -> str:
    """The model card.

    Args:
        report: As in ptq_report.json.
        folder: What the artefact is called in commands.
    """
    spec, bits = report["identity"]["spec"], report["bits_per_weight"]
    label, tag = f"{spec['bits']} bits", f"{spec['bits']}-bit"
    if _is_gguf(spec):
        label, tag = QuantSpec(**spec).label, "gguf"
    names = {"model": report["model"], "command": report["command"], "method": spec["method"]}
    head = HEAD.format(fence="```", label=label, tag=tag, **names, **bits)
    tail = "\nErrors of each linear, seconds and memory: `ptq_report.json`, drawn in `report.html`.\n"
    return head + MEASURED + _measured(report) + _spec(spec, report) + _loading(report, folder) + tail


def _measured(report):
    perplexity, bits, size = report["perplexity"], report["bits_per_weight"], report["file_bytes"]
    rows = [
        ("bits per weight, everything", f"{bits['before']:.2f}", f"{bits['after']:.2f}"),
        ("file", size_text(size["before"]), size_text(size["after"])),
    ]
    if perplexity:
        before, after = (perplexity[when] for when in ("before", "after"))
        what = f"perplexity, {perplexity['text']}, {after['tokens']} tokens in windows of {after['seqlen']}"
        numbers = (f"{found['perplexity']:.3f} ± {found['stderr']:.3f}" for found in (before, after))
        rows.insert(0, (what, *numbers))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _spec(spec, report):
    calibration = report["identity"]["calibration"]
    rows = [*spec.items(), *(() if calibration is None else _calibration(calibration))]
    return "\n## Settings\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _calibration(calibration):
    names = ("source", "samples", "seqlen", "fingerprint")
    return [(f"calibration {name}", calibration[name]) for name in names if name in calibration]


def _is_gguf(spec):
    return spec["checkpoint_format"] == "gguf"


def _loading(report, folder):
    if _is_gguf(report["identity"]["spec"]):
        file = f"{folder}/{report['model']}-{QuantSpec(**report['identity']['spec']).label}.gguf"
        return f"\n## Load it\n\n```\nllama-cli -m {file}\npython -m ptq.evaluate {file}\n```\n"
    lines = []
    if any(verdict["loads"] and verdict["name"].startswith("transformers") for verdict in report["runtimes"]):
        lines += ["from transformers import AutoModelForCausalLM  # with GPTQModel installed", ""]
        lines += [f"model = AutoModelForCausalLM.from_pretrained({folder!r})"]
    python = LOADING.format(fence="```", lines="\n".join(lines)) if lines else ""
    shell = f"python -m ptq.generate {folder} --prompt 'Once upon a time'\npython -m ptq.evaluate {folder}"
    return python + ("" if lines else "\n## Load it\n") + f"\n```\n{shell}\n```\n"


def python_call(model, spec: QuantSpec, **options) -> str:
    """The call of quantize_model that makes an artefact, without what has its default."""
    usual = QuantSpec()
    chosen = [
        f"{f.name}={getattr(spec, f.name)!r}" for f in fields(spec) if getattr(spec, f.name) != getattr(usual, f.name)
    ]
    named = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    recipe = f"QuantSpec({', '.join(chosen)})"
    return f"quantize_model({', '.join([repr(None if model is None else str(model)), recipe, *named])})"
