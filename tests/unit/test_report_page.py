"""The page and the card from a made-up record, and the facts that are taken from weights."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from made_up import KINDS, record
from pages import faults, text_of

from ptq.evaluation.published.models import rows_like
from ptq.evaluation.published.rows import published_rows
from ptq.formats import GptqFormat
from ptq.report import files
from ptq.report.card import card, python_call
from ptq.report.facts import BINS, SHOWN_LINEARS, weight_histograms
from ptq.report.page import Generations, page
from ptq.report.plots import bars, histogram
from ptq.report.svg import VARIABLES
from ptq.spec import QuantSpec


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_the_page_is_sound_and_fetches_nothing(blocks):
    text = page(record(blocks), Generations("import", "<b>\n  os", "sys & so"))
    assert not faults(text) and "http" not in text
    shown = text_of(text)
    for part in (
        "demo, 2 bits",
        "--out 'a b'",
        "5.5 → 9.25",
        "2.14",
        "<b>\n  os",
        "sys & so",
        "does not: its kernel has 4",
    ):
        assert part in shown
    assert f"block {blocks - 1}, mlp.down_proj" in shown
    assert "linear's squared output on the calibration text that is lost, from 0.001" in shown


def test_colours_are_the_pages_own():
    text = page(record())
    assert not [color for color in VARIABLES if color in text]
    drawn = "".join(re.findall("<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-fA-F]{6}", drawn) and "font-family" not in drawn and drawn.count("<svg") == 4


def test_what_a_run_did_not_keep_is_left_out():
    old = {k: v for k, v in record(perplexity=None).items() if k not in ("bytes", "histograms", "command")}
    old["identity"]["calibration"] = None
    old["linears"] = {name: {"error": 0.0, "error_rtn": 0.0} for name in old["linears"]}
    text = page(old)
    assert not faults(text) and "Perplexity" not in text_of(text) and "no calibration text" in text_of(text)
    assert "linear's squared weights that is lost" in text_of(text)


def test_bits_of_codes_as_short_as_may_be():
    assert "as short as" not in text_of(page(record()))
    bits = {"before": 16.0, "after": 2.5, "linears": 2.14, "shortest": 1.725}
    assert "2.14 (1.73 with codes as short as may be)" in text_of(page(record(bits_per_weight=bits)))


def test_what_each_step_gained():
    plain = record()
    assert "What each step gained" in text_of(page(plain)) and "Tuning" not in text_of(page(plain))
    assert "reconstructed" not in text_of(page(plain))
    linears = {
        name: entry | {"block_error_solved": 0.04321, "block_error": 0.01234}
        for name, entry in plain["linears"].items()
    }
    tuned = {"kl_before": 0.5, "kl_after": 0.375, "kl_epochs": [0.4375, 0.375], "codes_turned": 0.0123}
    text = page(plain | {"linears": linears, "tuning": tuned})
    assert not faults(text)
    cells = re.findall("<tr><td>2</td>(.*?)</tr>", text)[0]  # block 2: means over its linears, then its own
    assert re.findall(r">([\d.]+)<", cells) == ["0.3", "0.2", "0.003", "0.0432", "0.0123"]
    assert "0.5 → 0.375 nats" in text_of(text) and ">0.43750<" in text and "block 1, mlp.down_proj" in text


def test_published_figures_of_the_same_model_and_bits():
    text = page(record(model="Llama-2-7b-hf"))
    shown = text_of(text)
    assert "OmniQuant g128, wikitext2: Wikitext2 12.84; 11.06 in OmniQuant's README" in shown
    assert "12.84 (doubtful)" in shown and "BitDistiller, text not stated" in shown and "do not compare" in shown
    mine = [row for row in rows_like("Llama-2-7b-hf", published_rows()) if row.task in ("Wikitext2", "C4", "PPL")]
    other = {row.value for row in mine if row.bits != "2"} - {row.value for row in mine if row.bits == "2"}
    assert len(other) > 8 and not [value for value in other if f">{value}" in text]
    assert "LLaMA-2-70B" not in shown and "Lengths are logarithmic" in shown
    assert "Outlined" not in text_of(page(record()))


def test_the_heat_map_has_a_cell_for_each_linear():
    maps = re.findall(r"<svg[^>]*error of each linear.*?</svg>", page(record(5)), re.DOTALL)[0]
    depths = [float(depth) for depth in re.findall(r"fill: var\(--accent\); fill-opacity: ([\d.]+)", maps)]
    assert len(depths) == 5 * len(KINDS) and min(depths) == 0.06 and max(depths) == 0.8
    assert depths == sorted(depths[:5]) * 2  # errors grow with the block


@pytest.mark.parametrize("longest", [3.0, 3e6])
def test_texts_after_bars_end_inside_the_picture(longest):
    """Letters of 9 points are 5.5 wide on average in the widest font of the page's list."""
    texts = ["2.1 MB, 2.907 bits per weight"] * 6
    drawn = bars(["norms and biases"] * 6, [longest, 1, 1, 1, 1, 1], texts, [False] * 6, "n", "what")
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', drawn)[1])
    starts = [float(x) for x in re.findall(r'translate\(([\d.]+) [\d.]+\)">2.1 MB', drawn)]
    starts += [float(x) for x in re.findall(r' x="([\d.]+)"[^>]*>2.1 MB', drawn)]
    assert len(starts) == 6 and max(starts) + 5.5 * len(texts[0]) <= width


