"""The one exception for mistakes that the person at the keyboard can mend."""


class UserError(ValueError):
    """Bad input. The message is one line: the thing, its value and the remedy. The command line exits with 2."""
