"""ptq.evaluate on damaged models, from end to end: a figure or one line, in bounded memory."""

import json
import os
import random
import shutil
import struct
import time
from pathlib import Path

import pytest
from commands import token_file
from damage import WEIGHTS
from gguf_damage import COUNTS, NUMBERS, TEXTS, damage
from test_gguf_families import write
from tiny_models import make_tiny

from ptq import evaluate

resource = pytest.importorskip("resource")
MEMORY = 1 << 30  # address space that an evaluation may take beyond what the process has
SECONDS = 20
COPIES = [40, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a model, and the same as a file."""
    folder = tmp_path_factory.mktemp("whole")
    make_tiny("llama", folder / "model", blocks=1)
    write(folder / "model.gguf", folder / "model")
    token_file(folder / "h.npy", 1, 16)
    return folder


@pytest.fixture
def little_memory():
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("no /proc: the memory in use is not known")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(capsys, model, tokens) -> bool:
    """Measures a model; whether it was refused, in one line of its own making."""
    capsys.readouterr()
    start = time.thread_time()
    try:
        evaluate.main([str(model), "--text", str(tokens)])
        status = 0
    except SystemExit as left:
        status = left.code
    printed = capsys.readouterr()
    assert time.thread_time() - start < SECONDS
    assert "out of memory" not in printed.err
    if status == 0:
        assert "perplexity" in printed.out
        return False
    assert status == 2 and printed.out == "" and len(printed.err.splitlines()) == 1, printed.err
    return True


@pytest.mark.parametrize("copies", COPIES)
def test_gguf_files(whole, tmp_path, capsys, little_memory, copies):
    content, generator, count = (whole / "model.gguf").read_bytes(), random.Random(copies), 0
    for _ in range(copies):
        (tmp_path / "model.gguf").write_bytes(damage(content, generator))
        count += refused(capsys, tmp_path / "model.gguf", whole / "h.npy")
    print(f"{copies} files, {count} refused")
    assert copies / 4 < count < copies


def damage_config(folder, generator):
    """Another value under one of the config's names, or bytes that are no JSON."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    name = generator.choice(sorted(config))
    texts = [text.decode(errors="replace") for text in TEXTS]
    config[name] = generator.choice([None, True, [], {}, [1], {"a": 1}, *NUMBERS, *texts])
    if generator.random() < 0.1:
        del config[name]
    content = json.dumps(config).encode()
    file.write_bytes(content[: generator.randrange(len(content))] if generator.random() < 0.1 else content)


def damage_header(folder, generator):
    """Another entry, or other bytes, in the head of the safetensors file."""
    file = folder / WEIGHTS
    content = file.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if generator.random() < 0.3:
        place = generator.randrange(8 + size)
        file.write_bytes(content[:place] + bytes([generator.randrange(256)]) + content[place + 1 :])
        return
    entry = header[generator.choice([name for name in sorted(header) if name != "__metadata__"])]
    numbers = [*COUNTS, -1, 0.5, None, "x", []]
    field = generator.choice(sorted(entry))
    if field == "dtype":
        entry[field] = generator.choice(["F64", "BF16", "I8", "U4", "", None, 3])
    else:
        entry[field] = generator.choice([[generator.choice(numbers) for _ in entry[field]], [], None, entry[field] * 2])
    head = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", generator.choice([len(head)] * 9 + COUNTS)) + head + data)


@pytest.mark.parametrize("hurt", [damage_config, damage_header])
@pytest.mark.parametrize("copies", COPIES)
def test_model_folders(whole, tmp_path, capsys, little_memory, copies, hurt):
    generator, count = random.Random(copies), 0
    for _ in range(copies):
        shutil.copytree(whole / "model", tmp_path / "model", dirs_exist_ok=True)
        hurt(tmp_path / "model", generator)
        count += refused(capsys, tmp_path / "model", whole / "h.npy")
    print(f"{copies} folders, {count} refused")
    assert 0 < count <= copies
