"""Exceptions that command lines print as one line: InputError, "the user can fix this", and a rank that was lost."""


class InputError(ValueError):
    """A value, file or flag the user controls breaks a rule; the message names the value, the rule and where it is."""


class TrainingStopped(InputError):
    """Training broke off in one block; that block's best state and all blocks before it are kept for --resume."""


class RankLost(RuntimeError):
    """Another process of the same run has ended; finished blocks are kept for --resume."""
