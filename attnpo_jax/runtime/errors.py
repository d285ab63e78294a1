"""Errors that a program tells its user of in one message, and the notice that it was stopped."""


class UserError(ValueError):
    """An error whose message says what to mend: a program shows it without a traceback.

    Whatever else is raised, but an OSError, is a bug here, and keeps its traceback.
    """


class UsageError(UserError):
    """A command line that cannot be understood."""


class Preempted(RuntimeError):
    """The run has stopped on notice, its work is saved, and the same command continues it."""
