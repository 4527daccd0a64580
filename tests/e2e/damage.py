"""Ways to break a model folder, and what every command line owes a user who gives it one."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def refused(capsys, program, arguments, *words):
    """The command prints one line with all the words, exits with 2 and leaves the folder as it was."""
    before = listing(Path())
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        program.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert left.value.code == 2 and printed.out == ""
    assert_one_line(printed.err, *words)
    assert listing(Path()) == before


def assert_one_line(text, *words):
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    for word in words:
        assert word in lines[0], lines[0]


def edit_json(file, **values):
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | values))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def set_values(name, value, where=...):
    def change(tensors):
        tensors[name][where] = value

    return lambda folder: edit_tensors(folder, change)


def config(**values):
    return lambda folder: edit_json(folder / "config.json", **values)


def cut(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)
