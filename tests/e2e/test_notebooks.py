"""The notebooks run from top to bottom on the stand-in, and are committed small, with outputs, without traces of us."""

import re
from pathlib import Path

import pytest
from commands import REPOSITORY, environment

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
LARGEST = 100_000  # four plots are most of it


def texts(notebook):
    """What its cells print."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST and texts(notebook)
    assert not any(output.output_type == "error" or output.get("name") == "stderr"
                   for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)  # fmt: skip
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    """In a folder of its own; 80 seconds for the longest on one thread of a busy machine."""
    client = pytest.importorskip("nbclient", reason="nbclient is not installed").NotebookClient
    for name, value in environment(OUT=str(tmp_path / "out")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MODEL", raising=False)
    committed, notebook = nbformat.read(path, 4), nbformat.read(path, 4)
    (tmp_path / "out").mkdir()
    client(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert shape_of(texts(notebook)) == shape_of(texts(committed))
    assert not list(Path(tmp_path).glob("*.ptq-work"))


def shape_of(text):
    """Words of the printed text, without figures and bars, which depend on the machine."""
    lines = [line for line in text.splitlines() if re.match(r"bits|perplexity|GPTQModel|qweight|\s*\d+ bits", line)]
    return [re.sub(r"[\d.]+", "N", line).split() for line in lines]
