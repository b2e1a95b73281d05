"""The three ways in which a command ends early, each with one line for the user."""


class UsageError(Exception):
    """The request is wrong (a flag, a file, a folder). One line; exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class RunError(Exception):
    """The run failed (a non-finite loss, a full disk). One line; exit status 1."""


class Stopped(Exception):
    """A signal ended the run in good order. Exit status 128 + its number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def one_line(error: Exception, limit: int = 160) -> str:
    """What an error of a library says, without its line ends."""
    return " ".join(str(error).split())[:limit]
