"""The base of all errors that a user can mend."""


class UserError(ValueError):
    """An error whose message says what to mend: a program shows it without a traceback.

    Whatever else is raised, but an OSError, is a bug here, and keeps its traceback.
    """
