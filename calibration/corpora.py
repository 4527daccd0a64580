"""Named text sources and text files as lists of documents.

A source is a name in `CORPORA` or the path of a .txt, .jsonl or .parquet file. Hub corpora come from files named one by
one, fetched into the normal Hugging Face cache and read by `datasets`; a file that is already in the cache is used
without asking the hub, so a filled cache works offline and gives the same text every time. `stdlib` needs neither
network nor cache: it is the running Python's own library, split as the demo model's training split it.

This module does not tokenise; `tokens.py` decides what is done with the documents.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from calibration.errors import InputError

PROBE_SECONDS = 5.0
PERMISSIVE_LICENSES = frozenset({"mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0"})


@dataclass(frozen=True)
class Corpus:
    """Where documents come from and how the literature joins them.

    Attributes:
        description: One line for menus and reports.
        documents: Yields the documents of "train" or "heldout", always in the same order.
        separator: What stands between documents in the joined text.
        window_per_document: Random windows come one from each random document, not from the joined text.
        bos_per_document: Documents are separate files; each starts with the tokenizer's bos token and no separator.
    """

    description: str
    documents: Callable[[str], Iterable[str]]
    separator: str = "\n\n"
    window_per_document: bool = False
    bos_per_document: bool = False


def load_documents(source: str, split: str, *, needed_characters: int | None) -> list[str]:
    """Return the leading documents of a source.

    Args:
        source: A name in `CORPORA` or a file's path; both splits of a file are the whole file.
        split: "train" or "heldout".
        needed_characters: Stop after the document that reaches this total; None reads everything.

    Raises:
        InputError: The source is unknown, unreadable, malformed, empty or cannot be fetched.
    """
    assert split in ("train", "heldout"), split
    documents = take_documents(find_corpus(source).documents(split), needed_characters)
    if not any(document.strip() for document in documents):
        raise InputError(f"{source}: holds no text")
    return documents


def take_documents(documents: Iterable[str], needed_characters: int | None) -> list[str]:
    """Return whole leading documents until their lengths add up to `needed_characters`."""
    taken, characters = [], 0
    for document in documents:
        taken.append(document)
        characters += len(document)
        if needed_characters is not None and characters >= needed_characters:
            break
    return taken


def find_corpus(source: str) -> Corpus:
    """Return the named corpus, or a corpus that reads the file at this path."""
    if source in CORPORA:
        return CORPORA[source]
    path = Path(source)
    reader = FILE_READERS.get(path.suffix.lower())
    if os.path.isdir(path):
        raise InputError(f"{source}: is a directory; give one {_listed(FILE_READERS)} file")
    if reader and os.path.exists(path):
        return Corpus(f"the file {path.name}", lambda split: _read_file(path, reader))
    if os.path.exists(path):
        raise InputError(f"{source}: suffix {path.suffix!r} is not a text format; it must be {_listed(FILE_READERS)}")
    if path.suffix or len(path.parts) != 1:
        raise InputError(f"{source}: no such file; a source is a file or one of {_listed(CORPORA)}")
    raise InputError(f"{source!r} is not a corpus; known: {_listed(CORPORA)}, or a {_listed(FILE_READERS)} file")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


# Files


def _read_file(path: Path, reader: Callable[[Path], Iterator[str]]) -> Iterator[str]:
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: is empty")
        yield from reader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({_short(error)})") from error


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 at byte {error.start} ({error.reason})") from error


def _read_text(path: Path) -> Iterator[str]:
    # Universal newlines, so a file saved on Windows gives the same tokens.
    yield _decode(path.read_bytes(), str(path)).replace("\r\n", "\n").replace("\r", "\n")


def _read_json_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:  # bytes, because str.splitlines also splits at U+2028 inside a JSON string
        for number, raw in enumerate(lines, start=1):
            place = f"{path} line {number}"
            line = _decode(raw, place).strip()
            if line:
                yield _text_of_record(line, place)


def _text_of_record(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: malformed JSON ({_short(error)})") from error
    if not isinstance(record, dict):
        raise InputError(f"{place}: is a JSON {type(record).__name__}; each line must be an object with a text field")
    named = (record.get("text"), record.get("content"))
    text = next((value for value in chain(named, record.values()) if isinstance(value, str)), None)
    if text is None:
        raise InputError(f'{place}: has no string field "text", "content" or other; fields: {_listed(record)}')
    return _without_surrogates(text, place)


def _without_surrogates(text: str, place: str) -> str:
    try:
        text.encode("utf-8")  # JSON can spell half of a surrogate pair; no tokenizer accepts it
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: unpaired surrogate at character {error.start}") from error
    return text


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow  # heavy, and only this format needs it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            column = _text_column(table.schema_arrow, path)
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                yield from (value for value in batch.column(0).to_pylist() if value is not None)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file ({_short(error)})") from error
    except UnicodeDecodeError as error:  # arrow does not validate strings when it reads them
        raise InputError(f"{path}: column {column!r} is not UTF-8 ({error.reason})") from error


def _text_column(schema, path: Path) -> str:
    columns = dict(zip(schema.names, map(str, schema.types), strict=True))
    for name in ("text", "content"):
        if columns.get(name) in ("string", "large_string", "string_view"):
            return name
    found = _listed(f"{name} ({kind})" for name, kind in columns.items())
    raise InputError(f'{path}: has no string column "text" or "content"; columns: {found}')


# The Python library


def _stdlib_documents(split: str) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _stdlib_files(root):
        relative = path.relative_to(root).as_posix()
        if stdlib_split(relative) != split:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= 200 and max(map(len, text.splitlines()), default=0) <= 2000:
            yield text


def stdlib_split(relative: str) -> str:
    """Return the split of a library file: "heldout" for one path in twenty, by hash."""
    return "heldout" if int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 20 == 0 else "train"


def _stdlib_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        # Installed packages are not the library, and are most of the files.
        subfolders[:] = [name for name in subfolders if name != "site-packages"]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return [path for path in sorted(found) if _is_library_text(path.relative_to(root).as_posix())]


def _is_library_text(relative: str) -> bool:
    """Leave out what the demo model's training left out: test fixtures and the generated code pages."""
    if relative.startswith(("lib2to3/tests/data", "encodings/")) or "idle_test" in relative:
        return False
    return not relative.startswith("test/") or relative.startswith("test/test_")


