"""What the command lines share: one line for a user's mistake, and tables."""

import os
import warnings
from collections.abc import Callable, Sequence

from calibration.errors import InputError, RankLost
from ptq.lazy import Lazy

torch = Lazy("torch")
transformers_logging = Lazy("transformers.utils.logging")
processes = Lazy("calibration.ranks")

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130


def run_command(command: Callable[[], None], *, interrupted: str = "", ranks=None):
    """Runs a command line's work and exits; a mistake the user can mend is one line on stderr and status 2.

    Args:
        command: The work.
        interrupted: Said after Ctrl-C, and when another rank has ended.
        ranks: This process's Ranks among several, of which one says an error; None for one by itself.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        transformers_logging.set_verbosity_error()
        command()
        if ranks is not None:
            ranks.finish()
        return
    except InputError as error:
        said, status = f"error: {_one_line(error)}", MISTAKE
    except (torch.OutOfMemoryError, MemoryError) as error:
        said, status = f"error: out of memory: {_one_line(error)}", MISTAKE
    except OSError as error:
        said, status = f"error: {error.filename or 'system'}: {error.strerror or _one_line(error)}", MISTAKE
    except RankLost as error:
        said, status = f"error: {_one_line(error)}{interrupted}", FAILED
    except KeyboardInterrupt:
        said, status = f"interrupted{interrupted}", INTERRUPTED
    (ranks or processes.ALONE).leave(said, status)


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
