"""Tables of baselines: every published figure with its doubts, the order of cells, and what is refused."""

import csv
import fcntl
import io
import re

import pytest
from made_up import RESULT
from pages import faults, text_of

from calibration.errors import InputError
from ptq.baselines import __main__ as command
from ptq.baselines.grid import Cell, Grid, Model, Settings, in_order_of_cost
from ptq.baselines.page import page
from ptq.baselines.presets import PRESETS
from ptq.baselines.published import published_entries
from ptq.baselines.rows import labels, measured_row
from ptq.baselines.sections import build_sections
from ptq.baselines.tables import figure_text, long_csv, markdown
from ptq.evaluation.published.doubts import find_doubts
from ptq.evaluation.published.rows import SOURCES, published_rows


def sections(name, *, stand_in=False, result=None):
    preset = PRESETS[name]
    return build_sections(preset.grids, preset.settings, preset.sources, lambda cell: result, stand_in=stand_in)


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_figure_and_doubt_stands_in_each_file(name):
    built = sections(name)
    texts = {"md": markdown(name, [], built), "html": text_of(page(name, [], built)), "csv": long_csv(built)}
    published = [row for row in published_rows() if row.source in PRESETS[name].sources]
    doubts = [doubt for doubt in find_doubts(published_rows()) if doubt.rows[0].source in PRESETS[name].sources]
    assert len(published) > 19
    for kind, text in texts.items():
        plain = text.replace('""', '"')
        missing = [row for row in published if row.value not in plain or (row.error and row.stderr not in plain)]
        assert not missing, kind
        assert not [doubt for doubt in doubts if doubt.text not in plain], kind


@pytest.mark.parametrize("name", PRESETS)
def test_each_figure_stands_in_its_own_row(name):
    """By the CSV: as many figures of a value as the documents print, the shorter revision folded into the longer."""
    lines = list(csv.DictReader(io.StringIO(long_csv(sections(name)))))
    found = [(line["model"], line["value"], line["stderr"]) for line in lines if line["origin"] != "measured"]
    sources = [source for source in PRESETS[name].sources if source != "bitdistiller_short"]
    printed = [(row.model, row.value, row.stderr) for row in published_rows() if row.source in sources]
    assert sorted(found) == sorted(printed)


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_is_sound(name):
    assert not faults(page(name, ["head"], sections(name, result=RESULT)))


def test_a_document_that_repeats_another_is_one_row():
    both = published_entries(("bitdistiller", "bitdistiller_short"))
    assert len(both) == len(published_entries(("bitdistiller",)))
    assert sum(entry.origin == "bitdistiller, bitdistiller_short" for entry in both) == 5


def test_rows_stand_beside_the_model_that_they_are_of():
    by_title = {section.title: [row.name for row in section.rows] for section in sections("greenbit")}
    assert "LLaMA-2-7B" in by_title["Llama-2-7B"] and "LLaMA-2 7B q2g8" in by_title["Llama-2-7B"]
    assert "LLaMA 3B q2g16" in by_title["OpenLLaMA 3B"] and "TinyLLaMA 1.1B q2g8" in by_title["TinyLlama 1.1B"]
    assert set(by_title["Other models"]) == {
        "LLaMA-2-70B", "LLaMA-1-30B", "LLaMA-2-70B-Chat", "CodeLLaMA-7B", "CodeLLaMA-13B", "CodeLLaMA-34B",
    }  # fmt: skip
    assert [title for title in by_title if title == "Other models"] and "Other models" not in [
        section.title for name in ("bitdistiller", "onebit", "starcoder") for section in sections(name)
    ]


def comparable(name, label, **options):
    lines = csv.DictReader(io.StringIO(long_csv(sections(name, **options))))
    return {line["comparable"] for line in lines if line["figure"] == label and line["origin"] != "measured"}


def test_what_does_not_compare_is_marked():
    assert comparable("bitdistiller", "perplexity of an unnamed text") <= {"no", "yes"}
    lines = [line for line in csv.DictReader(io.StringIO(long_csv(sections("bitdistiller"))))]
    numbers = [line for line in lines if line["figure"] == "perplexity of an unnamed text" and line["value"] != "n/a"]
    assert {line["comparable"] for line in numbers} == {"no"} and len(numbers) > 10
    assert comparable("greenbit", "wikitext2 perplexity") == {"no"}
    assert comparable("onebit", "hellaswag acc") == {"no"}
    assert comparable("bitdistiller", "piqa acc") == {"yes", "no"}  # no: the doubtful ones
    assert comparable("bitdistiller", "piqa acc", stand_in=True) == {"no"}