# The hub


@dataclass(frozen=True)
class HubFiles:
    """The files of a dataset repository that hold a corpus.

    Attributes:
        repository: The dataset's name on the hub.
        train: File name and row slice (in the words of `datasets`) of the training text.
        heldout: The same for the held-out text.
        column: The column of the text.
        revision: Branch; refs/convert/parquet is the hub's own conversion of repositories that are loading scripts.
        licenses: Keep only rows whose `license` is one of these; empty keeps all.
    """

    repository: str
    train: tuple[str, str]
    heldout: tuple[str, str]
    column: str = "text"
    revision: str = "main"
    licenses: frozenset[str] = frozenset()


def _hub_documents(split: str, *, name: str, files: HubFiles) -> Iterator[str]:
    filename, rows = files.train if split == "train" else files.heldout
    table = _read_rows(name, _hub_file(name, files, filename), rows)
    columns = [files.column] + (["license"] if files.licenses else [])
    if missing := set(columns) - set(table.column_names):
        raise InputError(f"corpus {name}: {filename} has no column {_listed(sorted(missing))}")
    for batch in table.select_columns(columns).iter(256):
        licenses = batch["license"] if files.licenses else [None] * len(batch[files.column])
        for text, license_name in zip(batch[files.column], licenses, strict=True):
            if text is not None and (not files.licenses or license_name in files.licenses):
                yield text


