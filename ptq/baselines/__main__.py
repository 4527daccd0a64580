"""python -m ptq.baselines: a table of measured baselines beside published figures, from one command."""

import argparse
import fcntl
import json
from dataclasses import fields, replace
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from calibration.corpora import find_corpus
from calibration.errors import InputError
from ptq.baselines.grid import Cell, Grid, Model, Settings, in_order_of_cost
from ptq.baselines.page import page
from ptq.baselines.presets import KNOWN, PRESETS
from ptq.baselines.published import documents
from ptq.baselines.rows import measured_row
from ptq.baselines.sections import build_sections
from ptq.baselines.tables import long_csv, markdown
from ptq.console import run_command
from ptq.demo import DEMO
from ptq.evaluation.protocols import PROTOCOLS
from ptq.evaluation.published.rows import SOURCES
from ptq.evaluation.tasks import choose_tasks
from ptq.flags import Flags
from ptq.lazy import Lazy
from ptq.spec import CHECKPOINT_FORMATS, METHODS, width

tokens = Lazy("calibration.tokens")
measuring = Lazy("ptq.baselines.cells")
defaults = Lazy("ptq.defaults")
workdir = Lazy("ptq.workdir")

EXAMPLES = """examples:
  python -m ptq.baselines --preset bitdistiller --tasks --out tables/bitdistiller
  python -m ptq.baselines --preset greenbit --stand-in demo --out tables/try
  python -m ptq.baselines --models ./my-model --bits 2 3 4 --groups 64 128 --texts held-out.txt --out tables/mine
  python -m ptq.baselines --models ./my-model --formats gguf --types Q2_K Q3_K --divergence --out tables/gguf
  python -m ptq.baselines --config grid.toml --out tables/mine

grid.toml holds flags by their names: models = ["./my-model"], bits = [2, 3], max-tokens = 65536.
OUT gets table.md, table.csv and table.html, written anew after each cell. A killed run goes on with the same command;
cells that failed are tried again.
"""
AXES = ("methods", "bits", "groups", "formats", "types")
DEMO_NAME, OWN_TASKS = "demo", ""
PATH_STARTS = ("/", "./", "../", "~")  # no hub id begins so


def parser() -> Flags:
    """The command line's flags."""
    p = Flags("python -m ptq.baselines", description=__doc__, epilog=EXAMPLES,
                                formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where tables and finished cells are kept")
    p.add_argument("--config", type=Path, metavar="FILE", help="these flags as TOML; flags given beside it win")
    p.add_argument("--preset", choices=list(PRESETS), help="the grid of a published table, and its figures")
    p.add_argument("--stand-in", metavar="MODEL", help=f"run the preset on this model; {DEMO_NAME}: the embedded one")
    grid = p.add_argument_group("grid; beside a preset these replace the preset's own")
    grid.add_argument("--models", nargs="+", metavar="DIR|HUB_ID", help="full-precision models")
    grid.add_argument("--methods", nargs="+", metavar="NAME", help=", ".join(METHODS) + " (default: all)")
    grid.add_argument("--bits", nargs="+", type=width, metavar="N", help="(default: 2)")
    grid.add_argument("--groups", nargs="+", type=int, metavar="N", help="-1: whole rows (default: 128)")
    grid.add_argument("--formats", nargs="+", metavar="NAME", help=", ".join(CHECKPOINT_FORMATS))
    grid.add_argument("--types", nargs="+", metavar="TYPE", help="llama.cpp's, for format gguf (default: by --bits)")
    grid.add_argument("--published", nargs="*", metavar="SOURCE", help=f"figures beside them: {', '.join(SOURCES)}")
    how = p.add_argument_group("settings, the same for all cells")
    how.add_argument("--texts", nargs="+", metavar="NAME|FILE", help="for the perplexity (default: wikitext2)")
    how.add_argument("--protocol", choices=PROTOCOLS, help="of the perplexity (default: gptq)")
    how.add_argument("--divergence", action="store_true", default=None,
                     help="also KL divergence from the unquantized model, and how often tokens agree")  # fmt: skip
    how.add_argument("--max-tokens", type=int, metavar="N", help="of each text (default: all)")
    how.add_argument("--calibration", metavar="NAME|FILE", help="(default: c4)")
    how.add_argument("--samples", type=int, metavar="N", help="rows of calibration text (default: 128)")
    how.add_argument("--seqlen", type=int, metavar="N", help="tokens in a row and in a window")
    how.add_argument("--asym", action="store_true", default=None, help="a zero point per group")
    how.add_argument("--tasks", metavar="PRESET|NAME,NAME", nargs="?", const=OWN_TASKS,
                     help="also ask tasks; without names, the preset's own (default: none)")  # fmt: skip
    how.add_argument("--limit", type=int, metavar="N", help="questions of each task, documents of protocol lm-eval")
    how.add_argument("--data-dir", metavar="DIR", help="questions from DIR/TASK.jsonl")
    how.add_argument("--seed", type=int, metavar="N", help="draws the calibration rows")
    how.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    how.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    p.add_argument("--keep", action="store_true", help="keep the artefacts; they are removed once measured")
    return p


def main(argv=None):
    """Runs the command line."""
    args = parser().parse_args(argv)
    run_command(lambda: _baselines(args), interrupted="; the same command goes on")


def _baselines(args):
    if args.config is not None:
        args = _under(args, parser().parse_args(["--out", str(args.out), *_config_flags(args.config)]))
    grids, settings, sources = _grids(args), _settings(args), _sources(args)
    cells = in_order_of_cost(grids)
    _check_names(cells, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "lock", "a+") as lock:
        _take(lock, args.out)
        _claim(args.out, settings)
        results: dict[Cell, dict] = {}
        for number, cell in enumerate(cells, 1):
            results[cell] = measuring.run_cell(cell, settings, args.out / "cells" / cell.name, keep=args.keep)
            print(f"[{number}/{len(cells)}] {_line(cell, results[cell])}", flush=True)
            sections = build_sections(grids, settings, sources, results.get, stand_in=args.stand_in is not None)
            _write(args, settings, sources, sections)
    failed = sum("error" in result for result in results.values())
    print(f"\nwritten: {', '.join(str(args.out / f'table.{kind}') for kind in ('md', 'csv', 'html'))}")
    if failed:
        print(f"{failed} of {len(cells)} cells failed; the same command tries them again")


def _config_flags(file):
    """The lines of a TOML file as flags.

    Raises:
        InputError: It is not TOML, or names no flag.
    """
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file}: not TOML ({error})") from None
    known, flags = vars(parser().parse_args(["--out", "x"])).keys() - {"out", "config"}, []
    for name, value in entries.items():
        if name.replace("-", "_") not in known:
            raise InputError(f"--config {file}: {name!r} is no flag of this command")
        values = value if isinstance(value, list) else [value]
        flag = f"--{name.replace('_', '-')}"
        flags += [] if value is False else [flag] if value is True else [flag, *map(str, values)]
    return flags


