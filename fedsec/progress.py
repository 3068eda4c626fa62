"""How long work tells whoever watches how far it is; the command line draws it, a library call ignores it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Progress:
    """Receives the stages of a run. The base class shows nothing."""

    def stage(self, title: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` steps of the current stage are finished; `note` says something about the last one."""

    def message(self, text: str) -> None:
        """One line that stays."""


_watching: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def watching(progress: Progress) -> Iterator[None]:
    """Whoever has no progress of their own tells this one: reading a data set stands deep below what asked for it."""
    token = _watching.set(progress)
    try:
        yield
    finally:
        _watching.reset(token)


def watcher() -> Progress:
    """Who watches here; nobody, unless `watching` says so."""
    return _watching.get() or Progress()
