"""The one exception that means "the user can fix this": command lines print it as one line and exit with status 2."""


class InputError(ValueError):
    """A value, file or flag the user controls breaks a rule; the message names the value, the rule and where it is."""


class TrainingStopped(InputError):
    """Training broke off in one block; that block's best state and all blocks before it are kept for --resume."""