def _under(args, config):
    """Flags over those of a file."""
    for name, value in vars(config).items():
        if getattr(args, name) in (None, False):
            setattr(args, name, value)
    return args


def _grids(args) -> tuple[Grid, ...]:
    chosen = {axis: tuple(value) for axis in AXES if (value := getattr(args, axis))}
    if args.preset is None:
        if not args.models or args.stand_in is not None:
            raise InputError("give --models, or --preset with or without --stand-in")
        return (Grid(tuple(map(_model, args.models)), **chosen),)
    if args.models:
        raise InputError("--preset has its own models: --stand-in measures another one in their place")
    grids = [replace(grid, **chosen) for grid in PRESETS[args.preset].grids]
    if args.stand_in is None:
        return tuple(grids)
    source = _local(args.stand_in)
    return tuple(replace(grid, models=tuple(m.stood_in_by(source) for m in grid.models)) for grid in grids)


def _local(name):
    return str(DEMO) if name == DEMO_NAME else name


def _model(source) -> Model:
    """A model by its source; one of which documents print figures, by the way they spell it."""
    known = next((model for model in KNOWN if model.source.lower() == source.lower()), None)
    return known or Model(_local(source), Path(source).name)


def _settings(args) -> Settings:
    base = Settings() if args.preset is None else PRESETS[args.preset].settings
    if DEMO_NAME in (args.stand_in, *(args.models or ())):
        base = replace(base, texts=("stdlib",), calibration="stdlib")
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    if "texts" in given:
        given["texts"] = tuple(given["texts"])
    if given.get("tasks") == OWN_TASKS:
        if args.preset is None:
            raise InputError("--tasks names no task; only a --preset has its own")
        given["tasks"] = PRESETS[args.preset].tasks
    return replace(base, **given)


def _sources(args) -> tuple[str, ...]:
    if args.published is None:
        return () if args.preset is None else PRESETS[args.preset].sources
    for source in args.published:
        if source not in SOURCES:
            raise InputError(f"--published {source}: is not one of {', '.join(SOURCES)}")
    return tuple(args.published)


def _check_names(cells, settings):
    """Refuses at once what would fail in every cell."""
    for source in dict.fromkeys(cell.source for cell in cells):
        if Path(source).is_file() or (source.startswith(PATH_STARTS) and not Path(source).expanduser().is_dir()):
            raise InputError(f"{source}: there is no such folder; a model is a folder or a hub id")
    for text in (*settings.texts, settings.calibration):
        if not tokens.is_token_file(text):
            find_corpus(text)
        elif not Path(text).is_file():
            raise InputError(f"{text}: no such file")
    defaults.choose_device(settings.device)
    if settings.tasks is not None:
        choose_tasks(settings.tasks, None if settings.data_dir is None else Path(settings.data_dir))


def _take(lock, out):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another process is filling these tables") from None


def _claim(out, settings):
    """Cells of other settings do not go into one table."""
    record, now = out / "settings.json", settings.as_dict()
    if not record.exists():
        workdir.write_atomically(record, (json.dumps(now, indent=2) + "\n").encode())
        return
    before = Settings().as_dict() | json.loads(record.read_bytes())
    changed = [f"{name} {before[name]!r} -> {value!r}" for name, value in now.items() if before[name] != value]
    if changed:
        raise InputError(f"{out}: holds cells of other settings, choose another --out: {'; '.join(changed)}")


def _line(cell, result):
    row = measured_row(cell, result)
    figures = ", ".join(f"{label} {figure.value}" for label, figure in row.figures.items())
    return f"{cell.name}: {row.error or figures}"


def _write(args, settings, sources, sections):
    title = f"Baselines: {args.preset}" if args.preset else "Baselines"
    head = [settings.in_words(), *documents(sources)]
    for kind, text in (
        ("md", markdown(title, head, sections)),
        ("csv", long_csv(sections)),
        ("html", page(title, head, sections)),
    ):
        workdir.write_atomically(args.out / f"table.{kind}", text.encode())


if __name__ == "__main__":
    main()
