"""Documents of every source, and the one-line error for every way a source can be wrong."""

import gzip
import json
import time

import huggingface_hub
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from calibration import corpora
from calibration.corpora import CORPORA, HUB_FILES, find_corpus, load_documents, stdlib_split
from calibration.errors import InputError


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def error_of(source, split="train"):
    with pytest.raises(InputError) as caught:
        load_documents(str(source), split, needed_characters=None)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Files


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.TXT"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntw\xc3\xb6\n")
    for split in ("train", "heldout"):
        assert load_documents(str(path), split, needed_characters=None) == ["one\n\ntwö\n"]


def test_json_lines_take_text_then_content_then_the_first_string(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"content": "c", "text": "t"}, {"title": "x", "content": "c"}, {"n": 1, "title": "first", "b": "second"}]
    path.write_text("\n".join(map(json.dumps, records)) + '\n\n{"text": "line\u2028separator"}\n', encoding="utf-8")
    assert load_documents(str(path), "train", needed_characters=None) == ["t", "c", "first", "line\u2028separator"]


def test_parquet_prefers_text_and_skips_nulls(tmp_path):
    both = write_parquet(tmp_path / "a.parquet", content=["c1", "c2"], text=["t1", None])
    assert load_documents(both, "train", needed_characters=None) == ["t1"]
    content = write_parquet(tmp_path / "b.parquet", text=[1, 2], content=["c1", "c2"])
    assert load_documents(content, "heldout", needed_characters=None) == ["c1", "c2"]


def test_reading_stops_after_the_needed_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n' * 3 + "not json", encoding="utf-8")
    assert load_documents(str(path), "train", needed_characters=4) == ["abc", "abc"]
    assert load_documents(str(path), "train", needed_characters=3) == ["abc"]


def test_unknown_corpus_lists_the_known_ones():
    message = error_of("wikitext3")
    assert "'wikitext3'" in message and all(name in message for name in CORPORA)


def test_missing_file(tmp_path):
    assert "nowhere.txt: no such file" in error_of(tmp_path / "nowhere.txt")
    assert "nowhere.txt: no such file" in error_of("nowhere.txt")
    assert "folder/corpus: no such file" in error_of("folder/corpus")