def test_a_measured_row():
    row = measured_row(Cell("meta-llama/Llama-2-7b-hf", "gptq", 2, 64, "gptq_v2"), RESULT)
    assert (row.recipe, row.group, row.true_bits) == ("gptq, gptq_v2, PTQ", "64", ("2.14", "2.60"))
    assert (row.minutes, row.memory, row.calibration) == ("1.5", "2.0 GB", "c4, 128 x 2048")
    figures = {label: figure_text(figure) for label, figure in row.figures.items()}
    assert figures == {"wikitext2 perplexity": "5.47 ± 0.03", "piqa acc": "78.00 ± 1.00", "file, GiB": "2"}
    assert (
        measured_row(Cell("m", "rtn", 2, -1, "gptq"), RESULT | {"resumed": True, "calibration": None}).minutes[0] == ">"
    )


def test_a_failed_cell_is_a_row_with_its_error():
    built = sections("starcoder", result={"error": "out of | memory"})
    text = markdown("t", [], built)
    assert text.count("out of \\| memory") == len(built[0].rows) - 2
    assert "out of | memory" in text_of(page("t", [], built))


def test_cells_in_order_of_cost_and_each_once():
    small, large = Model("x/a-1b", "a"), Model("x/b-7b", "b")
    grids = (Grid((small, large), bits=(2, 3)), Grid((small,), bits=(2,), groups=(128, 64)))
    cells = in_order_of_cost(grids)
    assert len(cells) == len(set(cells)) == 2 * (1 + 2 * len(Grid((small,)).methods)) + len(Grid((small,)).methods)
    assert cells[0] == Cell("x/a-1b") and cells[-1].source == "x/b-7b"
    methods = [cell.method for cell in cells if cell.source == "x/a-1b"]
    assert methods == sorted(methods, key=["none", "rtn", "gptq", "omniquant"].index)


def test_files_of_llama_cpp_go_by_type_and_not_by_group():
    model = Model("x/a-1b", "a")
    cells = in_order_of_cost([Grid((model,), ("rtn",), (3,), (64, 128), ("gptq", "gguf"), ("Q2_K", "IQ4_XS"))])
    assert [cell.name for cell in cells] == [
        "x-a-1b-full", "x-a-1b-w3g64-rtn", "x-a-1b-w3g128-rtn", "x-a-1b-Q2_K-rtn", "x-a-1b-IQ4_XS-rtn",
    ]  # fmt: skip
    assert cells[-1].spec(Settings()).ggml_type == "IQ4_XS"
    row = measured_row(cells[-1], None)
    assert (row.recipe, row.bits, row.group) == ("rtn, IQ4_XS, PTQ", "4", "")
    usual = Grid((model,), bits=(2, 4), groups=(32, 64), formats=("gguf",)).cells(model)
    assert [cell.ggml_type for cell in usual] == ["", "Q2_K", "Q4_K", "Q2_K", "Q4_K"]  # gptq and rtn
    assert {cell.method for cell in usual[1:]} == {"gptq", "rtn"}


def test_a_divergence_is_printed_to_its_own_digits():
    figures = [
        {"task": "c4", "metric": metric, "value": value, "stderr": error, "questions": 9}
        for metric, value, error in (("KL divergence, nats", 0.012345, 0.000123), ("same token, %", 0.93456, None))
    ]
    row = measured_row(Cell("m", "gptq", 2, 64, "gptq"), RESULT | {"figures": figures})
    texts = {label: figure_text(figure) for label, figure in row.figures.items()}
    assert texts == {"c4 KL divergence, nats": "0.0123 ± 0.000123", "c4 same token, %": "93.46", "file, GiB": "2"}
    assert labels([row]) == (list(texts), [])


def test_files_go_by_their_last_part_unless_two_share_it():
    settings = Settings(texts=("a/x.txt", "b/x.txt", "c/y.txt", "c4"))
    assert [settings.label(text) for text in settings.texts] == ["a/x.txt", "b/x.txt", "y.txt", "c4"]