def _hub_file(name: str, files: HubFiles, filename: str) -> str:
    import huggingface_hub  # heavy, and only hub corpora need it
    from huggingface_hub.errors import LocalEntryNotFoundError

    where = dict(repo_id=files.repository, filename=filename, repo_type="dataset", revision=files.revision)
    try:
        return huggingface_hub.hf_hub_download(**where, local_files_only=True)
    except LocalEntryNotFoundError:
        pass
    try:
        # Without network the download itself retries for half a minute or more; one request tells in seconds.
        huggingface_hub.get_session().head(huggingface_hub.HfApi().endpoint, timeout=PROBE_SECONDS)
        return huggingface_hub.hf_hub_download(**where)
    except Exception as error:  # the HTTP library, and with it the exception types, changes with the hub's version
        raise InputError(
            f"corpus {name}: could not fetch {filename} of {files.repository} from the Hugging Face hub "
            f"({_short(error.__cause__ or error)}); without network use stdlib, a {_listed(FILE_READERS)} or "
            f".npy file, or fill the Hugging Face cache with that file (revision {files.revision}) while online"
        ) from error


def _read_rows(name: str, path: str, rows: str):
    import datasets  # takes seconds to import

    builder = "parquet" if path.endswith(".parquet") else "json"
    try:
        return datasets.load_dataset(builder, data_files={"train": path}, split=rows)
    except Exception as error:  # whatever a damaged file makes its many readers raise
        raise InputError(f"corpus {name}: {path} in the Hugging Face cache is unreadable ({_short(error)})") from error


HUB_FILES = {
    "wikitext2": HubFiles(
        "Salesforce/wikitext",
        train=("wikitext-2-raw-v1/train-00000-of-00001.parquet", "train"),
        heldout=("wikitext-2-raw-v1/test-00000-of-00001.parquet", "train"),
    ),
    "c4": HubFiles(
        "allenai/c4",
        train=("en/c4-train.00000-of-01024.json.gz", "train"),
        heldout=("en/c4-validation.00000-of-00008.json.gz", "train"),
    ),
    "ptb": HubFiles(
        "ptb-text-only/ptb_text_only",
        train=("penn_treebank/train/0000.parquet", "train"),
        heldout=("penn_treebank/validation/0000.parquet", "train"),
        column="sentence",
        revision="refs/convert/parquet",
    ),
    "pile": HubFiles(
        "NeelNanda/pile-10k",
        train=("data/train-00000-of-00001-4746b8785c874cc7.parquet", "train[:95%]"),
        heldout=("data/train-00000-of-00001-4746b8785c874cc7.parquet", "train[95%:]"),
    ),
    "code": HubFiles(
        "codeparrot/codeparrot-clean-valid",
        train=("file-000000000054.json.gz", "train[:95%]"),
        heldout=("file-000000000054.json.gz", "train[95%:]"),
        column="content",
        licenses=PERMISSIVE_LICENSES,
    ),
}


def _hub_corpus(name: str, description: str, **layout) -> Corpus:
    return Corpus(description, partial(_hub_documents, name=name, files=HUB_FILES[name]), **layout)


FILE_READERS = {".txt": _read_text, ".jsonl": _read_json_lines, ".parquet": _read_parquet}

CORPORA = {
    "wikitext2": _hub_corpus("wikitext2", "WikiText-2 raw, train and test, as in the GPTQ papers"),
    "c4": _hub_corpus(
        "c4", "C4 English, first train and validation shard, as in GPTQ", separator=" ", window_per_document=True
    ),
    "ptb": _hub_corpus("ptb", "Penn Treebank sentences, train and validation, as in GPTQ"),
    "pile": _hub_corpus("pile", "10,000 documents of the Pile; the last 5% are held out", window_per_document=True),
    "code": _hub_corpus(
        "code", "permissively licensed Python from GitHub; the last 5% are held out", window_per_document=True
    ),
    "stdlib": Corpus("the running Python's own library (offline)", _stdlib_documents, bos_per_document=True),
}
