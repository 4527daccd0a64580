"""The one exception that means "the user can fix this": command lines print it as one line and exit with status 2."""


class InputError(ValueError):
    """A value, file or flag the user controls breaks a rule; the message names the value, the rule and where it is."""