def test_folders_of_one_name_have_cells_of_their_own(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "model").mkdir(parents=True)
    names = {Cell(str(tmp_path / place / "model"), "gptq", 2, 128, "gptq").name for place in ("a", "b")}
    assert len(names) == 2 and all(re.fullmatch(r"model-\w{6}-w2g128-gptq", name) for name in names)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        command.main(["--out", "out", *arguments])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    return error


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--methods qat: is not one of gptq, rtn" in refused(capsys, "--models", "m", "--methods", "qat")
    assert "--formats zip: is not one of" in refused(capsys, "--preset", "onebit", "--formats", "zip")
    assert "--types 'Q9' is not one of" in refused(capsys, "--models", "m", "--formats", "gguf", "--types", "Q9")
    assert "--types are llama.cpp's" in refused(capsys, "--models", "m", "--types", "Q2_K")
    assert "--bits 7: no llama.cpp type" in refused(capsys, "--models", "m", "--formats", "gguf", "--bits", "7")
    no_method = ("--models", "m", "--formats", "gguf", "--methods", "omniquant")
    assert "--formats gguf takes --methods gptq or rtn" in refused(capsys, *no_method)
    lm_eval = ("--models", "m", "--protocol", "lm-eval")
    assert "--divergence compares tokens" in refused(capsys, *lm_eval, "--divergence")
    assert "give --models" in refused(capsys)
    assert "has its own models" in refused(capsys, "--preset", "onebit", "--models", "m")
    assert "--published x: is not one of" in refused(capsys, "--models", "m", "--published", "x")
    assert "--samples 0 must be" in refused(capsys, "--models", "m", "--samples", "0")
    assert "--tasks names no task" in refused(capsys, "--models", "m", "--tasks")
    assert "takes whole documents" in refused(capsys, "--preset", "onebit", "--max-tokens", "9")
    assert "./m: there is no such folder" in refused(capsys, "--models", "./m")
    assert "/no/m: there is no such folder" in refused(capsys, "--preset", "onebit", "--stand-in", "/no/m")
    assert "no.txt: no such file" in refused(capsys, "--models", "m", "--texts", "no.txt")
    assert "no.npy: no such file" in refused(capsys, "--models", "m", "--calibration", "no.npy")
    assert "--data-dir no: there is no such" in refused(capsys, "--models", "m", "--tasks", "piqa", "--data-dir", "no")
    assert "device 'tpu'" in refused(capsys, "--models", "m", "--device", "tpu")
    assert "no.toml" in refused(capsys, "--config", "no.toml")
    (tmp_path / "g.toml").write_text("bits = [")
    assert "g.toml: not TOML" in refused(capsys, "--config", "g.toml")
    (tmp_path / "g.toml").write_text('color = "red"')
    assert "'color' is no flag" in refused(capsys, "--config", "g.toml")
    assert not (tmp_path / "out").exists()


def test_one_process_fills_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with open("out/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "out: another process is filling these tables" in refused(capsys, "--models", "m")


def test_a_presets_own_tasks():
    args = command.parser().parse_args(["--out", "o", "--preset", "bitdistiller", "--stand-in", "demo", "--tasks"])
    settings = command._settings(args)
    assert settings.tasks == "qat" and settings.texts == ("stdlib",) and settings.calibration == "stdlib"


def test_flags_from_a_file_and_over_it(tmp_path):
    file = tmp_path / "g.toml"
    file.write_text('models = ["x/a", "x/b"]\nbits = [2, 3]\nmax-tokens = 512\nasym = true\nkeep = false\n')
    args = command.parser().parse_args(["--out", "o", "--bits", "4"])
    args = command._under(args, command.parser().parse_args(["--out", "o", *command._config_flags(file)]))
    assert args.models == ["x/a", "x/b"] and args.bits == [4] and args.max_tokens == 512 and args.asym is True
    assert command._settings(args) == Settings(max_tokens=512, asym=True)


def test_a_method_without_the_width_is_refused_by_its_cell():
    with pytest.raises(InputError, match="bits 9"):
        Cell("m", "gptq", 9, 128, "gptq").spec(Settings())
    with pytest.raises(InputError, match="omniquant needs 2 bits or more"):
        Cell("m", "omniquant", 1, 128, "gptq").spec(Settings())


def test_sources_of_presets_are_sources():
    assert {source for preset in PRESETS.values() for source in preset.sources} == set(SOURCES)