def test_histogram_names_do_not_meet():
    two = histogram(-1, 1, [1, 2], [2, 1], "a") + histogram(-1, 1, [1, 2], [2, 1], "b")
    ids = re.findall(r' id="([^"]+)"', two)
    assert ids and len(ids) == len(set(ids))


class Weights(dict):
    def names(self):
        return list(self)

    def shape(self, name):
        return tuple(self[name].shape)

    def nbytes(self, name):
        return self[name].nbytes

    def read(self, names):
        return {name: self[name] for name in names}


def test_histograms_count_every_weight_of_the_worst_linears():
    generator = torch.Generator().manual_seed(0)
    source = Weights({f"l{i}.weight": torch.randn(64, 32, generator=generator) for i in range(5)})
    packed = Weights({name: weight.round() for name, weight in source.items()})
    found = weight_histograms(source, packed, {f"l{i}": {"error": i} for i in range(5)})
    assert list(found) == ["l4", "l3", "l2"] and len(found) == SHOWN_LINEARS
    for linear, h in found.items():
        before, after = source[f"{linear}.weight"], packed[f"{linear}.weight"]
        assert len(h["before"]) == len(h["after"]) == BINS and sum(h["before"]) == sum(h["after"]) == 64 * 32
        assert h["low"] == min(before.min(), after.min()) and h["high"] == max(before.max(), after.max())
        edges = torch.linspace(h["low"], h["high"], BINS + 1, dtype=torch.float64)
        for weights, counted in ((before, h["before"]), (after, h["after"])):
            oracle = torch.histogram(weights.double().flatten(), edges).hist
            assert int((oracle - torch.tensor(counted)).abs().sum()) <= 2  # one on an edge may fall either way


def test_bytes_by_part_add_up():
    packed = Weights(
        {
            "a.qweight": torch.zeros(4, 8, dtype=torch.int32),
            "a.scales": torch.zeros(1, 8, dtype=torch.float16),
            "embed.weight": torch.zeros(10, 8),
            "norm.weight": torch.zeros(8),
        }
    )
    parts = GptqFormat(QuantSpec()).bytes_by_part(SimpleNamespace(packed=packed))
    assert parts == {"codes": 128, "scales": 16, "kept matrices": 320, "norms and biases": 32}


def test_the_card():
    text = card(record(), "my-folder")
    assert text.startswith("---\ntags:\n- gptq\n- 2-bit\n") and "python -m ptq.quantize --bits 2 --out 'a b'" in text
    assert "| perplexity, wikitext2, 4096 tokens in windows of 2048 | 5.500 ± 0.040 | 9.250 ± 0.040 |" in text
    assert "from_pretrained('my-folder')" in text and "| calibration fingerprint | f1 |" in text
    blocked = card(record(runtimes=[{"name": "transformers", "loads": False, "why": "x"}], perplexity=None), "f")
    assert "from_pretrained" not in blocked and "ptq.generate f" in blocked and "perplexity," not in blocked


def test_the_python_call_makes_the_same_spec():
    spec = QuantSpec(bits=3, sym=False, seed=4)
    call = python_call("m", spec, samples=8, calibration=None)
    assert call == "quantize_model('m', QuantSpec(bits=3, sym=False, seed=4), samples=8)"
    seen = []
    eval(call, {"QuantSpec": QuantSpec, "quantize_model": lambda model, s, **_: seen.append(s)})
    assert seen == [spec]


def test_files(tmp_path):
    files.write_page(tmp_path, json.loads(json.dumps(record())))
    files.write_card(tmp_path, record(), "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "report.html"]
