"""What people see while a run works: a bar on a terminal, plain lines otherwise. Always on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from fedsec.progress import Progress

PLAIN_INTERVAL = 10.0
"""Seconds between plain lines of one stage."""


class ConsoleProgress(Progress):
    """Draws the stages of a run.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.bars: Bars | None = None
        if self.console.is_terminal and not quiet:
            self.bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
                console=self.console,
            )
        self.title, self.total, self.last = "", 0, 0.0

    def __enter__(self) -> Self:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars:
            self.bars.stop()

    def stage(self, title: str, total: int) -> None:
        """A new bar, or a first plain line."""
        self.title, self.total, self.last = title, total, time.monotonic()
        if self.bars:
            self.task = self.bars.add_task(title, total=total, note="")
        elif not self.quiet:
            print(f"{title}: 0/{total}", file=sys.stderr, flush=True)

    def advance(self, done: int, note: str = "") -> None:
        """Move the bar; plain lines at most every ten seconds, and for the last step."""
        if self.bars:
            self.bars.update(self.task, completed=done, note=note)
        elif not self.quiet and (done == self.total or time.monotonic() - self.last > PLAIN_INTERVAL):
            self.last = time.monotonic()
            print(f"{self.title}: {done}/{self.total}{f', {note}' if note else ''}", file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """One line that stays."""
        self.console.print(Text(text))
