"""What the command lines share: one line for a user's mistake, and tables."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from transformers.utils import logging

from calibration.errors import InputError

MISTAKE, INTERRUPTED = 2, 130


def run_command(command: Callable[[], None], *, interrupted: str = ""):
    """Runs a command line's work and exits; a mistake the user can mend is one line on stderr and status 2.

    Args:
        command: The work.
        interrupted: Said after Ctrl-C.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        command()
    except InputError as error:
        _leave(f"error: {_one_line(error)}", MISTAKE)
    except (torch.OutOfMemoryError, MemoryError) as error:
        _leave(f"error: out of memory: {_one_line(error)}", MISTAKE)
    except OSError as error:
        _leave(f"error: {error.filename or 'system'}: {error.strerror or _one_line(error)}", MISTAKE)
    except KeyboardInterrupt:
        _leave(f"interrupted{interrupted}", INTERRUPTED)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size_text(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _one_line(error) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _leave(message, status):
    print(message, file=sys.stderr)
    sys.exit(status)
