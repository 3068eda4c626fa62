"""How long work tells whoever watches how far it is; the command line draws it, a library call ignores it."""

from __future__ import annotations


class Progress:
    """Receives the stages of a run. The base class shows nothing."""

    def stage(self, title: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` steps of the current stage are finished; `note` says something about the last one."""

    def message(self, text: str) -> None:
        """One line that stays."""
