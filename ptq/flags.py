"""Flags of a command line, and what is wrong with them in one line."""

import argparse
from typing import NoReturn


class Flags(argparse.ArgumentParser):
    """A parser that says a mistake as `run_command` says one: a line on stderr, status 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process; the usage, which argparse would print as well, is in --help."""
        self.exit(2, f"error: {message}; --help explains the flags\n")