def test_directory_in_place_of_a_file(tmp_path):
    folder = tmp_path / "texts.txt"
    folder.mkdir()
    assert "is a directory" in error_of(folder)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_empty_file(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.touch()
    assert "is empty" in error_of(path)


@pytest.mark.parametrize("content, suffix", [(" \n\t\n", ".txt"), ('{"text": " "}\n', ".jsonl"), ("\n\n", ".jsonl")])
def test_blank_file(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(content)
    assert "holds no text" in error_of(path)


def test_unsupported_suffix(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text")
    message = error_of(path)
    assert "'.csv'" in message and ".jsonl" in message


@pytest.mark.parametrize("name, place", [("a.txt", "a.txt"), ("a.jsonl", "a.jsonl line 1")])
def test_not_utf8(tmp_path, name, place):
    path = tmp_path / name
    path.write_bytes(b"caf\xe9 au lait")
    assert f"{place}: not UTF-8 at byte 3" in error_of(path)


@pytest.mark.parametrize(
    "line, rule",
    [
        ('{"text": "cut', "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ('"only a string"', "is a JSON str"),
        ('{"id": 7, "text": null}', "has no string field"),
        ('{"text": "\\ud800"}', "unpaired surrogate"),
    ],
)
def test_bad_json_line_names_its_number(tmp_path, line, rule):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    message = error_of(path)
    assert "a.jsonl line 3:" in message and rule in message


def test_parquet_without_a_text_column(tmp_path):
    message = error_of(write_parquet(tmp_path / "a.parquet", text=[1, 2], title=["a", "b"]))
    assert "no string column" in message and "text (int64)" in message and "title (string)" in message


def test_truncated_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, text=["word " * 500, "more " * 500])
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable parquet file" in error_of(path)


def test_parquet_damaged_inside(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, text=[f"document {number} " * 20 for number in range(500)])
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    assert "a.parquet" in error_of(path)


def test_parquet_that_is_not_utf8(tmp_path):
    buffers = pyarrow.array([b"caf\xe9"], pyarrow.binary()).buffers()
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    path = write_parquet(tmp_path / "a.parquet", text=bad)
    assert "not UTF-8" in error_of(path)


# The Python library


def test_stdlib_splits_are_disjoint_and_follow_the_hash():
    train = load_documents("stdlib", "train", needed_characters=None)
    heldout = load_documents("stdlib", "heldout", needed_characters=None)
    assert len(train) > 10 * len(heldout) > 100
    assert not set(train) & set(heldout)


@pytest.mark.parametrize("path", ["chunk.py", "codecs.py", "functools.py", "imaplib.py", "signal.py", "traceback.py"])
def test_heldout_library_files_are_those_the_demo_model_never_saw(path):
    assert stdlib_split(path) == "heldout"  # worked out with sha256sum
    assert stdlib_split("lib/" + path) == "train"


def test_stdlib_is_deterministic_and_filtered(tmp_path, monkeypatch):
    kept = ["abc.py", "json/decoder.py", "test/test_os.py"]
    left_out = ["encodings/a.py", "site-packages/x.py", "lib/site-packages/x.py", "test/data.py"]
    for name in kept + left_out + ["idlelib/idle_test/a.py", "lib2to3/tests/data/a.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 40)
    (tmp_path / "short.py").write_text("#" * 199)
    (tmp_path / "wide.py").write_text("#" * 2001)
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(corpora, "stdlib_split", lambda relative: "train")
    texts = load_documents("stdlib", "train", needed_characters=None)
    assert [text.split()[1] for text in texts] == kept


# The hub, never reached: the cache and the session are the test's own


class NoNetwork:
    def head(self, url, timeout):
        assert timeout <= 10
        raise ConnectionError("[Errno -2] Name or service not known\nsecond line")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_session", NoNetwork)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", HUB_FILES)
def test_no_network_fails_fast_and_names_the_offline_choices(hub_cache, name):
    start = time.monotonic()
    message = error_of(name)
    assert time.monotonic() - start < 5
    assert f"corpus {name}: could not fetch" in message and "Name or service not known" in message
    assert all(choice in message for choice in ("stdlib", ".txt", ".jsonl", ".parquet", ".npy", "cache"))


def fill_cache(cache, files, filename, records):
    """Lay a file out as the hub's own client leaves it."""
    folder = cache / ("datasets--" + files.repository.replace("/", "--"))
    commit = "0" * 40
    reference, path = folder / "refs" / files.revision, folder / "snapshots" / commit / filename
    for file in (reference, path):
        file.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    if filename.endswith(".parquet"):
        columns = {key: [record[key] for record in records] for key in records[0]}
        write_parquet(path, **columns)
    else:
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))


@pytest.mark.parametrize("name", HUB_FILES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_filled_cache_works_without_network(hub_cache, tmp_path, monkeypatch, name, split):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    files = HUB_FILES[name]
    records = [{files.column: f"{split} {n}"} for n in range(40)]
    if files.licenses:
        records = [record | {"license": "gpl-3.0" if n % 2 else "mit"} for n, record in enumerate(records)]
    fill_cache(hub_cache, files, getattr(files, split)[0], records)
    wanted = [record[files.column] for record in records]
    if files.train[0] == files.heldout[0]:  # one file: the last 5% are held out
        wanted = wanted[:38] if split == "train" else wanted[38:]
    if files.licenses:
        wanted = wanted[::2]
    assert load_documents(name, split, needed_characters=None) == wanted


def test_damaged_file_in_the_cache(hub_cache, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    files = HUB_FILES["wikitext2"]
    fill_cache(hub_cache, files, files.train[0], [{"text": "a"}])
    path = next(hub_cache.rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-8])
    assert "in the Hugging Face cache is unreadable" in error_of("wikitext2")


def test_cached_file_with_other_columns(hub_cache, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    files = HUB_FILES["code"]
    fill_cache(hub_cache, files, files.train[0], [{"content": "a"}])
    assert "corpus code: file-000000000054.json.gz has no column license" in error_of("code")


def test_every_corpus_says_what_it_is():
    assert all(find_corpus(name).description for name in CORPORA)
    assert set(CORPORA) == {"wikitext2", "c4", "ptb", "pile", "code", "stdlib"}
