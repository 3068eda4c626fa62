"""The errors a user can meet, each with the exit code that the command line documents.

Every message is one line: the thing that is wrong, what is wrong with it, and what to do.
"""

from __future__ import annotations

import traceback
from pathlib import Path


class FedsecError(Exception):
    """Base class: the run itself failed (exit code 3)."""

    exit_code = 3


class RunError(FedsecError):
    """The run could not be carried out (exit code 3)."""


class ConfigError(FedsecError):
    """The request cannot be carried out as written: an option, a name, a value or an input (exit code 2)."""

    exit_code = 2


class RefusedError(FedsecError):
    """The request is understood and refused: an unsafe file or an undefined privacy claim (exit code 4)."""

    exit_code = 4


class PayloadError(ValueError):
    """One client's update cannot be sent, or its payload cannot be used: the round goes on without that client."""


class DataError(ConfigError):
    """A data set or one of its files is wrong.

    Args:
        code: one of the documented codes, ``D01`` (missing) to ``D21`` (see docs/data.md).
        message: one line that names the file and row, the problem, and the fix.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code


class UnsafeFileError(RefusedError):
    """A file wants to execute code when it is read; it was not executed."""


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong and, where nobody foresaw it, at which line."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, FedsecError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
