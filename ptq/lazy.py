"""Modules that load when something of theirs is first used.

A command names what it works with so: `--help` and a flag that is refused then do not wait for torch and transformers,
which take seconds. From Python 3.15 on the language has this as `lazy import`.
"""

import gc
from importlib import import_module


class Lazy:
    """Stands for a module. While it loads, nothing is searched for garbage: modules stay, and it takes half a second.

    Args:
        name: Its dotted name.
        freeze: Leave all that there is out of later searches too, and of the interpreter's taking apart at its end.
            For commands, whose process is their own.
    """

    def __init__(self, name: str, *, freeze: bool = True):
        self._name, self._freeze, self._module = name, freeze, None

    def __getattr__(self, attribute: str):
        if self._module is None:
            self._module = self._load()
        return getattr(self._module, attribute)

    def _load(self):
        collecting = gc.isenabled()
        gc.disable()
        try:
            return import_module(self._name)
        finally:
            gc.freeze()
            if not self._freeze:
                gc.unfreeze()  # puts it with the oldest objects, unsearched
            if collecting:
                gc.enable()
