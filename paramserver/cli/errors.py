"""How a command ends other than well: one message on standard error and an exit code, never a traceback."""

from __future__ import annotations

EXIT_FAILED = 1  # the job or the cluster failed
EXIT_INPUT = 2  # what the user gave is wrong
EXIT_INTERRUPTED = 130


class CommandError(Exception):
    """Ends the command with this text and exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class InputError(CommandError):
    """What the user gave is wrong: the text says what, and what is allowed."""

    def __init__(self, text: str) -> None:
        super().__init__(text, EXIT_INPUT)


class FailedError(CommandError):
    """The job or the cluster failed."""

    def __init__(self, text: str) -> None:
        super().__init__(text, EXIT_FAILED)
