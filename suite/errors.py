"""Exit codes, and errors a user can act on. The command line prints them without a traceback; everything else is a bug and is shown whole."""


# 0 is PASS or success, 1 FAIL or a difference found, 10 INCONCLUSIVE, 13 INVALID, 128 + n ended by signal n.
EXIT_USAGE, EXIT_ERROR, EXIT_NOT_RUN, EXIT_NOTHING = 2, 11, 12, 14
EXIT_BROKEN_PIPE = 141


class UserError(Exception):
    """Bad usage or bad input: exit code 2."""


class TaskError(UserError):
    """A task or data file says something that is not allowed; names the file, the key, what stands there and what may stand there."""

    def __init__(self, file, key: str, found, allowed: str, hint: str | None = None):
        self.file, self.key, self.found, self.allowed, self.hint = str(file), key, found, allowed, hint
        message = f"{self.file}: {key}: found {found!r}, allowed: {allowed}"
        super().__init__(message + (f" ({hint})" if hint else ""))


class NotRunnable(Exception):
    """This machine cannot run the task: exit code 12, verdict NOT_RUN, with the reason as message."""


class WorkersFailed(Exception):
    """Some of several processes ended with an error; `code` is the exit code of all that did, or 11."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class DataError(UserError):
    """A data file is not the one the task names, or a row of it cannot be used."""
