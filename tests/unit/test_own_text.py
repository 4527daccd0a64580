"""Rows that a model writes itself: token by token what its predictions say, and what becomes of them in a run."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_columns import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM

import ptq.job
import ptq.own_text
from calibration.attention import use_faster_attention
from calibration.errors import InputError
from calibration.processor import has_bf16_units
from ptq import QuantSpec, quantize_model
from ptq.checkpoint import open_checkpoint
from ptq.clock import Clock
from ptq.families import FAMILIES
from ptq.own_text import OPENING, OwnText, continued
from ptq.streamed import StreamedModel
from ptq.workdir import WorkFolder

TOKENS = torch.arange(4 * 20).reshape(4, 20) * 7 % 290
SPEC = QuantSpec(bits=2, group_size=32, own_tokens=100)  # five rows


def chances(rows, T, seed=0):
    return torch.rand(rows, T, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def one_by_one(model, opening, chances):
    """The same text by its definition: whole rows through the model for each token, no keys kept."""
    rows = []
    for start, of_row in zip(opening.tolist(), chances.tolist(), strict=True):
        row = list(start)
        while len(row) < len(of_row):
            p, total = model(torch.tensor([row]), use_cache=False).logits[0, -1].softmax(-1).tolist(), 0.0
            token = -1
            while total <= of_row[len(row)]:
                token += 1
                total += p[token]
            row.append(token)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@torch.no_grad()
def test_rows_are_what_the_definition_says(model_type, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny(model_type), dtype=torch.float64).eval()
    opening, drawn = TOKENS[:3, :OPENING], chances(3, 40)  # past the sliding windows of 16
    assert torch.equal(continued(model, opening, drawn), one_by_one(model, opening, drawn))


@torch.no_grad()
def test_tokens_are_drawn_from_the_predictions(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    n, opening = 4000, TOKENS[:1, :OPENING]
    p = model(opening).logits[0, -1].double().softmax(-1)
    rows = continued(model, opening.expand(n, -1), chances(n, OPENING + 1))
    expected, seen = n * p, torch.bincount(rows[:, -1], minlength=len(p)).double()
    frequent = expected > 5
    chi2 = ((seen - expected).square() / expected)[frequent].sum()
    degrees = int(frequent.sum())
    assert degrees > 20 and chi2 < degrees + 5 * (2 * degrees) ** 0.5  # five deviations of a chi-squared number
    assert (seen[~frequent].sum() - expected[~frequent].sum()).abs() < 5 * expected[~frequent].sum() ** 0.5


@pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@torch.no_grad()
def test_keys_in_bf16_rarely_change_a_token(model_type, tiny):
    """Rounding moves cumulative probabilities by 1e-2; a token changes where the number drawn lies between the two."""
    model = AutoModelForCausalLM.from_pretrained(tiny(model_type), dtype=torch.float32).eval()
    opening, drawn = (TOKENS[:, :OPENING].repeat(16, 1) + torch.arange(64)[:, None]) % 290, chances(64, OPENING + 2)
    use_faster_attention(model)
    rounded = continued(model, opening, drawn, bf16=True)
    exact = continued(model, opening, drawn)
    alike = rounded[:, OPENING] == exact[:, OPENING]
    assert alike.float().mean() > 0.8 and (rounded[alike] == exact[alike]).all(1).float().mean() > 0.8


def own(folder, *, room=1 << 30, spec=SPEC):
    return OwnText(StreamedModel(open_checkpoint(folder)), spec, Clock(), room=room, bf16=False)


@pytest.mark.parametrize("tie", [False, True])
def test_rows_follow_the_calibration_rows_and_stay_in_the_work_folder(tiny, tmp_path, monkeypatch, tie):
    text, work = own(tiny("llama", tie=tie)), WorkFolder(tmp_path / "out", {}, resume=False)
    found = text.added_to(TOKENS, work)
    assert found.shape == (9, 20) and found.dtype == TOKENS.dtype and torch.equal(found[:4], TOKENS)
    assert torch.equal(found[4:, :OPENING], TOKENS[[0, 1, 2, 3, 0], :OPENING]), "openings go round"
    assert not torch.equal(found[4], found[8]), "the same opening goes on otherwise"
    assert all(p.device.type == "meta" for p in text.model.model.parameters()), "weights are dropped"
    monkeypatch.setattr(ptq.own_text, "continued", None)
    work.close()
    again = own(tiny("llama", tie=tie)).added_to(TOKENS, WorkFolder(tmp_path / "out", {}, resume=True))
    assert torch.equal(again, found), "a resumed run reads what was written"


def test_rows_written_side_by_side_do_not_change_each_other(tiny, tmp_path, monkeypatch):
    whole = own(tiny("llama")).added_to(TOKENS, WorkFolder(tmp_path / "a", {}, resume=False))
    monkeypatch.setattr(ptq.own_text, "AT_ONCE", 2)
    assert torch.equal(own(tiny("llama")).added_to(TOKENS, WorkFolder(tmp_path / "b", {}, resume=False)), whole)


def test_a_model_that_does_not_fit_writes_nothing_and_says_so(tiny, tmp_path, capsys):
    text, work = own(tiny("llama"), room=1000), WorkFolder(tmp_path / "out", {}, resume=False)
    assert text.added_to(TOKENS, work) is TOKENS and text.rows(TOKENS) == 0
    assert "whole in memory it takes 0.0 GB of 0.0 GB" in text.obstacle(TOKENS)
    assert capsys.readouterr().err == f"note: {text.obstacle(TOKENS)}\n"
    assert own(tiny("llama")).obstacle(TOKENS) is None and own(tiny("llama")).rows(TOKENS) == 5
    none = own(tiny("llama"), room=1000, spec=QuantSpec())
    assert none.obstacle(TOKENS) is None and none.rows(TOKENS) == 0, "none is asked for"


def test_a_damaged_model_is_refused_after_it_has_written(tiny, tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    spec = replace(SPEC, fisher_tokens=100)
    with pytest.raises(InputError, match="not finite"):
        quantize_model(folder, spec, out=tmp_path / "out", calibration="stdlib", samples=4, seqlen=20, heldout="none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "nothing is left behind"


def test_a_run_calibrates_on_both(tiny, tmp_path, monkeypatch):
    rows = []
    walk = ptq.job.Walk.run
    monkeypatch.setattr(ptq.job.Walk, "run", lambda self, tokens: (rows.append(len(tokens)), walk(self, tokens)))
    given = {"calibration": "stdlib", "samples": 4, "seqlen": 20, "heldout": "none"}
    made = quantize_model(tiny("llama"), SPEC, out=tmp_path / "both", **given)
    assert rows == [9] and made.report["identity"]["own_rows"] == 5 and made.report["seconds"]["own text"] > 0
    monkeypatch.setattr(ptq.job, "whole_model_room", lambda device: 1000)
    made = quantize_model(tiny("llama"), SPEC, out=tmp_path / "alone", **given)
    assert rows == [9, 4] and made.report["identity"]["own_rows"] == 0
    assert any("without text of the model's own" in note for note in made.report["notes"])
